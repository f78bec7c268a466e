"""Configuration of a FlashKAT model: the field names of ViT's config, and the group-rational activations'."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .coefficients import SIMPLE_FUNCTIONS, start_table

if (
    TYPE_CHECKING
):  # never runs, but transformers reads it: a config is saved with every file that its model needs
    from .backbone_flashkat import FlashKATBackbone  # noqa: F401
    from .masked_image_flashkat import FlashKATForMaskedImageModeling  # noqa: F401
    from .modeling_flashkat import FlashKATModel  # noqa: F401

AUTO_MAP = {  # where a checkpoint's own code has what each Auto class makes
    "AutoConfig": "configuration_flashkat.FlashKATConfig",
    "AutoModel": "modeling_flashkat.FlashKATModel",
    "AutoModelForImageClassification": "modeling_flashkat.FlashKATForImageClassification",
    "AutoModelForMaskedImageModeling": "masked_image_flashkat.FlashKATForMaskedImageModeling",
    "AutoBackbone": "backbone_flashkat.FlashKATBackbone",
}
SIZES = {
    "micro": {  # for small images and tests
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 16,
        "patch_size": 4,
    },
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
PYRAMID_STAGES = ("pyramid1", "pyramid2", "pyramid3", "pyramid4")  # from fine to coarse
DENSE_DEFAULTS = {  # not saved as long as they hold, so that classifiers are saved as they always were
    "num_register_tokens": 0,
    "apply_layernorm": True,
    "reshape_hidden_states": True,
    "pyramid_channels": None,
}


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return the height and the width of what a config states as one number or as two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


@strict
class FlashKATConfig(BackboneConfigMixin, PreTrainedConfig):
    """A Kolmogorov-Arnold Transformer for images.

    The defaults are the base size, `from_size` gives the others.

    Args:
        hidden_size: channels of a token; a multiple of `num_groups` and of `num_attention_heads`.
        num_hidden_layers: blocks.
        num_attention_heads: heads of `hidden_size // num_attention_heads` channels; by default heads of 64.
        intermediate_size: channels between the two linear maps of a block's MLP; a multiple of `num_groups`.
        image_size: height and width in pixels, one number or a pair (height, width); multiples of
            `patch_size`.
        patch_size: height and width of a patch in pixels, likewise.
        num_channels: channels of the image.
        layer_norm_eps: added to the variance in every layer norm.
        qkv_bias: whether the query, key and value maps have a bias.
        hidden_dropout_prob: dropout of the embeddings, of the attention's output and inside the MLP.
        attention_probs_dropout_prob: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 in the first.
        num_groups: groups of channels that share one rational function.
        num_numerator_groups: rows of each numerator: 1 (shared by the groups, as released) or `num_groups`.
        act1_init: start table of the activation before the first linear map (`coefficients.START_TABLES`).
        act2_init: start table of the activation before the second.
        pooling: "cls" (final norm, then the cls token) or "mean" (mean of the patch tokens, then the norm).
        initializer: start of the MLP's linear maps: "trunc_normal", as the released weights, or
            "variance_preserving", as the paper describes it. The attention starts mimetic with both.
        initializer_range: standard deviation of the truncated normal starts.
        simplified_functions: activations in which simpler functions stand for rationals, as
            `flashkat functions --simplify` writes it: by "LAYER.act1" or "LAYER.act2" the name of each
            group's function, "rational" or one of `coefficients.SIMPLE_FUNCTIONS`.
        num_register_tokens: learned tokens without a place, between the cls token and the patches (Darcet et
            al., Vision Transformers Need Registers, ICLR 2024).
        apply_layernorm: of a `FlashKATBackbone`: whether its feature maps go through the final norm.
        reshape_hidden_states: of a `FlashKATBackbone`: whether its feature maps are images `(batch, channels,
            height, width)`, or tokens `(batch, 1 + patches, channels)` with the cls token in front.
        pyramid_channels: of a `FlashKATBackbone`: channels of a simple feature pyramid, by default none.
        **kwargs: what every config of transformers has, such as `num_labels`; and which feature maps a
            `FlashKATBackbone` returns, `out_features` (names among `stage_names`: "stem", "stage1" and so on,
            or "pyramid1" to "pyramid4") or `out_indices` (their numbers), by default the last, all four of
            a pyramid.

    Raises:
        StrictDataclassError: a value has the wrong type or contradicts another; the message has names and
            values.
        ValueError: `out_features` or `out_indices` name no stage, or in another order.

    Source: Yang and Wang, Kolmogorov-Arnold Transformer, ICLR 2025.
    """

    model_type = "flashkat"
    _auto_class = "AutoConfig"  # `save_pretrained` copies the code too, of a config and so of a model

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int | None = None
    intermediate_size: int = 3072
    image_size: int | tuple[int, int] | list[int] = 224
    patch_size: int | tuple[int, int] | list[int] = 16
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    num_groups: int = 8
    num_numerator_groups: int = 1
    act1_init: str = "identity"
    act2_init: str = "swish"
    pooling: Literal["cls", "mean"] = "cls"
    initializer: Literal["trunc_normal", "variance_preserving"] = "trunc_normal"
    initializer_range: float = 0.02
    simplified_functions: dict[str, list[str]] | None = None
    num_register_tokens: int = 0
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    pyramid_channels: int | None = None

    def __post_init__(self, **kwargs):
        kwargs["auto_map"] = {**(kwargs.get("auto_map") or {}), **AUTO_MAP}
        if self.num_attention_heads is None and self.hidden_size % 64 == 0:
            self.num_attention_heads = self.hidden_size // 64
        for name in ("image_size", "patch_size"):  # JSON has lists
            if isinstance(size := getattr(self, name), list):
                setattr(self, name, tuple(size))
        kwargs.pop("stage_names", None)
        self._choose_features(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)

    def _choose_features(self, names: Sequence[str] | None, indices: Sequence[int] | None) -> None:
        """Name the stages of a backbone, and choose those whose feature maps it returns."""
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]
        if self.pyramid_channels is not None:
            self.stage_names = list(PYRAMID_STAGES)
            names = self.stage_names if names is None and indices is None else names
        number = len(self.stage_names)
        if wrong := [index for index in indices or () if not -number <= index < number]:
            raise ValueError(f"out_indices must be in [-{number}, {number}); got {wrong[0]}")
        self.set_output_features_output_indices(
            None if names is None else list(names), None if indices is None else list(indices)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, without what a backbone alone has and nobody changed."""
        values = super().to_dict()
        last = len(values.pop("stage_names")) - 1
        chosen = list(range(last + 1)) if self.pyramid_channels is not None else [last]
        if values["out_indices"] in (chosen, [index - last - 1 for index in chosen]):
            del values["out_features"], values["out_indices"]
        for name, default in DENSE_DEFAULTS.items():
            if values.get(name) == default:
                values.pop(name, None)
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "FlashKATConfig":
        """Make the config of a file, less an attention implementation, which might name a kernel of the Hub.

        transformers never writes one, and would download and run it; an argument of `from_pretrained` counts.
        """
        names = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
        kept = {name: value for name, value in config_dict.items() if name not in names}
        for name in (
            "num_hidden_layers",
            "pyramid_channels",
        ):  # what the names of a backbone's stages follow from
            if name in kwargs:
                kept[name] = kwargs.pop(name)
        return super().from_dict(kept, **kwargs)

    @classmethod
    def from_size(cls, size: str, **overrides) -> "FlashKATConfig":
        """Return the config of a size; `overrides` are fields of the config.

        Args:
            size: "tiny", "small" or "base": 5.7, 22 and 87 million parameters for 224 pixels; or "micro":
                0.1 million, for images of 16 pixels in patches of 4.
            **overrides: fields of the config.

        Raises:
            ValueError: the size is unknown.
            StrictDataclassError: a field does not serve.
        """
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}; known sizes: {', '.join(SIZES)}")
        return cls(**{**SIZES[size], **overrides})

    def validate_sizes(self):
        sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_channels", "num_groups")
        for name in (*sizes, "num_attention_heads", "pyramid_channels"):
            value = getattr(self, name)
            self._require(value is None or value > 0, f"{name} must be positive", name)
        self._require(
            self.num_register_tokens >= 0, "num_register_tokens must be 0 or more", "num_register_tokens"
        )
        for name in ("image_size", "patch_size"):
            self._require(min(pair(getattr(self, name))) > 0, f"{name} must be positive", name)
        for name, divisor in (("hidden_size", "num_groups"), ("intermediate_size", "num_groups")):
            divides = getattr(self, name) % getattr(self, divisor) == 0
            self._require(divides, f"{name} must be a multiple of {divisor}", name, divisor)
        if self.num_attention_heads is None:
            reason = "num_attention_heads must be given where hidden_size is no multiple of 64"
            self._require(False, reason, "hidden_size")
        else:
            divides = self.hidden_size % self.num_attention_heads == 0
            names = ("hidden_size", "num_attention_heads")
            self._require(divides, "hidden_size must be a multiple of num_attention_heads", *names)
        sides = zip(pair(self.image_size), pair(self.patch_size), strict=True)
        divides = all(size % patch == 0 for size, patch in sides)
        names = ("image_size", "patch_size")
        self._require(divides, "image_size must be a multiple of patch_size", *names)
        self._require(
            self.num_numerator_groups in (1, self.num_groups),
            "num_numerator_groups must be 1 or num_groups",
            "num_numerator_groups",
            "num_groups",
        )

    def validate_rates(self):
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            self._require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1)", name)
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            self._require(0 < value < math.inf, f"{name} must be positive and finite", name)

    def validate_start_tables(self):
        for name in (self.act1_init, self.act2_init):
            start_table(name)

    def validate_simplified_functions(self):
        acts = {f"{layer}.{act}" for layer in range(self.num_hidden_layers) for act in ("act1", "act2")}
        for act, names in (self.simplified_functions or {}).items():
            where = f"simplified_functions[{act!r}]"
            if act not in acts:
                raise ValueError(
                    f"{where}: the activations are 0.act1, 0.act2 to {self.num_hidden_layers - 1}.act2"
                )
            if len(names) != self.num_groups:
                raise ValueError(
                    f"{where} must name a function for each of num_groups={self.num_groups}, not {len(names)}"
                )
            if unknown := sorted(set(names) - {"rational", *SIMPLE_FUNCTIONS}):
                known = ", ".join(("rational", *SIMPLE_FUNCTIONS))
                raise ValueError(f"{where}: unknown function {unknown[0]!r}; known are {known}")

    def _require(self, condition: bool, message: str, *names: str) -> None:
        if not condition:
            raise ValueError(
                f"{message}; got " + ", ".join(f"{name}={getattr(self, name)}" for name in names)
            )
