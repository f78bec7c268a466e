"""Pictures: the learned functions of a model against their start tables, and the curves of a training run.

matplotlib is imported when a figure is made, and its `pyplot` never, so nothing global is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..model.layers import GroupRational
from ..model.modeling_flashkat import FlashKATLayer, FlashKATModel
from ..model.reference import rational_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_IMAGES = 4
QUANTILES = (0.001, 0.999)  # of a group's inputs, the part where its function is used
COLUMNS = 6
START_COLOR = "0.55"


def plot_functions(model: nn.Module) -> Figure:
    """Draw every activation of a FlashKAT in a panel: the groups' functions and, dashed, the start table.

    A function is drawn where it is used: between the 0.1% and the 99.9% quantile of what reaches its group
    when the model sees images of 1/f noise, which has the spectrum of photographs.

    Args:
        model: a `FlashKATModel` or a module that contains one; its mode stays, no random number is drawn.

    Raises:
        ValueError: matplotlib is not installed, or there is no `FlashKATModel`.
    """
    figure_class = _figure_class()
    import matplotlib

    backbone = next((module for module in model.modules() if isinstance(module, FlashKATModel)), None)
    if backbone is None:
        raise ValueError(f"{type(model).__name__} is not a FlashKAT and contains none")
    ranges = used_ranges(backbone)
    layers = [layer.mlp for layer in cast("list[FlashKATLayer]", backbone.layers)]
    columns = min(COLUMNS, len(layers))
    bands = -(-len(layers) // columns)
    figure = figure_class(figsize=(1 + 2.1 * columns, 0.9 + 3.5 * bands), layout="constrained")
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    num_groups = backbone.config.num_groups
    colors = matplotlib.colormaps["viridis"](torch.linspace(0, 0.92, num_groups).numpy())
    for index in range(bands * columns):
        band, column = divmod(index, columns)
        for row, name in enumerate(("act1", "act2")):
            panel = axes[2 * band + row, column]
            if index >= len(layers):
                panel.set_axis_off()
                continue
            act = getattr(layers[index], name)
            _draw(panel, act, ranges[index, name], colors)
            panel.set_title(f"layer {index}" if row == 0 else "", fontsize=9)
            if column == 0:
                panel.set_ylabel(name, fontsize=10)
    handles = [line for line in axes[0, 0].get_lines() if not line.get_label().startswith("_")]
    if len(handles) > 9:
        handles = [handles[0], handles[1], handles[-1]]
    labels = [line.get_label() for line in handles]
    ncols = min(len(handles), int(figure.get_figwidth()))
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, fontsize=8)
    return figure


@torch.no_grad()
def used_ranges(backbone: FlashKATModel) -> dict[tuple[int, str], Tensor]:
    """Return the lowest and highest input `(2, num_groups)` of each layer's act1 and act2 on `noise_images`.

    Inputs below the 0.1% or above the 99.9% quantile of their group are left out.
    """
    ranges: dict[tuple[int, str], Tensor] = {}

    def record(key: tuple[int, str]):
        def hook(act: GroupRational, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach().float().cpu().unflatten(-1, (len(act.denominator), -1))
            values = values.movedim(-2, 0).flatten(1).sort(1).values
            count = values.shape[1] - 1
            ranges[key] = torch.stack([values[:, round(part * count)] for part in QUANTILES]).double()

        return hook

    layers = enumerate(cast("list[FlashKATLayer]", backbone.layers))
    acts = {(index, name): getattr(layer.mlp, name) for index, layer in layers for name in ("act1", "act2")}
    hooks = [act.register_forward_pre_hook(record(key)) for key, act in acts.items()]
    modes = {module: module.training for module in backbone.modules()}
    first = next(backbone.parameters())
    try:
        backbone.eval()
        images = noise_images(NUM_IMAGES, backbone.config.num_channels, backbone.config.image_size)
        images = images.to(first.device, first.dtype)
        type(backbone).forward(backbone, images)  # the object's own may be accelerate's
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return ranges


def noise_images(count: int, num_channels: int, size: int) -> Tensor:
    """Make the same noise `(count, num_channels, size, size)` at each call: amplitude 1/f, variance 1."""
    noise = torch.randn(count, num_channels, size, size, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    frequency = torch.hypot(rows, columns).clamp_min(1 / size)
    images = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(size, size))
    return (images - images.mean((-2, -1), keepdim=True)) / images.std((-2, -1), keepdim=True)


def _draw(panel, act: GroupRational, ranges: Tensor, colors) -> None:
    """Draw the functions of an activation's groups, each over its range, and the start table."""
    low, high = ranges
    steps = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]
    x = low + steps * (high - low)  # a channel for each group
    y = rational_value(x, *(table.detach().double().cpu() for table in (act.numerator, act.denominator)))
    span = torch.linspace(low.min().item(), high.max().item(), 200, dtype=torch.float64)[:, None]
    start = rational_value(span, *(table[:1].double() for table in act.start()))
    style = {"color": START_COLOR, "linestyle": "--", "linewidth": 1.4}
    panel.plot(span[:, 0], start[:, 0], label="start", zorder=3, **style)
    for group, color in enumerate(colors):
        panel.plot(x[:, group], y[:, group], color=color, linewidth=1.1, label=f"group {group}")
    margin = 0.1 * (y.max() - y.min()).item() or 1.0
    panel.set_ylim(y.min().item() - margin, y.max().item() + margin)  # the start may leave the panel
    panel.axhline(0, color="0.85", linewidth=0.6, zorder=0)
    panel.axvline(0, color="0.85", linewidth=0.6, zorder=0)
    panel.tick_params(labelsize=7)
    panel.locator_params(nbins=5)
    panel.text(0.04, 0.94, act.init, transform=panel.transAxes, fontsize=7, color=START_COLOR, va="top")


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"a figure needs matplotlib: pip install 'flashkat_hf[train]' ({error})") from error
    return Figure
