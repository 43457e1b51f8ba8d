"""Builds the core and the bindings of the frameworks that are installed.

The frameworks are looked for when `build_ext` runs, in the interpreter that will use the package
(`TWINFUSE_PYTHON` names another). What cannot be built is left out and said in one line; what
should build and does not is an error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CORE = "twinfuse/_lib/libtwinfuse.so"

X86 = platform.machine().lower() in ("x86_64", "amd64")
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
# The kernels are compiled once for each of these and chosen between at run time. What they hold is
# told by macros, as a user's own flags may give every set all instructions.
ISAS = {"portable": ""}
if X86:
    ISAS |= {
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": _AVX512,
        "avx512_bf16": f"{_AVX512} -mavx512bf16 -DTWINFUSE_DOT_BF16",
        "amx_bf16": f"{_AVX512} -mavx512bf16 -DTWINFUSE_DOT_BF16 -DTWINFUSE_AMX",
    }
KERNELS = "csrc/cpu/kernels.cc"
# Sources of others, in C that is C++, too. Their warnings are not ours to mend.
THIRD_PARTY = "csrc/third_party"
THIRD_PARTY_FLAGS = ["-x", "c++", "-w"]
# What `make kernels` has compiled; a build takes what is there and up to date, and for GPUs of this
# machine or those in TORCH_CUDA_ARCH_LIST compiles the rest.
GPU_KERNELS = "build/kernels"
GPU_COMPILERS = ("csrc/aot.py", "csrc/cuda_build.py")
NO_GPU_KERNELS = "csrc/gpu/no_kernels.cc"

# Contraction would let the compiler choose where products are rounded, and with that the bits.
CXXFLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    "-ffp-contract=off",
]


def architectures() -> str:
    """Of GPUs to compile for without being asked by `make kernels`, such as `8.0 9.0`."""
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return wanted
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return " ".join(sorted(set(found.stdout.split())))


def load_module(name: str, path: Path) -> ModuleType:
    """A file of the repository, without importing the package that is being built."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load_module("twinfuse_build", ROOT / "pyext/twinfuse/_build.py")


def find_frameworks(python: str) -> dict[str, list[str] | None]:
    """Where `python` has each framework: name -> [name, version, folder], or None.

    pip hides the target's packages from an isolated build through these variables, and only
    through them.
    """
    program = (
        f"import json, runpy; b = runpy.run_path({str(build.__file__)!r});"
        "print(json.dumps({name: b['find'](name) for name in b['SOURCES']}))"
    )
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    return json.loads(
        subprocess.check_output([python, "-c", program], env=environment, cwd="/", text=True)
    )


class Ninja:
    """A build file that is grown a library at a time and then run."""

    def __init__(self, folder: Path, compiler: list[str]) -> None:
        self.folder = folder
        command = shlex.join(compiler)
        self.lines = [
            f"builddir = {self._escape(folder)}",
            "rule compile",
            f"  command = {command} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            f"  command = {command} $in -o $out $flags",
            "  description = link $out",
        ]

    @staticmethod
    def _escape(path: str | Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def _edge(self, rule: str, out: Path, inputs: list[Path], flags: list[str], uses: str) -> None:
        names = " ".join(map(self._escape, inputs))
        flag_text = shlex.join(flags).replace("$", "$$")
        self.lines += [f"build {self._escape(out)}: {rule} {names}{uses}", f"  flags = {flag_text}"]

    def compile(self, source: Path, flags: list[str], variant: str = "") -> Path:
        suffix = f".{variant}.o" if variant else ".o"
        made = source.is_relative_to(self.folder)
        out = self.folder / source.relative_to(self.folder if made else ROOT).with_suffix(suffix)
        self._edge("compile", out, [source], flags, "")
        return out

    def link(
        self, out: Path, objects: list[Path], flags: list[str], uses: Path | None = None
    ) -> None:
        self._edge("link", out, objects, flags, f" | {self._escape(uses)}" if uses else "")

    def run(self) -> None:
        if importlib.util.find_spec("ninja"):
            command = [sys.executable, "-m", "ninja"]
        elif path := shutil.which("ninja"):
            command = [path]
        else:
            raise SystemExit("twinfuse: building without isolation needs ninja: pip install ninja")
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "build.ninja"
        file.write_text("\n".join(self.lines) + "\n")
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        try:
            subprocess.run([*command, "-f", str(file), *jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "twinfuse: the build failed; the compiler's messages are above"
            ) from error


class BuildExt(build_ext):
    """Builds through ninja in `<build base>/objects`; copies what was built into the package."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("test-module", None, "also build tests/_core"),
    ]
    boolean_options: ClassVar = [*build_ext.boolean_options, "test-module"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.test_module = False

    def run(self) -> None:
        self.in_source = self.editable_mode or bool(self.inplace)
        base = Path(self.get_finalized_command("build").build_base)
        self.objects = (ROOT / base / "objects").resolve()
        self.products: dict[str, Path] = {}  # path in the wheel -> file that ninja makes
        self.built: list[str] = []
        self.left_out: list[str] = []
        compiler = build.compiler()
        if sys.platform != "linux":
            self.left_out.append("all compiled parts (they are built on Linux only)")
        elif not compiler:
            self.left_out.append("all compiled parts (no C++ compiler: only `reference` will run)")
        else:
            self._build(Ninja(self.objects, compiler))
        self._install()
        built = ", ".join(self.built) or "nothing compiled"
        left_out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        print(f"twinfuse: built: {built}{left_out}", flush=True)

    def _build(self, ninja: Ninja) -> None:
        self.extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        self.extra_link = [*self.extra, *shlex.split(os.environ.get("LDFLAGS", ""))]
        objects = self._add_core(ninja)
        python = os.environ.get("TWINFUSE_PYTHON", sys.executable)
        for name, found in find_frameworks(python).items():
            self._add_binding(ninja, name, build.Framework(*found) if found else None, python)
        if self.in_source or self.test_module:
            self._add_test_module(ninja, objects)
        ninja.run()

    def _add_core(self, ninja: Ninja) -> list[Path]:
        flags = [*CXXFLAGS, *self.extra, f"-I{ROOT / build.INCLUDE}", f"-I{ROOT / 'csrc'}"]
        flags.append(f'-DTWINFUSE_VERSION="{self.distribution.get_version()}"')
        if X86:
            flags.append("-DTWINFUSE_WITH_X86")
        kernels = ROOT / KERNELS
        plain = sorted(path for path in (ROOT / "csrc").rglob("*.cc") if path != kernels)
        plain = [path for path in plain if path != ROOT / NO_GPU_KERNELS]
        plain += self._gpu_kernels()
        objects = [ninja.compile(source, flags) for source in plain]
        foreign = sorted((ROOT / THIRD_PARTY).rglob("*.c"))
        objects += [ninja.compile(source, [*flags, *THIRD_PARTY_FLAGS]) for source in foreign]
        objects += [
            ninja.compile(kernels, [*flags, f"-DTWINFUSE_ISA={isa}", *options.split()], isa)
            for isa, options in ISAS.items()
        ]
        out = self.products[CORE] = self.objects / "libtwinfuse.so"
        exports = ROOT / "csrc/exports.map"
        options = ["-shared", "-Wl,-soname,libtwinfuse.so", "-Wl,--no-undefined", "-pthread"]
        options.append(f"-Wl,--version-script={exports}")
        ninja.link(out, objects, [*options, *self.extra_link], uses=exports)
        self.built.append(f"core ({', '.join(ISAS)})")
        return objects

    def _gpu_kernels(self) -> list[Path]:
        """Sources of the table of GPU kernels."""
        folder = Path(os.environ.get("TWINFUSE_KERNELS") or ROOT / GPU_KERNELS)
        embed = load_module("twinfuse_embed", ROOT / "csrc/embed.py")
        is_ours = "TWINFUSE_KERNELS" not in os.environ
        if is_ours and not embed.up_to_date(folder) and (wanted := architectures()):
            if importlib.util.find_spec("triton") is None:
                reason = f"no Triton for {sys.executable}; --no-build-isolation takes that of torch"
                self.left_out.append(f"GPU kernels ({reason})")
                return [ROOT / NO_GPU_KERNELS]
            for script in GPU_COMPILERS:
                command = [sys.executable, str(ROOT / script), str(folder), "--arch", wanted]
                subprocess.run(command, check=True)
        if not embed.up_to_date(folder):
            found = "older than csrc/triton" if (folder / "kernels.json").exists() else "not there"
            self.left_out.append(f"GPU kernels ({folder} is {found}; `make kernels` makes it)")
            return [ROOT / NO_GPU_KERNELS]
        self.built.append("GPU kernels")
        if reason := embed.without_cuda(folder):
            self.left_out.append(f"LSTM on GPUs ({reason})")
        return embed.write(folder, self.objects / "gpu")

    def _add_binding(self, ninja: Ninja, name: str, framework: Any, python: str) -> None:
        title = build.TITLES[name]
        if framework is None:
            self.left_out.append(
                f"{title} binding (not found by {python}; the first import compiles one)"
            )
        elif reason := build.unsupported(framework):
            self.left_out.append(f"{title} binding ({reason})")
        else:
            core = self.products[CORE]
            flags = [*build.compile_flags(framework), *self.extra, f"-I{ROOT / build.INCLUDE}"]
            sources = [path for path in build.source_files(name) if path.suffix == ".cc"]
            objects = [ninja.compile(source, flags) for source in sources]
            file = build.file_name(framework)
            out = self.products[f"twinfuse/{name}/{file}"] = self.objects / file
            link = [*build.link_flags(framework, core), *self.extra_link]
            ninja.link(out, objects, link, uses=core)
            self.built.append(f"{title} binding ({framework.version} in {framework.root})")

    def _add_test_module(self, ninja: Ninja, objects: list[Path]) -> None:
        try:
            import pybind11
        except ImportError:
            self.left_out.append("test module (pybind11 is not installed)")
            return
        flags = [*CXXFLAGS, *self.extra, f"-I{ROOT / build.INCLUDE}", f"-I{ROOT / 'csrc'}"]
        flags += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
        sources = sorted((ROOT / "tests/_core").glob("*.cc"))
        # Linked with the core's objects, not the library: it tests what the library keeps hidden.
        self.native = self.objects / f"native{sysconfig.get_config_var('EXT_SUFFIX')}"
        modules = [ninja.compile(source, flags) for source in sources]
        ninja.link(self.native, [*modules, *objects], ["-shared", "-pthread", *self.extra_link])
        self.built.append("test module")

    def _install(self) -> None:
        """Copy what was built to where the package is, and remove what an earlier build left."""
        if self.in_source:
            places = {"twinfuse/_lib": ROOT / "pyext/twinfuse/_lib"}
            places |= {f"twinfuse/{name}": build.package_folder(name) for name in build.SOURCES}
            if hasattr(self, "native"):
                self._replace(self.native, ROOT / "tests/_core")
        else:
            names = ["twinfuse/_lib", *(f"twinfuse/{name}" for name in build.SOURCES)]
            places = {name: Path(self.build_lib, name) for name in names}
        for name, folder in places.items():
            folder.mkdir(parents=True, exist_ok=True)
            kept = {os.path.basename(product) for product in self.products}
            for stale in folder.glob("*.so"):
                if stale.name not in kept:
                    stale.unlink()
            for product, file in self.products.items():
                if os.path.dirname(product) == name:
                    self._replace(file, folder)

    @staticmethod
    def _replace(file: Path, folder: Path) -> None:
        """Copy by renaming: a process that runs the old library keeps it."""
        new = folder / f"{file.name}.new"
        shutil.copy2(file, new)
        new.replace(folder / file.name)

    def get_outputs(self) -> list[str]:
        return [os.path.join(self.build_lib, product) for product in self.products]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def copy_extensions_to_source(self) -> None:
        """Done by `_install`, which knows the folders of both source trees."""


class BuildPy(build_py):
    """Adds to the wheel what bindings (at first import) and GPU kernels are compiled from."""

    def run(self) -> None:
        package = Path(self.build_lib, "twinfuse")
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)  # modules deleted since an earlier build
        super().run()
        if not self.editable_mode:
            files = {file for name in build.SOURCES for file in build.source_files(name)}
            for file in files.union(build.kernel_sources()):
                target = package / "_src" / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)


setup(
    # Only says that the wheel is not pure; what it holds is decided when `build_ext` runs.
    ext_modules=[Extension("twinfuse._lib.libtwinfuse", [], py_limited_api=True)],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
