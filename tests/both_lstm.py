"""The LSTM through `twinfuse.torch` and `twinfuse.tensorflow`: what `tests.both` is for other ops.

TensorFlow knows one bias, no packed sequences, and cells without a projection. No framework is
imported before it is used.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

import numpy as np

from tests.arrays import DTYPES, Array
from tests.lstm_case import NOISE, ROWS
from tests.lstm_cases import ONE_BIAS, LstmProblem, build
from tests.rule import bits

Arrays = dict[str, Array]
TABLE = [case for case in ONE_BIAS if not case.lengths and not (case.cell and case.projection)]


GIVEN = {"output": "grad_output", "h_n": "grad_h", "c_n": "grad_c"}
EXTRAS = ("peephole", "norm", *NOISE)
ACTIVATIONS = ("tanh", "sigmoid", "relu", "hard_sigmoid")


def through_torch(problem: LstmProblem) -> Arrays:
    """All results by name, from the views themselves."""
    import torch

    import twinfuse.torch  # noqa: F401
    from tests.torch_cases import array, tensor

    case, named = problem.case, {}
    for name, operand in problem.operands.items():
        view = tensor(operand, problem.dtype)
        named[name] = view.transpose(0, 1) if case.batch_first and name in ROWS else view
    leaves = [named[name].requires_grad_() for name in problem.leaves]
    mask = None if problem.mask is None else torch.from_numpy(problem.mask)
    sizes = problem.batch_sizes
    op = torch.ops.twinfuse.lstm_cell if case.cell else torch.ops.twinfuse.lstm
    options = {} if case.cell else {
        "weight_hr": named.get("weight_hr"),
        "batch_sizes": None if sizes is None else torch.from_numpy(sizes),
        "mask": mask.t() if mask is not None and case.batch_first else mask,
        "reverse": case.reverse,
        "batch_first": case.batch_first,
        "zero_masked_output": case.zero_masked_output,
    }  # fmt: skip
    first = ("input", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    outputs = op(
        *map(named.get, first),
        **{name: named.get(name) for name in EXTRAS},
        norm_epsilon=case.norm_epsilon,
        activation=ACTIVATIONS.index(case.activation),
        recurrent_activation=ACTIVATIONS.index(case.recurrent_activation),
        **options,
    )
    results = dict(zip(("output", "h_n", "c_n")[case.cell :], outputs))
    wanted = [name for name in results if GIVEN[name] in named]
    grads = torch.autograd.grad(
        [results[name] for name in wanted],
        leaves,
        [named[GIVEN[name]] for name in wanted],
        materialize_grads=True,
    )
    results |= {f"grad_{name}": grad for name, grad in zip(problem.leaves, grads)}
    turned = ("output", "grad_input") if case.batch_first else ()
    return {n: array(a.transpose(0, 1) if n in turned else a) for n, a in results.items()}


def through_tensorflow(problem: LstmProblem) -> Arrays:
    """All results by name, from contiguous copies in the layout of Keras."""
    import tensorflow as tf

    import twinfuse.tensorflow as tftf

    case = problem.case

    def turned(name: str, array: Array) -> Array:
        name = name.removeprefix("grad_")
        rows = case.batch_first and (name in ROWS or name == "output")
        return array.swapaxes(0, 1) if rows or name.startswith("weight") else array

    def constant(array: Array) -> tf.Tensor:
        tensor = tf.constant(np.ascontiguousarray(array))
        return tf.bitcast(tensor, tf.bfloat16) if array.dtype == np.uint16 else tensor

    def store(tensor: tf.Tensor) -> Array:
        is_bfloat16 = tensor.dtype == tf.bfloat16
        return (tf.bitcast(tensor, tf.uint16) if is_bfloat16 else tensor).numpy()

    named = {n: constant(turned(n, a.contiguous)) for n, a in problem.operands.items()}
    leaves = {name: named[name] for name in problem.leaves}
    options = {name: named.get(name) for name in EXTRAS} | {
        "norm_epsilon": case.norm_epsilon,
        "activation": case.activation,
        "recurrent_activation": case.recurrent_activation,
    }
    x, *weights = (named.get(n) for n in ("input", "weight_ih", "weight_hh", "bias_ih"))
    states = [named.get("h0"), named.get("c0")]
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        if case.cell:
            outputs = tftf.lstm_cell(x, states, *weights, **options)
        else:
            mask = problem.mask
            outputs = tftf.lstm(
                x,
                *weights,
                None if states == [None, None] else states,
                mask=mask.T if mask is not None and case.batch_first else mask,
                projection=named.get("weight_hr"),
                go_backwards=case.reverse,
                time_major=not case.batch_first,
                zero_output_for_mask=case.zero_masked_output,
                **options,
            )
    results = dict(zip(("output", "h_n", "c_n")[case.cell :], outputs))
    wanted = [name for name in results if GIVEN[name] in named]
    grads = tape.gradient(
        [results[name] for name in wanted],
        leaves,
        [named[GIVEN[name]] for name in wanted],
        unconnected_gradients="zero",
    )
    results |= {f"grad_{name}": grad for name, grad in grads.items()}
    return {name: turned(name, store(a)) for name, a in results.items()}


THROUGH: dict[str, Callable[[LstmProblem], Arrays]] = {
    "torch": through_torch,
    "tensorflow": through_tensorflow,
}


def digests(framework: str) -> dict[str, str]:
    """One digest of all bits per case and dtype."""
    result = {}
    for case, dtype in itertools.product(TABLE, DTYPES):
        problem = build(case, dtype)
        digest = hashlib.sha256()
        for name, array in sorted(THROUGH[framework](problem).items()):
            digest.update(f"{name}{array.shape}{array.dtype}".encode() + bits(array).tobytes())
        result[f"{case.op} {case.id} {dtype}"] = digest.hexdigest()
    return result
