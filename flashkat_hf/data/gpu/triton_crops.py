"""Triton kernels that resize parts of a batch's images with antialiasing, with their launcher.

The images lie where a decoder has put them, each with a size of its own: a table holds their addresses. A
pixel of the result is a weighted mean of the pixels around it, along the width first and then along the
height, as torchvision and PIL resize; the weights are made where they are needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .records import Crops, DecodedImages, Windows

# What the table has for each image.
ADDRESS, HEIGHT, WIDTH, TOP, LEFT, ROWS, COLUMNS, BICUBIC, MIRRORED = map(tl.constexpr, range(9))
TO_ROWS, TO_COLUMNS, FIRST_ROW, FIRST_COLUMN, ENTRIES = map(tl.constexpr, range(9, 14))
BLOCK = 8  # rows of a program
UNSPECIALIZED = ("most_rows",)  # another one in each batch: compiled once, not again where 16 divides it
EXACT = tl.constexpr(2.0**23)  # float32 has no fractions from here on


@triton.jit
def filter_weight(distance, bicubic):
    """Return the weight at a distance >= 0: a triangle, or Keys' cubic with -0.5."""
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    cubic = tl.where(distance < 1.0, near, tl.where(distance < 2.0, far, 0.0))
    return tl.where(bicubic, cubic, tl.maximum(1.0 - distance, 0.0))


@triton.jit
def taps(position, length, size, bicubic):
    """Return the first pixel that a result's pixel takes, how many at most, its center, and their density."""
    density = length.to(tl.float32) / size
    center = (position + 0.5) * density
    radius = tl.where(bicubic, 2.0, 1.0) * tl.maximum(density, 1.0)
    first = tl.floor(center - radius).to(tl.int32)
    return first, (2 * radius).to(tl.int32) + 2, center, tl.maximum(density, 1.0)


@triton.jit
def weigh(pixel, length, center, density, bicubic):
    """Return a pixel's weight, 0 outside of `length`, and the nearest pixel inside."""
    weight = filter_weight(tl.abs(pixel + 0.5 - center) / density, bicubic)
    inside = tl.minimum(tl.maximum(pixel, 0), length - 1)
    return tl.where(pixel == inside, weight, 0.0), inside


@triton.jit(do_not_specialize=UNSPECIALIZED)
def resize_width_kernel(
    table_ptr,  # (count, ENTRIES) int64; images are (3, height, width) uint8, contiguous
    y_ptr,  # (count, 3, most_rows, size) float32
    most_rows,
    size,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Resize the rows of each image's part, and keep `size` columns. Grid (row blocks, 3, count)."""
    channel, number = tl.program_id(1), tl.program_id(2)
    table_ptr += number * ENTRIES
    rows, columns = tl.load(table_ptr + ROWS).to(tl.int32), tl.load(table_ptr + COLUMNS).to(tl.int32)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    if tl.program_id(0) * BLOCK < rows:
        width = tl.load(table_ptr + WIDTH)
        image_ptr = (
            tl.load(table_ptr + ADDRESS).to(tl.pointer_type(tl.uint8))
            + channel * tl.load(table_ptr + HEIGHT) * width
        )
        image_ptr += (tl.load(table_ptr + TOP) + tl.minimum(row, rows - 1)) * width + tl.load(
            table_ptr + LEFT
        )
        bicubic = tl.load(table_ptr + BICUBIC) != 0
        column = tl.arange(0, PADDED)[None, :]
        resized = tl.load(table_ptr + TO_COLUMNS).to(tl.int32)
        place = tl.minimum(column, size - 1) + tl.load(table_ptr + FIRST_COLUMN).to(tl.int32)
        first, count, center, density = taps(place, columns, resized, bicubic)
        y = tl.zeros([BLOCK, PADDED], tl.float32)
        total = tl.zeros([1, PADDED], tl.float32)
        for tap in range(count):
            weight, inside = weigh(first + tap, columns, center, density, bicubic)
            y += weight * tl.load(image_ptr + inside).to(tl.float32)
            total += weight
        column = tl.where(tl.load(table_ptr + MIRRORED) != 0, size - 1 - column, column)
        y_ptr += (number.to(tl.int64) * 3 + channel) * most_rows * size
        tl.store(y_ptr + row * size + column, y / total, mask=(row < rows) & (column >= 0) & (column < size))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def resize_height_kernel(
    table_ptr,  # (count, ENTRIES) int64
    x_ptr,  # (count, 3, most_rows, width) float32
    y_ptr,  # (count, 3, size, width) uint8
    most_rows,
    width,
    size,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Resize the columns, and keep `size` rows, rounded. Grid (row blocks, 3, count)."""
    channel, number = tl.program_id(1), tl.program_id(2)
    table_ptr += number * ENTRIES
    rows, bicubic = tl.load(table_ptr + ROWS).to(tl.int32), tl.load(table_ptr + BICUBIC) != 0
    plane = number.to(tl.int64) * 3 + channel
    column = tl.arange(0, PADDED)[None, :]
    x_ptr += plane * most_rows * width + tl.minimum(column, width - 1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    resized = tl.load(table_ptr + TO_ROWS).to(tl.int32)
    place = tl.minimum(row, size - 1) + tl.load(table_ptr + FIRST_ROW).to(tl.int32)
    first, count, center, density = taps(place, rows, resized, bicubic)
    y = tl.zeros([BLOCK, PADDED], tl.float32)
    total = tl.zeros([BLOCK, 1], tl.float32)
    for tap in range(count):
        weight, inside = weigh(first + tap, rows, center, density, bicubic)
        y += weight * tl.load(x_ptr + inside * width)
        total += weight
    y = tl.minimum(tl.maximum(y / total, 0.0), 255.0)
    y = (y + EXACT) - EXACT  # rounds, a half to even
    tl.store(
        y_ptr + (plane * size + row) * width + column, y.to(tl.uint8), mask=(row < size) & (column < width)
    )


def resized_crops(
    images: DecodedImages, crops: Crops, size: tuple[int, int], windows: Windows | None = None
) -> Tensor:
    """Launch both kernels.

    Args:
        images: contiguous images on a device.
        crops: a part of each.
        size: height and width of the result.
        windows: to what each part is resized, and where in that the result lies; by default to `size`.

    Returns:
        `(count, 3, height, width)` uint8 on the device.
    """
    (height, width), count, device = size, len(images.address), images.memory[0].device
    places = images.address, images.height, images.width, crops.top, crops.left, crops.height, crops.width
    if windows is None:
        zero = torch.zeros_like(crops.top)
        windows = Windows(zero + height, zero + width, zero, zero)
    wanted = windows.height, windows.width, windows.top, windows.left
    table = torch.stack((*places, crops.bicubic, crops.mirrored, *wanted), 1).to(device, non_blocking=True)
    most_rows = int(crops.height.max())
    narrow = torch.empty(count, 3, most_rows, width, device=device)
    result = torch.empty(count, 3, height, width, dtype=torch.uint8, device=device)
    padded = triton.next_power_of_2(width)
    grid_width, grid_height = (
        (triton.cdiv(most_rows, BLOCK), 3, count),
        (triton.cdiv(height, BLOCK), 3, count),
    )
    with torch.accelerator.device_index(device.index):  # pyright: ignore[reportArgumentType]
        resize_width_kernel[grid_width](table, narrow, most_rows, width, BLOCK, padded)
        resize_height_kernel[grid_height](table, narrow, result, most_rows, width, height, BLOCK, padded)
    return result
