"""Writes compiled GPU kernels as sources that the core is built with.

`write(kernels, out)` reads what csrc/aot.py and csrc/cuda_build.py have left in the folder
`kernels` and makes in `out`

    table.cc    the tables that csrc/gpu/kernels.h declares
    images.S    the machine code of all kernels, each file packed by itself, as one block
    images.bin  which images.S includes
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "gpu" / "choices"
SOURCES = "sources.sha256"  # beside kernels.json: of what the kernels were compiled from
CUDA_SOURCES = "cuda.sha256"  # beside cuda.json
READS = {  # of rearrangements
    "vectors": "lines",
    "elements": "strided",
    "planes": "planes",
    "plane_vectors": "planes",
}
KINDS = {"data": "pointer", "fp32": "pointer", "i32": "i32", "i64": "i64", "tensor": "tensor"}


def sources_hash() -> str:
    """Of the kernels' sources: the arguments that the core passes are those of one version."""
    digest = hashlib.sha256()
    for path in (*sorted((HERE / "triton").glob("*.py")), HERE / "aot.py"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def up_to_date(kernels: Path) -> bool:
    stamp = kernels / SOURCES
    return stamp.exists() and stamp.read_text().strip() == sources_hash()


def cuda_sources_hash(folder: Path = HERE / "cuda") -> str:
    """Of what csrc/cuda_build.py compiles: the host passes structs of these files."""
    digest = hashlib.sha256()
    for path in (*sorted(folder.glob("*")), HERE / "cuda_build.py"):
        if path.suffix in (".h", ".cu", ".py"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def without_cuda(kernels: Path) -> str:
    """Why `write` takes no kernels of csrc/cuda from there; empty if it does."""
    stamp, table = kernels / CUDA_SOURCES, kernels / "cuda.json"
    if not stamp.exists() or not table.exists():
        return f"{table} is not there; `make kernels` makes it"
    if stamp.read_text().strip() != cuda_sources_hash():
        return f"{table} is older than csrc/cuda; `make kernels` makes it"
    if json.loads(table.read_text()):
        return ""
    return "no nvcc when the kernels were compiled: the framework's own run"


def write(kernels: Path, out: Path, measured: Path = MEASURED) -> list[Path]:
    """The sources to compile. Files whose content has not changed are left alone.

    `measured` holds choices for GPUs of these architectures, in files as `twinfuse.tune` writes
    them. What it has for kernels that are not there is left out.
    """
    table = json.loads((kernels / "kernels.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    cuda = [] if without_cuda(kernels) else json.loads((kernels / "cuda.json").read_text())
    block, images = _pack((kernels / kernel["file"]).read_bytes() for kernel in (*table, *cuda))
    parameters: dict[str, str] = {}
    rows = []
    for kernel, image in zip(table, images):
        listed = ", ".join(map(_parameter, kernel["parameters"]))
        name = parameters.setdefault(listed, f"kParameters{len(parameters)}")
        rows.append(_row(kernel, name, image))
    cuda_rows = [
        f'    {{{kernel["arch"]}, "{kernel["entry"]}", {kernel["registers"]}, {image}}},'
        for kernel, image in zip(cuda, images[len(table) :])
    ]
    digest = hashlib.sha256(block).hexdigest()
    _replace(out / "images.bin", block)
    _replace(out / "images.S", IMAGES.format(digest=digest, folder=out).encode())
    lists = "\n".join(f"const Parameter {name}[] = {{{x}}};" for x, name in parameters.items())
    names = {(kernel["arch"], kernel["name"]) for kernel in table}
    text = TABLE.format(
        lists=lists,
        rows="\n".join(rows),
        # An array needs an element.
        cuda="\n".join(cuda_rows) or "    {},",
        cuda_count=len(cuda_rows),
        choices=_choices(measured, names),
        sources=(kernels / SOURCES).read_text().strip(),
    )
    _replace(out / "table.cc", text.encode())
    return [out / "table.cc", out / "images.S"]


def pack(code: bytes) -> bytes:
    """In zlib's format, as csrc/gpu/image.h reads it."""
    return zlib.compress(code, 9)


def _pack(codes: Iterable[bytes]) -> tuple[bytes, list[str]]:
    """All in one block, and the `Image` of each; what compiles to the same code shares it."""
    order = list(codes)
    distinct = list(dict.fromkeys(order))
    block, images = bytearray(), {}
    with ThreadPoolExecutor() as pool:  # zlib lets other threads run
        for code, packed in zip(distinct, pool.map(pack, distinct)):
            images[code] = f"{{{len(block)}, {len(packed)}, {len(code)}}}"
            block += packed
    return bytes(block), [images[code] for code in order]


def _parameter(parameter: dict[str, Any]) -> str:
    box = parameter["box"] or []
    values = [
        f"Kind::{KINDS[parameter['kind']]}",
        str(parameter["divisible"]).lower(),
        str(len(box)),
        str(parameter["swizzle"] or 0),
        f"{{{', '.join(map(str, box))}}}",
    ]
    return f"{{{', '.join(values)}}}"


def _row(kernel: dict[str, Any], parameters: str, image: str) -> str:
    v = kernel["variant"]
    tile = v.get("tile") or {"m": v["rows"], "n": v["cols"], "k": 1}
    function = kernel["entry"].removeprefix("multiply") or "product"
    role = [
        f"Function::{function}",
        f"Reader::{v.get('a') or READS.get(v.get('access'), 'none')}",
        f"Reader::{v.get('b', 'none')}",
        f"Epilogue::{v.get('epilogue', 'none')}",
        f"Writer::{v.get('store', 'none')}",
        f"Type::{v['dtype']}",
        f"Precision::{v.get('precision', 'ieee')}",
        str(v.get("vectors", v.get("access") == "plane_vectors")).lower(),
        *(str(v.get(flag, False)).lower() for flag in ("mask", "write", "sum")),
    ]
    values = [
        kernel["arch"],
        f"{{{', '.join(role)}}}",
        f"{{{tile['m']}, {tile['n']}, {tile['k']}}}",
        kernel["warps"],
        str(v.get("persistent", False)).lower(),
        kernel["registers"],
        kernel["shared"],
        parameters,
        len(kernel["parameters"]),
        image,
        f'"{kernel["entry"]}"',
        f'"{kernel["name"]}"',
    ]
    return f"    {{{', '.join(map(str, values))}}},"


def _choices(folder: Path, kernels: set[tuple[int, str]]) -> str:
    """C literals of the lines that the core reads (twinfuse_tune_select)."""
    lines = []
    for file in sorted(folder.glob("*.json")):
        for choice in json.loads(file.read_text())["choices"]:
            problem, kernel, splits = choice["problem"], choice["kernel"], int(choice["splits"])
            arch = int(problem.partition(" ")[0].removeprefix("sm_"))
            if splits == 0 or (arch, kernel) in kernels:  # a way of computing has no kernel
                lines.append("    " + json.dumps(f"{problem}\t{kernel}\t{splits}\n"))
    return "\n".join(lines) or '    ""'


def _replace(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


TABLE = """\
// Written by csrc/embed.py.
#include "gpu/kernels.h"

extern "C" const unsigned char twinfuse_images[];

namespace twinfuse::gpu {{
namespace {{
{lists}
}}  // namespace

const Kernel kKernels[] = {{
{rows}
}};
const int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);
const CudaKernel kCudaKernels[] = {{
{cuda}
}};
const int kCudaKernelCount = {cuda_count};
const unsigned char* const kImages = twinfuse_images;
const char* const kMeasured =
{choices};
const char* const kSources = "{sources}";

}}  // namespace twinfuse::gpu
"""

# The hash makes the file change with what it includes, which compilers do not list.
IMAGES = """\
# sha256 of images.bin: {digest}
  .section .rodata
  .global twinfuse_images
  .hidden twinfuse_images
twinfuse_images:
  .incbin "{folder}/images.bin"
  .byte 0
  .section .note.GNU-stack,"",@progbits
"""
