"""Train fused networks in several replicas of Keras on TensorFlow, and compare with native ones.

    python -m examples.distributed_keras                  # two replicas, on two devices of the CPU
    TF_CONFIG='...' python -m examples.distributed_keras  # one of several workers

`TF_CONFIG` is TensorFlow's own: {"cluster": {"worker": ["127.0.0.1:4001", "127.0.0.1:4002"]},
"task": {"type": "worker", "index": 0}} starts the first of two. The loop is one of TensorFlow's:
Keras' `fit` does not work with several workers, natively either.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np
import tensorflow as tf
from rich.console import Console

from examples.distributed import chosen_networks, compare, end, parser
from examples.models import Array, KerasModel, channels_last
from examples.networks import Recipe


def make_strategy() -> Any:
    """That of the workers which `TF_CONFIG` names, or one of two devices on this CPU."""
    if os.environ.get("TF_CONFIG"):
        return tf.distribute.MultiWorkerMirroredStrategy()
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


class SpreadModel(KerasModel):
    """Each replica takes its share of a batch; what is asked for is that of the whole batch."""

    def __init__(
        self, strategy: Any, network: str, sizes: tuple[int, ...], recipe: Recipe, fused: bool
    ) -> None:
        with strategy.scope():
            super().__init__(network, sizes, recipe, fused)
            self.model.optimizer.build(self.model.trainable_variables)
        self.strategy = strategy
        self._step = self._spread(self._train)
        self._sum_gradients = self._spread(lambda *batch: self._backward(*batch)[1])

    def _spread(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What `function` returns, summed over the replicas, each of which has its share."""

        @tf.function
        def run(*shares: Any) -> Any:
            results = self.strategy.run(function, shares)
            return tf.nest.map_structure(
                lambda values: self.strategy.reduce("SUM", values, axis=None), results
            )

        return lambda *batch: run(*map(self._shares, batch))

    def _shares(self, batch: Array) -> Any:
        count = self.strategy.num_replicas_in_sync
        return self.strategy.experimental_distribute_values_from_function(
            lambda replica: tf.constant(batch[replica.replica_id_in_sync_group :: count])
        )

    def _backward(self, inputs: Any, targets: Any) -> tuple[Any, list[Any]]:
        with tf.GradientTape() as tape:
            outputs = self.model(inputs, training=True)
            # Keras has divided it by the number of replicas.
            loss = self.model.compute_loss(x=inputs, y=targets, y_pred=outputs)
        return loss, tape.gradient(loss, [v.value for v in self.model.trainable_variables])

    def _train(self, inputs: Any, targets: Any) -> Any:
        loss, gradients = self._backward(inputs, targets)
        self.model.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables))
        return loss

    def step(self, inputs: Array, targets: Array) -> float:
        return float(self._step(channels_last(inputs), targets))

    def gradients(self, inputs: Array, targets: Array) -> list[Array]:
        return [np.asarray(g) for g in self._sum_gradients(channels_last(inputs), targets)]


def build(
    strategy: Any, _: str, network: str, sizes: tuple[int, ...], recipe: Recipe, fused: bool
) -> SpreadModel:
    return SpreadModel(strategy, network, sizes, recipe, fused)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser("distributed_keras", __doc__).parse_args(arguments)
    strategy = make_strategy()
    count = strategy.num_replicas_in_sync
    here = len(strategy.extended.worker_devices)
    is_first = here == count or strategy.cluster_resolver.task_id == 0
    console = Console(width=140, quiet=not is_first)
    where = f"on {count} {'devices' if here == count else 'workers'}"
    problems: list[str] = []
    for name in chosen_networks(chosen.network):
        make = partial(build, strategy)
        problems += compare(console, name, chosen.epochs, "keras", where, make, count, here)
    return end(console, problems)


if __name__ == "__main__":
    sys.exit(main())
