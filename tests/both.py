"""One problem through `twinfuse.torch` and `twinfuse.tensorflow`, as arrays that can be compared.

`python -m tests.both torch,tensorflow 2` imports the frameworks in that order, gives each so many
threads, runs the whole table, and prints one digest of the bits per case as JSON. No framework is
imported before it is used.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable

import numpy as np

from tests.cases import (
    CASES,
    DTYPES,
    Array,
    Operand,
    Problem,
    build,
)
from tests.rule import bits

Arrays = dict[str, Array]


def through_torch(problem: Problem) -> Arrays:
    """Output and gradients of the views themselves, in storage dtype."""
    import torch

    import twinfuse.torch

    def view(operand: Operand) -> torch.Tensor:
        base = torch.from_numpy(operand.base)
        base = base.view(torch.bfloat16) if operand.base.dtype == np.uint16 else base
        return torch.as_strided(base, operand.sizes, operand.strides, operand.offset)

    def store(tensor: torch.Tensor) -> Array:
        tensor = tensor.detach().contiguous()
        return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

    named = {"input": problem.input, "weight": problem.weight, "bias": problem.bias}
    leaves = {name: view(a).requires_grad_() for name, a in named.items() if a is not None}
    output = twinfuse.torch.linear_relu(*leaves.values())
    grads = torch.autograd.grad(output, tuple(leaves.values()), view(problem.grad_output))
    return {"output": store(output)} | {
        f"grad_{name}": store(grad) for name, grad in zip(leaves, grads, strict=True)
    }


def through_tensorflow(problem: Problem) -> Arrays:
    """As `through_torch`, from contiguous copies and with the weight stored as `[K, N]`."""
    import tensorflow as tf

    import twinfuse.tensorflow

    def constant(array: Array) -> tf.Tensor:
        tensor = tf.constant(np.ascontiguousarray(array))
        return tf.bitcast(tensor, tf.bfloat16) if array.dtype == np.uint16 else tensor

    def store(tensor: tf.Tensor) -> Array:
        is_bfloat16 = tensor.dtype == tf.bfloat16
        return (tf.bitcast(tensor, tf.uint16) if is_bfloat16 else tensor).numpy()

    leaves = {
        "input": constant(problem.input.contiguous),
        "weight": constant(problem.weight.contiguous.T),
    }
    if problem.bias is not None:
        leaves["bias"] = constant(problem.bias.contiguous)
    with tf.GradientTape() as tape:
        tape.watch(list(leaves.values()))
        output = twinfuse.tensorflow.linear_relu(*leaves.values())
    grads = tape.gradient(output, list(leaves.values()), constant(problem.grad_output.contiguous))
    results = {"output": store(output)}
    for name, grad in zip(leaves, grads, strict=True):
        results[f"grad_{name}"] = store(grad).T if name == "weight" else store(grad)
    return results


THROUGH: dict[str, Callable[[Problem], Arrays]] = {
    "torch": through_torch,
    "tensorflow": through_tensorflow,
}


def comparable(problem: Problem, results: Arrays) -> Arrays:
    """Without gradients where the frameworks' rules for NaN and infinity differ."""
    return {"output": results["output"]} if problem.case.values == "nonfinite" else results


def digests(framework: str) -> dict[str, str]:
    """One digest of all bits per case and dtype."""
    result = {}
    for case in CASES:
        for dtype in DTYPES:
            problem = build(case, dtype)
            digest = hashlib.sha256()
            for name, array in comparable(problem, THROUGH[framework](problem)).items():
                digest.update(f"{name}{array.shape}{array.dtype}".encode() + bits(array).tobytes())
            result[f"{case.id} {dtype}"] = digest.hexdigest()
    return result


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
