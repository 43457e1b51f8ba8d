"""Finds the binding of a framework, or compiles it when no prebuilt one fits.

A binding is one shared library between a framework and the core. `setup.py` builds those whose
framework is installed; any other is compiled here at first import, into a cache that belongs to
the user. Standard library only, and nothing of the package is imported: `setup.py` loads this file
by its path.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
# A wheel carries the sources it compiles from; a checkout has them in place.
INSTALLED = (PACKAGE / "_src").is_dir()
ROOT = PACKAGE / "_src" if INSTALLED else PACKAGE.parents[1]

INCLUDE = "csrc/include"
SOURCES = {"torch": "pyext/binding", "tensorflow": "tfops/binding"}
TITLES = {"torch": "PyTorch", "tensorflow": "TensorFlow"}
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "tensorflow": (
        "tensorflow",
        "tensorflow-cpu",
        "tensorflow-intel",
        "tensorflow-cpu-aws",
        "tensorflow-rocm",
        "tf-nightly",
        "tf-nightly-cpu",
    ),
}
MINIMUM = {"torch": (2, 10), "tensorflow": (2, 18)}


class Framework(NamedTuple):
    """An installed framework: its import name, version and package folder."""

    name: str
    version: str
    root: str

    @property
    def release(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    def __str__(self) -> str:
        return f"{TITLES[self.name]} {self.version}"


def find(name: str) -> Framework | None:
    """The framework that `import <name>` would load, found without importing it."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None) or importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    root = os.path.dirname(spec.origin)
    for distribution in _DISTRIBUTIONS[name]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Framework(name, importlib.metadata.version(distribution), root)
    version = getattr(module, "__version__", None)
    return Framework(name, version, root) if version else None


def unsupported(framework: Framework) -> str:
    """Why no binding can serve this version; empty when one can."""
    if framework.release >= MINIMUM[framework.name]:
        return ""
    minimum = ".".join(map(str, MINIMUM[framework.name]))
    return f"{framework} is older than {minimum}, the first version that twinfuse supports"


def compiler() -> list[str]:
    """The C++ compiler's command, or an empty list where there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    return []


def compile_flags(framework: Framework) -> list[str]:
    """Flags for a binding's sources, but for the include path of the core."""
    include = f"{framework.root}/include"
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    if framework.name == "torch":
        # The stable ABI of 2.10: one binary serves that version and every newer one.
        return [
            *flags,
            *("-isystem", include, "-isystem", f"{include}/torch/csrc/api/include"),
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ]
    # What tf.sysconfig.get_compile_flags() answers, without importing TensorFlow for it.
    return [
        *flags,
        *("-isystem", include),
        *("-D_GLIBCXX_USE_CXX11_ABI=1", "-DEIGEN_MAX_ALIGN_BYTES=64"),
    ]


def link_flags(framework: Framework, core: Path) -> list[str]:
    """Flags that link a binding. No rpath: the framework and the core are in the process before."""
    flags = ["-shared", "-Wl,--no-undefined", f"-L{core.parent}", f"-l:{core.name}"]
    if framework.name == "torch":
        return [*flags, f"-L{framework.root}/lib", "-ltorch_cpu", "-lc10"]
    return [*flags, f"-L{framework.root}", "-l:libtensorflow_framework.so.2"]


def file_name(framework: Framework) -> str:
    """A torch binding serves every version from 2.10 on; a TensorFlow one exactly its minor one."""
    if framework.name == "torch":
        return "_C.abi3.so"
    return "_tf_{}_{}.so".format(*framework.release)


def serves(framework: Framework) -> str:
    """The versions that the binding for `framework` serves."""
    if framework.name == "torch":
        return "PyTorch {}.{} and newer".format(*MINIMUM["torch"])
    return "TensorFlow {}.{}".format(*framework.release)


def package_folder(name: str) -> Path:
    """Folder of the subpackage `twinfuse.<name>`, where prebuilt bindings lie."""
    if INSTALLED:
        return PACKAGE / name
    return (ROOT / SOURCES[name]).parent / "twinfuse" / name


def source_files(name: str) -> list[Path]:
    """Everything that a binding is compiled from: the core's public headers and its own files."""
    folders = (ROOT / INCLUDE, ROOT / SOURCES[name])
    files = (path for folder in folders for path in folder.rglob("*"))
    return sorted(path for path in files if path.suffix in (".cc", ".h"))


def kernel_sources() -> list[Path]:
    """Everything that GPU kernels are compiled from."""
    folder = ROOT / "csrc"
    own = (folder / name for name in ("aot.py", "embed.py", "jit.py"))
    return [*own, *sorted((folder / "triton").glob("*.py"))]


def cache_folder() -> Path:
    """The user's cache of what is compiled here: TWINFUSE_CACHE, or `twinfuse` in the XDG cache."""
    if os.environ.get("TWINFUSE_CACHE"):
        return Path(os.environ["TWINFUSE_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "twinfuse"


def _check_cache(folder: Path) -> None:
    """Raise if anybody else can put code into the cache."""
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(f"the cache {folder} belongs to another user; set TWINFUSE_CACHE")
    if stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"the cache {folder} is writable by others; chmod 700 it")


def _cached(framework: Framework) -> Path:
    """Where the cached binding of this framework is, or would be."""
    digest = hashlib.sha256((PACKAGE / "_version.py").read_bytes())
    for path in source_files(framework.name):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    library = {"torch": "lib/libtorch_cpu.so", "tensorflow": "libtensorflow_framework.so.2"}
    # Two builds of one version (a distribution's and the official one) differ in size.
    size = os.path.getsize(os.path.join(framework.root, library[framework.name]))
    flags = [flag.replace(framework.root, "") for flag in compile_flags(framework)]
    digest.update(repr((framework.version, size, platform.machine(), flags)).encode())
    stem = file_name(framework).removesuffix(".so")
    return cache_folder() / f"{stem}-{framework.version}-{digest.hexdigest()[:16]}.so"


def status(name: str) -> tuple[Path | None, str]:
    """As `binding`, but makes nothing: `(path, "")`, or None and what importing would do."""
    framework = find(name)
    if framework is None:
        return None, f"{TITLES[name]} is not installed"
    if reason := unsupported(framework) or _missing_core():
        return None, reason
    prebuilt = package_folder(name) / file_name(framework)
    if prebuilt.exists():
        return prebuilt, ""
    try:
        cached = _cached(framework)
        if cached.exists():
            _check_cache(cached.parent)
            return cached, ""
    except OSError as error:
        return None, str(error)
    if not compiler():
        return None, f"nothing is built for {framework}, and there is no C++ compiler to build it"
    if cached.with_suffix(".log").exists():
        return None, _failed(framework, cached.with_suffix(".log"))
    return None, f"will be compiled for {framework} at first import of twinfuse.{name}"


def binding(name: str, unloadable: Path | None = None) -> tuple[Path | None, str]:
    """Path of the binding for the installed framework, compiled first if need be.

    Returns `(path, "")`, or `(None, reason)` where no binding can be had. `unloadable` is a path
    returned before that the dynamic loader refused: it is then built anew from source.
    """
    path, reason = status(name)
    framework = find(name)
    if framework is None or unsupported(framework) or _missing_core():
        return None, reason
    if path is not None and unloadable is None:
        return path, ""
    try:
        target = _cached(framework)
        if target == unloadable:
            return None, f"{target} does not load"
        if not target.exists() and not compiler():
            return None, reason or f"{path} does not load, and there is no C++ compiler"
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_cache(target.parent)
        return _compile_once(framework, target)
    except OSError as error:
        return None, f"the binding for {framework} cannot be built: {error}"


def torch_binding(unloadable: Path | None = None) -> tuple[Path | None, str]:
    """`binding("torch")`: the path for `torch.ops.load_library`, or None and the reason."""
    return binding("torch", unloadable)


def tensorflow_binding(unloadable: Path | None = None) -> tuple[Path | None, str]:
    """`binding("tensorflow")`: the path for `tf.load_op_library`, or None and the reason."""
    return binding("tensorflow", unloadable)


def _missing_core() -> str:
    if (PACKAGE / "_lib" / "libtwinfuse.so").exists():
        return ""
    return "the compiled core is missing (twinfuse was installed without a C++ compiler)"


def _failed(framework: Framework, log: Path) -> str:
    return f"the binding for {framework} did not compile: see {log}, and delete it to try again"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not at the top: Windows has none, and the reference backend runs there

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file unlocks


def _compile_once(framework: Framework, target: Path) -> tuple[Path | None, str]:
    """Compile into `target` unless another process has done so while this one waited."""
    log = target.with_suffix(".log")
    with _locked(target.with_suffix(".lock")):
        if target.exists():
            return target, ""
        if log.exists():
            return None, _failed(framework, log)
        start = time.monotonic()
        print(
            f"twinfuse: compiling the binding for {framework} (once) ...", end="", file=sys.stderr
        )
        sys.stderr.flush()
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            output = Path(work, target.name)
            error = _compile(framework, output)
            if error:
                print(" failed", file=sys.stderr)
                Path(work, "log").write_text(error)
                os.replace(Path(work, "log"), log)
                return None, _failed(framework, log)
            os.replace(output, target)
        print(f" {time.monotonic() - start:.1f} s", file=sys.stderr)
    return target, ""


def _compile(framework: Framework, output: Path) -> str:
    """Compile and link a binding; returns the compiler's complaint, or an empty string."""
    flags = [*compile_flags(framework), f"-I{ROOT / INCLUDE}"]

    def run(arguments: list[str]) -> str:
        command = [*compiler(), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        return "" if result.returncode == 0 else f"{shlex.join(command)}\n{result.stderr}"

    files = [path for path in source_files(framework.name) if path.suffix == ".cc"]
    objects = [str(output.with_name(f"{source.stem}.o")) for source in files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = "".join(
            pool.map(
                lambda source, target: run([*flags, "-c", str(source), "-o", target]),
                files,
                objects,
            )
        )
    core = PACKAGE / "_lib" / "libtwinfuse.so"
    return errors or run([*objects, "-o", str(output), *link_flags(framework, core)])
