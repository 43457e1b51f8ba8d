"""Installs the package every way it can be installed, each in a fresh virtual environment.

    python -m tests.install_matrix [--full] [-k TEXT] [--work FOLDER]

A case installs from a copy of the checkout, so that nothing built there leaks in, and then calls
the ops of the frameworks it has and compares them with the native layers. The environments hold
only what a case names: the running interpreter's copies of a framework and of everything that it
depends on are linked into a folder of their own, which a `.pth` file adds to the environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FRAMEWORKS = {"torch": "torch", "tensorflow": "tensorflow-cpu"}
BOTH = ("torch", "tensorflow")

PROBES = {
    "torch": """
import torch, twinfuse, twinfuse.torch as tft
x, w, b = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
torch.testing.assert_close(tft.linear_relu(x, w, b), torch.relu(torch.addmm(b, x, w.T)))
""",
    "tensorflow": """
import numpy as np, tensorflow as tf, twinfuse, twinfuse.tensorflow as tftf
x, w, b = (np.random.randn(*s).astype("f") for s in ((5, 7), (7, 3), (3,)))
np.testing.assert_allclose(tftf.linear_relu(x, w, b), tf.nn.relu(x @ w + b), 1e-5, 1e-5)
""",
    "none": "import twinfuse",
}
REPORT = """
import json
print(json.dumps({"launches": sum(twinfuse.launches().values()), "doctor": twinfuse.doctor()}))
"""


class CaseFailed(AssertionError):
    """A case did not do what it says; the text ends with what the last command printed."""


def check(condition: bool, expected: str, output: str = "") -> None:
    if not condition:
        raise CaseFailed(f"expected {expected}\n{output}".rstrip())


def dependencies(*roots: str) -> set[str]:
    """Names of the installed distributions `roots` and of all that they need here."""
    # pip carries the parser of requirement markers, so nothing more need be installed.
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        for text in required:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


class Workspace:
    """A copy of the checkout, the folders of linked distributions, and fresh environments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "tree"
        ignored = (
            ".git",
            ".venv",
            "build",
            "dist",
            "*.so",
            "*.egg-info",
            "__pycache__",
            ".*_cache",
        )
        if not self.tree.exists():
            shutil.copytree(REPOSITORY, self.tree, ignore=shutil.ignore_patterns(*ignored))
        self._count = 0
        self._wheel: Path | None = None

    def linked(self, name: str, *distributions: str) -> Path:
        """Folder with links to the files of these distributions and of what they depend on."""
        folder = self.folder / "linked" / name
        if folder.exists():
            return folder
        folder.mkdir(parents=True)
        for distribution in dependencies(*distributions):
            files = importlib.metadata.distribution(distribution).files or []
            site = importlib.metadata.distribution(distribution).locate_file("")
            for entry in {file.parts[0] for file in files} - {"..", "__pycache__"}:
                if not (folder / entry).exists():
                    (folder / entry).symlink_to(Path(str(site)) / entry)
        return folder

    def environment(self, frameworks: Sequence[str], tools: bool) -> Environment:
        self._count += 1
        environment = Environment(self.folder / f"env{self._count}")
        environment.add(self.linked("numpy", "numpy"))
        if tools:
            environment.add(self.linked("tools", "setuptools", "ninja"))
        for name in frameworks:
            environment.add(self.linked(name, FRAMEWORKS[name]))
        return environment

    def wheel(self) -> Path:
        """A wheel built where both frameworks are; built once and shared."""
        if self._wheel is None:
            environment = self.environment(BOTH, tools=True)
            target = self.folder / "wheel"
            environment.pip("wheel", "--no-build-isolation", "--no-deps", "-w", target, self.tree)
            (self._wheel,) = target.glob("*.whl")
        return self._wheel


class Environment:
    """A virtual environment without pip of its own; the running interpreter's pip serves it."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.folder = folder
        self.python = folder / "bin/python"
        self.variables = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("TWINFUSE_", "PYTHON")) and key not in ("CXXFLAGS", "LDFLAGS")
        }
        # The folder of a cache must not be open to others, whatever the umask.
        self.variables |= {"TWINFUSE_CACHE": str(folder / "cache"), "TF_CPP_MIN_LOG_LEVEL": "3"}

    @property
    def site(self) -> Path:
        (site,) = self.folder.glob("lib/python*/site-packages")
        return site

    def add(self, folder: Path) -> None:
        (self.site / f"{folder.name}.pth").write_text(f"{folder}\n")

    def start(self, *command: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(part) for part in command],
            env=self.variables,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pip(self, *arguments: object) -> str:
        pip = (sys.executable, "-m", "pip", "--python", self.python, *arguments)
        process = self.start(*pip, "-v", "--disable-pip-version-check")
        output, errors = process.communicate()
        check(process.returncode == 0, f"pip {arguments[0]} to succeed", output + errors)
        return output + errors  # pip sends what a build prints to the latter

    def probe(self, *names: str, processes: int = 1) -> list[Probe]:
        """Import and call the named frameworks' ops, in this many processes at once."""
        program = "".join(PROBES[name] for name in names or ("none",)) + REPORT
        running = [self.start(self.python, "-c", program) for _ in range(processes)]
        return [Probe.read(process) for process in running]


@dataclass
class Probe:
    """What a process that called the ops printed."""

    launches: int
    doctor: dict[str, dict[str, dict[str, str]]]
    errors: str

    @classmethod
    def read(cls, process: subprocess.Popen[str]) -> Probe:
        output, errors = process.communicate()
        check(process.returncode == 0, "the ops to agree with the native layers", output + errors)
        return cls(**json.loads(output.splitlines()[-1]), errors=errors)

    @property
    def compiled(self) -> int:
        """How many bindings this process compiled."""
        return self.errors.count("twinfuse: compiling the binding")


def summary(pip_output: str) -> str:
    lines = re.findall(r"^\s*(twinfuse: built: .*)$", pip_output, re.MULTILINE)
    check(len(lines) == 1, "one line that says what was built and left out", pip_output)
    return str(lines[0])


def _titles(text: str) -> set[str]:
    titles = {"torch": "PyTorch binding", "tensorflow": "TensorFlow binding"}
    return {name for name, title in titles.items() if title in text}


MODES = {
    "isolated": [],
    "no isolation": ["--no-build-isolation"],
    "editable": ["--no-build-isolation", "-e"],
}


@dataclass(frozen=True)
class Install:
    """`pip install` in one mode beside some frameworks, whose bindings are then prebuilt."""

    mode: str
    frameworks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.mode}, {' and '.join(self.frameworks) or 'no framework'}"

    def run(self, workspace: Workspace) -> str:
        environment = workspace.environment(self.frameworks, tools=self.mode != "isolated")
        line = summary(environment.pip("install", *MODES[self.mode], workspace.tree))
        built, _, left_out = line.partition("; left out:")
        check(_titles(built) == set(self.frameworks), f"{self.frameworks} to be built", line)
        check(_titles(left_out) == set(BOTH) - set(self.frameworks), "the rest left out", line)
        (probe,) = environment.probe(*self.frameworks)
        check(probe.compiled == 0, "nothing compiled at import", probe.errors)
        check((probe.launches > 0) == bool(self.frameworks), "fused kernels to run", str(probe))
        return line


def no_compiler(workspace: Workspace) -> str:
    """Without a compiler the package is `reference` only, and says so."""
    environment = workspace.environment(("torch",), tools=True)
    environment.variables["PATH"] = str(environment.folder / "empty")
    environment.variables.pop("CXX", None)
    line = summary(environment.pip("install", "--no-build-isolation", workspace.tree))
    check("no C++ compiler" in line, "the reason in the line", line)
    (probe,) = environment.probe("torch")
    check(probe.launches == 0, "no kernel to run", str(probe))
    check("FallbackWarning" in probe.errors, "a warning with the reason", probe.errors)
    check("compiler" in json.dumps(probe.doctor["advice"]), "advice to install one", str(probe))
    return line


def no_triton(workspace: Workspace) -> str:
    """On a machine with a GPU, where nothing can compile its kernels."""
    environment = workspace.environment((), tools=True)
    query = environment.folder / "bin" / "nvidia-smi"
    query.write_text("#!/bin/sh\necho 9.0\n")
    query.chmod(0o755)
    environment.variables["PATH"] = f"{query.parent}:{environment.variables['PATH']}"
    line = summary(environment.pip("install", "--no-build-isolation", workspace.tree))
    check("GPU kernels (no Triton" in line, "the reason in the line", line)
    return line


def gpu_kernels(workspace: Workspace) -> str:
    """Compiled by the installation for the architecture that is asked for."""
    environment = workspace.environment(("torch",), tools=True)
    environment.add(workspace.linked("triton", "triton", "tqdm"))
    environment.variables["TORCH_CUDA_ARCH_LIST"] = "9.0"
    line = summary(environment.pip("install", "--no-build-isolation", workspace.tree))
    built, _, left_out = line.partition("; left out:")
    check("GPU kernels" in built, "GPU kernels to be built", line)
    lstm = bool(shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin"))
    check(("LSTM on GPUs" in left_out) != lstm, "those of the LSTM to depend on nvcc", line)
    (probe,) = environment.probe("torch")
    check(probe.launches > 0, "fused kernels to run", str(probe))
    return line


def framework_later(workspace: Workspace) -> str:
    """A framework installed after us: compiled by the first import, once for two processes."""
    environment = workspace.environment((), tools=True)
    line = summary(environment.pip("install", "--no-build-isolation", workspace.tree))
    for name in BOTH:
        environment.add(workspace.linked(name, FRAMEWORKS[name]))
    first = environment.probe(*BOTH, processes=2)
    compiled = sum(probe.compiled for probe in first)
    check(compiled == 2, "each binding compiled once", "".join(probe.errors for probe in first))
    (again,) = environment.probe(*BOTH)
    check(again.compiled == 0, "the cache to serve later imports", again.errors)
    check(all(p.launches >= 2 for p in (*first, again)), "fused kernels to run", str(again))
    return f"{line}; two processes compiled each binding once"


def other_version(workspace: Workspace) -> str:
    """A wheel built for another TensorFlow: its binding is passed over and one is compiled."""
    environment = workspace.environment(("tensorflow",), tools=False)
    environment.pip("install", workspace.wheel())
    (prebuilt,) = environment.site.glob("twinfuse/tensorflow/_tf_*.so")
    prebuilt.rename(prebuilt.with_name("_tf_2_17.so"))
    (probe,) = environment.probe("tensorflow")
    check(probe.compiled == 1 and probe.launches > 0, "a binding to be compiled", probe.errors)
    return f"passed over {prebuilt.name} of another version, compiled for the installed one"


def does_not_load(workspace: Workspace) -> str:
    """A binding of the right name that the loader refuses (the framework's ABI differs)."""
    environment = workspace.environment(BOTH, tools=False)
    environment.pip("install", workspace.wheel())
    for prebuilt in environment.site.glob("twinfuse/*/_*.so"):
        if prebuilt.parent.name in BOTH:
            source = environment.folder / "broken.cc"
            source.write_text("void missing(); void (*reference)() = missing;")
            subprocess.run(["g++", "-shared", "-fPIC", source, "-o", prebuilt], check=True)
    (probe,) = environment.probe(*BOTH)
    check(probe.compiled == 2 and probe.launches >= 2, "both to be compiled", probe.errors)
    return "compiled both bindings anew"


@dataclass(frozen=True)
class Special:
    name: str
    function: Callable[[Workspace], str]

    def run(self, workspace: Workspace) -> str:
        return self.function(workspace)


Case = Install | Special

# What one build, that of a wheel, can show; --full takes every way with every set of frameworks.
REDUCED: list[Case] = [
    Special("no compiler", no_compiler),
    Special("wheel for another TensorFlow", other_version),
    Special("GPU without Triton", no_triton),
]
FULL: list[Case] = [
    *(
        Install(mode, frameworks)
        for mode in MODES
        for frameworks in (BOTH, ("torch",), ("tensorflow",), ())
    ),
    *REDUCED,
    Special("framework later, two processes", framework_later),
    Special("bindings that do not load", does_not_load),
    Special("GPU kernels", gpu_kernels),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.install_matrix", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every mode with every framework set")
    parser.add_argument("-k", metavar="TEXT", default="", help="only cases whose name has TEXT")
    parser.add_argument("--work", type=Path, help="keep the environments in this folder")
    options = parser.parse_args()
    cases = [case for case in (FULL if options.full else REDUCED) if options.k in case.name]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="twinfuse-install-") as temporary:
        workspace = Workspace(options.work or Path(temporary))
        for number, case in enumerate(cases, 1):
            print(f"[{number}/{len(cases)}] {case.name} ...", end=" ", flush=True)
            start = time.monotonic()
            try:
                text = f"ok, {{:.0f}} s\n    {case.run(workspace)}"
            except CaseFailed as error:
                failed += 1
                text = f"FAILED, {{:.0f}} s\n{error}"
            print(text.replace("{:.0f}", f"{time.monotonic() - start:.0f}"), flush=True)
    print(f"{len(cases) - failed} of {len(cases)} cases passed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
