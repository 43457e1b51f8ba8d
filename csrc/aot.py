"""Compiles the Triton kernels ahead of time, without a GPU.

    python csrc/aot.py build/kernels --arch "8.0 9.0"

writes the machine code of every variant (csrc/triton/catalogue.py) for every architecture, one file
each, and `kernels.json`, which says how each is launched. Warps, shared memory, scratch, clusters
and the boxes of descriptors are read from what the compiler reports, never from what was asked for,
and the arguments of the variant are compared with the parameters of the compiled code (behind which
two pointers follow, for scratch of the kernel and of a profiler). A kernel that spills registers,
needs more shared memory than the smallest device that runs its code has, or was not compiled to
the instructions that it was written for is an error.

Triton keeps what it has compiled under a hash of its sources, in `<folder>/cache`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
# The folder of this script holds one that is called like the compiler.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
PACKAGE = "twinfuse_kernels"
# Line information would triple the size of the code.
ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1"}
# Hidden parameters behind the kernel's own: scratch for the kernel and for a profiler.
HIDDEN = ["u64", "u64"]


def _load(name: str, file: Path, folders: list[str] | None = None) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# csrc/triton, under a name that is not Triton's.
_load(PACKAGE, HERE / "triton/__init__.py", [str(HERE / "triton")])
embed = _load("twinfuse_embed", HERE / "embed.py")
from twinfuse_kernels import catalogue, variants  # noqa: E402


@dataclass(frozen=True)
class Parameter:
    """An argument of a launch: its name, its kind, and whether it must be divisible by 16. Of a
    descriptor, also the box that it is encoded for."""

    name: str
    kind: str
    divisible: bool
    box: list[int] | None = None
    swizzle: int | None = None


@dataclass(frozen=True)
class Kernel:
    """Compiled code and what its launch needs."""

    arch: int
    name: str
    entry: str
    warps: int
    shared: int
    cluster: int
    cooperative: bool
    dependent: bool  # launched before its predecessor has ended
    scratch: int  # bytes per block, of global memory
    parameters: list[Parameter]
    image: bytes
    registers: int
    spilled: int
    instructions: dict[str, int]
    variant: dict[str, Any]

    def description(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["image"]
        return fields | {"file": self.file, "size": len(self.image)}

    @property
    def file(self) -> str:
        return f"{self.name}.sm_{self.arch}.cubin"


INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"mma\.sync",
    "cp.async": r"cp\.async\.c[ag]",
    # To shared memory: results leave by the same instruction.
    "bulk copy": r"cp\.async\.bulk\.tensor\.\dd\.shared",
}
TYPES = {"data": "u64", "fp32": "u64", "i32": "u32", "i64": "u64"}


def source(variant: Any) -> Any:
    """The variant as Triton's compiler takes it."""
    from triton.compiler import ASTSource

    types = {"data": f"*{variant.dtype}", "fp32": "*fp32", "i32": "i32", "i64": "i64"}

    def kind(argument: Any) -> str:
        if argument.kind == "tensor":
            return f"tensordesc<{variant.dtype}[{','.join(map(str, argument.block))}]>"
        return types[argument.kind]

    given = variants.bind(variant, kind)
    names = variant.function.arg_names
    signature = dict.fromkeys(names, "constexpr") | given
    constants = {name: None for name in names if name not in given} | variant.constants()
    divisible = [["tt.divisibility", variants.DIVISOR]]
    attributes = {a.path: divisible for a in variant.arguments() if a.divisible}
    return ASTSource(variant.function, signature, constants, attributes)


@contextmanager
def _for_family(arch: int) -> Iterator[None]:
    """Triton's code, which is for `arch` alone ("a" targets), is for all of its family ("f"), of
    which ptxas lets no instruction through that one of them lacks."""
    from triton import knobs
    from triton.backends.nvidia import compiler

    name = "sm_arch_from_capability"
    of = getattr(compiler, name, None)
    if of is None or of(arch) != f"sm_{arch}a" or not hasattr(knobs, "runtime"):
        raise RuntimeError(f"this version of Triton has no {name} as 3.7.1 has it")
    hook = "add_stages_inspection_hook"
    kept = getattr(knobs.runtime, hook)
    setattr(compiler, name, lambda capability: f"sm_{capability}f")
    # Without stages to change, this gives a part of the keys under which Triton keeps its code.
    setattr(knobs.runtime, hook, lambda *stages: None if stages else ("family", "family"))
    try:
        yield
    finally:
        setattr(compiler, name, of)
        setattr(knobs.runtime, hook, kept)


def check_family(arch: int, ptx: str, image: bytes) -> None:
    """Raises RuntimeError where code is not for the whole family."""
    in_ptx = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    in_image = re.search(rb" -arch (\w+)", image)  # ptxas notes how it was called
    found = {in_ptx and in_ptx[1], in_image and in_image[1].decode()}
    if found != {f"sm_{arch}f"}:
        raise RuntimeError(f"expected code for sm_{arch}f, found targets {found}")


def compile_variant(arch: int, variant: Any, *, family: bool = False) -> Kernel:
    """`family`: for all architectures that run this one's code, not for `arch` alone.

    Raises RuntimeError where the compiled code has other parameters than the variant says.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", arch, 32)
    with _for_family(arch) if family else nullcontext():
        compiled = triton.compile(source(variant), target=target, options=variant.options)
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    parameters = list(_parameters(variant, metadata.tensordesc_meta or []))
    expected = [t for p in parameters for t in passed(p)]
    found = parameters_of(ptx)
    if found != expected + HIDDEN:
        raise RuntimeError(
            f"{variant.name}: expected parameters {expected + HIDDEN}, "
            f"the compiled code has {found}"
        )
    image = bytes(compiled.asm["cubin"])
    if family:
        check_family(arch, ptx, image)
    registers, spilled = resources(image)
    return Kernel(
        arch=arch,
        name=variant.name,
        entry=metadata.name,
        warps=metadata.num_warps,
        shared=metadata.shared,
        cluster=metadata.num_ctas,
        cooperative=metadata.launch_cooperative_grid,
        dependent=metadata.launch_pdl,
        scratch=metadata.global_scratch_size,
        parameters=parameters,
        image=image,
        registers=registers,
        spilled=spilled,
        instructions={k: len(re.findall(v, ptx)) for k, v in INSTRUCTIONS.items()}
        | {"load": len(re.findall(r"\btt\.load\b", compiled.asm["ttgir"]))},
        variant=asdict(variant),
    )


def passed(parameter: Parameter) -> list[str]:
    """What the compiled code takes for it: a descriptor is followed by the tensor's sizes and
    strides."""
    if not parameter.box:
        return [TYPES[parameter.kind]]
    rank = len(parameter.box)
    return ["descriptor"] + ["u32"] * rank + ["u64"] * rank


def _parameters(variant: Any, descriptors: list[dict[str, Any]]) -> Iterator[Parameter]:
    remaining = iter(descriptors)
    for a in variant.arguments():
        if a.kind == "tensor":
            encoded = next(remaining)
            box = list(encoded["block_size"])
            yield Parameter(a.name, a.kind, a.divisible, box, encoded["swizzle"])
        else:
            yield Parameter(a.name, a.kind, a.divisible)


def parameters_of(ptx: str) -> list[str]:
    """Types of an entry's parameters, in their order."""
    entry = ptx[ptx.index(".entry") :]
    found = re.findall(
        r"\.param (?:\.align 64 \.b8 \w+\[(128)\]|\.(\w+))", entry[: entry.index(")")]
    )
    return ["descriptor" if block else kind for block, kind in found]


def resources(image: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    tool = Path(importlib.import_module("triton").__file__ or "").parent / (
        "backends/nvidia/bin/cuobjdump"
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise RuntimeError(f"{tool} reports no registers: {text!r}")
    return int(found[1]), int(found[2])


def complaints(kernel: Kernel, variant: Any) -> list[str]:
    """What is wrong with the compiled code."""
    found = kernel.instructions
    wrong = []
    if kernel.spilled:
        wrong.append(f"spills {kernel.spilled} bytes per thread")
    limit = catalogue.ARCHITECTURES[kernel.arch].shared
    if kernel.shared > limit:
        wrong.append(f"needs {kernel.shared} bytes of shared memory, of {limit}")
    if kernel.scratch or kernel.cluster != 1 or kernel.cooperative:
        wrong.append("needs scratch, a cluster or a cooperative launch, which nothing provides")
    if not isinstance(variant, variants.Product):
        return wrong
    multiplies = {9: "wgmma", 10: "tcgen05"}.get(kernel.arch // 10, "mma")
    if variant.tile.m < 64:
        multiplies = "mma"
    one_by_one = (variant.dtype, variant.precision) == catalogue.SHALLOW
    if not found[multiplies] and not one_by_one:
        wrong.append(f"has no {multiplies}")
    if not variant.vectors:
        return wrong
    copies = "bulk copy" if variant.a.startswith("tensor_") else "cp.async"
    if not found[copies]:
        wrong.append(f"has no {copies}")
    # Of the loads that Triton has not made copies of, one is the bias; unrolled loops repeat it.
    if found["load"] and (variant.epilogue == "identity" or found["load"] > 3):
        wrong.append(f"reads operands by {found['load']} plain loads")
    return wrong


def parse_architectures(text: str) -> list[int]:
    """From TORCH_CUDA_ARCH_LIST's form, such as `8.0;9.0+PTX`: those that we build for, which may
    be others that the wanted ones run the code of.

    Raises ValueError for what is no architecture. Those that nothing is built for are left out.
    """
    chosen = []
    for word in re.split(r"[;,\s]+", text.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)a?f?(?:\+PTX)?", word)
        if not found:
            raise ValueError(f"expected architectures such as '8.0 9.0', got {word!r} in {text!r}")
        wanted = int(found[1]) * 10 + int(found[2])
        arch = catalogue.code_for(wanted)
        if arch in catalogue.ARCHITECTURES:
            chosen.append(arch)
            if arch != wanted:
                print(f"aot: {word} runs the code of {arch / 10}", file=sys.stderr)
        else:
            print(f"aot: no kernels for architecture {word}: left out", file=sys.stderr)
    return sorted(set(chosen))


def _job(job: tuple[int, Any]) -> tuple[Kernel, list[str]]:
    arch, variant = job
    kernel = compile_variant(arch, variant, family=arch in catalogue.FAMILIES)
    return kernel, complaints(kernel, variant)


def build(folder: Path, architectures: list[int], jobs: int, only: str = "") -> list[Kernel]:
    """Compiles everything. Raises SystemExit with all complaints where there are any."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT, TRITON_CACHE_DIR=str(folder / "cache"))
    work = [(a, v) for a in architectures for v in catalogue.variants(a) if only in v.name]
    kernels, wrong = [], []
    with ProcessPoolExecutor(jobs) as pool:
        done = pool.map(_job, work, chunksize=4)
        for kernel, found in tqdm(done, "kernels", len(work), unit="kernel", mininterval=1):
            kernels.append(kernel)
            wrong += [f"{kernel.name} for sm_{kernel.arch} {text}" for text in found]
    if wrong:
        sys.exit("\n".join(wrong))
    return kernels


def write(folder: Path, kernels: list[Kernel]) -> None:
    """The same bytes for the same kernels; what an earlier build left is removed."""
    kernels = sorted(kernels, key=lambda k: (k.arch, k.name))
    files = {k.file for k in kernels}
    for old in folder.glob("*.cubin"):
        if old.name not in files:
            old.unlink()
    for kernel in kernels:
        (folder / kernel.file).write_bytes(kernel.image)
    table = [kernel.description() for kernel in kernels]
    (folder / "kernels.json").write_text(json.dumps(table, indent=1) + "\n")
    (folder / embed.SOURCES).write_text(embed.sources_hash() + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    everything = " ".join(f"{a // 10}.{a % 10}" for a in catalogue.ARCHITECTURES)
    parser.add_argument(
        "--arch",
        default=os.environ.get("TORCH_CUDA_ARCH_LIST") or everything,
        help="as in TORCH_CUDA_ARCH_LIST, the default; else all: %(default)s",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="variants with this in their name")
    chosen = parser.parse_args(arguments)
    try:
        architectures = parse_architectures(chosen.arch)
    except ValueError as error:
        parser.error(str(error))
    kernels = build(chosen.folder, architectures, chosen.jobs, chosen.only)
    if not kernels:
        parser.error(f"no kernel for --arch {chosen.arch!r} --only {chosen.only!r}")
    write(chosen.folder, kernels)
    size = sum(len(k.image) for k in kernels)
    print(f"{len(kernels)} kernels for {len(architectures)} architectures, {size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
