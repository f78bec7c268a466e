"""The picture of a model's learned functions over the inputs that they meet.

matplotlib is imported when a figure is made, and its `pyplot` never, so nothing global is touched and no
display is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .functions import What, model_functions
from .functions_drawing import Size, Theme, draw_functions, figure_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_functions(
    model: nn.Module,
    batches: Iterable[Tensor] | None = None,
    *,
    layer: int | None = None,
    group: int | None = None,
    compare: nn.Module | None = None,
    what: What = "value",
    theme: Theme = "light",
    size: Size = "screen",
) -> Figure:
    """Draw every activation of a model, a panel each: its groups' functions over the inputs that they meet.

    A panel shows the inputs from 0.1% to 99.9%; a group's curve is faint where only other groups have inputs.
    Behind each curve is the histogram of its inputs. The start is dashed, and GELU (act2) or the identity
    (act1) dotted. A digit on a curve is its group.

    Args:
        model: a module that contains a `GroupRational`; its mode stays, no random number is drawn.
        batches: what the model is called with to measure the inputs, see `model_functions`.
        layer: only of this layer.
        group: only of this group.
        compare: another model with the same activations, whose functions are drawn thin, dash-dotted.
        what: "value", or "slope" for derivatives.
        theme: "light" or "dark".
        size: "screen", or "column" for a column of a paper.

    Raises:
        ValueError: matplotlib is not installed, there is no such activation, layer or group, or `compare` has
            other activations.
    """
    figure_class("functions")
    batches = None if batches is None else list(batches)
    functions = model_functions(model, batches, layer=layer, group=group)
    others = None if compare is None else model_functions(compare, batches, layer=layer, group=group)
    return draw_functions(functions, others, what=what, theme=theme, size=size)
