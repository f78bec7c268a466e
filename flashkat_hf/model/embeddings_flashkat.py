"""From pixels to tokens: patches, their positions, and the tokens that are no patches."""

import torch
from torch import Tensor, nn

from .configuration_flashkat import FlashKATConfig, pair


class FlashKATPatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel, as the matrix product that it is.

    Same parameters, same function.
    """

    def forward(self, input: Tensor) -> Tensor:
        patch_height, patch_width = self.kernel_size
        batch, channels, height, width = input.shape
        grid = (height // patch_height, width // patch_width)
        patches = input.reshape(batch, channels, grid[0], patch_height, grid[1], patch_width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class FlashKATEmbeddings(nn.Module):
    """Patch embeddings behind a cls token and register tokens, plus learned positions of cls and patches."""

    mask_token: nn.Parameter | None
    register_tokens: nn.Parameter | None

    def __init__(self, config: FlashKATConfig, use_mask_token: bool = False):
        super().__init__()
        size, num_registers = config.hidden_size, config.num_register_tokens
        self.num_channels = config.num_channels
        self.image_size, self.patch_size = pair(config.image_size), pair(config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size))
        self.mask_token = nn.Parameter(torch.empty(1, 1, size)) if use_mask_token else None
        self.register_tokens = nn.Parameter(torch.empty(1, num_registers, size)) if num_registers else None
        self.num_prefix_tokens = 1 + num_registers
        self.patch_embeddings = FlashKATPatchProjection(
            config.num_channels, size, kernel_size=self.patch_size, stride=self.patch_size
        )
        height, width = self.grid(*self.image_size)
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + height * width, size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return how many patches an image has in height and width."""
        return height // self.patch_size[0], width // self.patch_size[1]

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        bool_masked_pos: Tensor | None = None,
    ) -> Tensor:
        self._check(pixel_values, interpolate_pos_encoding)
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))
        positions, grid = self.position_embeddings, patches.shape[-2:]
        if interpolate_pos_encoding and tuple(grid) != self.grid(*self.image_size):
            positions = self.interpolate_pos_encoding(*grid)
        tokens = patches.flatten(2).transpose(1, 2)
        if bool_masked_pos is not None:
            tokens = torch.where(self._mask(bool_masked_pos, tokens), self._own_mask_token(tokens), tokens)
        tokens = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens), dim=1)
        tokens = tokens + positions
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
            tokens = torch.cat((tokens[:, :1], registers, tokens[:, 1:]), dim=1)
        return self.dropout(tokens)

    def interpolate_pos_encoding(self, grid_height: int, grid_width: int) -> Tensor:
        """Return positions `(1, 1 + grid_height * grid_width, hidden_size)` for another grid, bicubic."""
        cls_position, grid = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = grid.unflatten(1, self.grid(*self.image_size)).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(
            grid, size=(grid_height, grid_width), mode="bicubic", align_corners=False
        )
        return torch.cat((cls_position, grid.flatten(2).transpose(1, 2)), dim=1)

    @torch.no_grad()
    def resize(self, height: int, width: int) -> None:
        """Take images of this size from now on, with the positions interpolated to it."""
        positions = self.interpolate_pos_encoding(*self.grid(height, width)).contiguous()
        self.position_embeddings = nn.Parameter(positions)
        self.image_size = height, width

    def _own_mask_token(self, tokens: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos needs a model with a mask token: FlashKATForMaskedImageModeling, or "
                "FlashKATModel(config, use_mask_token=True)"
            )
        return self.mask_token.to(tokens.dtype)

    def _mask(self, bool_masked_pos: Tensor, tokens: Tensor) -> Tensor:
        if bool_masked_pos.shape != tokens.shape[:2]:
            raise ValueError(
                f"bool_masked_pos must have shape (batch, patches), here {tuple(tokens.shape[:2])}, "
                f"not {tuple(bool_masked_pos.shape)}"
            )
        return bool_masked_pos.bool()[..., None]

    def _check(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must have shape (batch, {self.num_channels}, height, width), "
                f"not {tuple(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != self.image_size:
            raise ValueError(
                f"images are {height}x{width} but the model takes {self.image_size[0]}x{self.image_size[1]}; "
                "resize them or pass interpolate_pos_encoding=True"
            )
        patch_height, patch_width = self.patch_size
        if height % patch_height or width % patch_width or not height or not width:
            patch = f"{patch_height}" if patch_height == patch_width else f"{patch_height}x{patch_width}"
            raise ValueError(f"image size {height}x{width} must be a multiple of patch_size ({patch})")
