"""One problem through `twinfuse.torch` and `twinfuse.tensorflow`, as arrays that can be compared.

`python -m tests.both torch,tensorflow 2` imports the frameworks in that order, gives each so many
threads, runs the whole table, and prints one digest of the bits per case as JSON. No framework is
imported before it is used.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import sys
from collections.abc import Callable

import numpy as np

from tests import both_lstm
from tests.arrays import DTYPES, Array, Operand
from tests.cases import CASES as LINEAR
from tests.conv_case import ConvCase
from tests.conv_cases import CASES as CONV
from tests.problem import Case, Problem, build, relaid
from tests.rule import bits

Arrays = dict[str, Array]


def through_torch(problem: Problem, layout: str = "contiguous") -> Arrays:
    """Output and gradients of the views themselves, in storage dtype and with torch's strides.

    `layout` is unused: torch's rules decide what the output of a convolution has.
    """
    import torch

    import twinfuse.torch

    def view(operand: Operand) -> torch.Tensor:
        base = torch.from_numpy(operand.base)
        base = base.view(torch.bfloat16) if operand.base.dtype == np.uint16 else base
        return torch.as_strided(base, operand.sizes, operand.strides, operand.offset)

    def store(tensor: torch.Tensor) -> Array:
        tensor = tensor.detach()
        return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

    named = {"input": problem.input, "weight": problem.weight, "bias": problem.bias}
    leaves = {name: view(a).requires_grad_() for name, a in named.items() if a is not None}
    bias = leaves.get("bias")
    if isinstance(problem.case, ConvCase):
        # The operator, unlike the function over it, takes padding that differs between the ends.
        operation = getattr(torch.ops.twinfuse, problem.case.name)
        rest = problem.case.torch_arguments
    else:
        operation, rest = twinfuse.torch.linear_relu, ()
    output = operation(leaves["input"], leaves["weight"], bias, *rest)
    grads = torch.autograd.grad(output, tuple(leaves.values()), view(problem.grad_output))
    return {"output": store(output)} | {
        f"grad_{name}": store(grad) for name, grad in zip(leaves, grads, strict=True)
    }


def through_tensorflow(problem: Problem, layout: str = "contiguous") -> Arrays:
    """As `through_torch`, from contiguous copies in TensorFlow's order of dimensions.

    Images have their channels last where `layout` is "channels_last", else first.
    """
    import tensorflow as tf

    import twinfuse.tensorflow

    def constant(array: Array) -> tf.Tensor:
        tensor = tf.constant(np.ascontiguousarray(array))
        return tf.bitcast(tensor, tf.bfloat16) if array.dtype == np.uint16 else tensor

    def store(tensor: tf.Tensor) -> Array:
        is_bfloat16 = tensor.dtype == tf.bfloat16
        return (tf.bitcast(tensor, tf.uint16) if is_bfloat16 else tensor).numpy()

    images, filters, arguments = list(range(problem.input.view.ndim)), [1, 0], {}
    operation = twinfuse.tensorflow.linear_relu
    if isinstance(problem.case, ConvCase):
        operation = getattr(twinfuse.tensorflow, problem.case.name)
        data_format = "channels_last" if layout == "channels_last" else "channels_first"
        arguments = problem.case.tensorflow_arguments(data_format)
        filters = [*images[2:], 1, 0]
        images = [0, *images[2:], 1] if data_format == "channels_last" else images

    leaves = {
        "input": constant(problem.input.contiguous.transpose(images)),
        "weight": constant(problem.weight.contiguous.transpose(filters)),
    }
    if problem.bias is not None:
        leaves["bias"] = constant(problem.bias.contiguous)
    with tf.GradientTape() as tape:
        tape.watch(list(leaves.values()))
        output = operation(*leaves.values(), **arguments)
    grad_output = constant(problem.grad_output.contiguous.transpose(images))
    grads = tape.gradient(output, list(leaves.values()), grad_output)
    results = {"output": store(output).transpose(np.argsort(images))}
    orders = {"input": images, "weight": filters, "bias": [0]}
    for name, grad in zip(leaves, grads, strict=True):
        results[f"grad_{name}"] = store(grad).transpose(np.argsort(orders[name]))
    return results


THROUGH: dict[str, Callable[..., Arrays]] = {
    "torch": through_torch,
    "tensorflow": through_tensorflow,
}


def output_layout(problem: Problem, results: Arrays) -> str:
    """Which of the two orders of its sums a convolution had: its output tells."""
    output = results["output"]
    last = problem.case.op == "conv_relu" and output.strides[1] == output.itemsize
    return "channels_last" if last else "contiguous"


def comparable(problem: Problem, results: Arrays) -> Arrays:
    """Without gradients where the frameworks' rules for NaN and infinity differ."""
    return {"output": results["output"]} if problem.case.values == "nonfinite" else results


# Every problem in its own layout; convolutions, whose bits depend on one, in both.
TABLES: list[tuple[Case, str]] = [
    *((case, "") for case in LINEAR),
    # torch refuses kernels without elements.
    *(
        (case, layout)
        for case in CONV
        for layout in ("", "contiguous", "channels_last")
        if 0 not in case.weight_sizes
    ),
]


def problem_in(case: Case, dtype: str, layout: str) -> Problem:
    problem = build(case, dtype)
    return relaid(problem, layout) if layout else problem


def digests(framework: str) -> dict[str, str]:
    """One digest of all bits per case, dtype and layout of the output."""
    result = {}
    for (case, layout), dtype in itertools.product(TABLES, DTYPES):
        problem = problem_in(case, dtype, layout)
        results = THROUGH[framework](problem, layout)
        digest = hashlib.sha256()
        for name, array in comparable(problem, results).items():
            digest.update(f"{name}{array.shape}{array.dtype}".encode() + bits(array).tobytes())
        got = output_layout(problem, results)
        result[f"{case.op} {case.id} {dtype} {got}"] = digest.hexdigest()
    return result | both_lstm.digests(framework)


def main() -> None:
    order, threads = sys.argv[1].split(","), int(sys.argv[2])
    for framework in order:
        module = importlib.import_module(framework)
        if framework == "torch":
            module.set_num_threads(threads)
        else:
            module.config.threading.set_intra_op_parallelism_threads(threads)
        importlib.import_module(f"twinfuse.{framework}")
    print(json.dumps({framework: digests(framework) for framework in order}))


if __name__ == "__main__":
    main()
