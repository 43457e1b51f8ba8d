"""Compiling the CUDA C++ kernels ahead of time: what is refused, kept, written and embedded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import skip
from tests.gpu import launcher

UNITS = ("bf16",)
# `alpha` and `beta` differ by unit; what goes before them is a test's.
KERNELS = """
struct Arguments { float* data; int count; };
#define TWINFUSE_LSTM_BF16 1
#define TWINFUSE_LSTM_FP16 2
extern "C" __global__ void __launch_bounds__(256, 1) alpha(Arguments a) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = a.data[threadIdx.x];
  __syncthreads();
  a.data[threadIdx.x] = shared[255 - threadIdx.x] * TWINFUSE_UNIT;
}
extern "C" __global__ void __launch_bounds__(128, 1) beta(Arguments a) {
  if (threadIdx.x < a.count) a.data[threadIdx.x] = 0;
}
"""
STACK = """
extern "C" __global__ void __launch_bounds__(32, 1) bad(float* data, int at) {
  float values[64] = {};
  for (int i = 0; i < 64; i++) values[(at * i) & 63] += data[i];
  data[at] = values[at & 63];
}
"""
SPILL = """
extern "C" __global__ void __launch_bounds__(1024, 1) bad(float* data) {
  float values[128];
#pragma unroll
  for (int i = 0; i < 128; i++) values[i] = data[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; i++) data[i * 1024 + threadIdx.x] = values[127 - i];
}
"""
STATIC = """
extern "C" __global__ void __launch_bounds__(32, 1) bad(float* data) {
  __shared__ float values[32];
  values[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = values[31 - threadIdx.x];
}
"""
UNBOUNDED = 'extern "C" __global__ void bad(float* data) { data[threadIdx.x] = 0; }'


def load() -> ModuleType:
    file = launcher.ROOT / "csrc/cuda_build.py"
    spec = importlib.util.spec_from_file_location("cuda_build", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_build"] = module
    spec.loader.exec_module(module)
    return module


cuda_build = load()
embed = cuda_build.embed


@pytest.fixture(name="nvcc")
def nvcc_fixture() -> str:
    found = cuda_build.find_nvcc()
    if found is None:
        skip("nvcc", "there is none")
    return found


def sources(folder: Path, text: str) -> Path:
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    (folder / "cuda/lstm.cu").write_text(text)
    return folder


def refused(folder: Path, nvcc: str, text: str) -> str:
    """What the build step says of it; it must leave no table."""
    with pytest.raises(SystemExit) as stopped:
        cuda_build.build(folder / "out", [90], 2, nvcc, sources(folder / "src", text), UNITS)
    assert not (folder / "out/cuda.json").exists()
    return str(stopped.value)


def contents(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("cuda*"), *folder.glob("cuda/*.cubin")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.is_file()}


def test_kernels_and_their_table(tmp_path: Path, nvcc: str) -> None:
    src, out = sources(tmp_path / "src", KERNELS), tmp_path / "out"
    cuda_build.build(out, [80, 90], 2, nvcc, src, UNITS)
    table = json.loads((out / "cuda.json").read_text())
    assert [(k["arch"], k["entry"], k["threads"]) for k in table] == [
        (80, "alpha", 256),
        (80, "beta", 128),
        (90, "alpha", 256),
        (90, "beta", 128),
    ]
    assert all(0 < kernel["registers"] < 64 for kernel in table)
    files = {kernel["file"] for kernel in table}
    assert files == {"cuda/bf16.sm_80.cubin", "cuda/bf16.sm_90.cubin"}
    assert all((out / file).read_bytes()[:4] == b"\x7fELF" for file in files)
    # What is not wanted any more goes.
    cuda_build.build(out, [90], 2, nvcc, src, UNITS)
    assert [path.name for path in (out / "cuda").glob("*.cubin")] == ["bf16.sm_90.cubin"]


def test_output_is_deterministic_and_kept(
    tmp_path: Path, nvcc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, found = sources(tmp_path / "src", KERNELS), []
    for name in ("a", "b"):
        cuda_build.build(tmp_path / name, [90], 2, nvcc, src, UNITS)
        found.append(contents(tmp_path / name))
    assert found[0] == found[1] and len(found[0]) == 3
    compiled = []
    run = subprocess.run

    def counted(command: list[str], **options: object) -> object:
        compiled.append(command)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(cuda_build.subprocess, "run", counted)

    def compiles(text: str) -> int:
        """Runs of the compiler; questions about its version are asked by another function."""
        compiled.clear()
        cuda_build.build(tmp_path / "a", [90], 2, nvcc, sources(src, text), UNITS)
        return sum("cuda/lstm.cu" in command for command in compiled)

    assert compiles(KERNELS) == 0
    assert contents(tmp_path / "a") == found[0]
    assert compiles(KERNELS.replace("255 -", "254 +")) == 1
    assert contents(tmp_path / "a") != found[0]
    assert compiles(KERNELS) == 0
    assert contents(tmp_path / "a") == found[0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (STACK, "bad for sm_90 has a stack of 256 bytes"),
        (SPILL, "bad for sm_90 spills registers: "),
        (STATIC, "bad for sm_90 has 128 bytes of static shared memory"),
        (UNBOUNDED, "bad for sm_90 has no __launch_bounds__"),
    ],
    ids=["stack", "spill", "static", "unbounded"],
)
def test_what_is_refused(tmp_path: Path, nvcc: str, text: str, complaint: str) -> None:
    for _ in range(2):  # compiled, and as it was kept
        said = refused(tmp_path, nvcc, KERNELS + text)
        assert complaint in said and "alpha" not in said


def test_registers_are_counted() -> None:
    report = cuda_build.Report("one", 129, 0, 0, 0, 0)
    assert cuda_build.complaints(report, 512) == ["needs 129 registers for each of 512 threads"]
    assert not cuda_build.complaints(report, 508)


def test_a_kernel_of_two_units_is_refused(tmp_path: Path, nvcc: str) -> None:
    src = sources(tmp_path / "src", KERNELS)
    with pytest.raises(SystemExit, match="alpha for sm_90 is there 2 times"):
        cuda_build.build(tmp_path, [90], 2, nvcc, src, ("bf16", "fp16"))


def test_what_does_not_compile(tmp_path: Path, nvcc: str) -> None:
    assert "nonsense" in refused(tmp_path, nvcc, KERNELS + "nonsense")


def test_a_report_that_is_not_understood() -> None:
    for text in ("", "Compiling entry function 'a' for 'sm_90'\n", "Function properties for a\n"):
        with pytest.raises(RuntimeError, match="report"):
            cuda_build.parse_report(text)


def test_architectures() -> None:
    assert cuda_build.architectures("8.6;9.0a 10.3+PTX,12.1") == [80, 90, 100, 120]
    assert cuda_build.architectures("10.0 10.3") == [100]
    with pytest.raises(ValueError, match="Hopper"):
        cuda_build.architectures("Hopper")


def test_without_nvcc(tmp_path: Path) -> None:
    """It says so, and leaves a table that has no rows and that the core is built with."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/old.sm_90.cubin").write_bytes(b"old")
    program = (
        "import runpy, shutil, sys;"
        "shutil.which = lambda *_, **__: None;"
        f"sys.argv = ['cuda_build.py', {str(tmp_path)!r}, '--arch', '9.0'];"
        f"runpy.run_path({str(launcher.ROOT / 'csrc/cuda_build.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no nvcc" in done.stdout and "LSTMs on GPUs" in done.stdout
    assert contents(tmp_path) == {
        "cuda.json": b"[]\n",
        embed.CUDA_SOURCES: f"{embed.cuda_sources_hash()}\n".encode(),
    }
    assert "no nvcc" in embed.without_cuda(tmp_path)
    assert "const int kCudaKernelCount = 0;" in embedded(tmp_path)


def embedded(folder: Path) -> str:
    """The table that the core is built with, beside none of other kernels."""
    (folder / "kernels.json").write_text("[]")
    (folder / embed.SOURCES).write_text("")
    embed.write(folder, folder / "made", folder / "none")
    return (folder / "made/table.cc").read_text()


def test_what_the_core_takes_in(tmp_path: Path) -> None:
    """Kernels of one file share its code; older ones than the sources are left out, and told."""
    codes = {"cuda/a": b"\x7fELF a", "cuda/b": b"\x7fELF b"}
    rows = [("alpha", "cuda/a"), ("beta", "cuda/a"), ("gamma", "cuda/b")]
    kernels = [cuda_build.Kernel(90, entry, 200, 256, file) for entry, file in rows]
    assert "not there" in embed.without_cuda(tmp_path)
    cuda_build.write(tmp_path, kernels, codes, launcher.ROOT / "csrc")
    assert embed.without_cuda(tmp_path) == ""
    table = embedded(tmp_path)
    packed = [embed.pack(codes[file]) for file in ("cuda/a", "cuda/b")]
    first, second = (f"{{{at}, {len(x)}, 6}}" for at, x in zip((0, len(packed[0])), packed))
    for entry, image in (("alpha", first), ("beta", first), ("gamma", second)):
        assert f'{{90, "{entry}", 200, {image}}}' in table
    assert "const int kCudaKernelCount = 3;" in table
    assert (tmp_path / "made/images.bin").read_bytes() == b"".join(packed)
    (tmp_path / embed.CUDA_SOURCES).write_text("of another version\n")
    assert "older than csrc/cuda" in embed.without_cuda(tmp_path)
    assert "const int kCudaKernelCount = 0;" in embedded(tmp_path)
