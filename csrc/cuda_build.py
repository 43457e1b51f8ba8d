"""Compiles the CUDA C++ kernels (csrc/cuda) ahead of time, without a GPU.

    python csrc/cuda_build.py build/kernels --arch "8.0 9.0"

writes machine code for every architecture, a file for each list of kernels, and `cuda.json`: the
architecture, entry, registers, threads and file of each kernel. Code for 9.0 runs on all of 9.x, so
one of each major number is compiled. Registers, threads and memory are read from what the compiler
reports. A kernel that spills, has a stack or static shared memory (which the host does not count),
or needs more registers than a multiprocessor has, is an error.

Needs nvcc: in `$CUDA_HOME/bin`, on the PATH or in /usr/local/cuda/bin. Without it `cuda.json` has
no rows, and LSTMs on GPUs are left to the framework. What was compiled is kept under a hash of
sources, compiler and options, in `<folder>/cuda/cache`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
UNITS = ("bf16", "fp16", "tf32", "tf32x3", "offsets")
OPTIONS = ["-std=c++17", "-O3", "-cubin", "-Xptxas=-v,-warn-spills,-warn-lmem-usage"]
REGISTERS = 65536  # of a multiprocessor
# What the compiled code says of itself: attributes of an entry whose value follows.
SIZED, MOST_THREADS = 4, 5


def _load(name: str, file: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


aot = _load("twinfuse_aot", HERE / "aot.py")
embed = aot.embed


@dataclass(frozen=True)
class Kernel:
    """A row of cuda.json."""

    arch: int
    entry: str
    registers: int
    threads: int
    file: str


@dataclass(frozen=True)
class Report:
    """What the compiler says of a kernel; bytes are of each thread, shared ones of a block."""

    entry: str
    registers: int
    stack: int
    stores: int
    loads: int
    shared: int


@dataclass(frozen=True)
class Unit:
    """One run of the compiler."""

    arch: int
    name: str

    @property
    def file(self) -> str:
        return f"cuda/{self.name}.sm_{self.arch}.cubin"

    @property
    def options(self) -> list[str]:
        unit = f"-DTWINFUSE_UNIT=TWINFUSE_LSTM_{self.name.upper()}"
        return [*OPTIONS, f"-arch=sm_{self.arch}", unit]


@dataclass(frozen=True)
class Compiler:
    nvcc: str
    sources: Path  # csrc, with `cuda` inside
    cache: Path

    def version(self) -> str:
        return subprocess.check_output([self.nvcc, "--version"], text=True)

    def targets(self) -> set[int]:
        text = subprocess.check_output([self.nvcc, "--list-gpu-code"], text=True)
        return {int(number) for number in re.findall(r"sm_(\d+)\b", text)}

    def compile(self, unit: Unit, salt: str) -> tuple[bytes, str]:
        """Machine code and the compiler's report. Raises RuntimeError with the compiler's text."""
        key = hashlib.sha256(json.dumps([salt, unit.options]).encode()).hexdigest()
        image, report = (self.cache / f"{key[:32]}.{ending}" for ending in ("cubin", "txt"))
        # The report is written last.
        if not report.exists():
            # Beside the place that it gets: no other run may see half of it.
            made = self.cache / f"{key[:32]}.{os.getpid()}.new"
            command = [self.nvcc, *unit.options, "-I.", "cuda/lstm.cu", "-o", str(made)]
            done = subprocess.run(
                command, cwd=self.sources, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            made.replace(image)
            made.write_text(done.stdout + done.stderr)
            made.replace(report)
        return image.read_bytes(), report.read_text()


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def parse_report(text: str) -> list[Report]:
    """Of every function; one that is no kernel has no registers of its own. Raises RuntimeError
    where a kernel's part is not understood."""
    found = []
    blocks = re.split(r"^.*Function properties for ", text, flags=re.MULTILINE)[1:]
    for block in blocks:
        memory = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        if not memory:
            raise RuntimeError(f"the compiler's report is not understood: {block!r}")
        used = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        found.append(
            Report(
                block.split(maxsplit=1)[0].strip("'"),
                int(used[1]) if used else 0,
                *map(int, memory.groups()),
                int(shared[1]) if shared else 0,
            )
        )
    entries = re.findall(r"Compiling entry function '(\w+)'", text)
    missing = set(entries) - {report.entry for report in found if report.registers}
    if missing or not entries:
        raise RuntimeError(
            f"the compiler reports no registers of {missing or 'any kernel'}: {text}"
        )
    return found


def most_threads(image: bytes) -> dict[str, int]:
    """Of the entries that were compiled for a number of threads (__launch_bounds__)."""
    found = {}
    for name, content in _sections(image):
        entry = name.removeprefix(".nv.info.")
        if entry == name:
            continue
        at = 0
        while at < len(content):
            form, attribute, value = struct.unpack_from("<BBH", content, at)
            if (form, attribute) == (SIZED, MOST_THREADS):
                x, y, z = struct.unpack_from("<III", content, at + 4)
                found[entry] = x * y * z
            at += 4 + (value if form == SIZED else 0)
    return found


def _sections(image: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents, of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, table + i * size) for i in range(count)]
    first = headers[names][4]
    for name, kind, _, _, offset, length in headers:
        start = first + name
        title = image[start : image.index(b"\0", start)].decode()
        yield title, b"" if kind == 8 else image[offset : offset + length]  # 8: NOBITS


def complaints(report: Report, threads: int | None) -> list[str]:
    """What is wrong with a kernel."""
    wrong = []
    if report.stores or report.loads:
        wrong.append(f"spills registers: {report.stores} bytes stored, {report.loads} loaded")
    if report.stack:
        wrong.append(f"has a stack of {report.stack} bytes")
    if report.shared:
        wrong.append(f"has {report.shared} bytes of static shared memory")
    if not report.registers:
        return wrong
    if not threads:
        wrong.append("has no __launch_bounds__")
    elif report.registers * threads > REGISTERS:
        wrong.append(f"needs {report.registers} registers for each of {threads} threads")
    return wrong


def architectures(text: str) -> list[int]:
    """Those to compile for: the first of each major number that is wanted."""
    return sorted({arch // 10 * 10 for arch in aot.parse_architectures(text)})


def build(
    folder: Path,
    archs: list[int],
    jobs: int,
    nvcc: str,
    sources: Path = HERE,
    units: tuple[str, ...] = UNITS,
) -> list[Kernel]:
    """Compiles everything. Raises SystemExit with all complaints where there are any."""
    from tqdm import tqdm

    compiler = Compiler(nvcc, sources, folder.resolve() / "cuda/cache")  # runs in `sources`
    compiler.cache.mkdir(parents=True, exist_ok=True)
    known = compiler.targets()
    for arch in sorted(set(archs) - known):
        print(f"cuda: {nvcc} is too old for architecture {arch / 10}: left out", file=sys.stderr)
    salt = embed.cuda_sources_hash(sources / "cuda") + compiler.version()
    work = [Unit(arch, unit) for arch in archs if arch in known for unit in units]
    kernels: list[Kernel] = []
    images, wrong = {}, []

    def job(unit: Unit) -> tuple[Unit, bytes, str]:
        return unit, *compiler.compile(unit, salt)

    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(job, work)
        try:
            for unit, image, text in tqdm(done, "CUDA C++", len(work), unit="file", mininterval=1):
                threads = most_threads(image)
                images[unit.file] = image
                for report in parse_report(text):
                    of = threads.get(report.entry)
                    title = f"{report.entry} for sm_{unit.arch}"
                    wrong += [f"{title} {what}" for what in complaints(report, of)]
                    row = Kernel(unit.arch, report.entry, report.registers, of or 0, unit.file)
                    kernels += [row] if report.registers else []
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"cuda: {error}")
    twice = Counter((kernel.arch, kernel.entry) for kernel in kernels)
    wrong += [
        f"{entry} for sm_{arch} is there {n} times" for (arch, entry), n in twice.items() if n > 1
    ]
    if wrong:
        sys.exit("\n".join(wrong))
    write(folder, kernels, images, sources)
    return kernels


def write(folder: Path, kernels: list[Kernel], images: dict[str, bytes], sources: Path) -> None:
    """The same bytes for the same kernels; what an earlier build left is removed."""
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    for old in (folder / "cuda").glob("*.cubin"):
        if f"cuda/{old.name}" not in images:
            old.unlink()
    for file, image in images.items():
        (folder / file).write_bytes(image)
    rows = [asdict(kernel) for kernel in sorted(kernels, key=lambda k: (k.arch, k.entry))]
    (folder / "cuda.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / embed.CUDA_SOURCES).write_text(embed.cuda_sources_hash(sources / "cuda") + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    everything = " ".join(f"{a // 10}.{a % 10}" for a in aot.catalogue.ARCHITECTURES)
    parser.add_argument(
        "--arch",
        default=os.environ.get("TORCH_CUDA_ARCH_LIST") or everything,
        help="as in TORCH_CUDA_ARCH_LIST, the default; else all: %(default)s",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(arguments)
    try:
        archs = architectures(chosen.arch)
    except ValueError as error:
        parser.error(str(error))
    nvcc = find_nvcc()
    if nvcc is None:
        write(chosen.folder, [], {}, HERE)
        print(
            "cuda: no nvcc in $CUDA_HOME/bin, on the PATH or in /usr/local/cuda/bin: "
            "LSTMs on GPUs will be computed by the framework's own"
        )
        return
    kernels = build(chosen.folder, archs, chosen.jobs, nvcc)
    files = {kernel.file for kernel in kernels}
    size = sum((chosen.folder / file).stat().st_size for file in files)
    of = len({kernel.arch for kernel in kernels})
    print(f"{len(kernels)} kernels of CUDA C++ for {of} architectures, {size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
