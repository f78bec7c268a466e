"""Maps of the pixels that a prediction rests on: attention rollout, and integrated gradients by captum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..messages import needs
from ..model.modeling_flashkat import FlashKATForImageClassification

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_STEPS = 64  # of the integral
STEPS_AT_ONCE = 16


@dataclass(frozen=True)
class Explanation:
    """Two maps of one image, on the CPU.

    Attributes:
        label: index of the explained output.
        name: of that label.
        probability: that the model gives it.
        pixels: `(channels, height, width)`, the image as the model saw it, normalised.
        rollout: `(rows, columns)` of patches: part of the attention that flows from each to what is pooled,
            over all layers; not negative, and it knows nothing of the label.
        gradients: `(height, width)`: integrated gradients of the label's output, summed over the channels;
            positive where a pixel speaks for the label. Their sum is the output less the baseline's.
        missing: the output less the baseline's less that sum: how far the integral is from exact.
    """

    label: int
    name: str
    probability: float
    pixels: Tensor
    rollout: Tensor
    gradients: Tensor
    missing: float

    @property
    def patch_gradients(self) -> Tensor:
        """Return the gradients summed over each patch, in the shape of `rollout`."""
        rows, columns = self.rollout.shape
        height, width = self.gradients.shape
        return self.gradients.reshape(rows, height // rows, columns, width // columns).sum((1, 3))

    def plot(self, mean: float | list[float] = 0.0, std: float | list[float] = 1.0) -> Figure:
        """Draw the image, the rollout and the gradients, both by patches, beside each other.

        Args:
            mean: of the image processor, for each channel.
            std: the same.

        Raises:
            ValueError: matplotlib is not installed.
        """
        needs("matplotlib", "explain")
        from matplotlib.figure import Figure

        scale, shift = (torch.as_tensor(value).reshape(-1, 1, 1) for value in (std, mean))
        image = (self.pixels * scale + shift).clamp(0, 1).permute(1, 2, 0).numpy()
        grey = image.mean(-1)
        height, width = grey.shape
        figure = Figure(figsize=(9.6, 3.5), layout="constrained")
        axes = figure.subplots(1, 3)
        axes[0].imshow(image if image.shape[-1] == 3 else grey, cmap="gray", vmin=0, vmax=1)
        axes[0].set_title(f"{self.name}: {self.probability:.1%}", fontsize=10)
        signed = self.patch_gradients
        largest = max(signed.abs().max().item(), 1e-12)
        maps = [
            (self.rollout, "magma", 0.0, self.rollout.max().item(), "attention rollout (part of the whole)"),
            (signed, "RdBu_r", -largest, largest, "integrated gradients: for (red), against (blue)"),
        ]
        for panel, (values, colors, low, high, title) in zip(axes[1:], maps, strict=True):
            panel.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
            where = (0, width, height, 0)
            drawn = panel.imshow(values.numpy(), cmap=colors, vmin=low, vmax=high, alpha=0.65, extent=where)
            panel.set_title(title, fontsize=9)
            figure.colorbar(drawn, ax=panel, shrink=0.8).ax.tick_params(labelsize=7)
        for panel in axes:
            panel.set_xticks([])
            panel.set_yticks([])
        return figure


def explain(
    model: FlashKATForImageClassification, pixel_values: Tensor, label: int | str | None = None
) -> Explanation:
    """Compute attention rollout and integrated gradients for one image.

    Args:
        model: a classifier, on any device; it stays as it is.
        pixel_values: `(1, channels, height, width)` of the model's image processor.
        label: name or index of the output to explain; default: the most probable.

    Raises:
        ValueError: captum is not installed, the model has no head or no such label, or it is not one image.

    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020; Sundararajan et al.,
    Axiomatic Attribution for Deep Networks, ICML 2017 (baseline: the mean colour, 0 after normalisation).
    """
    captum = needs("captum.attr", "explain")
    if not model.config.num_labels:
        raise ValueError("the model has no head: there is no prediction to explain")
    if pixel_values.ndim != 4 or len(pixel_values) != 1:
        shape = tuple(pixel_values.shape)
        raise ValueError(f"pixel_values must have shape (1, channels, height, width), not {shape}")
    names: dict[int, str] = dict(model.config.id2label or {})  # pyright: ignore[reportAssignmentType]
    index = None if label is None else _label_index(label, names)
    pixels = pixel_values.to(model.device, model.dtype)
    with _quiet(model):
        with torch.no_grad():
            outputs = model(pixels, output_attentions=True)
        probabilities = outputs.logits[0].float().softmax(-1)
        index = int(probabilities.argmax()) if index is None else index
        gradients, missing = captum.IntegratedGradients(lambda x: model(x).logits.float()).attribute(
            pixels,
            target=index,
            n_steps=NUM_STEPS,
            internal_batch_size=STEPS_AT_ONCE,
            return_convergence_delta=True,
        )
    embeddings = model.flashkat.embeddings
    prefix = embeddings.num_prefix_tokens
    rollout = attention_rollout(outputs.attentions, model.config.pooling, prefix)
    return Explanation(
        index,
        names[index],
        probabilities[index].item(),
        pixels[0].float().cpu(),
        rollout[0].reshape(embeddings.grid(*embeddings.image_size)).cpu(),
        gradients[0].detach().float().sum(0).cpu(),
        -missing.item(),
    )


def attention_rollout(attentions: tuple[Tensor, ...], pooling: str = "cls", num_prefix: int = 1) -> Tensor:
    """Return how much of what is pooled comes from each patch, `(batch, patches)`.

    Each layer passes on half of a token itself and half by its mean attention; the layers multiply.

    Args:
        attentions: of each layer `(batch, heads, tokens, tokens)`.
        pooling: "cls", the first token, or "mean", the patches.
        num_prefix: tokens in front of the patches: the cls token and registers.
    """
    flow = stays = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for weights in attentions:
        flow = (0.5 * weights.float().mean(1) + 0.5 * stays) @ flow
    pooled = flow[:, 0] if pooling == "cls" else flow[:, num_prefix:].mean(1)
    return pooled[:, num_prefix:]


def _label_index(label: int | str, names: dict[int, str]) -> int:
    found = [index for index, name in names.items() if label in (index, name)]
    found = found or [index for index in names if str(index) == str(label)]
    if not found:
        some = ", ".join(list(names.values())[:3])
        raise ValueError(f"the model has no label {label!r}; it has {len(names)}, such as {some}")
    return found[0]


@contextmanager
def _quiet(model: FlashKATForImageClassification) -> Iterator[None]:
    """Give attention weights, evaluation mode and parameters without gradients; then put all back."""
    attention, modes = model.config._attn_implementation, {m: m.training for m in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.set_attn_implementation("eager")
        model.eval().requires_grad_(False)
        yield
    finally:
        model.set_attn_implementation(attention or "eager")
        for module, mode in modes.items():
            module.training = mode
        for parameter, value in wanted.items():
            parameter.requires_grad_(value)
