"""act2 fitted to GELU on the activations that each layer of a converted ViT sees.

The converted network runs once over the images with the exact GELU in place of every act2, so that each layer
sees what it saw in the ViT. Each group's fc1 outputs are counted in a histogram with fixed bins: memory does
not grow with the images. Then each layer's coefficients solve

    minimise  sum over groups g and bins x of w_g(x) (r_g(x) - GELU(x))^2    with all b_j >= 0

by Levenberg-Marquardt in float64 from the gelu table. Only |b_j| enters r, so the bounds cost nothing. w_g is
the part of the group's activations in the bin plus `GUARD` times the uniform density on [-REACH, REACH]. The
guard bounds what r does where no activation was seen. A fit is never worse in w than its start, so there

    mean of (r - GELU)^2  <=  mean of (start - GELU)^2 + (start's mean square error on activations) / GUARD.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checkpoints.functions_inputs import NUM_BINS, bin_centers, histogram
from ..data.augmentation import evaluation_transform
from ..data.digits import load_digits
from ..data.samples import IMAGE_SUFFIXES, Encoded, open_image
from ..model.coefficients import start_table
from ..model.layers import GroupRational
from ..model.reference import rational_value

GUARD, REACH = 1e-3, 10.0
FINE = 1.0  # bins of equal width in asinh(x): 0.006 wide at 0, 0.6% of |x| far out
FAR = 0.1  # from GELU on [-3, 3]: no table that stands for it is; swish is 0.19 away
STEPS = 200
NUM_IMAGES = 256  # of a folder, evenly spread over its sorted names
BATCH_SIZE = 16


@dataclass(frozen=True)
class LayerFit:
    """The distance of one layer's act2 from GELU on the activations, before and after the fit."""

    name: str  # of the module
    before: float  # root mean square error before calibration
    after: float  # the same, after it
    least: float  # smallest activation seen, to the width of a bin
    largest: float  # largest activation seen


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], approximate: str = "none") -> list[LayerFit]:
    """Fit every act2 of a ViT just converted to GELU, by least squares on the activations of these images.

    Numerators stay shared or separate as the model has them. A layer whose fit is no better keeps its
    coefficients. All layers see the ViT's own activations, so neither the order of the layers nor that of the
    images matters.

    Args:
        model: a `FlashKATForImageClassification` or `FlashKATModel`, on any device; only its act2 change, in
            place and together at the end.
        batches: `(batch, num_channels, height, width)` each, as the model's image processor makes them.
        approximate: form of GELU that the ViT was trained with, "none" (erf) or "tanh".

    Returns:
        What was reached, for each layer.

    Raises:
        ValueError: the model has no act2, or one that does not stand for GELU; no images, images of a wrong
            shape or with values that are not finite, or activations that are not. The model is unchanged
            then.
    """
    activations = _activations(model)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', not {approximate!r}")
    counts = _count(model, activations, batches, approximate)
    x = bin_centers(FINE)
    target = functional.gelu(x, approximate=approximate)
    fits, tables = [], []
    for name, act in activations.items():
        density = counts[name] / counts[name].sum(1, keepdim=True)
        weights = density + GUARD * _uniform(x)
        old = act.numerator.double().cpu(), act.denominator.double().cpu()
        new = _fit_layer(x, target, weights, old)
        new = tuple(table.to(act.numerator.dtype).double() for table in new)  # as it will be stored
        best = min((old, new), key=lambda tables: _cost(x, target, weights, *tables))
        before, after = (_cost(x, target, density, *tables) / len(density) for tables in (old, best))
        seen = x[density.sum(0) > 0]
        fits.append(LayerFit(name, before**0.5, after**0.5, seen.min().item(), seen.max().item()))
        tables.append(best)
    for act, (numerator, denominator) in zip(activations.values(), tables, strict=True):
        act.numerator.copy_(numerator)
        act.denominator.copy_(denominator)
    return fits


def _activations(model: nn.Module) -> dict[str, Any]:
    """Return each act2 by its name; all of them are near GELU."""
    activations = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "act2" and isinstance(module, GroupRational)
    }
    if not activations:
        raise ValueError(f"{type(model).__name__} has no act2: calibration is for FlashKAT models")
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    for name, act in activations.items():
        tables = act.numerator.double().cpu(), act.denominator.double().cpu()
        far = _error(x, functional.gelu(x), *tables).abs().max().item()
        if not far <= FAR:
            raise ValueError(
                f"{name} is up to {far:.2g} away from GELU on [-3, 3]: calibration is for a plain ViT just "
                "converted, whose act2 stand for GELU"
            )
    return activations


def _count(
    model: nn.Module, activations: dict, batches: Iterable[Tensor], approximate: str
) -> dict[str, Tensor]:
    """Count each act2's inputs in bins `(num_groups, NUM_BINS)`, with GELU in place of every act2."""
    counts: dict[str, Tensor] = {}

    def hook(name: str):
        def count_and_replace(act, inputs, output):
            counts[name] += histogram(inputs[0], len(act.denominator), name, FINE)
            return functional.gelu(inputs[0], approximate=approximate)

        return count_and_replace

    device = next(model.parameters()).device
    training = {module for module in model.modules() if module.training}
    handles = [act.register_forward_hook(hook(name)) for name, act in activations.items()]
    num_images = 0
    try:
        model.eval()
        for name, act in activations.items():
            counts[name] = torch.zeros(len(act.denominator), NUM_BINS, dtype=torch.int64, device=device)
        for index, batch in enumerate(batches):
            if not isinstance(batch, Tensor):
                raise ValueError(f"batch {index} is a {type(batch).__name__}, not a tensor of pixel values")
            if not batch.isfinite().all():
                raise ValueError(f"batch {index} has pixel values that are not finite")
            if len(batch):
                model(batch.to(device))
                num_images += len(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    if not num_images:
        raise ValueError("no images to calibrate with")
    if unseen := [name for name, count in counts.items() if not count.any()]:
        message = "was not called as a module: calibrate before compiling or replacing parts"
        raise ValueError(f"{unseen[0]} {message}")
    return {name: count.double().cpu() for name, count in counts.items()}


def _uniform(x: Tensor) -> Tensor:
    """Return weights of the bins, with sum 1, that are the uniform density on [-REACH, REACH]."""
    weights = (1 + x * x).sqrt() * (x.abs() <= REACH)  # the width of a bin is proportional to cosh(asinh(x))
    return weights / weights.sum()


def _fit_layer(
    x: Tensor, target: Tensor, weights: Tensor, old: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Fit one layer's tables, with rows as `old` has them; a shared numerator makes one joint fit."""
    rows, num_groups = len(old[0]), len(old[1])
    parts = [_fit(x, target, part) for part in weights.split(num_groups if rows == 1 else 1)]
    numerators, denominators = zip(*parts, strict=True)
    return torch.cat(numerators), torch.cat(denominators)


def _fit(x: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Fit one numerator `(1, 6)` and denominators `(groups, 4)` by least squares from the gelu table.

    Levenberg-Marquardt with b_j >= 0: a b_j at 0 that would turn negative is left out of a step. Each step
    taken makes the sum smaller, so the result is never worse than the table.

    Args:
        x: bin centers `(bins,)`.
        target: the function's values there.
        weights: `(groups, bins)`.
    """
    seen = weights.sum(0) > 0
    x, target, root = x[seen], target[seen], weights[:, seen].T.sqrt()
    numerator, denominator = start_table("gelu")
    num_groups = len(weights)
    theta = torch.tensor(numerator + denominator * num_groups, dtype=torch.float64)

    def tables(theta: Tensor) -> tuple[Tensor, Tensor]:
        return theta[None, :6], theta[6:].view(num_groups, 4)

    def residual(theta: Tensor) -> Tensor:
        return (root * _error(x, target, *tables(theta))).flatten()

    def derivatives(theta: Tensor) -> Tensor:
        """Derive the residual: x^k / Q by a_k, which is shared, and -r |x|^j / Q by the group's own b_j."""
        numerator, denominator = tables(theta)
        by_b = torch.zeros(len(x), num_groups, num_groups, 4, dtype=torch.float64)
        weighted = root * _rational(x, torch.eye(6, dtype=torch.float64)[:1], denominator)  # over Q
        own = -weighted * _rational(x, numerator, denominator)
        groups = torch.arange(num_groups)
        by_b[:, groups, groups] = own[:, :, None] * x.abs()[:, None, None] ** torch.arange(1, 5)
        by_a = weighted[:, :, None] * x[:, None, None] ** torch.arange(6)
        return torch.cat((by_a, by_b.flatten(2)), dim=2).flatten(0, 1)

    def cost(theta: Tensor) -> float:
        return residual(theta).square().sum().item()

    damping, lowest = 1e-3, cost(theta)
    for _ in range(STEPS):
        jacobian, r = derivatives(theta), residual(theta)
        gradient = jacobian.T @ r
        free = (theta > 0) | (gradient < 0)
        free[:6] = True
        scale = jacobian[:, free].norm(dim=0)
        scaled = jacobian[:, free] / scale
        before = lowest
        while damping < 1e12:
            system = torch.cat((scaled, damping**0.5 * torch.eye(len(scale), dtype=torch.float64)))
            right = torch.cat((-r, torch.zeros(len(scale), dtype=torch.float64)))
            trial = theta.clone()
            trial[free] += torch.linalg.lstsq(system, right).solution / scale
            trial[6:].clamp_(min=0)
            if (value := cost(trial)) < lowest:
                theta, lowest, damping = trial, value, damping / 10
                break
            damping *= 4
        if before - lowest <= 1e-9 * before:
            break
    return tables(theta)


def _error(x: Tensor, target: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """r(x) - target `(bins, groups)` for `x` and `target` `(bins,)`, float64."""
    return _rational(x, numerator, denominator) - target[:, None]


def _rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """r(x) of each group `(bins, groups)`."""
    return rational_value(x[:, None].expand(-1, len(denominator)), numerator, denominator)


def _cost(x: Tensor, target: Tensor, weights: Tensor, numerator: Tensor, denominator: Tensor) -> float:
    return (weights.T * _error(x, target, numerator, denominator).square()).sum().item()


def find_images(source: str | Path) -> Sequence[Encoded]:
    """Find at most `NUM_IMAGES` images to calibrate with, in a folder and its sub-folders, or "digits".

    Args:
        source: a folder; names that start with a dot are passed over. "digits" is the training split of
            scikit-learn's digits (extra `train`); a folder of that name is "./digits".

    Raises:
        ValueError: no folder, or no images in it; scikit-learn is missing.
    """
    if source == "digits":
        try:
            images: Sequence[Encoded] = list(load_digits().train.images)
        except ImportError as error:
            raise ValueError(str(error)) from error
    else:
        root = Path(source).expanduser()
        if not root.is_dir():
            raise ValueError(f"{source} is not a folder of images")
        images = sorted(
            path
            for path in root.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
        )
        if not images:
            raise ValueError(f"{source} has no images that Pillow reads")
    count = min(len(images), NUM_IMAGES)
    return [images[index * len(images) // count] for index in range(count)]


def image_batches(images: Sequence[Encoded], processor) -> Iterator[Tensor]:
    """Yield batches of what the model's image processor makes of these images.

    Raises:
        ValueError: a file is no image; the message names it.
    """
    transform = evaluation_transform(processor)
    for start in range(0, len(images), BATCH_SIZE):
        batch = images[start : start + BATCH_SIZE]
        yield torch.stack([transform(open_image(image)) for image in batch])
