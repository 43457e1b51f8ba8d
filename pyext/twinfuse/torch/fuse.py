"""Fuses the layers of an existing model, and undoes it."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from twinfuse import explain as explain_call
from twinfuse._backend import Choice, Report
from twinfuse.torch import _deferred, _norm, _rewrite, _spread
from twinfuse.torch._clamp import CLAMPED
from twinfuse.torch._conv_choice import large_calls_left_to_torch
from twinfuse.torch._held import held
from twinfuse.torch._run import eval_mode, outputs
from twinfuse.torch._savings import Call, Calls, recorded, saving
from twinfuse.torch._survey import ALONE, FUSED, Survey, alone, is_exactly
from twinfuse.torch.conv_relu import conv1d_relu, conv2d_relu
from twinfuse.torch.linear_relu import linear_relu
from twinfuse.torch.lstm import lstm
from twinfuse.torch.lstm_cell import lstm_cell
from twinfuse.torch.nn import LSTM, LSTMCell

__all__ = ["explain", "fuse", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)

# What reports call the layers.
_NAMES = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d"}
_ALONE_NAMES = {nn.LSTM: "lstm", nn.LSTMCell: "lstm_cell"}
_FUSING = (FUSED, ALONE, CLAMPED, _norm.CONVS, _deferred.DEFERRED)
_KINDS = (*_FUSING, _norm.NORMS)
# Those of which `explain` estimates nothing.
_UNKNOWN = (LSTM, LSTMCell, _deferred.DeferredLinear)
_MARK = _rewrite.FUSED


class FusedReLU(nn.Module):
    """Stands where a ReLU was that layers before it now compute; passes its input on.

    It applies the ReLU itself where one of them does not any longer.
    """

    def __init__(self, relu: nn.Module, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.train(relu.training)
        # In tuples, so that they are no submodules.
        self._original = (relu,)
        self._layers = tuple(layers)

    @property
    def original(self) -> nn.Module:
        return self._original[0].train(self.training)

    @property
    def is_computed(self) -> bool:
        return all(_rewrite.is_fused(layer) for layer in self._layers)

    def forward(self, input: Tensor) -> Tensor:
        return input if self.is_computed else self._original[0](input)

    def extra_repr(self) -> str:
        return "in the layer before" if self.is_computed else "by itself"


def fuse(
    model: Model, example_inputs: Any = None, inplace: bool = False, deferred: bool = False
) -> Model:
    """Replace each Linear, Conv1d and Conv2d followed by a ReLU with one fused layer.

    Pairs are found in `nn.Sequential` (its subclasses too, unless they have a forward method of
    their own), nested ones included, and in modules whose forward method has no loops of Python,
    no branches but on whether an optional child is None, and calls nothing but its children and
    torch: the ReLU may be a module, `F.relu`, `torch.relu`,
    `x.relu()` or one of them in place; `clamp(min=0)` is fused where no gradients are asked for.
    A BatchNorm between convolution and ReLU is folded into the convolution in eval mode, anew in
    each call; in training mode all three are native. LSTM and LSTMCell are fused by themselves,
    wherever they are. A pair is fused only where it is certain that nobody sees the value between
    the two; `explain(model)` says for each layer what became of it, and why.

    Parameters, buffers, names, `state_dict` keys and indices stay as they are, so optimizers and
    checkpoints remain valid. Parametrized and pruned layers are fused as well. Change the
    architecture of the model, or add hooks to a pair, before fusing or after `unfuse`. What
    DistributedDataParallel or `fully_shard` already holds is left as it is: fuse first.

    Args:
        model: any module. Where a forward method calls a ReLU that is now computed elsewhere, the
            module gets a subclass of its class, which leaves that call out.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping, which is keyword
            arguments. The model is run on copies of them once before (which gives lazy modules
            their weights) and once after, in eval mode and without gradients, and the outputs are
            compared.
        inplace: change `model` itself, and return it. Else the result is a copy of `model` with the
            same parameters, buffers and other tensors: training the one trains the other.
        deferred: also fuse each other Linear, in every call, with a ReLU that turns out to be the
            first to use its output; in any forward method, so long as the ReLU is in that of the
            same module. Costs time in the first calls of a Linear that has none.

    Raises:
        RuntimeError: the outputs for `example_inputs` differ, and the model is then unfused; or
            `model` cannot be copied, as one that is sharded cannot.
    """
    expected = [] if example_inputs is None else outputs(model, example_inputs)
    if not inplace:
        model = _copied(model)
    survey = Survey(_restored(model, _spread.around(model)))
    for fusion in survey.fusions:
        for layer, norm, clamped in fusion.layers:
            if norm is None:
                _become(layer, CLAMPED if clamped else FUSED)
            else:
                setattr(layer, _norm.NORM, (norm,))
                _become(layer, _norm.CONVS)
                _become(norm, _norm.NORMS)
        layers = [m for layer in fusion.layers for m in (layer.module, layer.norm) if m is not None]
        for key, relu in fusion.relus.items():
            fusion.parent._modules[key] = FusedReLU(relu, layers)
        if fusion.calls or (fusion.choices and layers):
            keys = (key for key, child in fusion.parent._modules.items() if child in layers)
            setattr(fusion.parent, _rewrite.LAYERS, tuple(keys))
            setattr(fusion.parent, _rewrite.CHOICES, fusion.choices)
            native: Any = type(fusion.parent)
            fusion.parent.__class__ = _rewrite.rewritten(native, fusion.calls)
    for module in list(model.modules()):
        if id(module) not in survey.reasons:
            _become(module, ALONE)
    spread = _spread.around(model)
    for layer, owner in list(_deferred.layers_with_owners(model)) if deferred else ():
        if id(layer) not in spread:
            _become(layer, _deferred.DEFERRED)
            _deferred.defer(layer, owner)
    if example_inputs is not None:
        for got, want in zip(outputs(model, example_inputs), expected, strict=True):
            if not _is_close(got, want):
                unfuse(model)
                raise RuntimeError(
                    "fuse: example_inputs: expected outputs equal to those of the unfused model, "
                    f"got {got} instead of {want}"
                )
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse`, in place: every layer is of its former class again; returns `model`."""
    return _restored(model, ())


def _restored(model: Model, but: Container[int]) -> Model:
    """The model with native layers, but for modules of these ids."""
    for module in [m for m in model.modules() if id(m) not in but]:
        if vars(module).pop(_MARK, False):
            vars(module).pop(_norm.NORM, None)
            for native, fused in (pair for kinds in _KINDS for pair in kinds.items()):
                if isinstance(module, fused):
                    _swap_class(module, fused, native)
        if kind := _rewrite.rewritten_of(type(module)):
            _swap_class(module, kind, kind.native)
        vars(module).pop(_rewrite.LAYERS, None)
        vars(module).pop(_rewrite.CHOICES, None)
        _deferred.undo(module)
        for key, child in module._modules.items():
            if isinstance(child, FusedReLU):
                module._modules[key] = child.original
    return model


def explain(model: nn.Module, example_inputs: Any = None) -> Report:
    """One row for each layer of `model` that `fuse` knows: fused, or native and why.

    With `example_inputs`, as `fuse` takes them, the model is run once, in eval mode and without
    gradients: what a fused layer saves is then that of its calls in this run.
    """
    fused = tuple(kind for kinds in _FUSING for kind in kinds.values())
    calls: Calls | None = None
    if example_inputs is not None:
        calls = recorded(
            (m for m in model.modules() if isinstance(m, fused) and not isinstance(m, _UNKNOWN)),
            lambda: outputs(model, example_inputs),
        )
    survey = Survey(model)
    spread = _spread.around(model)
    fusible = {
        id(module)
        for fusion in survey.fusions
        for module in (*(layer.module for layer in fusion.layers), *fusion.relus.values())
    }
    before = "no Linear, Conv1d or Conv2d before it"
    if any(isinstance(module, _deferred.DeferredLinear) for module in model.modules()):
        before = "by itself, unless it is the first to use the output of a deferred Linear"
    report = Report()
    for name, module in model.named_modules():
        if isinstance(module, fused):
            seen = None if calls is None else calls.get(id(module), [])
            around = spread.get(id(module), "")
            report.append(replace(_explain_fused(module, seen, around), where=name))
        elif isinstance(module, tuple(ALONE)):
            op = next(op for kind, op in _ALONE_NAMES.items() if isinstance(module, kind))
            reason = "a subclass may compute something else"
            if isinstance(module, nn.Module) and alone(module):
                reason = "can be fused: call fuse(model)"
            reason = survey.reasons.get(id(module), reason)
            report.append(Choice(where=name, op=op, backend="native", reason=reason))
        elif isinstance(module, FusedReLU):
            backend = "fused" if module.is_computed else "native"
            reason = "in the layer before" if module.is_computed else "its layer was unfused"
            report.append(Choice(where=name, op="relu", backend=backend, reason=reason))
        elif isinstance(module, (*_NAMES, nn.ReLU)):
            op = next((op for kind, op in _NAMES.items() if isinstance(module, kind)), "relu")
            reason = survey.reasons.get(id(module), _why_native(module, before))
            if id(module) in fusible:
                reason = "can be fused: call fuse(model)"
            report.append(Choice(where=name, op=op, backend="native", reason=reason))
    return report


def _why_native(module: Any, before: str) -> str:
    """Why a module is in no pattern, where the survey has not said so; `before`: of ReLUs."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it has no weight yet: call the model once, then fuse it"
    if type(module) not in (*_NAMES, nn.ReLU):
        return "a subclass may compute something else"
    if not is_exactly(module, type(module)):
        return "its forward method was replaced"
    if isinstance(module, nn.ReLU):
        return before
    return "no ReLU follows"


def _explain_fused(layer: Any, calls: list[Call] | None, around: str) -> Choice:
    if around == "FullyShardedDataParallel":
        names = _NAMES | {ALONE[kind]: op for kind, op in _ALONE_NAMES.items()}
        op_name = next(op for kind, op in names.items() if isinstance(layer, kind))
        return Choice(op_name, "unknown", reason=f"{around} holds its weights")
    # DTensors that are so by tensor parallelism are so while the layer runs, too.
    parallel = getattr(layer, "_distribute_module_applied", False)
    sharded = around == "fully_shard" and not parallel
    with torch.no_grad():
        if isinstance(layer, (LSTM, LSTMCell)):
            return _explain_recurrent(layer, sharded)
        with eval_mode(layer):  # in training, reading a weight under spectral_norm changes it
            weight, bias = _as_run([layer.weight, layer.bias], sharded)
        if isinstance(layer, nn.Linear):
            example = weight.new_empty((1, layer.in_features))
            (choice,) = explain_call(linear_relu, example, weight, bias)
        else:
            op = conv1d_relu if isinstance(layer, nn.Conv1d) else conv2d_relu
            folds = hasattr(layer, _norm.NORM)
            if folds and (reason := _why_not_folded(layer, weight, calls)):
                return Choice(op.__name__.removesuffix("_relu"), "native", reason=reason)
            window = (d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size))
            example = weight.new_empty((1, layer.in_channels, *window))
            options = (layer.stride, "valid", layer.dilation, layer.groups)
            (choice,) = explain_call(op, example, weight, bias, *options)
            if folds and calls is None and not choice.reason:
                choice = replace(choice, reason=layer.why_small(weight))
    if isinstance(layer, _deferred.DeferredLinear) and choice.backend != "reference":
        return Choice("linear", "deferred", choice.kernel, layer.uses.described())
    if isinstance(layer, tuple(CLAMPED.values())) and not choice.reason:
        reason = "where no gradients are asked for: ReLU has others than clamp"
        choice = replace(choice, reason=reason)
    if choice.backend == "reference":
        return choice
    if weight.is_cuda and isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        trained = not isinstance(layer, (*CLAMPED.values(), *_norm.CONVS.values()))
        large = large_calls_left_to_torch(layer, weight, trained)
        choice = replace(choice, reason="; ".join(filter(None, (choice.reason, large))))
    return replace(choice, saving=saving(layer, weight, calls))


def _why_not_folded(layer: Any, weight: Tensor, calls: list[Call] | None) -> str:
    """Why a convolution and the BatchNorm behind it run natively, in the calls that were seen."""
    reason: str = layer.why_native(weight)
    if reason or not calls or any(call.folded for call in calls):
        return reason
    small: str = layer.why_small(weight)
    return small


def _as_run(tensors: list[Any], sharded: bool) -> list[Any]:
    return [_spread.whole(t) if sharded and t is not None else t for t in tensors]


def _explain_recurrent(layer: Any, sharded: bool) -> Choice:
    size = layer.hidden_size
    parameters = _as_run(list(layer.parameters()), sharded)
    options = {"activation": layer.activation, "recurrent_activation": layer.recurrent_activation}
    example = parameters[0].new_empty((1, layer.input_size))
    if isinstance(layer, LSTMCell):
        hx = (example.new_empty((1, size)), example.new_empty((1, size)))
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = _as_run([getattr(layer, n, None) for n in names], sharded)
        return explain_call(lstm_cell, example, hx, *weights, **options)[0]
    example = example.unsqueeze(0)
    shape = (layer.num_layers * (1 + layer.bidirectional), 1)
    hx = (example.new_empty((*shape, layer.proj_size or size)), example.new_empty((*shape, size)))
    weights = _as_run(layer._flat_weights, sharded)
    call = (example, hx, weights, layer.bias, layer.num_layers)
    options["bidirectional"] = layer.bidirectional
    return explain_call(lstm, *call, **options)[0]


def _copied(model: Model) -> Model:
    """A copy with the same tensors."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    shared += [t for m in model.modules() for t in held(m) if isinstance(t, Tensor)]
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    except Exception as error:
        for name, module in model.named_modules():
            if _spread.is_sharded(module):
                raise RuntimeError(
                    "fuse: model: expected one that fully_shard has not sharded, or inplace=True, "
                    f"got a {type(module).__name__} at '{name}': fuse the model, then shard it"
                ) from error
        raise RuntimeError(
            "fuse: model: expected one that copy.deepcopy can copy, or inplace=True, "
            f"got {type(error).__name__}: {error}"
        ) from error


def _is_close(got: Tensor, expected: Tensor) -> bool:
    inexact = expected.is_floating_point() or expected.is_complex()
    if not inexact or not expected.numel():
        return torch.equal(got, expected)
    # Differences between kernels grow from layer to layer, a wrong layer is far off.
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    atol = tolerance * float(expected.abs().nan_to_num(0, 0).max())
    return torch.allclose(got, expected, rtol=tolerance, atol=atol, equal_nan=True)


def _become(module: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    for native, fused in kinds.items():
        if is_exactly(module, native):
            _swap_class(module, native, fused)
            setattr(module, _MARK, True)


def _swap_class(module: nn.Module, old: type, new: type) -> None:
    if type(module) is old:
        module.__class__ = new
        return
    # A parametrized or sharded module has a class of its own, a direct subclass of the original's:
    # what undoes that restores the class's base, which therefore has to be the new one.
    derived = type(module)
    name = derived.__name__.replace(old.__name__, new.__name__)
    bases = tuple(new if base is old else base for base in derived.__bases__)
    members = {k: v for k, v in vars(derived).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(name, bases, members)
