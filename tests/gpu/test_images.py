"""Machine code in the library: packed and unpacked again, and what is said where it is damaged."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import skip
from tests.core_api import OK, last_error
from tests.gpu import replay
from tests.gpu import test_driver_failures as products
from tests.gpu import test_lstm_driver_failures as lstms
from tests.gpu.fake_driver import Driver, Launch, driver_fixture  # noqa: F401
from tests.gpu.replay import GpuLender
from twinfuse import _core

native: Any = pytest.importorskip("tests._core.native")
embed = replay.aot.embed
NOISE = random.Random(0)
# Distances from 1 to the largest, lengths to the largest, and what has no pattern.
WORDS = [NOISE.randbytes(NOISE.randint(1, 300)) for _ in range(60)]
CODES = {
    "empty": b"",
    "byte": b"\x7f",
    "zeros": bytes(100_000),
    "noise": NOISE.randbytes(70_000),
    "words": b"".join(NOISE.choice(WORDS) for _ in range(1000)),
    "far": b"".join([WORDS[0], NOISE.randbytes((1 << 15) - 300), WORDS[0]]),
}
LAYER = products.CASES[0]
SEQUENCE = lstms.CASES[2]


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_what_is_packed_is_unpacked(code: bytes) -> None:
    packed = embed.pack(code)
    assert packed == embed.pack(code)
    assert native.unpack(packed, len(code), "k") == code


@pytest.mark.parametrize("strategy", [zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE])
def test_blocks_of_every_kind_are_unpacked(strategy: int) -> None:
    for level in (0, 1, 9):
        for code in CODES.values():
            stream = zlib.compressobj(level, strategy=strategy)
            packed = stream.compress(code) + stream.flush()
            assert native.unpack(packed, len(code), "k") == code


def refused(packed: bytes, size: int) -> str:
    with pytest.raises(RuntimeError) as error:
        native.unpack(packed, size, "multiply-it")
    return str(error.value)


def test_another_size_than_was_packed_is_told() -> None:
    for code in CODES.values():
        packed = embed.pack(code)
        for size in {0, len(code) - 1, len(code) + 1, 2 * len(code) + 1} - {-1, len(code)}:
            text = refused(packed, size)
            assert "kernel multiply-it" in text
            assert f"its {len(packed)} bytes do not unpack to {size};" in text


def test_what_is_cut_off_is_told() -> None:
    code = CODES["words"][:5000]
    packed = embed.pack(code)
    for end in range(len(packed)):
        assert "kernel multiply-it" in refused(packed[:end], len(code))


def test_every_bit_that_changes_is_told() -> None:
    """But for the few that change nothing, such as those that fill up the last byte."""
    for code in (CODES["words"][:5000], CODES["noise"][:300]):
        packed, unnoticed = embed.pack(code), 0
        for bit in range(8 * len(packed)):
            changed = bytearray(packed)
            changed[bit // 8] ^= 1 << bit % 8
            try:
                assert native.unpack(bytes(changed), len(code), "multiply-it") == code
                unnoticed += 1
            except RuntimeError as error:
                assert "kernel multiply-it" in str(error)
        assert unnoticed < 16


def test_noise_is_refused() -> None:
    """With a right header, so that the decoder reads it."""
    for _ in range(3000):
        packed = b"\x78\xda" + NOISE.randbytes(NOISE.randint(0, 400))
        refused(packed, NOISE.randint(0, 2000))


def test_images_are_packed_in_the_library(driver: Driver) -> None:
    library = _core.LIBRARY.read_bytes()
    with driver.stream() as stream:
        assert products.Call(LAYER, False)(GpuLender(stream=stream)) == OK, last_error()
    for launch in driver.launches():
        assert launch.image[:4] == b"\x7fELF"
        assert launch.image not in library
        assert library.count(embed.pack(launch.image)) == 1


def of_a_damaged_library(tmp_path: Path, launch: Launch, program: str) -> str:
    """What two calls in another process print, whose library has another byte in this image."""
    library = bytearray(_core.LIBRARY.read_bytes())
    packed = embed.pack(launch.image)
    at = library.find(packed)
    assert at > 0
    library[at + len(packed) // 2] ^= 1
    damaged = tmp_path / "libtwinfuse.so"
    damaged.write_bytes(library)
    script = f"""
        from pathlib import Path
        from twinfuse import _core
        _core.LIBRARY = Path({str(damaged)!r})
        from tests.gpu import fake_driver, test_images
        driver = fake_driver.load()
        held = driver.held
        for _ in range(2):
            {program}
            print(status, test_images.last_error())
            assert driver.held == held
    """
    first, second = products.printed_by(script).splitlines()
    assert first == second
    return first


def text_of(kernel: str, launch: Launch) -> str:
    sizes = f"its {len(embed.pack(launch.image))} bytes do not unpack to {len(launch.image)}"
    return f"the machine code of kernel {kernel} in libtwinfuse.so is damaged: {sizes}"


def test_a_damaged_product_is_named(driver: Driver, tmp_path: Path) -> None:
    with driver.stream() as stream:
        assert products.Call(LAYER, False)(GpuLender(stream=stream)) == OK, last_error()
    launch = driver.launches()[0]
    program = (
        "status = test_images.products.Call(test_images.LAYER, False)(test_images.GpuLender())"
    )
    kernel = replay.kernel_of(launch, "float32")["name"]
    said = of_a_damaged_library(tmp_path, launch, program)
    assert said.startswith(f"{products.DRIVER_ERROR} linear_relu: {text_of(kernel, launch)}")


def test_a_damaged_lstm_is_named(driver: Driver, tmp_path: Path) -> None:
    if not native.cuda_kernels():
        skip("nvcc", "this build has no kernels of CUDA C++")
    with driver.stream() as stream:
        assert lstms.Call(SEQUENCE)(stream=stream)[1] == 0, last_error()
    launch = next(launch for launch in driver.launches() if launch.entry.startswith("lstm"))
    program = "status = test_images.lstms.Call(test_images.SEQUENCE)()[1]"
    said = of_a_damaged_library(tmp_path, launch, program)
    # The first kernel that is asked for need not be the one that is launched in the end.
    offsets = {entry: offset for arch, entry, _, offset in native.cuda_kernels() if arch == 90}
    same = [entry for entry, offset in offsets.items() if offset == offsets[launch.entry]]
    texts = tuple(f"{lstms.DRIVER_ERROR} lstm: {text_of(entry, launch)}" for entry in same)
    assert said.startswith(texts)
