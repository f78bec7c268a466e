"""FlashKAT that learns without labels, by filling in hidden patches (SimMIM)."""

from typing import Unpack

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedImageModelingOutput
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .configuration_flashkat import FlashKATConfig
from .modeling_flashkat import FlashKATModel, FlashKATPreTrainedModel


class FlashKATForMaskedImageModeling(FlashKATPreTrainedModel):
    """FlashKATModel with a linear map from each patch's token to the patch's pixels.

    Source: Xie et al., SimMIM: A Simple Framework for Masked Image Modeling, CVPR 2022.
    """

    def __init__(self, config: FlashKATConfig):
        super().__init__(config)
        self.flashkat = FlashKATModel(config, add_pooling_layer=False, use_mask_token=True)
        height, width = self.flashkat.embeddings.patch_size
        self.decoder = nn.Linear(config.hidden_size, config.num_channels * height * width)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedImageModelingOutput:
        """Reconstruct images, whose hidden patches the model does not see.

        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised.
            bool_masked_pos: `(batch, patches)`, true for the hidden patches, row by row of the image.
            interpolate_pos_encoding: accept another image size, with positions interpolated to it.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict`.

        Returns:
            `reconstruction`, shaped as `pixel_values`, and, with hidden patches, `loss`: the mean absolute
            error of their pixels, in float32.

        Raises:
            ValueError: wrong number of channels, image size or mask; an argument that is not used.
        """
        outputs = self.flashkat(
            pixel_values, interpolate_pos_encoding, bool_masked_pos, return_dict=True, **kwargs
        )
        embeddings = self.flashkat.embeddings
        pixels = self.decoder(outputs.last_hidden_state[:, embeddings.num_prefix_tokens :])
        rows, columns = embeddings.grid(*pixel_values.shape[-2:])
        patches = pixels.unflatten(2, (embeddings.num_channels, *embeddings.patch_size))
        patches = patches.unflatten(1, (rows, columns))  # (batch, rows, columns, channels, height, width)
        reconstruction = patches.permute(0, 3, 1, 4, 2, 5).reshape(pixel_values.shape)
        loss = None
        if bool_masked_pos is not None:
            error = (reconstruction.float() - pixel_values.float()).abs().mean(1)
            height, width = embeddings.patch_size
            error = error.unflatten(1, (rows, height)).unflatten(3, (columns, width)).mean((2, 4)).flatten(1)
            hidden = bool_masked_pos.to(error.dtype)
            loss = (error * hidden).sum() / hidden.sum().clamp(min=1)
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def random_mask(
    batch_size: int, grid: tuple[int, int], ratio: float = 0.6, generator: torch.Generator | None = None
) -> Tensor:
    """Return `bool_masked_pos` `(batch_size, patches)` that hides the same number of patches in each image.

    Args:
        batch_size: number of images.
        grid: patches in height and width, as `model.flashkat.embeddings.grid(height, width)` gives them.
        ratio: part of the patches that is hidden, in [0, 1].
        generator: of the random numbers, on the CPU.

    Raises:
        ValueError: `ratio` is not in [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1]; got {ratio}")
    number = grid[0] * grid[1]
    ranks = torch.rand(batch_size, number, generator=generator).argsort(dim=1)
    return ranks < round(ratio * number)
