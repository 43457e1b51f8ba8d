"""What is installed, what runs, and what to do about what does not: `python -m twinfuse doctor`."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinfuse import _backend, _build, _core
from twinfuse._version import __version__

_WHEN_EMPTY = {
    "kernels": "none: every op takes the framework's own layers",
    "gpu_architectures": "none: no GPU kernels are built, tensors on a GPU take the framework's own"
    " layers",
    "advice": "nothing is missing",
}


class Diagnosis(dict[str, Any]):
    """What `doctor` found: plain values, ready for JSON, that print as a page.

    `versions` (name -> version, "" where not installed), `core` (`library`, `isa`, `isa_note`,
    `built_isas`, `problem`), `bindings` (framework -> `path`, `serves`, `origin`, `problem`),
    `kernels` (name -> launches in this process), `devices`, `gpu_architectures` and `advice`
    (lists of text). A `problem` is empty where there is none.
    """

    def __str__(self) -> str:
        lines: list[str] = []
        for title, section in self.items():
            lines.append(title.replace("_", " "))
            rows = list(_rows(section)) or [("", _WHEN_EMPTY[title])]
            width = max(len(name) for name, _ in rows)
            lines += [f"  {name:<{width}}  {text}" if width else f"  {text}" for name, text in rows]
        return "\n".join(lines)


def _rows(section: Any) -> Iterator[tuple[str, str]]:
    if isinstance(section, list):
        yield from (("", text) for text in section)
        return
    for name, value in section.items():
        if isinstance(value, dict):
            yield name, value["problem"] or f"{value['serves']}, {value['origin']}: {value['path']}"
        elif isinstance(value, list):
            yield name.replace("_", " "), ", ".join(value)
        elif name == "problem" or name == "isa_note":
            if value:
                yield name.replace("_", " "), value
        else:
            yield name, "not installed" if value == "" else str(value)


def doctor() -> Diagnosis:
    """Describe this installation. Imports no framework and compiles nothing."""
    core, bindings, devices = _describe_core(), _describe_bindings(), _devices()
    return Diagnosis(
        versions=_versions(),
        core=core,
        bindings=bindings,
        kernels=_core.launches(),
        devices=devices + [f"cuda:{i}: {b}" for i, (b, _) in enumerate(_gpus(devices)) if b],
        gpu_architectures=_core.gpu_architectures(),
        advice=list(_advice(core, bindings, devices)),
    )


def _versions() -> dict[str, str]:
    import importlib.metadata

    versions = {"twinfuse": __version__, "python": platform.python_version()}
    for name in _build.SOURCES:
        framework = _build.find(name)
        versions[name] = framework.version if framework else ""
    for name in ("keras", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


def _describe_core() -> dict[str, Any]:
    library, problem = _core.load()
    return {
        "library": str(_core.LIBRARY) if library else "",
        "isa": _core.isa(),
        "isa_note": _core.isa_note(),
        "built_isas": _core.built_isas(),
        "problem": problem,
    }


def _describe_bindings() -> dict[str, dict[str, str]]:
    bindings = {}
    for name in _build.SOURCES:
        framework = _build.find(name)
        path, problem = _build.status(name)
        serves = origin = ""
        if framework and path:
            serves = _build.serves(framework)
            compiled_here = path.parent == _build.cache_folder()
            origin = "compiled on this machine" if compiled_here else "built with twinfuse"
        bindings[name] = {
            "path": str(path or ""),
            "serves": serves,
            "origin": origin,
            "problem": problem,
        }
    return bindings


def _devices() -> list[str]:
    model = re.search(r"^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    usable = len(affinity(0)) if affinity else os.cpu_count()
    devices = [f"cpu: {model.group(1) if model else platform.machine()}, {usable} cores usable"]
    # The driver lists its GPUs here, so that naming them takes no CUDA context.
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        gpu = re.search(r"^Model:\s*(.*)$", _read(file), re.MULTILINE)
        devices.append(f"cuda: {gpu.group(1) if gpu else file.parent.name}")
    return devices


def _gpus(devices: list[str]) -> Iterator[tuple[str, str]]:
    """What `_core.device_backend` says of each GPU that this process may use."""
    for index in range(sum(device.startswith("cuda") for device in devices)):
        backend, reason = _core.device_backend(index)
        if index and reason.startswith("cuDeviceGet "):  # the process may not use all
            return
        yield backend, reason


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _advice(
    core: dict[str, Any], bindings: dict[str, dict[str, str]], devices: list[str]
) -> Iterator[str]:
    frameworks = [framework for name in bindings if (framework := _build.find(name))]
    if not frameworks:
        yield "install torch (2.10 or newer) or tensorflow (2.18 or newer): neither is here"
    if core["problem"]:
        yield "install a C++17 compiler (g++), then reinstall twinfuse"
    if core["isa_note"]:
        yield "unset TWINFUSE_ISA, or set it to one of: " + ", ".join(core["built_isas"])
    for framework in frameworks:
        problem = bindings[framework.name]["problem"]
        if _build.unsupported(framework):
            yield f"upgrade {framework.name}: {problem}"
        elif problem and not core["problem"]:
            # Without a core the advice above comes first; a binding is compiled by the way.
            compiler = "" if _build.compiler() else "install g++, then "
            yield f"{compiler}import twinfuse.{framework.name}: {problem}"
    if _backend.requested == "reference":
        yield "use_backend('reference') is in force: no fused kernel runs"
    for index, (_, reason) in enumerate(_gpus(devices)):
        if reason and not core["problem"]:
            yield f"GPU {index} is not used by twinfuse: {reason}"
