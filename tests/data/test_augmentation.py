"""What evaluation sees is timm's transform to the pixel.

Training is timm's, with the processor's settings.
"""

import pickle
import random
from dataclasses import replace

import numpy
import pytest
import timm.data
import torch
from data_helpers import smooth_picture
from PIL import Image
from transformers import ConvNextImageProcessor, ViTImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from flashkat_hf import make_image_processor
from flashkat_hf.data import augmentation
from flashkat_hf.data.augmentation import (
    SIGNS,
    Augmentation,
    batch_transform,
    evaluation_transform,
    middle,
    training_transform,
)
from flashkat_hf.data.batches import EvalBatches
from flashkat_hf.data.gpu import augmentation as gpu_augmentation
from flashkat_hf.data.samples import DataError, Examples, Sample
from flashkat_hf.data.seeding import seeded

SIZES = [(500, 375), (333, 257), (257, 1001), (31, 45), (224, 224), (225, 227), (601, 402), (1, 1), (7, 300)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("size", "crop"), [(224, 0.875), (224, 0.9), (16, 1.0), (96, 0.95)])
def test_evaluation_is_timms_to_the_pixel(size, crop):
    """On all images of odd and even sizes, where crop and scaled side leave even and odd margins."""
    ours = evaluation_transform(make_image_processor(size, crop))
    edge = make_image_processor(size, crop).size["shortest_edge"]
    # timm rounds size / crop down, and the processor to the nearest; the same edge makes it the same
    # transform
    timms = timm.data.create_transform((3, size, size), interpolation="bicubic", crop_pct=size / (edge + 0.5))
    for width, height in SIZES:
        image = noise(width, height)
        assert torch.equal(ours(image), timms(image)), (width, height)


@pytest.mark.parametrize("size", [(900, 6), (3, 333), (2000, 30), (401, 7), (7, 400), (5000, 4000)])
@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_a_long_image_is_cropped_first_to_the_same_pixels(monkeypatch, size, crop):
    pixels = numpy.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=numpy.uint8)
    image, transform = Image.fromarray(pixels), evaluation_transform(make_image_processor(56, crop=crop))
    results = []
    for aspect in (1, 1000):
        monkeypatch.setattr(augmentation, "MOST_ASPECT", aspect)
        results.append(transform(image))
    assert results[0].shape == (3, 56, 56)
    assert (results[0] - results[1]).abs().max() < 1.01 / 255 / 0.22  # a level
    assert (results[0] != results[1]).float().mean() < 0.005


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_only_the_middle_of_a_long_thin_image_is_made(monkeypatch, size):
    """Its resized form would have 1.3 billion pixels; other ways to resize say so."""
    made, resize = [], Image.Image.resize

    def noted(image, shape, *arguments, **options):
        made.append(shape)
        return resize(image, shape, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    ramp = Image.fromarray(numpy.linspace(0, 255, 20_000).astype("uint8").reshape(size[::-1]))
    levels = evaluation_transform(make_image_processor(224))(ramp.convert("RGB")) * 0.229 + 0.485
    assert max(map(max, made)) <= 256
    assert abs(levels[0].mean() * 255 - 127) < 1
    message = f"{size[0]} x {size[1]} pixels would become 1[68]0000 x [89]; one side may be at most 64 times"
    for data in (training_transform(make_image_processor(8), SIGNS), evaluation_transform(uncropped())):
        batches = EvalBatches(Examples([ramp], [0]), data, batch_size=1)
        with pytest.raises(
            DataError, match=f"^cannot use the image number 0 of the images: {message} the other$"
        ):
            list(batches)


def uncropped():
    processor = make_image_processor(8, crop=1.0)
    processor.do_center_crop = False
    return processor


def test_evaluation_of_a_vit_squashes_as_its_own_processor():
    """Transformers' ViT resizes to height and width without a crop, bilinear."""
    processor = ViTImageProcessor(size={"height": 32, "width": 48})
    for width, height in SIZES:
        image = noise(width, height)
        expected = ViTImageProcessorPil(size={"height": 32, "width": 48})(image, return_tensors="pt")[
            "pixel_values"
        ][0]
        torch.testing.assert_close(evaluation_transform(processor)(image), expected, rtol=0, atol=1e-6)


def test_the_processor_is_the_same_but_for_levels_and_odd_margins():
    """What docs/data.md says of `pipeline`."""
    processor = make_image_processor(224)
    by_pil = ViTImageProcessorPil(**{key: getattr(processor, key) for key in PROCESSOR_FIELDS})
    for (width, height), margin in zip(
        SIZES[:2], (256 * 500 // 375 - 224, 256 * 333 // 257 - 224), strict=True
    ):
        image, ours = noise(width, height), evaluation_transform(processor)
        assert torch.equal(by_pil(image, return_tensors="pt")["pixel_values"][0], ours(image)) == (
            margin % 4 != 3
        )
    smooth = noise(6, 6).resize((500, 375), Image.Resampling.BICUBIC)
    error = processor(smooth, return_tensors="pt")["pixel_values"][0] - ours(smooth)
    levels = (error * torch.tensor(processor.image_std)[:, None, None] * 255).abs().round()
    assert levels.max() <= 2  # torchvision rounds after each of the two directions, PIL with more bits
    assert (levels > 0).float().mean() < 0.02


PROCESSOR_FIELDS = (
    "do_convert_rgb",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "image_mean",
    "image_std",
)


@pytest.mark.parametrize("kind", [ViTImageProcessor, ConvNextImageProcessor])
def test_a_processor_of_another_kind_does_its_own_work(kind):
    """One that does not normalise; one that resizes in its own way."""
    options = (
        {"do_normalize": False, "size": {"height": 20, "width": 20}} if kind is ViTImageProcessor else {}
    )
    processor = kind(**options)
    image = noise(40, 30)
    assert torch.equal(
        evaluation_transform(processor)(image), processor(image, return_tensors="pt")["pixel_values"][0]
    )


@pytest.mark.parametrize("augmentation", [Augmentation(), SIGNS], ids=["recipe", "signs"])
def test_training_is_random_normalised_alike_and_picklable(augmentation):
    processor = make_image_processor(24)
    transform = pickle.loads(pickle.dumps(training_transform(processor, augmentation)))
    image = noise(60, 50)
    with seeded(1):
        first, second = transform(image), transform(image)
    assert (first.shape, first.dtype) == ((3, 24, 24), torch.float32)
    assert not torch.equal(first, second)
    calm = training_transform(
        processor, Augmentation(**{**vars(augmentation), "rand_augment": None, "erasing": 0})
    )
    flat = Image.new("RGB", (40, 40), (124, 116, 104))
    middle = (slice(None), slice(8, 16), slice(8, 16))  # moves bring black in at the borders only
    torch.testing.assert_close(calm(flat)[middle], evaluation_transform(processor)(flat)[middle])


def test_the_recipe_is_timms():
    """The same draws give the same image as timm's own transform with the arguments of KAT's training."""
    processor = make_image_processor(32)
    theirs = timm.data.create_transform(
        32, is_training=True, auto_augment="rand-m9-mstd0.5", interpolation="random", re_prob=0.25,
        re_mode="pixel",
        color_jitter=None,
    )  # fmt: skip
    for seed in range(40):
        image = noise(50, 40, seed)
        with seeded(seed):
            expected = theirs(image)
        with seeded(seed):
            assert torch.equal(training_transform(processor, Augmentation())(image), expected)


@pytest.mark.parametrize(
    ("field", "value", "seen"),
    [
        ("crop_area", (0.5, 1.0), "scale=(0.5, 1.0)"),
        ("crop_ratio", [1, 2], "ratio=(1.0, 2.0)"),
        ("interpolation", "bilinear", "interpolation=bilinear"),
        ("flip", 0.2, "RandomHorizontalFlip(p=0.2)"),
        ("rand_augment", "rand-m5-n3", "RandAugment(n=3"),
        ("erasing", 0.7, "RandomErasing(p=0.7, mode=pixel, count=(1, 1))"),
    ],
)
def test_every_field_is_used(field, value, seen):
    assert seen in repr(training_transform(make_image_processor(24), Augmentation(**{field: value})))


def test_color_jitter_takes_the_place_of_rand_augment():
    transform = training_transform(
        make_image_processor(24), Augmentation(rand_augment=None, color_jitter=0.3)
    )
    assert "ColorJitter" in repr(transform)
    assert "RandAugment" not in repr(transform)
    both = training_transform(make_image_processor(24), Augmentation(color_jitter=0.3))
    assert "ColorJitter" not in repr(both)


def test_signs_are_moved_but_never_mirrored():
    """A bright left half stays at the left, and the image is scaled as evaluation scales it."""
    processor = make_image_processor(image_size=24, crop=0.5)
    image = Image.new("RGB", (48, 48))
    image.paste((255, 255, 255), (0, 0, 24, 48))
    transform = training_transform(processor, SIGNS)
    for _ in range(20):
        made = transform(image)
        assert made[:, :, :4].mean() > 1 > -1 > made[:, :, -4:].mean()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("crop", "center", "crop 'center' is not one of auto, random, moves, shifts"),
        ("interpolation", "box", "interpolation 'box' is not one of random, bilinear, bicubic"),
        (
            "crop_area",
            (0.5, 0.1),
            r"crop_area \(0.5, 0.1\) must be two numbers above 0 and up to 1.0, least first",
        ),
        ("crop_area", (0.5, 1.5), r"crop_area \(0.5, 1.5\) must be"),
        ("crop_ratio", (0, 1), r"crop_ratio \(0, 1\) must be"),
        ("flip", 1.5, r"flip \(1.5\) must be a probability"),
        ("erasing", -1, r"erasing \(-1\) must be a probability"),
        ("color_jitter", -0.1, r"color_jitter \(-0.1\) must not be negative"),
        (
            "rand_augment",
            "randaugment",
            "rand_augment 'randaugment' must be timm's, such as 'rand-m9-mstd0.5'",
        ),
        ("rand_augment", "rand-q9", "rand_augment 'rand-q9' is not timm's form, such as 'rand-m9-mstd0.5'"),
    ],
)
def test_wrong_settings(field, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Augmentation(**{field: value})


def test_random_is_seeded_for_what_timm_draws():
    """Timm draws from Python's random, numpy's and torch's generators; one number fixes all three."""
    transform = training_transform(make_image_processor(24), Augmentation(erasing=1.0))
    image = noise(60, 50)

    def made(seed: int) -> torch.Tensor:
        random.random(), numpy.random.rand(), torch.rand(1)
        with seeded(seed):
            return transform(image)

    assert torch.equal(made(3), made(3))
    assert not torch.equal(made(3), made(4))


@pytest.mark.parametrize("on_device", ["nothing", "augmentation"])
def test_posterize_without_bits(on_device):
    """Timm's increasing operations keep no bits at magnitude 10, which Pillow 13 refuses."""
    recipe = Augmentation(rand_augment="rand-m10-n4-p1.0-inc1", erasing=0, on_device=on_device)
    transform, image = training_transform(make_image_processor(24), recipe), noise(60, 50)
    for seed in range(60):
        with seeded(seed):
            transform(Sample(image, 0, "") if on_device == "augmentation" else image)


def test_auto_is_decided_by_device_recipe_and_source(monkeypatch):
    monkeypatch.setattr("flashkat_hf.data.gpu.decoding.decodes", lambda device: device.index == 0)
    cpu, gpu, other = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
    resolved = [Augmentation().resolved(device, False).on_device for device in (cpu, gpu, other)]
    assert resolved == ["nothing", "decoding", "augmentation"]
    assert Augmentation().resolved(gpu, in_memory=True).on_device == "nothing"
    for unknown in ({"color_jitter": 0.4}, {"rand_augment": "rand-m9-t3a"}):
        assert Augmentation(**unknown).resolved(gpu, False).on_device == "nothing"
    for crop in ("moves", "shifts"):
        assert Augmentation(crop=crop).resolved(gpu, False).on_device == "augmentation"
    for on_device in ("nothing", "augmentation", "decoding"):
        assert Augmentation(on_device=on_device).resolved(gpu, False).on_device == on_device
    assert batch_transform(make_image_processor(24), Augmentation()) is None  # not decided


def test_kernels_are_needed_on_a_device(monkeypatch):
    """Without them "auto" leaves all to the workers, and who asks for more is told what is missing."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    with pytest.raises(ValueError, match=r"^on_device 'decoding' needs a GPU; use 'nothing'$"):
        Augmentation(on_device="decoding").resolved(cpu, False)
    recipe = Augmentation(on_device="augmentation")
    batch = {"plan": torch.zeros(1, 5)}
    with pytest.raises(ValueError, match=r"^augmentation in batches needs a GPU; use on_device='nothing'$"):
        batch_transform(make_image_processor(24), recipe)(batch)
    monkeypatch.setattr(gpu_augmentation, "augmented", None)  # as without triton
    assert Augmentation().resolved(gpu, False).on_device == "nothing"
    with pytest.raises(
        ValueError, match=r"^on_device 'augmentation' needs the package triton; use 'nothing'$"
    ):
        recipe.resolved(gpu, False)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1200, 5), (4, 801), (900, 7)])
def test_a_processor_of_its_own_way_gets_the_middle_of_a_long_thin_image(size, channels):
    """As classify, explain and grey models have it: the crop sees the same, but for a fraction of a pixel."""
    processor, image = make_image_processor(32, num_channels=channels), smooth_picture(0, size)
    part = middle(image, processor)
    assert max(part.size) <= 11 * min(image.size)
    whole, made = (processor(each, return_tensors="pt")["pixel_values"] for each in (image, part))
    assert (whole - made).abs().max() < 0.05 * whole.std()
    assert middle(image.crop((0, 0, 200, 4)), processor).size == (200, 4)


def test_a_long_thin_image_that_is_not_cropped_is_refused():
    processor = ConvNextImageProcessor(size={"shortest_edge": 384})
    with pytest.raises(
        DataError, match=r"^20000 x 1 pixels would become 7680000 x 384; one side may be at most"
    ):
        middle(Image.new("RGB", (20_000, 1)), processor)


@pytest.mark.parametrize(
    "recipe", [Augmentation(on_device="decoding"), replace(SIGNS, flip=0.5)], ids=["photographs", "signs"]
)
def test_training_images_for_one_channel(recipe):
    """Their colours count for nothing, workers do all of it, and the statistics are the processor's."""
    processor, image = make_image_processor(32, num_channels=1), noise(60, 50)
    transform = pickle.loads(pickle.dumps(training_transform(processor, recipe)))
    made = []
    for picture in (image, image.convert("L").convert("RGB")):
        with seeded(1, 2):
            made.append(transform(picture))
    assert made[0].shape == (1, 32, 32)
    assert torch.equal(*made)
    assert batch_transform(processor, recipe) is None
    plain = Augmentation(rand_augment=None, erasing=0.0, on_device="nothing")
    white = training_transform(processor, plain)(Image.new("RGB", (40, 40), "white"))
    torch.testing.assert_close(white, torch.full((1, 32, 32), (1 - 0.449) / 0.226))


def test_images_of_four_channels_are_no_files():
    processor = make_image_processor(32, num_channels=4)
    message = "^the model takes images of 4 channels, but image files have 1 or 3$"
    for use in (
        evaluation_transform,
        lambda it: middle(noise(9, 9), it),
        lambda it: training_transform(it, SIGNS),
    ):
        with pytest.raises(ValueError, match=message):
            use(processor)
