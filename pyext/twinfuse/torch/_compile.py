"""Fused ops in what `torch.compile` compiles; imported when that is asked for, as it is slow."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor import config, list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import (
    CustomGraphPass,
    get_custom_graph_passes,
    get_hash_for_files,
)

import twinfuse
from twinfuse import _backend, _core
from twinfuse.torch import _conv_choice, _operators, conv_relu
from twinfuse.torch.compile import MIN_SIZE
from twinfuse.torch.linear_relu import linear_relu

_PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_LINEAR = (F.linear, torch._C._nn.linear)
_CONVS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2}
_RELUS = (F.relu, torch.relu, torch.relu_)


class FusePass(CustomGraphPass):
    """Puts a fused op in the place of each linear or convolution with a ReLU behind it."""

    def __init__(self, min_size: int = MIN_SIZE) -> None:
        self.min_size = min_size

    def __call__(self, graph: fx.Graph) -> None:
        for relu in list(graph.nodes):
            layer = _layer_before(relu)
            call = layer and self._fused(layer)
            if not layer or not call:
                continue
            # Where the layer was: what stands behind it may write to the layer's arguments.
            with graph.inserting_before(layer):
                fused = graph.call_function(*call)
            fused.meta = relu.meta.copy()
            relu.replace_all_uses_with(fused)
            graph.erase_node(relu)
            graph.erase_node(layer)

    def uuid(self) -> Any:
        # All that decides what is fused, besides the graph.
        in_tf32 = _operators.allows_tf32(torch.backends.cudnn)
        state = (_backend.requested, _operators.missing, tuple(_core.launches()), in_tf32)
        files = get_hash_for_files((__file__, _conv_choice.__file__))
        return twinfuse.__version__, files, self.min_size, state

    def _fused(self, layer: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
        """The fused op with its arguments; None if no kernel serves it, or it is too small."""
        nodes = _DEFAULTS | dict(zip(_PARAMETERS, layer.args)) | layer.kwargs
        values = {name: _value(argument) for name, argument in nodes.items()}
        given = [values[name] for name in _PARAMETERS]
        input, weight, bias, *options = given
        output = _value(layer)
        if not all(isinstance(tensor, Tensor) for tensor in (input, weight, output)):
            return None
        rank = _CONVS.get(layer.target, 0)
        size = output.numel() * prod(weight.shape[1:])
        # A size that is not known yet counts as large.
        if type(size) is int and size < self.min_size:
            return None
        tensors = tuple(nodes[name] for name in _PARAMETERS[:3])
        if not rank:
            served = twinfuse.explain(linear_relu, input, weight, bias)
            call = torch.ops.twinfuse.linear_relu.default, tensors
        elif input.dim() != rank + 2:
            return None
        else:
            function = conv_relu.conv1d_relu if rank == 1 else conv_relu.conv2d_relu
            served = twinfuse.explain(function, *given)
            op = getattr(torch.ops.twinfuse, f"conv{rank}d_relu").default
            call = op, (*tensors, *conv_relu.normalized(rank, weight, *options))
        return None if served[0].backend == "reference" else call


def _layer_before(node: fx.Node) -> fx.Node | None:
    """The linear or convolution whose only use is that node, if that is a ReLU."""
    is_relu = node.op == "call_function" and node.target in _RELUS
    is_method = node.op == "call_method" and node.target in ("relu", "relu_")
    layer = node.all_input_nodes[0] if is_relu or is_method else None
    if layer is None or layer.op != "call_function" or len(layer.users) > 1:
        return None
    if layer.target not in (*_LINEAR, *_CONVS) or _changes_mode(layer, node):
        return None
    return layer


def _changes_mode(first: fx.Node, last: fx.Node) -> bool:
    """Whether the two may run in different modes: with gradients, under autocast, in a vmap."""
    node = first.next
    while node is not last:
        if "example_value" not in node.meta:  # as of all calls that return nothing to compute with
            return True
        node = node.next
    return False


def _value(argument: Any) -> Any:
    return argument.meta.get("example_value") if isinstance(argument, fx.Node) else argument


def backend(
    module: fx.GraphModule, inputs: list[Tensor], mode: str | None = None, options: Any = None
) -> Any:
    """What `torch.compile(model, backend="twinfuse")` calls: Inductor, with the fused ops."""
    settings = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    others = settings.pop("pre_grad_custom_pass", config.pre_grad_custom_pass)
    with config.patch(pre_grad_custom_pass=(*get_custom_graph_passes(others), FusePass())):
        return compile_fx(module, inputs, config_patches=settings)
