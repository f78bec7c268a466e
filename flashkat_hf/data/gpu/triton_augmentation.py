"""Triton kernels that carry out the plans of a batch of images: RandAugment, normalisation and erasing.

Images have operations of their own: each program looks up what its image's is. A layer of operations is two
launches: the first makes tables for those operations that replace each level by another, the second makes the
new pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .records import GEOMETRIC, OPERATIONS

# Numbers of the operations that are not geometric.
AUTO_CONTRAST, EQUALIZE, INVERT, SOLARIZE, SOLARIZE_ADD, POSTERIZE, CONTRAST, BRIGHTNESS, COLOR, SHARPNESS = (
    map(tl.constexpr, range(len(GEOMETRIC), len(OPERATIONS)))
)
# A plan on the device has these for each layer, and at its end the erased box and the seed of its noise.
OPERATION, ARGUMENT, FILTER, MAP, ENTRIES = map(tl.constexpr, (0, 1, 2, 3, 9))
TOP, LEFT, ROWS, COLUMNS, SEED = map(tl.constexpr, range(5))
BICUBIC = tl.constexpr(3)  # PIL's number
BLOCK = 1024  # pixels of a program


@triton.jit
def to_level(value):
    """Round down, as PIL does."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.uint8)


@triton.jit
def away_from(start, value, argument):
    """Enhance as PIL does: away from a faded version, which is the result at factor 0."""
    return start + argument * (value - start)


@triton.jit
def gray(x_ptr, index, num_pixels, mask):
    red = tl.load(x_ptr + index, mask=mask, other=0).to(tl.int32)
    green = tl.load(x_ptr + num_pixels + index, mask=mask, other=0).to(tl.int32)
    blue = tl.load(x_ptr + 2 * num_pixels + index, mask=mask, other=0).to(tl.int32)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


@triton.jit
def level_tables_kernel(
    x_ptr,  # (count, 3, num_pixels) uint8
    plan_ptr,  # (count, plan_stride) float32, from this layer's entries on
    table_ptr,  # (count, 3, 256) uint8, written for operations on levels
    plan_stride,
    num_pixels,
    BLOCK: tl.constexpr,
):
    """Tabulate what becomes of each level of a channel. Grid (3, count)."""
    channel, number = tl.program_id(0), tl.program_id(1)
    plan_ptr += number * plan_stride
    operation, argument = tl.load(plan_ptr + OPERATION).to(tl.int32), tl.load(plan_ptr + ARGUMENT)
    x_ptr += number.to(tl.int64) * 3 * num_pixels
    level = tl.arange(0, 256)
    value = level.to(tl.float32)
    if operation >= AUTO_CONTRAST and operation <= BRIGHTNESS:
        if operation <= EQUALIZE:
            counts = tl.zeros([256], tl.int32)
            for start in range(0, num_pixels, BLOCK):
                index = start + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + channel * num_pixels + index, mask=index < num_pixels, other=0)
                counts += tl.histogram(x.to(tl.int32), 256)
            counts -= tl.where(level == 0, tl.cdiv(num_pixels, BLOCK) * BLOCK - num_pixels, 0)  # of the mask
            high = tl.max(tl.where(counts > 0, level, 0), 0)
            if operation == AUTO_CONTRAST:
                low = tl.min(tl.where(counts > 0, level, 255), 0)
                scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)  # as PIL calculates
                stretched = level.to(tl.float64) * scale - low.to(tl.float64) * scale
                value = tl.where(
                    high > low, tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32), level
                ).to(tl.float32)
            else:
                step = (num_pixels - tl.sum(tl.where(level == high, counts, 0), 0)) // 255
                equal = (step // 2 + tl.cumsum(counts, 0) - counts) // tl.maximum(step, 1)
                value = tl.where(step > 0, equal, level).to(tl.float32)
        elif operation == INVERT:
            value = 255.0 - value
        elif operation == SOLARIZE:
            value = tl.where(value < argument, value, 255.0 - value)
        elif operation == SOLARIZE_ADD:
            value = tl.where(level < 128, tl.minimum(value + argument, 255.0), value)
        elif operation == POSTERIZE:
            value = (level & (256 - (1 << (8 - tl.minimum(argument, 8.0).to(tl.int32))))).to(tl.float32)
        elif operation == CONTRAST:
            total = tl.zeros([BLOCK], tl.int32)
            for start in range(0, num_pixels, BLOCK):
                index = start + tl.arange(0, BLOCK)
                total += gray(x_ptr, index, num_pixels, index < num_pixels)
            mean = tl.sum(total.to(tl.int64), 0).to(tl.float64) / num_pixels
            value = away_from(tl.floor(mean + 0.5).to(tl.float32), value, argument)
        else:
            value = argument * value
        tl.store(table_ptr + (number * 3 + channel) * 256 + level, to_level(value))


@triton.jit
def tap(x_ptr, x, y, width, height):
    """Return the pixel at a place, or the nearest one to it."""
    x, y = tl.minimum(tl.maximum(x, 0), width - 1), tl.minimum(tl.maximum(y, 0), height - 1)
    return tl.load(x_ptr + y * width + x).to(tl.float32)


@triton.jit
def cubic(a, b, c, d, at):
    """Interpolate between b and c as PIL's transformations do."""
    return b + at * (c - a + at * (2.0 * (a - b) + c - d + at * (b - a + d - c)))


@triton.jit
def cubic_row(x_ptr, x, y, at, width, height):
    first, second = tap(x_ptr, x - 1, y, width, height), tap(x_ptr, x, y, width, height)
    third, fourth = tap(x_ptr, x + 1, y, width, height), tap(x_ptr, x + 2, y, width, height)
    return cubic(first, second, third, fourth, at)


@triton.jit
def linear_row(x_ptr, x, y, at, width, height):
    first, second = tap(x_ptr, x, y, width, height), tap(x_ptr, x + 1, y, width, height)
    return first + at * (second - first)


@triton.jit
def operations_kernel(
    x_ptr,  # (count, 3, height, width) uint8
    plan_ptr,  # (count, plan_stride) float32, from this layer's entries on
    table_ptr,  # (count, 3, 256) uint8
    fill_ptr,  # (3,) float32: the color of what comes from outside
    y_ptr,  # like x, and not x
    plan_stride,
    height,
    width,
    BLOCK: tl.constexpr,
):
    """Carry out one operation for each image. Grid (pixel blocks, count)."""
    number, num_pixels = tl.program_id(1), height * width
    plan_ptr += number * plan_stride
    operation, argument = tl.load(plan_ptr + OPERATION).to(tl.int32), tl.load(plan_ptr + ARGUMENT)
    x_ptr += number.to(tl.int64) * 3 * num_pixels
    y_ptr += number.to(tl.int64) * 3 * num_pixels
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_pixels
    row, column = index // width, index % width
    if operation < 0:
        for channel in tl.static_range(3):
            offset = channel * num_pixels + index
            tl.store(y_ptr + offset, tl.load(x_ptr + offset, mask=mask), mask=mask)
    elif operation < AUTO_CONTRAST:
        x, y = column + 0.5, row + 0.5
        plan_ptr += MAP
        at_x = tl.load(plan_ptr) * x + tl.load(plan_ptr + 1) * y + tl.load(plan_ptr + 2)
        at_y = tl.load(plan_ptr + 3) * x + tl.load(plan_ptr + 4) * y + tl.load(plan_ptr + 5)
        inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
        at_x, at_y = tl.where(inside, at_x, 0.0) - 0.5, tl.where(inside, at_y, 0.0) - 0.5
        x, y = tl.floor(at_x).to(tl.int32), tl.floor(at_y).to(tl.int32)
        at_x, at_y = at_x - x, at_y - y
        bicubic = tl.load(plan_ptr - MAP + FILTER).to(tl.int32) == BICUBIC
        for channel in tl.static_range(3):
            plane_ptr = x_ptr + channel * num_pixels
            if bicubic:
                first = cubic_row(plane_ptr, x, y - 1, at_x, width, height)
                second = cubic_row(plane_ptr, x, y, at_x, width, height)
                third = cubic_row(plane_ptr, x, y + 1, at_x, width, height)
                fourth = cubic_row(plane_ptr, x, y + 2, at_x, width, height)
                value = cubic(first, second, third, fourth, at_y)
            else:
                first = linear_row(plane_ptr, x, y, at_x, width, height)
                second = linear_row(plane_ptr, x, y + 1, at_x, width, height)
                value = first + at_y * (second - first)
            value = tl.where(inside, value, tl.load(fill_ptr + channel))
            tl.store(y_ptr + channel * num_pixels + index, to_level(value), mask=mask)
    elif operation <= BRIGHTNESS:
        for channel in tl.static_range(3):
            offset = channel * num_pixels + index
            level = tl.load(x_ptr + offset, mask=mask, other=0).to(tl.int32)
            tl.store(y_ptr + offset, tl.load(table_ptr + (number * 3 + channel) * 256 + level), mask=mask)
    elif operation == COLOR:
        faded = gray(x_ptr, index, num_pixels, mask).to(tl.float32)
        for channel in tl.static_range(3):
            offset = channel * num_pixels + index
            value = away_from(faded, tl.load(x_ptr + offset, mask=mask, other=0).to(tl.float32), argument)
            tl.store(y_ptr + offset, to_level(value), mask=mask)
    else:
        inner = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)  # the border stays
        for channel in tl.static_range(3):
            plane_ptr = x_ptr + channel * num_pixels
            value = tap(plane_ptr, column, row, width, height)
            total = 4.0 * value
            for down in tl.static_range(-1, 2):
                for right in tl.static_range(-1, 2):
                    total += tap(plane_ptr, column + right, row + down, width, height)
            smooth = tl.where(inner, tl.floor((2.0 * total + 13.0) / 26.0), value)
            tl.store(
                y_ptr + channel * num_pixels + index, to_level(away_from(smooth, value, argument)), mask=mask
            )


@triton.jit
def normalize_kernel(
    x_ptr,  # (count, 3, height, width) uint8
    plan_ptr,  # (count, plan_stride) float32, from the erased box on
    mean_ptr,  # (3,) float32, of levels
    std_ptr,  # likewise
    noise_ptr,  # (NOISE,) float32
    y_ptr,  # (count, 3, height, width) float32
    plan_stride,
    height,
    width,
    STRIDE: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise, with noise in the box, from a place that the seed gives. Grid (pixel blocks, 3, count)."""
    channel, number, num_pixels = tl.program_id(1), tl.program_id(2), height * width
    plan_ptr += number * plan_stride
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_pixels
    offset = (number.to(tl.int64) * 3 + channel) * num_pixels + index
    y = tl.load(x_ptr + offset, mask=mask, other=0).to(tl.float32)
    y = tl.div_rn(y - tl.load(mean_ptr + channel), tl.load(std_ptr + channel))
    rows, columns = tl.load(plan_ptr + ROWS).to(tl.int32), tl.load(plan_ptr + COLUMNS).to(tl.int32)
    if rows > 0:
        row, column = index // width - tl.load(plan_ptr + TOP).to(tl.int32), index % width
        column -= tl.load(plan_ptr + LEFT).to(tl.int32)
        erased = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        place = tl.load(plan_ptr + SEED).to(tl.int64) * STRIDE + channel * num_pixels + index
        y = tl.where(erased, tl.load(noise_ptr + place % NOISE, mask=erased & mask, other=0.0), y)
    tl.store(y_ptr + offset, y, mask=mask)


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, which it does on any device."""
    return triton.knobs.runtime.interpret


def augmented(
    images: Tensor,
    plan: Tensor,
    num_layers: int,
    fill: Tensor,
    mean: Tensor,
    std: Tensor,
    noise: Tensor,
    stride: int,
) -> Tensor:
    """Launch the kernels.

    Args:
        images: `(count, 3, height, width)` uint8, contiguous, on the device; it may be written over.
        plan: `(count, 9 * num_layers + 5)` float32 on the device: operation, argument, PIL's filter and the
            map of each layer, and the erased box with its seed (`Plan.for_kernels`).
        num_layers: number of operations of each image.
        fill: `(3, 1, 1)` float32: the color of what comes from outside, in levels.
        mean: likewise: the mean of each channel.
        std: likewise: the standard deviation of each channel.
        noise: `(length,)` float32.
        stride: distance from one seed's place in the noise to the next.

    Returns:
        `(count, 3, height, width)` float32, normalised.
    """
    (count, _, height, width), device = images.shape, images.device
    blocks, num_pixels = triton.cdiv(height * width, BLOCK), height * width
    tables = torch.empty(count, 3, 256, dtype=torch.uint8, device=device)
    result = torch.empty(images.shape, device=device)
    spare, plan_stride = torch.empty_like(images), plan.stride(0)
    exact = {"enable_fp_fusion": False}  # each product is rounded, as PIL's are
    with torch.accelerator.device_index(device.index):  # pyright: ignore[reportArgumentType]
        for layer in range(num_layers):
            part = plan[:, ENTRIES.value * layer :]
            level_tables_kernel[3, count](images, part, tables, plan_stride, num_pixels, BLOCK, **exact)
            operations_kernel[blocks, count](
                images, part, tables, fill, spare, plan_stride, height, width, BLOCK, **exact
            )
            images, spare = spare, images
        part = plan[:, ENTRIES.value * num_layers :]
        normalize_kernel[blocks, 3, count](
            images,
            part,
            mean,
            std,
            noise,
            result,
            plan_stride,
            height,
            width,
            stride,
            len(noise),
            BLOCK,
            **exact,
        )
    return result
