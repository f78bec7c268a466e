"""What worker processes draw and note for a device: what timm draws, to the image."""

import io
import re

import pytest
import timm.data.auto_augment as auto_augment
import torch
from data_helpers import by_pil, encoded_picture, image_file, smooth_picture, stacked
from PIL import Image

from flashkat_hf import make_image_processor
from flashkat_hf.data.augmentation import Augmentation, batch_transform, training_transform
from flashkat_hf.data.batches import EvalBatches
from flashkat_hf.data.gpu.records import OPERATIONS, EncodedCrops, Plan
from flashkat_hf.data.samples import DataError, Examples, Sample
from flashkat_hf.data.seeding import seeded

PROCESSOR = make_image_processor(32)
FILL = [round(255 * value) for value in PROCESSOR.image_mean]
MEAN, STD = (255 * torch.tensor(v)[:, None, None] for v in (PROCESSOR.image_mean, PROCESSOR.image_std))


def test_the_operations_are_those_of_timms_recipe():
    names = {auto_augment.NAME_TO_OP[name].__name__ for name in auto_augment._RAND_TRANSFORMS}
    assert names == set(OPERATIONS)


def both(augmentation: dict, image: bytes, seed: int) -> tuple[torch.Tensor, torch.Tensor, Plan]:
    """Timm's result in levels; what timm's functions make of our crop by our plan; and the plan."""
    plain = Augmentation(**{"interpolation": "bilinear", "erasing": 0.0, **augmentation})
    with seeded(seed):
        expected = training_transform(PROCESSOR, plain)(Image.open(io.BytesIO(image)).convert("RGB"))
    batched = Augmentation(**{**vars(plain), "on_device": "augmentation"})
    with seeded(seed):
        item = training_transform(PROCESSOR, batched)(Sample(image, 0, "the image"))
    crop = Image.fromarray(item["pixel_values"].movedim(0, 2).numpy())
    [planned] = stacked([by_pil(crop, item["plan"], FILL)])
    return expected * STD + MEAN, planned.float(), Plan.unpacked(item["plan"][None])


@pytest.mark.parametrize(
    ("config", "crop"),
    [
        *(("rand-m9-mstd0.5", crop) for crop in ("random", "moves", "shifts")),
        ("rand-m7-n3-p1.0-inc1", "random"),
    ],
)
def test_the_recipe_draws_what_timm_draws(config, crop):
    """Crop, flip, and operations each with its chance and its magnitude; or more of them, always, increasing.

    A plan's float32 magnitudes put few pixels on the other side of a rounding.
    """
    for seed in range(60):
        image = encoded_picture(seed, (50, 40), "PNG")
        settings = {"rand_augment": config, "interpolation": "random", "crop": crop}
        expected, planned, _ = both(settings, image, seed)
        assert ((expected - planned).abs() > 0.5).float().mean() < 0.01, seed


def test_the_erased_box_is_timms():
    boxes = 0
    for seed in range(30):
        augmentation = {"rand_augment": None, "erasing": 0.5}
        expected, planned, plan = both(augmentation, encoded_picture(seed, (50, 40), "PNG"), seed)
        top, left, height, width = plan.box[0].int().tolist()
        box = torch.zeros(32, 32, dtype=torch.bool)
        box[top : top + height, left : left + width] = True
        assert torch.equal((expected - planned).abs().sum(0) > 1e-3, box)
        boxes += height > 0
    assert 8 <= boxes <= 22  # of 30 with a chance of a half


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size():
    """And gives nearly the pixels of the whole; upright, too."""
    calm = {"rand_augment": None, "crop_area": (0.5, 1.0)}
    for seed in range(5):
        expected, planned, _ = both(calm, encoded_picture(seed, (640, 480)), seed)
        assert (expected - planned).abs().mean() < 1
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: what is stored as 640 x 480 stands upright as 480 x 640
    calm = Augmentation(rand_augment=None, flip=0, erasing=0, on_device="augmentation")
    transform = training_transform(PROCESSOR, calm)
    upright = smooth_picture(1, (480, 640))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    pixels = []
    for image in (image_file(stored, exif=exif, quality=100), image_file(upright, quality=100)):
        with seeded(1):
            pixels.append(transform(Sample(image, 0, ""))["pixel_values"].float())
    assert (pixels[0] - pixels[1]).abs().mean() < 1


@pytest.mark.parametrize("kind", ["png", "turned", "cmyk", "pixels"])
def test_what_the_device_cannot_decode_comes_as_pixels(kind):
    image, exif = smooth_picture(3, (50, 40)), Image.Exif()
    exif[0x0112] = 6
    encoded = {
        "png": lambda: image_file(image, "PNG"),
        "turned": lambda: image_file(image, exif=exif),
        "cmyk": lambda: image_file(image.convert("CMYK")),
        "pixels": lambda: image,
    }[kind]()
    items = []
    for on_device in ("augmentation", "decoding"):
        with seeded(1):
            items.append(
                training_transform(PROCESSOR, Augmentation(on_device=on_device))(Sample(encoded, 0, ""))
            )
    assert torch.equal(items[0]["pixel_values"].flatten(), items[1]["pixel_values"])
    assert torch.equal(items[0]["plan"], items[1]["plan"])
    crop = EncodedCrops.unpacked(items[1]["crop"][None])
    assert (crop.height.item(), crop.length.item()) == (0, 3 * 32 * 32)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_comes_as_a_file_with_its_crop(mode):
    """The same draws as with cropped pixels, and the crop gives these, up to a half's rounding."""
    for seed in range(8):
        image, items = encoded_picture(seed, (70, 50), mode=mode, quality=95), []
        for on_device in ("augmentation", "decoding"):
            augmentation = Augmentation(rand_augment=None, interpolation="bicubic", on_device=on_device)
            with seeded(seed):
                items.append(training_transform(PROCESSOR, augmentation)(Sample(image, 0, "")))
        assert torch.equal(items[0]["plan"], items[1]["plan"])
        assert items[1]["pixel_values"].numpy().tobytes() == image
        crop = EncodedCrops.unpacked(items[1]["crop"][None])
        assert (crop.length.item(), crop.plain.item()) == (len(image), 1)
        assert (crop.image_height.item(), crop.image_width.item(), crop.bicubic.item()) == (50, 70, 1)
        left, top, width, height = (c.item() for c in (crop.left, crop.top, crop.width, crop.height))
        part = Image.open(io.BytesIO(image)).convert("RGB").crop((left, top, left + width, top + height))
        part = part.resize((32, 32), Image.Resampling.BICUBIC)
        if crop.mirrored.item():
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert torch.equal(stacked([part])[0], items[0]["pixel_values"])


@pytest.mark.parametrize(
    ("on_device", "crop"),
    [("augmentation", "random"), ("decoding", "random"), ("augmentation", "shifts")],
)
def test_broken_images_are_named_by_the_worker(tmp_path, on_device, crop):
    broken, missing = encoded_picture(0, (200, 200))[:-400], str(tmp_path / "gone.jpg")
    transform = training_transform(PROCESSOR, Augmentation(crop, on_device=on_device))
    for encoded, name in ((broken, "shard.tar/7.jpg"), (missing, missing)):
        with pytest.raises(DataError, match=rf"^cannot read the image {re.escape(name)}: [^\n]+$"):
            transform(Sample(encoded, 0, name))
    split = Examples([broken, encoded_picture(1, (32, 32))], [0, 1], skip_corrupt=True)
    batch = next(iter(EvalBatches(split, transform, batch_size=2)))
    assert batch["labels"].tolist() == [1]


def test_operations_that_batches_do_not_know():
    message = "RandAugment's Desaturate cannot be done in batches; use on_device='nothing'"
    with pytest.raises(ValueError, match=message):
        training_transform(PROCESSOR, Augmentation(rand_augment="rand-m9-t3a", on_device="augmentation"))
    with pytest.raises(ValueError, match="'decoding' does not know the crop 'moves'; use 'augmentation'"):
        Augmentation("moves", on_device="decoding")
    with pytest.raises(ValueError, match="'decoding' does not know color_jitter; use 'nothing'"):
        Augmentation(on_device="decoding", color_jitter=0.4)
    assert batch_transform(PROCESSOR, Augmentation(on_device="nothing")) is None
