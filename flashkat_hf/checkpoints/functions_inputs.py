"""The inputs that the activations of a model meet: a histogram for each group of channels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from torch import Tensor, nn

from ..model.configuration_flashkat import pair
from ..model.modeling_flashkat import FlashKATModel

NUM_BINS, LARGEST = (
    4096,
    1e5,
)  # bins of equal width in asinh(x / FINE): 0.8% of FINE wide at 0, of |x| far out
FINE = 0.01
QUANTILES = (0.001, 0.999)  # of a group's inputs: the part where its function is used
ASSUMED = 3.0  # where nothing is measured: from minus this to this
NUM_NOISE_IMAGES = 4


@dataclass(frozen=True)
class Inputs:
    """The inputs of one group, as a histogram.

    Attributes:
        x: centers of the bins that are not empty, ascending, float64.
        weight: part of the inputs in each; the sum is 1.
        source: "images", "noise", "assumed", or "range": of those counted earlier, only their range.
    """

    x: numpy.ndarray
    weight: numpy.ndarray
    source: str

    @cached_property
    def range(self) -> tuple[float, float]:
        """Return the 0.1% and the 99.9% quantile, up to half a bin; a single value gets a margin."""
        below = self.weight.cumsum()
        low, high = (float(self.x[min(below.searchsorted(part), len(below) - 1)]) for part in QUANTILES)
        margin = 0.5 if high - low < 1e-9 else 0.0
        return low - margin, high + margin

    @property
    def counted(self) -> bool:
        """Return True if `weight` is what was counted."""
        return self.source in ("images", "noise")

    def mean(self, values: numpy.ndarray) -> float:
        """Return the mean of values at `x`."""
        return float(self.weight @ values)


def assumed_inputs() -> Inputs:
    """Return equal weights on [-3, 3]."""
    x = numpy.linspace(-ASSUMED, ASSUMED, 601)
    return Inputs(x, numpy.full(len(x), 1 / len(x)), "assumed")


def measure_inputs(
    model: nn.Module, num_groups: Mapping[str, int], batches: Iterable[Tensor] | None = None
) -> dict[str, list[Inputs]]:
    """Count what the groups of a model's activations meet.

    Args:
        model: in any mode, which it keeps; it is called in evaluation mode.
        num_groups: of each activation to watch, by its name in the model.
        batches: arguments of the calls, one after the other. By default a FlashKAT sees noise with the
            spectrum of photographs, and of other models nothing is counted.

    Returns:
        The inputs of each group, by the activation's name.

    Raises:
        ValueError: there are no batches, a value is not finite, or an activation meets none.
    """
    source, runner = "images", model
    if batches is None:
        backbone = next((module for module in model.modules() if isinstance(module, FlashKATModel)), None)
        if backbone is None:
            return {name: [assumed_inputs()] * groups for name, groups in num_groups.items()}
        config, source, runner = backbone.config, "noise", backbone
        batches = [noise_images(NUM_NOISE_IMAGES, config.num_channels, *pair(config.image_size))]
    counts = count_inputs(model, num_groups, batches, runner)
    x = bin_centers().numpy()
    return {
        name: [
            Inputs(x[row > 0], row[row > 0] / row.sum(), source)
            for row in counts[name].double().cpu().numpy()
        ]
        for name in num_groups
    }


@torch.no_grad()
def count_inputs(
    model: nn.Module,
    num_groups: Mapping[str, int],
    batches: Iterable[Tensor],
    runner: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Return the histogram `(num_groups, NUM_BINS)`, int64, of each activation's inputs: `measure_inputs`."""
    runner = model if runner is None else runner
    counts: dict[str, Tensor] = {}

    def hook(name: str):
        def count(act: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().movedim(getattr(act, "dim", -1), -1)
            added = histogram(x, num_groups[name], name)
            counts[name] = counts[name] + added if name in counts else added

        return count

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in num_groups]
    modes = {module: module.training for module in model.modules()}
    first = next(runner.parameters())
    try:
        model.eval()
        for index, batch in enumerate(batches):
            if not batch.isfinite().all():
                raise ValueError(f"batch {index} has values that are not finite")
            batch = batch.to(first.device, first.dtype)
            if "forward" in runner.__dict__:  # accelerate's, which may work in another precision
                type(runner).forward(runner, batch)
            else:
                runner(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if unseen := [name for name in num_groups if name not in counts or not counts[name].any()]:
        name = unseen[0] or "the activation"
        raise ValueError(f"{name} met no inputs: there are no images, or it is not called as a module")
    return counts


def histogram(x: Tensor, num_groups: int, name: str, fine: float = FINE) -> Tensor:
    """Return counts `(num_groups, NUM_BINS)` of `x` `(..., channels)`, int64: the order does not matter.

    Raises:
        ValueError: a value is not finite; the message has `name`.
    """
    if not x.isfinite().all():
        raise ValueError(f"{name} has activations that are not finite")
    end = torch.tensor(LARGEST / fine).asinh().item()
    bins = ((x.float().clamp(-LARGEST, LARGEST) / fine).asinh() + end) * (NUM_BINS / (2 * end))
    bins = bins.int().clamp_(0, NUM_BINS - 1).reshape(-1, num_groups, x.shape[-1] // num_groups)
    bins += torch.arange(num_groups, device=x.device, dtype=torch.int32)[:, None] * NUM_BINS
    return bins.flatten().bincount(minlength=num_groups * NUM_BINS).view(num_groups, NUM_BINS)


def bin_centers(fine: float = FINE) -> Tensor:
    """Return the centers `(NUM_BINS,)` of the histogram's bins, float64."""
    end = torch.tensor(LARGEST / fine, dtype=torch.float64).asinh().item()
    return (((torch.arange(NUM_BINS, dtype=torch.float64) + 0.5) / NUM_BINS * 2 - 1) * end).sinh() * fine


def noise_images(count: int, num_channels: int, height: int, width: int | None = None) -> Tensor:
    """Return the same noise `(count, num_channels, height, width)` each time: amplitude 1/f, variance 1."""
    width = height if width is None else width
    noise = torch.randn(count, num_channels, height, width, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = torch.hypot(rows, columns).clamp_min(1 / max(height, width))
    images = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(height, width))
    return (images - images.mean((-2, -1), keepdim=True)) / images.std((-2, -1), keepdim=True)
