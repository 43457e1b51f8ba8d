"""`lstm` and `lstm_cell`: a whole LSTM layer, or one step of it, in one kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from twinfuse import _backend, _core
from twinfuse.tensorflow import _binding, _calls, _lstm_vectorize  # noqa: F401
from twinfuse.tensorflow._lstm_gradients import CELL, LAYER, Kind, forward
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
    zoneout_hidden: Any = None,
    zoneout_cell: Any = None,
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
        zoneout_hidden: The share of the old state that stays; broadcasts to `[B, H]`, or None. It
            gets no gradient, nor does `zoneout_cell`.
        zoneout_cell: The same of the cell.
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
    zoneout_hidden: Any = None,
    zoneout_cell: Any = None,
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
        zoneout_hidden: The share of the old state that stays; broadcasts to `[B, T, R]`, or None.
            It gets no gradient, nor does `zoneout_cell`.
        zoneout_cell: The same of the cell; broadcasts to `[B, T, H]`.
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
    tensors["mask"] = None if mask is None else tf.cast(mask, tf.bool)
    settings: dict[str, Any] = {
        name: _activation(kind, name, given[name])
        if name.endswith("activation")
        else bool(given[name])
        for name in kind.settings
    }
    operands = Operands(**{**dict.fromkeys(Operands._fields), **tensors})
    return kind, operands, Settings(**settings)


def _choose(kind: Kind, operands: Operands, settings: Settings) -> tuple[str, str]:
    """`(kernel name, "")`, or `("", why the reference path serves it)`; raises if none can."""
    _check(kind, operands, settings)
    for function in (settings.activation, settings.recurrent_activation):
        if not isinstance(function, str):
            name = "linear" if function is tf.identity else None
            name = name or getattr(function, "__name__", type(function).__name__)
            return "", f"no kernel computes the activation {name}"
    x = operands.x
    return _binding.find_kernel(f"{kind.name}_forward", x.dtype, _binding.device_type(x))


def _check(kind: Kind, o: Operands, settings: Settings) -> None:
    """Raise for what no path accepts, as far as is known now; the op looks again."""
    for name, tensor in o._asdict().items():
        if name == "mask" or tensor is None or tensor.dtype == o.x.dtype:
            continue
        expected = f"dtype {o.x.dtype.name} as x has"
        _calls.refuse(kind.name, name, expected, tensor.dtype.name, TypeError)
    layer = kind is LAYER
    units: int | None = None
    if o.kernel.shape.rank == 2 and o.kernel.shape[1] is not None:
        if o.kernel.shape[1] % 4:
            _calls.refuse(kind.name, "kernel", "[I, 4H]", _calls.text(o.kernel))
        units = o.kernel.shape[1] // 4
    gates = None if units is None else 4 * units
    hidden = o.recurrent_kernel.shape[0] if o.recurrent_kernel.shape.rank == 2 else None
    hidden = units if hidden is None and o.projection is None else hidden
    order = (0, 1) if settings.time_major else (1, 0)
    x = o.x.shape
    batch = (x[order[1]] if layer else x[0]) if x.rank == 2 + layer else None
    steps = x[order[0]] if x.rank == 3 and layer else None
    sequence = [steps, batch] if settings.time_major else [batch, steps]
    inputs = o.kernel.shape[0] if o.kernel.shape.rank == 2 else None
    state = hidden if o.projection is not None else units
    shapes: dict[str, list[int | None]] = {
        "x": [*(sequence if layer else [batch]), inputs],
        "kernel": [inputs, gates],
        "recurrent_kernel": [state, gates],
        "bias": [gates],
        "projection": [units, hidden],
        "peephole": [3, units],
        "h": [batch, state],
        "c": [batch, units],
        "mask": sequence,
    }
    for name, shape in shapes.items():
        tensor = getattr(o, name)
        if tensor is not None and not tensor.shape.is_compatible_with(shape):
            text = ", ".join("any" if size is None else str(size) for size in shape)
            _calls.refuse(kind.name, name, f"[{text}]", _calls.text(tensor))


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
        return _backend.Report([_backend.Choice(kind.name, *choice)])

    return explain


lstm.__twinfuse_explain__ = _explain(LAYER, lstm)  # type: ignore[attr-defined]
lstm_cell.__twinfuse_explain__ = _explain(CELL, lstm_cell)  # type: ignore[attr-defined]
_binding.do_not_convert(lstm)
_binding.do_not_convert(lstm_cell)
