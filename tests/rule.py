"""The rule of every numeric test, and the exact comparison of bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tests.arrays import ROUNDOFF, SMALLEST, Array, decode, encode, flushed


def assert_within_twice(
    ours: npt.ArrayLike,
    native: npt.ArrayLike,
    reference: npt.NDArray[np.floating],
    what: str,
    *,
    dtype: str,
    flushed_below: float = 0.0,
    noise: float = 0.0,
) -> None:
    """Assert `max|ours - reference| <= 2 * max|native - reference| + tiny`.

    `native` is the framework's own result in the same dtype. `tiny` is one unit in the last place
    of the largest reference element: what must be granted where the native result happens to be
    exact, as it may where there are few elements; `flushed_below` is granted where numbers as small
    may be taken for zero. The native error counts as `noise` where it is smaller: where many
    operations follow one another, their errors may happen to cancel. NaN and infinities must be
    where the reference, rounded to `dtype`, has them, and where the native result has them.
    """
    ours, native = (np.asarray(_wide(a, reference.dtype)) for a in (ours, native))
    assert ours.shape == reference.shape, (
        f"{what}: expected shape {reference.shape}, got {ours.shape}"
    )
    assert native.shape == reference.shape, f"{what}: the native result has shape {native.shape}"
    rounded = decode(encode(reference, dtype))
    _assert_same_nonfinite(native, rounded, f"{what}: native against reference")
    _assert_same_nonfinite(ours, rounded, f"{what}: ours against reference")

    finite = np.isfinite(rounded)
    if not finite.any():
        return
    our_error, native_error, scale = (
        np.where(finite, np.abs(a), 0)
        for a in (
            np.subtract(ours, reference, where=finite, out=np.zeros_like(reference)),
            np.subtract(native, reference, where=finite, out=np.zeros_like(reference)),
            reference,
        )
    )
    tiny = 2 * ROUNDOFF[dtype] * scale.max() + SMALLEST[dtype] + max(flushed(dtype), flushed_below)
    limit = 2 * max(native_error.max(), noise) + tiny
    if our_error.max() <= limit:
        return
    worst = tuple(int(i) for i in np.unravel_index(our_error.argmax(), our_error.shape))
    ratio = our_error.max() / native_error.max() if native_error.any() else np.inf
    raise AssertionError(
        f"{what} ({dtype}): error {our_error.max():.3e} is above the limit {limit:.3e}: "
        f"{ratio:.2f} times the native error "
        f"{native_error.max():.3e} (tiny {tiny:.1e}). Worst at {worst}: ours {ours[worst]!r}, "
        f"native {native[worst]!r}, reference {reference[worst]!r}"
    )


def _wide(array: npt.ArrayLike, kind: np.dtype) -> Array:
    array = np.asarray(array)
    return (decode(array) if array.dtype == np.uint16 else array).astype(kind)


def _assert_same_nonfinite(got: Array, expected: Array, what: str) -> None:
    for name, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        different = np.argwhere(test(got) != test(expected))
        if len(different):
            worst = tuple(int(i) for i in different[0])
            raise AssertionError(
                f"{what}: {name} differs at {len(different)} elements, first at {worst}: expected "
                f"{expected[worst]!r}, got {got[worst]!r}"
            )


def bits(array: npt.ArrayLike) -> Array:
    """The bit pattern, for exact comparison; every NaN counts as the same."""
    array = np.ascontiguousarray(array)
    patterns = array.view(f"u{array.itemsize}").reshape(array.shape).copy()
    patterns[np.isnan(decode(array))] = np.iinfo(patterns.dtype).max
    return patterns


def assert_same_bits(got: npt.ArrayLike, expected: npt.ArrayLike, what: str) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape and got.dtype == expected.dtype, (
        f"{what}: expected {expected.dtype}{expected.shape}, got {got.dtype}{got.shape}"
    )
    different = np.argwhere(bits(got) != bits(expected))
    if len(different):
        worst = tuple(int(i) for i in different[0])
        raise AssertionError(
            f"{what}: {len(different)} of {got.size} elements differ in their bits, first at "
            f"{worst}: expected {decode(expected)[worst]!r}, got {decode(got)[worst]!r}"
        )
