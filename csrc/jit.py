"""Compiles one kernel for an architecture that csrc/aot.py has not compiled it for.

    python csrc/jit.py <sources' hash> <name> <listed> <arch> <file>

writes the variant `name` of architecture `listed` (csrc/triton/catalogue.py), compiled for `arch`,
as JSON: what `kernels.json` says of a kernel, `listed` and its machine code. What goes wrong is one
line on the standard error stream, and an exit code of 1.

The package runs this in a process of its own: Triton must not be imported beside TensorFlow.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def load_aot() -> Any:
    spec = importlib.util.spec_from_file_location("twinfuse_aot", HERE / "aot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["twinfuse_aot"] = module
    spec.loader.exec_module(module)
    return module


def compile_kernel(sources: str, name: str, listed: int, arch: int) -> dict[str, Any]:
    """Raises RuntimeError for code that the core cannot launch."""
    aot = load_aot()
    if aot.embed.sources_hash() != sources:
        raise RuntimeError("the core was built from other sources than these: reinstall twinfuse")
    (variant,) = (v for v in aot.catalogue.variants(listed) if v.name == name)
    kernel = aot.compile_variant(arch, variant)
    if kernel.scratch or kernel.cluster != 1 or kernel.cooperative:
        raise RuntimeError("Triton made code that needs scratch, a cluster or a cooperative launch")
    image = base64.b64encode(kernel.image).decode()
    return kernel.description() | {"listed": listed, "image": image}


def main(sources: str, name: str, listed: str, arch: str, file: str) -> None:
    try:
        found = compile_kernel(sources, name, int(listed), int(arch))
    except Exception as error:  # of whatever version Triton is
        text = " ".join(str(error).split())
        sys.exit(f"{type(error).__name__}: {text}"[:500])
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
