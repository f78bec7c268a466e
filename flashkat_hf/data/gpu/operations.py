"""RandAugment, normalisation and erasing of a batch by PyTorch's operations, on devices that have no Triton kernels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

OPERATIONS = (  # timm's functions, in the order of their numbers in a plan
    "shear_x", "shear_y", "translate_x_rel", "translate_y_rel", "rotate", "auto_contrast", "equalize", "invert",
    "solarize", "solarize_add", "posterize", "contrast", "brightness", "color", "sharpness",
)  # fmt: skip
GEOMETRIC = OPERATIONS[:5]
BICUBIC = 3  # PIL's number of the filter


def augmented_by_operations(
    images: Tensor,
    plan: Tensor,
    num_layers: int,
    fill: Tensor,
    mean: Tensor,
    std: Tensor,
    noise: Tensor,
    stride: int,
) -> Tensor:
    """What `triton_augmentation.augmented` gives, but for bicubic filters; the plan stays on the CPU."""
    for layer in plan[:, :-5].unflatten(1, (num_layers, 9)).unbind(1):
        _layer(images, layer, fill)
    pixels = (images.float() - mean) / std
    _erase(pixels, plan[:, -5:], noise, stride)
    return pixels


def _layer(images: Tensor, operations: Tensor, fill: Tensor) -> None:
    """One operation for each image, in place; `(batch, 9)` on the CPU: number, argument, filter, map.

    Images of the same operation stand together, so that all that the device needs of the plan goes there at
    once.
    """
    numbers, arguments, filters = operations[:, :3].unbind(1)
    geometric = (numbers >= 0) & (numbers < len(GEOMETRIC))
    kinds, order = torch.where(geometric, (filters == BICUBIC).float(), numbers).sort(stable=True)
    starts = torch.searchsorted(kinds, torch.arange(len(OPERATIONS) + 1.0)).tolist()
    table = torch.cat((order[:, None], arguments[order, None], operations[order, 3:]), 1)
    table = table.to(images.device, non_blocking=True)
    index, arguments, maps = table[:, 0].long(), table[:, 1, None, None, None], table[:, 2:, None, None]

    def replace(first: str, last: str, function: Callable[[Tensor, slice], Tensor]) -> None:
        """What function makes of the images of these operations, and of their place in the table."""
        there = slice(starts[OPERATIONS.index(first)], starts[OPERATIONS.index(last) + 1])
        if there.start < there.stop:
            images[index[there]] = function(images[index[there]], there)

    bilinear, by_levels = starts[1] - starts[0], list(LEVELS)
    ends = [starts[OPERATIONS.index(name) + 1] - starts[OPERATIONS.index(by_levels[0])] for name in by_levels]
    replace(OPERATIONS[0], OPERATIONS[1], lambda images, there: _moved(images, maps[there], bilinear, fill))
    replace(by_levels[0], by_levels[-1], lambda images, there: _through(ends, images, arguments[there]))
    replace(
        "color", "color", lambda images, there: _away_from(_gray(images), images.float(), arguments[there])
    )
    replace("sharpness", "sharpness", lambda images, there: _away_from(*_smooth(images), arguments[there]))


def _moved(images: Tensor, maps: Tensor, bilinear: int, fill: Tensor) -> Tensor:
    """By the maps `(count, 6, 1, 1)`; the first `bilinear` images with that filter, the others bicubic."""
    height, width = images.shape[2:]
    rows = (torch.arange(height, device=images.device) + 0.5)[:, None]
    columns = torch.arange(width, device=images.device) + 0.5
    x, y = (maps[:, k] * columns + maps[:, k + 1] * rows + maps[:, k + 2] for k in (0, 3))
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], -1)
    sampled = torch.cat([
        functional.grid_sample(images[part].float(), grid[part], mode, "border", align_corners=False)
        for part, mode in ((slice(bilinear), "bilinear"), (slice(bilinear, None), "bicubic"))
    ])  # fmt: skip
    inside = ((x >= 0) & (x < width) & (y >= 0) & (y < height))[:, None]
    return torch.where(inside, sampled.clamp(0, 255), fill).to(torch.uint8)  # PIL rounds down


def _erase(pixels: Tensor, boxes: Tensor, noise: Tensor, stride: int) -> None:
    """Noise in the boxes, from a place in the buffer that an image's own seed gives."""
    index = boxes[:, 2].nonzero()[:, 0]
    if not len(index):
        return
    boxes, index = (
        boxes[index].to(pixels.device, non_blocking=True),
        index.to(pixels.device, non_blocking=True),
    )
    top, left, rows, columns, seed = boxes.long()[:, :, None, None, None].unbind(1)
    _, channels, height, width = pixels.shape
    y, x = torch.arange(height, device=pixels.device)[:, None], torch.arange(width, device=pixels.device)
    inside = (y >= top) & (y < top + rows) & (x >= left) & (x < left + columns)
    count = torch.arange(channels * height * width, device=pixels.device).view(channels, height, width)
    pixels[index] = torch.where(inside, noise[(seed * stride + count) % len(noise)], pixels[index])


def _through(ends: Sequence[int], images: Tensor, arguments: Tensor) -> Tensor:
    """Each level replaced by what its operation's table has for it.

    `ends` of each of the `LEVELS`' images in a row.
    """
    levels, tables, start = torch.arange(256, device=images.device).expand(1, 1, -1), [], 0
    for table, end in zip(LEVELS.values(), ends, strict=True):
        if start < end:
            made = table(images[start:end], arguments[start:end, 0], levels).clamp(0, 255)
            tables.append(made.to(torch.uint8).expand(end - start, 3, -1))  # PIL rounds down
        start = end
    return torch.cat(tables).gather(2, images.flatten(2).long()).view_as(images)


def _auto_contrast(images: Tensor, _: Tensor, levels: Tensor) -> Tensor:
    low, high = (
        extreme.double()[..., None] for extreme in images.flatten(2).aminmax(dim=2)
    )  # as PIL calculates
    scale = 255 / (high - low)
    return torch.where(high > low, levels * scale - low * scale, levels)


def _equalize(images: Tensor, _: Tensor, levels: Tensor) -> Tensor:
    flat = images.flatten(2).long()
    counts = flat.new_zeros(*flat.shape[:2], 256).scatter_add_(2, flat, flat.new_ones(1).expand_as(flat))
    last = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - last) // 255
    tables = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    return torch.where(step > 0, tables, levels)


def _solarize_add(_: Tensor, arguments: Tensor, levels: Tensor) -> Tensor:
    return torch.where(levels < 128, (levels + arguments).clamp(max=255), levels)


def _posterize(_: Tensor, arguments: Tensor, levels: Tensor) -> Tensor:
    return levels & (256 - 2 ** (8 - arguments.clamp(max=8))).long()


def _contrast(images: Tensor, arguments: Tensor, levels: Tensor) -> Tensor:
    mean = (_gray(images).mean((2, 3)) + 0.5).floor()[..., None]
    return _away_from(mean, levels.float(), arguments)


LEVELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of images, arguments, levels
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda images, arguments, levels: 255 - levels,
    "solarize": lambda images, arguments, levels: torch.where(levels < arguments, levels, 255 - levels),
    "solarize_add": _solarize_add,
    "posterize": _posterize,
    "contrast": _contrast,
    "brightness": lambda images, arguments, levels: _away_from(0.0, levels.float(), arguments),
}


def _away_from(start: Tensor | float, pixels: Tensor, arguments: Tensor) -> Tensor:
    """PIL's enhancements: away from a faded version, which is the result at factor 0."""
    return (start + arguments * (pixels - start)).clamp(0, 255).to(torch.uint8)  # PIL rounds down


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16)[:, None].float()


def _smooth(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each pixel averaged with its neighbours, where the border stays, and the pixels."""
    pixels = images.float()
    kernel = pixels.new_ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    smoothed = pixels.clone()
    smoothed[:, :, 1:-1, 1:-1] = (functional.conv2d(pixels, kernel / 13, groups=3) + 0.5).floor()
    return smoothed, pixels
