"""FlashKAT as a backbone: feature maps for dense heads, with a pyramid for those who need four scales."""

from typing import Unpack

import torch
from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_flashkat import FlashKATConfig
from .modeling_flashkat import FlashKATModel, FlashKATPreTrainedModel


class FlashKATChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of an image `(batch, channels, height, width)`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def pyramid_level(name: str, hidden_size: int, channels: int, eps: float) -> nn.Sequential:
    """Make one level of a simple feature pyramid, which comes from the last block's map alone.

    The levels have 4, 2, 1 and half as many pixels a side as there are patches, by transposed convolutions or
    a maximum; then follow a 1x1 and a 3x3 convolution with norms.

    Args:
        name: in `PYRAMID_STAGES`.
        hidden_size: channels in.
        channels: channels out.
        eps: of the norms.

    Source: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022 (ViTDet).
    """
    half = hidden_size // 2
    twice = nn.ConvTranspose2d(hidden_size, half, 2, stride=2)
    scale, width = {
        "pyramid1": (
            [
                twice,
                FlashKATChannelNorm(half, eps=eps),
                nn.GELU(),
                nn.ConvTranspose2d(half, half // 2, 2, stride=2),
            ],
            half // 2,
        ),
        "pyramid2": ([twice], half),
        "pyramid3": ([], hidden_size),
        "pyramid4": ([nn.MaxPool2d(2, ceil_mode=True)], hidden_size),
    }[name]
    return nn.Sequential(
        *scale,
        nn.Conv2d(width, channels, 1, bias=False),
        FlashKATChannelNorm(channels, eps=eps),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        FlashKATChannelNorm(channels, eps=eps),
    )


class FlashKATBackbone(BackboneMixin, FlashKATPreTrainedModel):
    """A FlashKAT gives feature maps, to AutoBackbone and to transformers' models with a `backbone_config`.

    It takes images of any size that the patch divides, also such that are not square: positions are
    interpolated. A classifier's checkpoint fits, its head is left out; a pyramid, where the config asks for
    one, starts at random.

    Args:
        config: `out_features` or `out_indices` choose the maps; `apply_layernorm`, `reshape_hidden_states`
            and `pyramid_channels` say what they are like.
    """

    def __init__(self, config: FlashKATConfig):
        super().__init__(config)
        self.flashkat = FlashKATModel(config, add_pooling_layer=False)
        channels = config.pyramid_channels
        self.num_features = [channels or config.hidden_size] * len(config.stage_names)
        self.pyramid = nn.ModuleDict()
        if channels is not None:
            for name in self.out_features:  # no others, whose parameters would learn nothing
                level = pyramid_level(name, config.hidden_size, channels, config.layer_norm_eps)
                self.pyramid[name] = level
        self.post_init()

    def post_init(self) -> None:
        # not BackboneMixin's, which listens to every layer for good: kernels go past modules that nobody
        # hears
        FlashKATPreTrainedModel.post_init(self)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BackboneOutput:
        """Return the feature maps of images.

        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised; the patch divides the sides.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict`.

        Returns:
            `feature_maps`, one for each of `out_features`, in the dtype of the model: `(batch, channels,
            rows, columns)` of patches, or `(batch, 1 + patches, channels)` with the cls token in front if the
            config does not reshape. Register tokens are in none, they have no place.

        Raises:
            ValueError: wrong number of channels or image size; an argument that is not used.
        """
        base = self.flashkat
        hidden_states = base.embed(pixel_values, True, None, kwargs)
        chosen = {"stem": hidden_states}
        for number, layer in enumerate(base.layers, start=1):
            hidden_states = layer(hidden_states, **kwargs)
            chosen[f"stage{number}"] = hidden_states
        grid = base.embeddings.grid(*pixel_values.shape[-2:])
        if self.config.pyramid_channels is not None:
            last = self._feature_map(hidden_states, grid, reshape=True)
            maps = tuple(self._level(name)(last) for name in self.out_features)
            return BackboneOutput(maps)  # pyright: ignore[reportArgumentType]
        reshape = self.config.reshape_hidden_states
        maps = tuple(self._feature_map(chosen[name], grid, reshape) for name in self.out_features)
        return BackboneOutput(maps)  # pyright: ignore[reportArgumentType]

    def _level(self, name: str) -> nn.Module:
        if name not in self.pyramid:
            raise ValueError(
                f"the backbone was built with the levels {', '.join(self.pyramid)}, not with {name}"
            )
        return self.pyramid[name]

    def _feature_map(self, hidden_states: Tensor, grid: tuple[int, int], reshape: bool) -> Tensor:
        if self.config.apply_layernorm:
            hidden_states = self.flashkat.norm(hidden_states)
        patches = hidden_states[:, self.flashkat.embeddings.num_prefix_tokens :]
        if reshape:
            return patches.transpose(1, 2).unflatten(2, grid).contiguous()
        return torch.cat((hidden_states[:, :1], patches), dim=1)
