"""FlashKAT as timm's models are: made by `timm.create_model`, with timm's arguments and methods."""

from functools import partial
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model.configuration_flashkat import FlashKATConfig
from ..model.modeling_flashkat import FlashKATForImageClassification

POOLING = {"token": "cls", "avg": "mean"}  # timm's names and ours


class TimmFlashKAT(FlashKATForImageClassification):
    """A FlashKAT that returns logits, and has what timm asks of a model.

    Its parameters have a FlashKAT folder's names, so timm's `checkpoint_path` takes a `model.safetensors`.

    Args:
        size: as for `FlashKATConfig.from_size`.
        num_classes: 0 for none: the output is then the pooled vector.
        in_chans: channels of the image.
        img_size: height and width in pixels.
        global_pool: "token" (the cls token) or "avg" (the mean of the patches, then the norm).
        drop_rate: dropout of embeddings, of the attention's output and inside the MLP.
        drop_path_rate: stochastic depth of the last block.
        dynamic_img_size: take other image sizes, with interpolated positions.
        **overrides: fields of `FlashKATConfig`, such as `num_numerator_groups=8`.
    """

    def __init__(
        self,
        size: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        **overrides: Any,
    ):
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height != width:
            raise ValueError(f"img_size ({height}x{width}) must be square")
        config = FlashKATConfig.from_size(
            size,
            num_labels=num_classes,
            num_channels=in_chans,
            image_size=height,
            pooling=pooling_of(global_pool),
            hidden_dropout_prob=drop_rate,
            drop_path_rate=drop_path_rate,
            **overrides,
        )
        super().__init__(config)
        self.dynamic_img_size = dynamic_img_size
        self.num_classes, self.global_pool = num_classes, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = config.hidden_size
        self.num_prefix_tokens, self.patch_size = 1 + config.num_register_tokens, config.patch_size
        self.feature_info = [
            {"module": f"flashkat.layers.{i}", "num_chs": config.hidden_size, "reduction": config.patch_size}
            for i in range(config.num_hidden_layers)
        ]

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return logits `(batch, num_classes)` of images `(batch, in_chans, height, width)`."""
        return self.classifier(self.flashkat(x, self.dynamic_img_size).pooler_output)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return tokens `(batch, 1 + patches, num_features)`, as `FlashKATModel`'s `last_hidden_state`."""
        return self.flashkat(x, self.dynamic_img_size).last_hidden_state

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of `forward_features`' tokens, or the pooled vector."""
        pooled = self.flashkat.norm(x[:, 1:].mean(dim=1)) if self.global_pool == "avg" else x[:, 0]
        return pooled if pre_logits else self.classifier(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the tokens after some layers, as timm's `VisionTransformer.forward_intermediates` does.

        Args:
            x: images.
            indices: of the layers; a number means so many last ones, None all.
            return_prefix_tokens: return pairs of patches and cls token.
            norm: apply the final norm to each.
            stop_early: leave out the layers behind the last index.
            output_fmt: "NCHW" `(batch, channels, rows, columns)` or "NLC" `(batch, patches, channels)`.
            intermediates_only: return the list alone, without the final tokens in front.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt ({output_fmt!r}) must be NCHW or NLC")
        taken, last = feature_take_indices(len(self.flashkat.layers), indices)
        grid = self.flashkat.embeddings.grid(*x.shape[-2:])
        tokens = self.flashkat.embeddings(x, self.dynamic_img_size)
        results = []
        for index, layer in enumerate(
            self.flashkat.layers[: last + 1] if stop_early else self.flashkat.layers
        ):
            tokens = layer(tokens)
            if index in taken:
                state = self.flashkat.norm(tokens) if norm else tokens
                patches = state[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                results.append(
                    (patches, state[:, : self.num_prefix_tokens]) if return_prefix_tokens else patches
                )
        if intermediates_only:
            return results
        return (tokens if self.global_pool == "avg" else self.flashkat.norm(tokens)), results

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` of these layers does not need; return their indices."""
        taken, last = feature_take_indices(len(self.flashkat.layers), indices)
        self.flashkat.layers = self.flashkat.layers[: last + 1]
        if prune_norm:
            self.flashkat.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        if prune_head:
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module:
        return self.classifier

    @torch.no_grad()
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh head, or none for 0 classes, in the place of the classifier."""
        if global_pool is not None:
            self.global_pool, self.config.pooling = global_pool, pooling_of(global_pool)
            self.flashkat.config.pooling = self.config.pooling
        self.num_classes = self.num_labels = self.config.num_labels = num_classes
        old = self.flashkat.embeddings.cls_token
        self.classifier = nn.Identity()
        if num_classes:
            factory = {"device": old.device, "dtype": old.dtype}
            self.classifier = nn.Linear(self.num_features, num_classes, **factory)
            self._init_weights(self.classifier)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self._set_gradient_checkpointing(enable, partial(checkpoint, use_reentrant=False))

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimisers do not decay, beside vectors."""
        rationals = {
            name for name, _ in self.named_parameters() if name.endswith(("numerator", "denominator"))
        }
        return {"flashkat.embeddings.position_embeddings", "flashkat.embeddings.cls_token"} | rationals

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns of layers for timm's layer-wise decay."""
        return {
            "stem": r"^flashkat\.embeddings",
            "blocks": [(r"^flashkat\.layers\.(\d+)", None), (r"^flashkat\.norm", (99999,))],
        }


def pooling_of(global_pool: str) -> Any:
    """Return our name of a pooling of timm's.

    Raises:
        ValueError: FlashKAT has none such.
    """
    if global_pool not in POOLING:
        raise ValueError(f"global_pool ({global_pool!r}) must be one of {', '.join(POOLING)}")
    return POOLING[global_pool]


CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": None,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "flashkat.embeddings.patch_embeddings",
    "classifier": "classifier",
    "license": "mit",
}
NAMES = [f"flashkat_{size}_patch16_224" for size in ("tiny", "small", "base")]
default_cfgs = generate_default_cfgs(dict.fromkeys(NAMES, CFG))


def create(name: str, pretrained: bool, out_indices: Any = 3, **arguments: Any) -> Any:
    """Make a registered model as timm makes its own.

    Raises:
        ValueError: `pretrained`: timm knows no address of these weights.
    """
    if pretrained:
        raise ValueError(
            f"{name} has no weights in timm; convert published ones with `flashkat convert` and pass "
            "checkpoint_path='FOLDER/model.safetensors'"
        )
    features = {"out_indices": out_indices, "feature_cls": "getter"}
    size = name.split("_")[1]
    return build_model_with_cfg(TimmFlashKAT, name, False, feature_cfg=features, size=size, **arguments)


@register_model
def flashkat_tiny_patch16_224(pretrained: bool = False, **arguments: Any) -> TimmFlashKAT:
    """Make a FlashKAT of 5.7 million parameters."""
    return create("flashkat_tiny_patch16_224", pretrained, **arguments)


@register_model
def flashkat_small_patch16_224(pretrained: bool = False, **arguments: Any) -> TimmFlashKAT:
    """Make a FlashKAT of 22 million parameters."""
    return create("flashkat_small_patch16_224", pretrained, **arguments)


@register_model
def flashkat_base_patch16_224(pretrained: bool = False, **arguments: Any) -> TimmFlashKAT:
    """Make a FlashKAT of 87 million parameters."""
    return create("flashkat_base_patch16_224", pretrained, **arguments)
