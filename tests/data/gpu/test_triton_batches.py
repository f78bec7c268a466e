"""Batches augmented on a device, from files to normalised pixels: on a GPU, or in Triton's interpreter."""

import copy
import io

import pytest
import torch
from data_helpers import encoded_picture
from helpers import KERNEL_DEVICES
from PIL import Image

from flashkat_hf import make_image_processor
from flashkat_hf.data.augmentation import Augmentation, batch_transform, training_transform
from flashkat_hf.data.batches import TrainBatches
from flashkat_hf.data.gpu.augmentation import BatchAugmentation
from flashkat_hf.data.gpu.decoding import TorchvisionDecoder, crop_images
from flashkat_hf.data.gpu.records import EncodedCrops
from flashkat_hf.data.samples import Examples, Sample
from flashkat_hf.data.seeding import seeded
from flashkat_hf.data.workers import collate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # Python 3.12, where threads run
    pytest.mark.parametrize("device", KERNEL_DEVICES),
]
PROCESSOR = make_image_processor(32)
MODULE = BatchAugmentation(PROCESSOR.image_mean, PROCESSOR.image_std, (32, 32))


def levels(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised pixels in 0 to 255 again."""
    return pixels.cpu() * MODULE.std + MODULE.mean


def both(
    augmentation: dict, images: list[bytes], device: str, on_device: str = "augmentation"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timm's result and ours, each image from the seed of its number, in levels."""
    plain = Augmentation(**{"interpolation": "bilinear", "erasing": 0.0, **augmentation})
    batched = Augmentation(**{**vars(plain), "on_device": on_device})
    by_timm, by_worker = (training_transform(PROCESSOR, recipe) for recipe in (plain, batched))
    expected, items = [], []
    for seed, image in enumerate(images):
        with seeded(seed):
            expected.append(by_timm(Image.open(io.BytesIO(image)).convert("RGB")))
        with seeded(seed):
            items.append({**by_worker(Sample(image, 0, "the image")), "labels": 0, "corrupt": {}})
    module = batch_transform(PROCESSOR, batched).to(device)
    return levels(torch.stack(expected)), levels(module(collate(items))["pixel_values"])


def pictures(count: int) -> list[bytes]:
    return [encoded_picture(seed, (50, 40), "PNG") for seed in range(count)]


def test_the_recipe_gives_timms_images(device):
    """Crop, flip, two operations each with its chance and its magnitude, to rounding."""
    expected, pixels = both({}, pictures(60), device)
    far = ((expected - pixels).abs() > 2.5).float().mean((1, 2, 3))
    assert (far < 0.02).sum() >= 57  # a level before equalize or solarize may be many after it
    assert far.mean() < 0.01


def test_another_rand_augment_is_done_too(device):
    """Increasing magnitudes, three operations, always."""
    expected, pixels = both({"rand_augment": "rand-m7-n3-p1.0-inc1"}, pictures(20), device)
    assert (((expected - pixels).abs() > 2.5).float().mean((1, 2, 3)) < 0.02).sum() >= 17


def test_the_erased_box_is_timms_and_full_of_noise(device):
    images, plain = pictures(30), {"rand_augment": None}
    expected, pixels = both({**plain, "erasing": 0.5}, images, device)
    _, wholes = both(plain, images, device)
    boxes = []
    for image, pixel, whole in zip(expected, pixels, wholes, strict=True):
        box = (pixel - whole).abs().sum(0) > 1e-3
        assert torch.equal(box, (image - whole).abs().sum(0) > 1e-3)
        if box.any():
            assert box.sum() == box.any(0).sum() * box.any(1).sum()
            boxes.append(((pixel - MODULE.mean) / MODULE.std)[:, box].flatten())
    assert 8 <= len(boxes) <= 22  # of 30 with a chance of a half
    noise = torch.cat(boxes)
    assert noise.mean().abs() < 0.05
    assert (noise.std() - 1).abs() < 0.05
    assert not torch.equal(boxes[0][:30], boxes[1][:30])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoding_with_the_batch_gives_the_same(mode, device):
    chroma = {} if device == "cpu" else {"subsampling": 0}  # nvJPEG enlarges quartered chroma otherwise
    images = [
        encoded_picture(seed, (70, 50), mode=mode, quality=95, **chroma)
        for seed in range(4 if device == "cpu" else 8)
    ]
    _, cropped = both({"rand_augment": None}, images, device)
    _, decoded = both({"rand_augment": None}, images, device, "decoding")
    # the kernels' resizing rounds otherwise than PIL's, and nvJPEG differs from libjpeg by a level or two
    assert (cropped - decoded).abs().max() <= (3 if device == "cpu" else 4)


def test_decoding_on_a_gpu_agrees_with_that_on_a_cpu(device):
    """The recipe's crops, within a level or two of libjpeg where chroma is whole."""
    count = 4 if device == "cpu" else 40  # the interpreter is slow
    images = [encoded_picture(seed, (90, 70), quality=95, subsampling=0) for seed in range(count)]
    transform = training_transform(
        PROCESSOR, Augmentation(rand_augment=None, erasing=0, on_device="decoding")
    )
    [batch] = TrainBatches(Examples(images, [0] * count), transform, batch_size=count, seed=0).epoch(0)
    crops = EncodedCrops.unpacked(batch["crop"])
    plain = TorchvisionDecoder(torch.device("cpu"))(crops.files(batch["pixel_values"]))
    plain = type(plain).of([image.to(device) for image in plain.memory])
    expected = crop_images(plain, crops, (32, 32)).cpu()
    pixels = copy.deepcopy(MODULE).to(device)(batch)["pixel_values"]
    assert pixels.device.type == device
    assert (levels(pixels) - expected).abs().max() <= 4


@pytest.mark.parametrize("on_device", ["augmentation", "decoding"])
def test_batches_are_a_pure_function_too(on_device, device):
    """Of seed, epoch and position: one process or two, from the start or resumed, alone or together."""
    forms = [("JPEG", "RGB"), ("PNG", "RGB"), ("JPEG", "L")]
    count = 4 if device == "cpu" else 12  # the interpreter is slow
    images = [encoded_picture(i, (24 + i, 20), *forms[i % 3]) for i in range(count)]
    split, augmentation = Examples(images, [i % 2 for i in range(count)]), Augmentation(on_device=on_device)
    transform = training_transform(PROCESSOR, augmentation)
    module = batch_transform(PROCESSOR, augmentation).to(device)

    def epoch(start: int = 0, ahead=module.decode, batch_size: int = count // 2, **more) -> list[dict]:
        batches = TrainBatches(split, transform, seed=1, batch_size=batch_size, **more)
        return [module(ahead(batch)) for batch in batches.epoch(1, start)]

    whole = epoch()
    shape = (count // 2, 3, 32, 32)
    assert whole[0].keys() == {"pixel_values", "labels"}
    assert (whole[0]["pixel_values"].shape, whole[0]["pixel_values"].dtype) == (shape, torch.float32)
    assert torch.equal(whole[1]["pixel_values"], epoch(start=1, workers=1)[0]["pixel_values"])
    assert torch.equal(whole[1]["pixel_values"], epoch(ahead=lambda batch: batch)[1]["pixel_values"])
    ranks = [epoch(batch_size=count // 4, rank=rank, world_size=2) for rank in range(2)]
    parts = torch.cat([rank[0]["pixel_values"] for rank in ranks])
    torch.testing.assert_close(parts, whole[0]["pixel_values"], rtol=0, atol=1e-5)
    assert torch.equal(torch.cat([rank[0]["labels"] for rank in ranks]), whole[0]["labels"])
