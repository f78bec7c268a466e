"""Learned rationals in the place of a model's activations, whoever wrote the model."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.layers import GroupRational

ALIKE = 1e-3  # two functions are the same if they differ by less on GRID: GELU and its approximation by tanh
GRID = torch.linspace(-8, 8, 1001)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # which the start tables are named after
    "swish": functional.silu,
    "gelu": functional.gelu,
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
PLAIN_FUNCTIONS = (*FUNCTIONS.values(), functional.relu, functional.elu, functional.mish, functional.softplus)
Place = tuple[nn.Module, str]  # a module and the name of its attribute


@dataclass(frozen=True)
class Replacement:
    """The changes that `replace_activations` has made to a model.

    Attributes:
        layers: the new layers by their names; a layer that stands at several places has the first one's.
        change: root mean square of the outputs' difference over that of the outputs.
        error: largest difference of a rational and its activation on [-5, 5].
    """

    layers: dict[str, GroupRational]
    change: float
    error: float

    def __str__(self) -> str:
        """Return a line for people."""
        number = sum(parameter.numel() for layer in self.layers.values() for parameter in layer.parameters())
        return (
            f"{len(self.layers)} activations are rationals with {number:,} parameters, within "
            f"{self.error:.1e} of what they were on [-5, 5]; outputs change by {self.change:.1e}, relatively"
        )


@torch.no_grad()
def replace_activations(
    model: nn.Module,
    act: Callable[..., Any] | nn.Module = nn.GELU,
    *,
    inputs: Any,
    num_groups: int = 8,
    num_numerator_groups: int = 1,
    dim: int | None = None,
) -> Replacement:
    """Put a `GroupRational` in the place of each activation that computes a given function.

    Found are modules without parameters that compute the function (those of `torch.nn`, of timm, and of
    transformers' ACT2FN among them), and functions of PyTorch that a module keeps as an attribute; not those
    that a `forward` calls by name. The rationals start as the same function, as near as one comes to it;
    their parameters are float32 in a model of half precision.

    Args:
        model: any module; changed in place, its mode and random state stay.
        act: the class of the activations, or the function itself, such as `torch.relu`.
        inputs: what the model is called with, a tensor, a tuple of arguments or a mapping of keywords; it is
            run three times, to see how wide the activations' inputs are and what changes.
        num_groups: of each rational.
        num_numerator_groups: 1 or `num_groups`, as in `GroupRational`.
        dim: dimension of the channels; by default that of the layer in front of each activation.

    Raises:
        ValueError: the model has no such activation (the message says which it has) or never calls it, the
            groups do not divide a width, or the channels' dimension is not clear; the model is as it was.
    """
    target = function_of(act)
    places: dict[str, Place] = {}
    others: Counter[str] = Counter()
    for name, place, value in activations(model):
        if (isinstance(act, type) and isinstance(value, act)) or alike(value, target):
            places[name] = place
        else:
            others[getattr(value, "__name__", type(value).__name__)] += 1
    if not places:
        known = ", ".join(f"{name} ({count})" for name, count in sorted(others.items())) or "none"
        raise ValueError(
            f"{type(model).__name__} has no activation that computes {label(act)}; "
            f"its activations are: {known}"
        )
    olds = {name: getattr(*place) for name, place in places.items()}
    first_names: dict[int, str] = {}
    for name, old in olds.items():
        first_names.setdefault(id(old), name)
    before = call(model, inputs)
    try:
        probes = {id(old): Probe(name, old, dim) for name, old in olds.items()}
        for name, place in places.items():
            put(place, probes[id(olds[name])])
        with features_noted(model, list(probes.values())):
            call(model, inputs)
        new = {key: probe.rational(num_groups, num_numerator_groups) for key, probe in probes.items()}
        for name, place in places.items():
            put(place, new[id(olds[name])])
        after = call(model, inputs)
    except BaseException:
        for name, place in places.items():
            put(place, olds[name])
        raise
    layers = {name: new[key] for key, name in first_names.items()}
    size = before.square().mean().sqrt().clamp(min=torch.finfo(before.dtype).tiny)
    change = ((after - before).square().mean().sqrt() / size).item()
    return Replacement(layers, change, max(probe.error for probe in probes.values()))


def activations(model: nn.Module) -> Iterator[tuple[str, Place, Any]]:
    """Yield name, place and value of each elementwise function in a model, at each of its places."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        children = {key: child for key, child in module._modules.items() if child is not None}
        for key, child in children.items():
            if not isinstance(child, GroupRational) and is_elementwise(child):
                yield prefix + key, (module, key), child
        if children or module._parameters:
            for key, value in vars(module).items():
                if any(value is function for function in PLAIN_FUNCTIONS):
                    yield prefix + key, (module, key), value


def is_elementwise(module: nn.Module) -> bool:
    """Tell whether a module without parameters is a function of each number, and not the identity."""
    if (
        module._modules
        or module._parameters
        or module._buffers
        or isinstance(module, nn.Identity | nn.Dropout)
    ):
        return False
    training = module.training
    try:
        module.eval()
        y, reverse = module(GRID.clone()), module(GRID.flip(0))
    except Exception:  # it takes something else than a vector
        return False
    finally:
        module.train(training)
    return (
        isinstance(y, Tensor)
        and y.shape == GRID.shape
        and torch.allclose(y, reverse.flip(0), atol=1e-5)
        and not torch.equal(y, GRID)
    )


def function_of(act: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """Return the function that a class of activations computes, or the function itself.

    Raises:
        ValueError: it is no class that can be made without arguments, or no function of a tensor.
    """
    try:
        function = act() if isinstance(act, type) else act
        value = function(GRID.clone())
    except Exception as error:
        raise ValueError(f"act ({label(act)}) is no activation: {error}") from error
    if not isinstance(value, Tensor) or value.shape != GRID.shape:
        raise ValueError(f"act ({label(act)}) is no activation: it does not keep the shape of a tensor")
    return function


def alike(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether two elementwise functions are the same, up to their approximations."""
    return bool((one(GRID.clone()) - other(GRID.clone())).abs().max() < ALIKE)


def label(act: Any) -> str:
    return getattr(act, "__name__", None) or type(act).__name__


def put(place: Place, value: Any) -> None:
    """Set an attribute of a module that may have been a function, a module, and either again."""
    module, name = place
    module._modules.pop(name, None) if not isinstance(value, nn.Module) else vars(module).pop(name, None)
    if isinstance(value, nn.Module):
        module._modules[name] = value
    else:
        vars(module)[name] = value


class Probe(nn.Module):
    """An activation in its place, which notes the width and the dimension of its channels."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor], dim: int | None):
        super().__init__()
        self.name, self.dim = name, dim
        self.calls = [function]  # in a list, so that it is no part of this module
        self.widths: set[tuple[int, int]] = set()  # dimension and width of each call
        self.features: tuple[nn.Module, int] | None = None  # the layer that ran last, and its width
        self.like = torch.empty(0)
        self.error = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.like = x[:0]
        dim = self.dim if self.dim is not None else self.channels(x)
        dim = dim % x.ndim
        self.widths.add((-1 if dim == x.ndim - 1 else dim, x.shape[dim]))
        return self.calls[0](x)

    def channels(self, x: Tensor) -> int:
        """Return the dimension that has the width of the layer in front."""
        module, width = self.features or (None, -1)
        dims = [dim for dim in {1 % x.ndim, x.ndim - 1} if x.shape[dim] == width]
        if len(dims) == 2:
            convolves = isinstance(
                module, nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase | nn.GroupNorm
            )
            return 1 if convolves else x.ndim - 1
        if not dims:
            raise ValueError(
                f"it is not clear which dimension of {tuple(x.shape)} the channels of {self.name} are: "
                "dim=1 or dim=-1 says so"
            )
        return dims[0]

    def rational(self, num_groups: int, num_numerator_groups: int) -> GroupRational:
        """Return the layer that stands for the activation from now on."""
        function = self.calls[0]
        if len(self.widths) != 1:
            met = ", ".join(f"{width} in dimension {dim}" for dim, width in sorted(self.widths))
            raise ValueError(f"{self.name} needs one width of its inputs, but {met or 'it is never called'}")
        ((dim, width),) = self.widths
        if width % num_groups:
            raise ValueError(f"{self.name} is {width} channels wide, which {num_groups} groups do not divide")
        names = [name for name in FUNCTIONS if alike(function, FUNCTIONS[name])]
        init = names[0] if names else "identity"
        layer = GroupRational(width, num_groups, num_numerator_groups, init, dim=dim)
        if not names:
            layer.fit(function)
        x = torch.linspace(-5, 5, 1001)
        one = GroupRational(1, 1, init=init)
        one.numerator.copy_(layer.numerator[:1])
        one.denominator.copy_(layer.denominator[:1])
        self.error = (one(x[:, None]).squeeze(1) - function(x.clone())).abs().max().item()
        training = function.training if isinstance(function, nn.Module) else True
        dtype = torch.promote_types(self.like.dtype, torch.float32)  # half precision would move the start
        return layer.to(self.like.device, dtype).train(training)


@contextmanager
def features_noted(model: nn.Module, probes: list[Probe]) -> Iterator[None]:
    """Tell the probes of each layer that ran, with the number of its output's channels."""
    names = ("out_features", "out_channels", "num_features", "num_channels", "nf", "normalized_shape")

    def note(module: nn.Module, *_: Any) -> None:
        width = next((getattr(module, name) for name in names if hasattr(module, name)), None)
        width = width[-1] if isinstance(width, tuple | list) else width
        for probe in probes:
            if isinstance(width, int):
                probe.features = module, width

    handles = [
        module.register_forward_hook(note)
        for module in model.modules()
        if not module._modules and module._parameters
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def call(model: nn.Module, inputs: Any) -> Tensor:
    """Return all floating outputs of a model in evaluation mode, as one vector in float64."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        for module, mode in modes.items():
            module.training = mode
    tensors = list(floating_tensors(output))
    if not tensors:
        raise ValueError(f"{type(model).__name__} returned no floating tensor")
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def floating_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from floating_tensors(list(output.values()))
    elif isinstance(output, tuple | list):
        for item in output:
            yield from floating_tensors(item)
