"""`lstm` and `lstm_cell`: a whole LSTM layer, or one step of it, in one kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from twinfuse import _backend, _core
from twinfuse.tensorflow import _binding, _calls, _lstm_vectorize  # noqa: F401
from twinfuse.tensorflow._lstm_gradients import CELL, LAYER, Kind, find_kernel, forward
from twinfuse.tensorflow._lstm_reference import NUMBERS, Operands, Settings

# What TensorFlow's functions of these names compute has the same name here.
_FUNCTIONS = {
    **{id(f): "tanh" for f in (tf.tanh, tf.nn.tanh)},
    **{id(f): "sigmoid" for f in (tf.sigmoid, tf.nn.sigmoid)},
    id(tf.nn.relu): "relu",
}


def lstm_cell(
    x: Any,
    states: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any = None,
    *,
    peephole: Any = None,
    norm: Any = None,
    norm_epsilon: float = 1e-3,
    zoneout_hidden: Any = None,
    zoneout_cell: Any = None,
    dropout_input: Any = None,
    dropout_hidden: Any = None,
    activation: Any = "tanh",
    recurrent_activation: Any = "sigmoid",
) -> tuple[tf.Tensor, tf.Tensor]:
    """Compute one step of an LSTM, as `keras.layers.LSTMCell` does.

    Args:
        x: `[B, I]`.
        states: The pair `(h, c)`, both `[B, H]`.
        kernel: `[I, 4H]`, for the gates input, forget, cell, output in this order, as in Keras.
        recurrent_kernel: `[H, 4H]`.
        bias: `[4H]`, or None.
        peephole: `[3, H]`: what input, forget and output gate see of the cell, or None.
        norm: `[2, 4H]`: each row of the products with `kernel` and with `recurrent_kernel` is
            normalised to mean 0 and variance 1, and multiplied by `norm[0]` and `norm[1]`, before
            the bias is added; or None.
        norm_epsilon: What is added to the variance; 1e-3, as in
            `keras.layers.LayerNormalization` (`twinfuse.torch` has the 1e-5 of torch).
        zoneout_hidden: The share of the old state that stays; broadcasts to `[B, H]`, or None. It
            gets no gradient, nor do `zoneout_cell` and the two dropouts.
        zoneout_cell: The same of the cell.
        dropout_input: What `x` is multiplied by for each gate, as the `recurrent_dropout` of Keras
            does with `h`: 0 or 1 / (1 - rate); broadcasts to `[4, B, I]`, or None.
        dropout_hidden: The same of `h`; broadcasts to `[4, B, H]`.
        activation: "tanh", "sigmoid", "relu" or "hard_sigmoid". A callable, or None for linear,
            takes the reference path, with a `FallbackWarning`.
        recurrent_activation: The same, of the gates.

    Returns:
        `(h, c)`, both `[B, H]`. All tensors have one dtype: float32, float64, bfloat16 and float16
        take the fused kernel. A `tf.function` keeps the choice made while it was traced.

    Raises:
        tf.errors.InvalidArgumentError: Shapes or dtypes do not fit (eager).
        ValueError, TypeError: The same while tracing; activations that do not exist.
        twinfuse.FallbackError: The call would fall back and `twinfuse.strict()` is on.
    """
    h, c = run(*_arguments(CELL, locals()))
    return h, c


def lstm(
    x: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any = None,
    initial_state: Any = None,
    *,
    mask: Any = None,
    projection: Any = None,
    peephole: Any = None,
    norm: Any = None,
    norm_epsilon: float = 1e-3,
    zoneout_hidden: Any = None,
    zoneout_cell: Any = None,
    dropout_input: Any = None,
    dropout_hidden: Any = None,
    activation: Any = "tanh",
    recurrent_activation: Any = "sigmoid",
    go_backwards: bool = False,
    time_major: bool = False,
    zero_output_for_mask: bool = False,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Compute a layer of an LSTM over whole sequences, in one direction.

    Args:
        x: `[B, T, I]`.
        kernel: `[I, 4H]`, for the gates input, forget, cell, output in this order, as in Keras.
        recurrent_kernel: `[R, 4H]`; R is H, or the size of the projection.
        bias: `[4H]`, or None.
        initial_state: The pair `(h, c)`, `[B, R]` and `[B, H]`, or None for zeros; so may either
            of them be.
        mask: `[B, T]`, false where a sequence skips the step, or None. Any steps may be skipped.
            States stay; the output is the one of the step before, or 0 if there is none.
        projection: `[H, R]`, or None.
        peephole: `[3, H]`: what input, forget and output gate see of the cell, or None.
        norm: `[2, 4H]`: each row of the products with `kernel` and with `recurrent_kernel` is
            normalised to mean 0 and variance 1, and multiplied by `norm[0]` and `norm[1]`, before
            the bias is added; or None.
        norm_epsilon: What is added to the variance; 1e-3, as in
            `keras.layers.LayerNormalization` (`twinfuse.torch` has the 1e-5 of torch).
        zoneout_hidden: The share of the old state that stays; broadcasts to `[B, T, R]`, or None.
            It gets no gradient, nor do `zoneout_cell` and the two dropouts.
        zoneout_cell: The same of the cell; broadcasts to `[B, T, H]`.
        dropout_input: What `x` is multiplied by for each gate, the same at every step, as the
            `recurrent_dropout` of Keras does with `h`: 0 or 1 / (1 - rate); broadcasts to
            `[4, B, I]`, or None.
        dropout_hidden: The same of `h`; broadcasts to `[4, B, R]`.
        activation: "tanh", "sigmoid", "relu" or "hard_sigmoid". A callable, or None for linear,
            takes the reference path, with a `FallbackWarning`.
        recurrent_activation: The same, of the gates.
        go_backwards: From the last step to the first.
        time_major: Whatever has steps is `[T, B, ...]`, the mask `[T, B]`.
        zero_output_for_mask: The output of a step that is skipped is 0.

    Returns:
        `(outputs, h, c)`: `[B, T, R]`, in the order of time also with `go_backwards`, and the state
        behind the last step, `[B, R]` and `[B, H]`. All tensors but the mask have one dtype:
        float32, float64, bfloat16 and float16 take the fused kernel. A `tf.function` keeps the
        choice made while it was traced.

    Raises:
        tf.errors.InvalidArgumentError: Shapes or dtypes do not fit (eager).
        ValueError, TypeError: The same while tracing; activations that do not exist.
        twinfuse.FallbackError: The call would fall back and `twinfuse.strict()` is on.
    """
    outputs, h, c = run(*_arguments(LAYER, locals()))
    return outputs, h, c


def run(
    kind: Kind, operands: Operands, settings: Settings, sequence: bool = True
) -> list[tf.Tensor]:
    """Take the path that serves the call; `sequence` is as in `forward`."""
    if _backend.requested == "reference":
        return kind.reference(operands, settings)
    _, reason = _choose(kind, operands, settings)
    if not reason:
        try:
            return forward(kind, operands, settings, sequence)
        except tf.errors.UnimplementedError as error:
            reason = error.message
    _backend.fall_back(kind.name, reason)
    return kind.reference(operands, settings)


def _setting(kind: Kind, name: str, given: Any) -> Any:
    if name == "norm_epsilon":
        if not float(given) >= 0:
            _calls.refuse(kind.name, name, "a number that is not negative", given)
        return repr(float(given))
    return _activation(kind, name, given) if name.endswith("activation") else bool(given)


def _activation(kind: Kind, name: str, given: Any) -> str | Callable[[Any], Any]:
    if given is None or given == "linear":
        return tf.identity
    if isinstance(given, str) and given not in NUMBERS:
        names = ", ".join(f'"{known}"' for known in NUMBERS)
        expected = f'{names}, "linear" or a function'
        raise ValueError(f'{kind.name}: {name}: expected {expected}, got "{given}"')
    return _FUNCTIONS.get(id(given), given)


def _arguments(kind: Kind, given: dict[str, Any]) -> tuple[Kind, Operands, Settings]:
    """What a public function was given, as tensors; numbers without a dtype get that of x."""
    x = tf.convert_to_tensor(given["x"], name="x")
    states = given["states"] if kind is CELL else given["initial_state"]
    if states is None:
        states = ()
    elif not isinstance(states, (tuple, list)) or len(states) != 2:
        got = f"{len(states)} of them" if isinstance(states, (tuple, list)) else "one tensor"
        _calls.refuse(kind.name, "the state", "a pair of tensors (h, c)", got)
    given = {**given, "x": x, **dict(zip("hc", states))}
    mask = given.pop("mask", None)
    tensors = {
        name: tf.convert_to_tensor(given[name], dtype_hint=x.dtype.base_dtype, name=name)
        for name in Operands._fields
        if given.get(name) is not None
    }
    if mask is not None:
        tensors["mask"] = tf.cast(mask, tf.bool)
    settings = {name: _setting(kind, name, given[name]) for name in kind.settings}
    return kind, Operands(**tensors), Settings(**settings)


def _choose(kind: Kind, operands: Operands, settings: Settings) -> tuple[str, str]:
    """`(kernel name, "")`, or `("", why the reference path serves it)`; raises if none can."""
    _check(kind, operands, settings)
    for function in (settings.activation, settings.recurrent_activation):
        if not isinstance(function, str):
            name = "linear" if function is tf.identity else None
            name = name or getattr(function, "__name__", type(function).__name__)
            return "", f"no kernel computes the activation {name}"
    return find_kernel(kind, "forward", operands)


def _check(kind: Kind, o: Operands, settings: Settings) -> None:
    """Raise for what no path accepts, as far as is known now; the op looks again."""
    dtype, found = o.x.dtype, dict[str, list[int | None] | None]()
    for name, tensor in zip(Operands._fields, o):
        if tensor is None:
            continue
        if name != "mask" and tensor.dtype != dtype:
            expected = f"dtype {dtype.name} as x has"
            _calls.refuse(kind.name, name, expected, tensor.dtype.name, TypeError)
        shape = tensor.shape
        found[name] = None if shape.rank is None else shape.as_list()

    def size(name: str, rank: int, dim: int) -> int | None:
        sizes = found[name]
        return sizes[dim] if sizes is not None and len(sizes) == rank else None

    layer = kind is LAYER
    gates = size("kernel", 2, 1)
    if gates is not None and gates % 4:
        _calls.refuse(kind.name, "kernel", "[I, 4H]", _calls.text(o.kernel))
    units = None if gates is None else gates // 4
    hidden = size("recurrent_kernel", 2, 0)
    hidden = units if hidden is None and o.projection is None else hidden
    of_batch, of_steps = (1, 0) if settings.time_major else (0, 1)
    batch = size("x", 3, of_batch) if layer else size("x", 2, 0)
    steps = size("x", 3, of_steps) if layer else None
    sequence = [steps, batch] if settings.time_major else [batch, steps]
    inputs = size("kernel", 2, 0)
    state = hidden if o.projection is not None else units
    shapes: dict[str, list[int | None]] = {
        "x": [*(sequence if layer else [batch]), inputs],
        "kernel": [inputs, gates],
        "recurrent_kernel": [state, gates],
        "bias": [gates],
        "projection": [units, hidden],
        "peephole": [3, units],
        "norm": [2, gates],
        "h": [batch, state],
        "c": [batch, units],
        "mask": sequence,
    }
    for name, expected_sizes in shapes.items():
        sizes = found.get(name)
        if sizes is None or _fit(sizes, expected_sizes):
            continue
        text = ", ".join("any" if size is None else str(size) for size in expected_sizes)
        _calls.refuse(kind.name, name, f"[{text}]", _calls.text(getattr(o, name)))


def _fit(sizes: list[int | None], expected: list[int | None]) -> bool:
    return len(sizes) == len(expected) and all(
        a == b or a is None or b is None for a, b in zip(sizes, expected)
    )


def _on_gpu(kind: Kind, o: Operands, settings: Settings, index: int) -> str:
    """What takes the steps, if the sizes are known."""
    *first, gates = o.x.shape[0], o.x.shape[1], o.kernel.shape[1]
    batch, steps = reversed(first) if settings.time_major else first
    steps = steps if kind is LAYER else 1
    if None in (batch, steps, gates):
        return ""
    tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    sizes = {"steps": steps, "batch": batch, "units": gates // 4}
    return _core.lstm_gpu_kernel(False, o.x.dtype.name, tf32, index, **sizes)


def _explain(kind: Kind, function: Callable[..., Any]) -> Callable[..., _backend.Report]:
    signature = inspect.signature(function)

    def explain(*args: Any, **kwargs: Any) -> _backend.Report:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        _, operands, settings = _arguments(kind, call.arguments)
        if _backend.requested == "reference":
            choice = ("reference", "", "asked for by use_backend")
        else:
            device, index = _binding.device_type(operands.x), _binding.device_index(operands.x)
            choice = _core.reported(*_choose(kind, operands, settings), device, index)
            if choice[0] == "cuda" and (own := _on_gpu(kind, operands, settings, index)):
                choice = (choice[0], f"{choice[1]} ({own})", choice[2])
        return _backend.Report([_backend.Choice(kind.name, *choice)])

    return explain


lstm.__twinfuse_explain__ = _explain(LAYER, lstm)  # type: ignore[attr-defined]
lstm_cell.__twinfuse_explain__ = _explain(CELL, lstm_cell)  # type: ignore[attr-defined]
_binding.do_not_convert(lstm)
_binding.do_not_convert(lstm_cell)
