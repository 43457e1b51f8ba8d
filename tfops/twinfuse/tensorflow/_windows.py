"""How a convolution's windows lie, from the arguments of users to the attributes of the ops."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from twinfuse.tensorflow import _calls

Numbers = int | Sequence[int] | None
Padding = str | Sequence[Sequence[int]]

_LARGEST = 2**31 - 1
_FORMATS: dict[Any, str] = {
    **dict.fromkeys((None, "channels_last", "NWC", "NHWC"), "channels_last"),
    **dict.fromkeys(("channels_first", "NCW", "NCHW"), "channels_first"),
}


class Windows(NamedTuple):
    """The attributes of the fused ops, with one entry per spatial dimension."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: str  # VALID, SAME, CAUSAL or EXPLICIT
    explicit_paddings: tuple[int, ...]  # two per spatial dimension, zeros before and after
    data_format: str  # channels_last or channels_first

    @classmethod
    def of(cls, node: Any) -> Windows:
        """The attributes of a node, which has lists and, in graphs, bytes."""

        def read(name: str) -> Any:
            value = node.get_attr(name)
            return tf.compat.as_str(value) if isinstance(value, (bytes, str)) else tuple(value)

        return cls(*map(read, cls._fields))

    @property
    def spatial(self) -> int:
        return len(self.strides)

    @property
    def op(self) -> str:
        """What users call the op."""
        return f"conv{self.spatial}d_relu"

    @property
    def channels(self) -> int:
        """Where x and y have their channels, counted from the end."""
        return -1 if self.data_format == "channels_last" else -1 - self.spatial


def windows(spatial: int, *arguments: Any) -> Windows:
    """The attributes for strides, padding, data_format and dilations as users give them."""
    try:
        return _parsed(spatial, *arguments)
    except TypeError:  # lists have no hash
        return _parse(spatial, *arguments)


def _parse(spatial: int, strides: Any, padding: Any, data_format: Any, dilations: Any) -> Windows:
    op = f"conv{spatial}d_relu"
    if data_format not in _FORMATS:
        names = ", ".join(repr(name) for name in _FORMATS if name)
        _calls.refuse(op, "data_format", f"one of {names}", repr(data_format))
    layout = _FORMATS[data_format]
    return Windows(
        _numbers(op, "strides", strides, spatial, layout),
        _numbers(op, "dilations", dilations, spatial, layout),
        *_pads(op, padding, spatial, layout),
        layout,
    )


_parsed = functools.lru_cache(maxsize=4096)(_parse)


def _inside(values: list[Any], spatial: int, layout: str) -> tuple[list[Any], list[Any]]:
    """The entries of the spatial dimensions, and those of batch and channels."""
    first = 1 if layout == "channels_last" else 2
    end = first + spatial
    return values[first:end], values[:first] + values[end:]


def _numbers(op: str, name: str, value: Any, spatial: int, layout: str) -> tuple[int, ...]:
    values = [1] if value is None else value if isinstance(value, Sequence) else np.ravel(value)
    numbers = [int(number) for number in values]
    if len(numbers) == spatial + 2:
        numbers, others = _inside(numbers, spatial, layout)
        if others != [1, 1]:
            kind, expected = tf.errors.UnimplementedError, "1 for the batch and the channels"
            _calls.refuse(op, name, expected, value, tracing=kind, eager=kind)
    if len(numbers) not in (1, spatial):
        counts = " or ".join(map(str, sorted({1, spatial, spatial + 2})))
        _calls.refuse(op, name, f"{counts} numbers", value, eager=ValueError)
    if not all(1 <= number <= _LARGEST for number in numbers):
        _calls.refuse(op, name, "numbers from 1 to 2^31 - 1", value)
    return tuple(numbers * spatial if len(numbers) == 1 else numbers)


def _pads(op: str, padding: Any, spatial: int, layout: str) -> tuple[str, tuple[int, ...]]:
    if not isinstance(padding, (list, tuple)):
        return _word(op, padding, spatial), ()
    pairs = all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in padding)
    if not pairs or len(padding) != spatial + 2:
        _calls.refuse(op, "padding", f"{spatial + 2} pairs", padding, eager=ValueError)
    inside, outside = _inside([tuple(map(int, pair)) for pair in padding], spatial, layout)
    if outside != [(0, 0), (0, 0)]:
        _calls.refuse(op, "padding", "no zeros in the batch and the channels", padding)
    zeros = tuple(number for pair in inside for number in pair)
    if not all(0 <= number <= _LARGEST for number in zeros):
        _calls.refuse(op, "padding", "numbers from 0 to 2^31 - 1", padding)
    return "EXPLICIT", zeros


def _word(op: str, padding: Any, spatial: int) -> str:
    words = ("VALID", "SAME", "CAUSAL") if spatial == 1 else ("VALID", "SAME")
    expected = f"{', '.join(map(repr, words))} or a list of {spatial + 2} pairs"
    if not isinstance(padding, str):
        _calls.refuse(op, "padding", expected, repr(padding), tracing=TypeError, eager=TypeError)
    if padding.upper() not in words:
        explicit = {"eager": ValueError} if padding == "EXPLICIT" else {}
        _calls.refuse(op, "padding", expected, repr(padding), **explicit)
    return padding.upper()
