"""Compiling the GPU kernels ahead of time: what is read from the compiler, checked and written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import launcher

aot = sys.modules["aot"]
FAST = "depth-depth-bias_relu-lines-fp16-vectors-64x64"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process that compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(launcher.ROOT / "csrc/aot.py"), str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def build(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "kernels.json").read_text())


def test_kernels_and_their_table(tmp_path: Path) -> None:
    table = build(tmp_path, "--arch", "8.6 9.0", "--only", FAST)
    assert [kernel["arch"] for kernel in table] == [80, 90]
    for kernel in table:
        image = (tmp_path / kernel["file"]).read_bytes()
        assert image[:4] == b"\x7fELF" and len(image) == kernel["size"]
        assert kernel["warps"] == 4 and kernel["spilled"] == 0
        names = [p["name"] for p in kernel["parameters"]]
        assert names[:5] == ["a_data", "a_stride", "b_data", "b_stride", "out_data"]
        divisible = {p["name"] for p in kernel["parameters"] if p["divisible"]}
        assert {"a_stride", "b_stride", "depth", "cols"} <= divisible
        assert not divisible & {"rows", "steps", "programs", "bias_present"}


def test_descriptors_carry_their_boxes(tmp_path: Path) -> None:
    name = "tensor_depth-tensor_lines-bias_relu-tensor-fp16-vectors-128x128"
    (kernel,) = build(tmp_path, "--arch", "9.0", "--only", name)
    boxes = {p["name"]: p["box"] for p in kernel["parameters"] if p["box"]}
    assert boxes == {"a_data": [128, 64], "b_data": [64, 64], "out_data": [128, 64]}
    assert kernel["shared"] > 48 << 10


def test_output_is_deterministic(tmp_path: Path) -> None:
    """Compiled anew, in another folder, and taken from what was compiled before."""
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "b"):
        build(folder, "--arch", "9.0", "--only", FAST)
        contents.append({f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()})
    assert contents[0] == contents[1] == contents[2]


def test_files_of_kernels_that_are_gone_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / "old.sm_90.cubin"
    stale.write_bytes(b"")
    build(tmp_path, "--arch", "9.0", "--only", FAST)
    assert not stale.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0 9.0", [80, 90]),
        ("9.0a;8.6+PTX", [80, 90]),
        ("12.0,10.0 8.9 8.0", [80, 100, 120]),
        ("7.5 9.0", [90]),
        ("10.3 12.1a", [100, 120]),
        ("10.0f;10.3;12.0+PTX", [100, 120]),
        ("10.1 11.0 12.2 8.0", [80]),
    ],
)
def test_architectures(text: str, expected: list[int]) -> None:
    assert aot.parse_architectures(text) == expected


def test_what_is_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.parse_architectures("7.5") == []
    assert "no kernels for architecture 7.5" in capsys.readouterr().err
    assert aot.parse_architectures("12.2") == []
    assert "no kernels for architecture 12.2" in capsys.readouterr().err


def test_whose_code_an_architecture_runs_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.parse_architectures("8.0 10.0 10.3 8.9") == [80, 100]
    lines = ["aot: 10.3 runs the code of 10.0", "aot: 8.9 runs the code of 8.0"]
    assert capsys.readouterr().err.splitlines() == lines


def test_code_for_families(tmp_path: Path) -> None:
    """As the PTX and the machine code say, and whatever is kept for one architecture."""
    name = "tensor_depth-tensor_depth-identity-tensor-bf16-vectors-128x64"
    table = build(tmp_path, "--arch", "10.3 12.1", "--only", name)
    assert [kernel["arch"] for kernel in table] == [100, 120]
    text = f"""
import os, sys
os.environ.update(aot.ENVIRONMENT, TRITON_CACHE_DIR={str(tmp_path / "cache")!r})
for arch in (100, 120, 100):
    (variant,) = (v for v in aot.catalogue.variants(arch) if {name!r} in v.name)
    for family in (False, True, False):
        kernel = aot.compile_variant(arch, variant, family=family)
        print(b" -arch sm_%d%c" % (arch, b"af"[family]) in kernel.image, kernel.image[1:4])
"""
    code = f"import sys; sys.path.insert(0, {str(launcher.ROOT / 'csrc')!r}); import aot{text}"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert done.splitlines() == ["True b'ELF'"] * 9
    for kernel in table:
        image = (tmp_path / kernel["file"]).read_bytes()
        aot.check_family(kernel["arch"], f".target sm_{kernel['arch']}f", image)
        assert kernel["instructions"]["tcgen05" if kernel["arch"] == 100 else "mma"]


@pytest.mark.parametrize(
    ("in_ptx", "in_image"), [("100f", "100a"), ("100a", "100f"), ("120f", "120f"), ("", "100f")]
)
def test_code_that_is_not_for_the_family(in_ptx: str, in_image: str) -> None:
    image = f"\0-v  -arch sm_{in_image} \0".encode()
    with pytest.raises(RuntimeError, match="expected code for sm_100f"):
        aot.check_family(100, f".version 9.0\n.target sm_{in_ptx}\n", image)


def test_another_version_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia import compiler

    variant = launcher.find(100, a="tensor_depth", b="tensor_depth", dtype="bf16")
    for other in (lambda capability: f"sm_{capability}", None):
        monkeypatch.setattr(compiler, "sm_arch_from_capability", other)
        with pytest.raises(RuntimeError, match="this version of Triton"):
            aot.compile_variant(100, variant, family=True)


@pytest.mark.parametrize("text", ["", "Hopper", "90", "9.0 x"])
def test_no_architecture(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected architectures"):
        aot.parse_architectures(text)
    if text:
        done = run(tmp_path, "--arch", text)
        assert done.returncode == 2 and "expected architectures" in done.stderr


PTX = """
.visible .entry multiply(
	.param .align 64 .b8 multiply_param_0[128],
	.param .u32 multiply_param_1,
	.param .u64 .ptr .global .align 16 multiply_param_2
)
.reqntid 128
{ ld.param.b32 %r1, [multiply_param_1]; }
"""


def test_parameters_are_read_from_the_code() -> None:
    assert aot.parameters_of(PTX) == ["descriptor", "u32", "u64"]


def kernel_of(variant: Any, arch: int, **changes: Any) -> Any:
    found = {"wgmma": 4, "tcgen05": 0, "bulk copy": 8, "mma": 4, "cp.async": 8, "load": 0}
    good = aot.Kernel(
        arch=arch,
        name=variant.name,
        entry="multiply",
        warps=8,
        shared=98304,
        cluster=1,
        cooperative=False,
        dependent=False,
        scratch=0,
        parameters=[],
        image=b"",
        registers=128,
        spilled=0,
        instructions=found,
        variant={},
    )
    assert aot.complaints(good, variant) == []
    return dataclasses.replace(good, instructions=found | changes.pop("found", {}), **changes)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 250000}, "250000 bytes of shared memory, of 232448"),
        ({"scratch": 384}, "needs scratch"),
        ({"cluster": 2}, "a cluster"),
        ({"cooperative": True}, "a cooperative launch"),
        ({"found": {"wgmma": 0}}, "no wgmma"),
        ({"found": {"bulk copy": 0}}, "no bulk copy"),
        ({"found": {"load": 3}}, "3 plain loads"),
    ],
)
def test_bad_code_is_refused(change: dict[str, Any], complaint: str) -> None:
    variant = launcher.find(90, a="tensor_depth_masked", b="tensor_lines", dtype="bf16")
    (found,) = aot.complaints(kernel_of(variant, 90, **change), variant)
    assert complaint in found


def test_the_bias_may_be_loaded() -> None:
    variant = launcher.find(
        90, a="tensor_depth", b="tensor_depth", dtype="bf16", epilogue="bias_relu"
    )
    assert aot.complaints(kernel_of(variant, 90, found={"load": 2}), variant) == []
    assert aot.complaints(kernel_of(variant, 90, found={"load": 6}), variant)


def test_no_kernels_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kept.sm_90.cubin").write_bytes(b"")
    for arguments in (("--arch", "7.5"), ("--arch", "9.0", "--only", "no such variant")):
        done = run(tmp_path, *arguments)
        assert done.returncode == 2 and "no kernel for" in done.stderr
    assert (tmp_path / "kept.sm_90.cubin").exists()


def test_shared_memory_of_small_devices() -> None:
    variant = launcher.find(80, a="depth_masked", b="lines", dtype="bf16", store="lines")
    (found,) = aot.complaints(kernel_of(variant, 80, shared=110000), variant)
    assert "of 101376" in found


def test_names_are_unique() -> None:
    for arch in launcher.catalogue.ARCHITECTURES:
        names = [v.name for v in launcher.catalogue.variants(arch)]
        assert len(names) == len(set(names))
