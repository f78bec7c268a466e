"""The proof of a conversion: the written folder against an evaluation of the source without any code of ours.

A KAT runs in timm's VisionTransformer, with the MLP in a few lines of plain PyTorch, and its original state
dict is loaded strictly; a ViT runs in timm's or transformers' own class. Everything is float64: what computes
the same function agrees to rounding, and a wrong name, a swapped query and key or another epsilon does not
hide behind it. A ViT runs twice: as it is, whose difference to the result is what the activation's start
table costs, and with the result's tables as activations, which must agree to rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from ..checkpoints.loading import load_processor
from ..model.configuration_flashkat import FlashKATConfig, pair
from ..model.modeling_flashkat import FlashKATForImageClassification
from .source import Source, timm_arguments, timm_model
from .tensor_names import NAMINGS, has_layer_scale, is_folded, num_patches, source_names, strip_prefix

NUM_IMAGES = 4
ROUNDING = 1e-9  # of float64 through a deep network with fifth powers, relative to the largest output
FOLDED_ROUNDING = 1e-5  # of float32 weights that layer scale was multiplied into, or positions added to


@dataclass(frozen=True)
class Proof:
    """A comparison of the result with its source on a fixed batch."""

    outputs: str  # what was compared: "logits" or, without the source's head, "pooled features"
    difference: float  # largest absolute difference to the source
    spread: float  # standard deviation of the source's outputs
    agreement: float  # part of the images with the same largest output
    rounding: float  # largest difference relative to the largest output, to a KAT or to a ViT with our tables


class PlainRational(nn.Module):
    """The formula term by term, with its coefficients under the names of the source."""

    def __init__(
        self, numerator: Tensor, denominator: Tensor, names: tuple[str, str] = ("numerator", "denominator")
    ):
        super().__init__()
        self.names = names
        for name, table in zip(names, (numerator, denominator), strict=True):
            self.register_parameter(name, nn.Parameter(table))

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.get_parameter(name) for name in self.names)
        groups = x.reshape(*x.shape[:-1], len(b), -1)
        p, q = torch.zeros_like(groups), torch.ones_like(groups)
        for k in range(6):
            p += a[:, k, None] * groups**k
        for k in range(4):
            q += b[:, k, None].abs() * groups.abs() ** (k + 1)
        return (p / q).reshape(x.shape)


class PlainKATMlp(nn.Module):
    """KAT's MLP in the shape that timm's VisionTransformer asks for."""

    def __init__(self, in_features: int, hidden_features: int, *, rows: int, groups: int, names, **ignored):
        super().__init__()
        self.act1 = PlainRational(torch.empty(rows, 6), torch.empty(groups, 4), names)
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act2 = PlainRational(torch.empty(rows, 6), torch.empty(groups, 4), names)
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act2(self.fc1(self.act1(x))))


@torch.no_grad()
def prove(source: Source, config: FlashKATConfig, folder: Path, fresh_head: bool = False) -> Proof:
    """Compare a written folder with its source, whose positions have been resized if the result's were.

    Args:
        source: with the state dict that the result must compute.
        config: of the result; sizes and number of heads of both.
        folder: the result, loaded as a user would.
        fresh_head: the result has another head than the source: the pooled features are compared.

    Raises:
        ValueError: the result does not compute the source's function, or gives numbers that are not finite;
            its processor does not make what it takes; or the library that evaluates the source is missing.
    """
    shape = (NUM_IMAGES, config.num_channels, *pair(config.image_size))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    processor = load_processor(folder, config)
    if config.num_channels in (1, 3):  # and an image of a file's kind, as users have them
        pixels = torch.randint(256, (48, 40, 3), generator=generator, dtype=torch.uint8).numpy()
        processed = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        images = torch.cat((images, processed.double()))
    pooled = fresh_head or not config.num_labels
    model = _source_model(source, config, pooled)
    expected = expected_with_tables = _outputs(model, images)
    if not source.is_kat:
        _install_tables(model, folder)
        expected_with_tables = _outputs(model, images)
    del model  # one model in float64 at a time
    result: Any = FlashKATForImageClassification.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    )
    output = result.flashkat(images).pooler_output if pooled else result(images).logits
    largest = expected_with_tables.abs().max()
    rounding = ((output - expected_with_tables).abs().max() / largest).item()
    if not rounding <= (FOLDED_ROUNDING if is_folded(source.state, config) else ROUNDING):  # NaN too
        raise ValueError(
            f"{source.name} converted does not compute the same function: largest relative difference "
            f"{rounding:.2g} on a fixed batch; nothing is written"
        )
    output, expected = output[:NUM_IMAGES], expected[:NUM_IMAGES]
    return Proof(
        outputs="pooled features" if pooled else "logits",
        difference=(output - expected).abs().max().item(),
        spread=expected.std().item(),
        agreement=(output.argmax(-1) == expected.argmax(-1)).double().mean().item(),
        rounding=rounding,
    )


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    outputs = model(images)
    for name in ("logits", "pooler_output"):  # transformers' wraps them
        if getattr(outputs, name, None) is not None:
            return getattr(outputs, name)
    return outputs  # pyright: ignore[reportReturnType]


def _source_model(source: Source, config: FlashKATConfig, pooled: bool) -> nn.Module:
    """Make the source's own model in float64, without its head if the pooled features are wanted."""
    head = ("head.", "classifier.") if pooled else ()
    state = {
        name: tensor.double()
        for name, tensor in strip_prefix(source.state).items()
        if not name.startswith(head)
    }
    num_labels = 0 if pooled else config.num_labels
    if source.title.startswith("transformers"):
        if "DINOv2" in source.title:
            return _transformers_dinov2(source, config, state)
        return _transformers_vit(source, config, state, num_labels)
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ValueError(
            "timm, which evaluates the source, is missing: pip install 'flashkat_hf[train]', "
            "or give --no-verify"
        ) from error
    arguments: dict[str, Any] = timm_arguments(config) | {"num_classes": num_labels}
    if source.architecture:
        sizes = {name: arguments[name] for name in ("img_size", "num_classes", "global_pool")}
        model = timm_model(source.architecture, source.config, **sizes)
    else:
        if source.is_kat:
            names = [
                source_names(f"flashkat.layers.0.mlp.act1.{part}", NAMINGS[source.title])[0].split(".")[-1]
                for part in ("numerator", "denominator")
            ]
            rows, groups = config.num_numerator_groups, config.num_groups
            arguments["mlp_layer"] = partial(PlainKATMlp, rows=rows, groups=groups, names=tuple(names))
        with torch.device("meta"):
            model = VisionTransformer(
                **arguments,
                init_values=1.0 if has_layer_scale(state) else None,
                no_embed_class=state["pos_embed"].shape[1] == num_patches(config),
                reg_tokens=config.num_register_tokens,
                norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),  # pyright: ignore[reportArgumentType]
                weight_init="skip",
            )
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _transformers_vit(
    source: Source, config: FlashKATConfig, state: Mapping[str, Tensor], num_labels: int | None
) -> nn.Module:
    """Make transformers' own ViT with these weights."""
    from transformers import ViTConfig, ViTForImageClassification

    values = _shared_values(source, config) | {"intermediate_size": config.intermediate_size}
    values["num_labels"] = num_labels
    vit_config = ViTConfig(**values, attn_implementation="sdpa")  # pyright: ignore[reportCallIssue]
    prefixed = {
        name if name.startswith("classifier.") else f"vit.{name}": tensor for name, tensor in state.items()
    }
    model, info = ViTForImageClassification.from_pretrained(
        None, config=vit_config, state_dict=prefixed, dtype=torch.float64, output_loading_info=True
    )  # pyright: ignore[reportGeneralTypeIssues]
    _refuse_others(info, "ViT")
    return model.eval()


def _transformers_dinov2(source: Source, config: FlashKATConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """Make transformers' own DINOv2, which has no head of ours, with these weights."""
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    values = _shared_values(source, config) | {"mlp_ratio": config.intermediate_size // config.hidden_size}
    registers, kinds = config.num_register_tokens, (Dinov2Config, Dinov2Model)
    if registers:
        kinds = (Dinov2WithRegistersConfig, Dinov2WithRegistersModel)
        values["num_register_tokens"] = registers
    else:
        values["use_mask_token"] = "embeddings.mask_token" in state
    own: Any = kinds[0](**values, attn_implementation="sdpa")  # pyright: ignore[reportCallIssue]
    model, info = kinds[1].from_pretrained(
        None, config=own, state_dict=dict(state), dtype=torch.float64, output_loading_info=True
    )  # pyright: ignore[reportGeneralTypeIssues]
    _refuse_others(info, "DINOv2")
    return model.eval()


def _shared_values(source: Source, config: FlashKATConfig) -> dict[str, Any]:
    """Return what the config of transformers' own model shares with ours."""
    shared = ["hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"]
    shared += ["num_channels", "layer_norm_eps", "qkv_bias"]
    values: dict[str, Any] = {name: getattr(config, name) for name in shared}
    return values | {"hidden_act": source.config.get("hidden_act", "gelu")}


def _refuse_others(info: Mapping[str, Any], kind: str) -> None:
    if names := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]):
        listed = ", ".join(names[:5])
        raise ValueError(f"transformers' own {kind} does not take the source's weights: {listed}")


def _install_tables(model: nn.Module, folder: Path) -> None:
    """Give each MLP of a ViT the activations of the written layer with the same index."""
    modules: list[Any] = list(model.modules())
    mlps = [module for module in modules if hasattr(module, "fc1") and hasattr(module, "fc2")]
    with safe_open(folder / "model.safetensors", "pt") as file:

        def rational(name: str) -> PlainRational:
            parts = (f"{name}.numerator", f"{name}.denominator")
            return PlainRational(*(file.get_tensor(part).double() for part in parts))

        for index, mlp in enumerate(mlps):
            name = f"flashkat.layers.{index}.mlp"
            mlp.fc1 = nn.Sequential(rational(f"{name}.act1"), mlp.fc1)
            act2 = next(part for part in ("activation_fn", "activation", "act") if hasattr(mlp, part))
            setattr(mlp, act2, rational(f"{name}.act2"))
