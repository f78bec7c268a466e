"""Augmentation in batches.

The same draws as timm's, the same pixels up to rounding, whole batches at once.
"""

import contextlib
import copy
import functools
import io
import re
from unittest import mock

import numpy
import pytest
import timm.data.auto_augment as auto_augment
import torch
from data_helpers import one_operation, smooth_picture
from PIL import Image
from torchvision.transforms.v2 import functional

from flashkat_hf import make_image_processor
from flashkat_hf.data import augmentation as augmentation_module
from flashkat_hf.data.augmentation import Augmentation, batch_transform, training_transform
from flashkat_hf.data.batches import EvalBatches, TrainBatches, _collate, seeded
from flashkat_hf.data.gpu import decoding
from flashkat_hf.data.gpu.augmentation import BatchAugmentation, _plain
from flashkat_hf.data.gpu.decoding import decodes
from flashkat_hf.data.gpu.operations import OPERATIONS
from flashkat_hf.data.samples import DataError, Examples, Sample

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning"
)  # Python 3.12, where threads run
PROCESSOR = make_image_processor(32)
MODULE = BatchAugmentation(PROCESSOR.image_mean, PROCESSOR.image_std, (32, 32))


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return smooth_picture(seed, size)


def file(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def decoded(files: list[bytes], device: str | torch.device) -> decoding.Decoded:
    headers = [Image.open(io.BytesIO(one)) for one in files]
    table, start = [], 0
    for one, header in zip(files, headers, strict=True):
        table.append([start, len(one), header.height, header.width, _plain(header)])
        start += len(one)
    data = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
    return decoding.decoded(data, torch.tensor(table), torch.device(device))


def images_of(files: list[bytes], device: str) -> list[torch.Tensor]:
    found = decoded(files, device)
    found.wait()
    return found.images()


def levels(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised pixels in 0 to 255 again."""
    return pixels * MODULE.std + MODULE.mean


def test_the_operations_are_those_of_timms_recipe():
    names = {auto_augment.NAME_TO_OP[name].__name__ for name in auto_augment._RAND_TRANSFORMS}
    assert names == set(OPERATIONS)


@pytest.mark.parametrize("name", auto_augment._RAND_TRANSFORMS)
@pytest.mark.parametrize("bicubic", [False, True])
def test_an_operation_is_pils(name, bicubic):
    """One batch of all images."""
    geometric = name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
    images, expected, plans = one_operation(name, bicubic, MODULE.fill, (32, 32), count=20)
    made = levels(
        MODULE({"pixel_values": images, "plan": plans, "labels": torch.zeros(20)})["pixel_values"]
    ).round()
    error = (made - expected).abs()
    # PyTorch's cubic kernel is another one than PIL's (-0.75 for -0.5): some levels on smooth images
    assert error.max() <= (8 if geometric and bicubic else 1 if geometric or name == "AutoContrast" else 0)
    assert (made != images).any()


def both(
    augmentation: dict, image: bytes, seed: int, on_device: str = "augmentation"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timm's result and ours, from the same seed, in levels."""
    plain = Augmentation(**{"interpolation": "bilinear", "erasing": 0.0, **augmentation})
    sample = Sample(image, 0, "the image")
    with seeded(seed):
        expected = training_transform(PROCESSOR, plain)(Image.open(io.BytesIO(image)).convert("RGB"))
    batched = Augmentation(**{**vars(plain), "on_device": on_device})
    with seeded(seed):
        item = training_transform(PROCESSOR, batched)(sample)
    batch = _collate([{**item, "labels": 0, "corrupt": {}}])
    return levels(expected), levels(batch_transform(PROCESSOR, batched)(batch)["pixel_values"][0])


def test_the_recipe_draws_what_timm_draws():
    """Crop, flip, two operations each with its chance and its magnitude.

    The same image as timm's, to rounding.
    """
    far = []
    for seed in range(60):
        expected, made = both({}, file(picture(seed, (50, 40)), "PNG"), seed)
        far.append(((expected - made).abs() > 2.5).float().mean().item())
    assert sum(part < 0.02 for part in far) >= 57  # a level before equalize or solarize may be many after it
    assert sum(far) / len(far) < 0.01


def test_another_rand_augment_is_drawn_too():
    """Increasing magnitudes, three operations, always."""
    near = 0
    for seed in range(20):
        expected, made = both(
            {"rand_augment": "rand-m7-n3-p1.0-inc1"}, file(picture(seed, (50, 40)), "PNG"), seed
        )
        near += ((expected - made).abs() > 2.5).float().mean() < 0.02
    assert near >= 17


def test_the_erased_box_is_timms_and_full_of_noise():
    boxes = []
    for seed in range(30):
        image = file(picture(seed, (50, 40)), "PNG")
        plain = {"rand_augment": None}
        expected, made = both({**plain, "erasing": 0.5}, image, seed)
        _, whole = both(plain, image, seed)
        box = (made - whole).abs().sum(0) > 1e-3
        assert torch.equal(box, (expected - whole).abs().sum(0) > 1e-3)
        if box.any():
            assert box.sum() == box.any(0).sum() * box.any(1).sum()
            boxes.append(((made - MODULE.mean) / MODULE.std)[:, box].flatten())
    assert 8 <= len(boxes) <= 22  # of 30 with a chance of a half
    noise = torch.cat(boxes)
    assert noise.mean().abs() < 0.05
    assert (noise.std() - 1).abs() < 0.05
    assert not torch.equal(boxes[0][:30], boxes[1][:30])


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size():
    """And gives nearly the pixels of the whole; upright, too."""
    calm = {"rand_augment": None, "crop_area": (0.5, 1.0)}
    for seed in range(5):
        expected, made = both(calm, file(picture(seed, (640, 480))), seed)
        assert (expected - made).abs().mean() < 1
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: what is stored as 640 x 480 stands upright as 480 x 640
    transform = training_transform(
        PROCESSOR, Augmentation(rand_augment=None, flip=0, erasing=0, on_device="augmentation")
    )
    upright = picture(1, (480, 640))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    with seeded(1):
        one = transform(Sample(file(stored, exif=exif, quality=100), 0, ""))["pixel_values"]
    with seeded(1):
        other = transform(Sample(file(upright, quality=100), 0, ""))["pixel_values"]
    assert (one.float() - other.float()).abs().mean() < 1


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoding_with_the_batch_gives_the_same(mode):
    for seed in range(8):
        image = file(picture(seed, (70, 50)).convert(mode), quality=95)
        _, cropped = both({"rand_augment": None}, image, seed)
        _, decoded = both({"rand_augment": None}, image, seed, "decoding")
        assert (cropped - decoded).abs().max() <= 3  # torchvision's resizing rounds otherwise than PIL's


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("limit", [2**28, 20_000])
def test_crops_of_a_batch_are_torchvisions(limit, bicubic, device, monkeypatch):
    """Larger and smaller than the result, of images of all sizes, mirrored or not.

    Few of them at once, or all.
    """
    monkeypatch.setattr(decoding, "CROP_BYTES", limit)
    modes = functional.InterpolationMode
    generator = numpy.random.default_rng(0)
    files, windows, expected = [], [], []
    for seed in range(70):  # more than are decoded at once
        width, height = generator.integers(20, 120, 2).tolist()
        rows, columns = generator.integers(4, [height + 1, width + 1]).tolist()
        top, left = generator.integers(0, [height - rows + 1, width - columns + 1]).tolist()
        encoded = file(picture(seed, (width, height)), quality=95)
        [whole] = images_of([encoded], device)
        mode = modes.BICUBIC if bicubic else modes.BILINEAR
        crop = functional.resized_crop(
            whole.float(), top, left, rows, columns, [32, 24], mode, antialias=True
        )
        files.append(encoded)
        windows.append([top, left, rows, columns, bicubic, seed % 2])
        expected.append((crop.flip(-1) if seed % 2 else crop).round().clamp(0, 255))
    made = decoding.decoded_crops(decoded(files, device), torch.tensor(windows), (32, 24))
    error = (made - torch.stack(expected)).abs()
    assert error.max() <= 1  # rounding at a half
    assert (error > 0).float().mean() < 0.001


def test_decoding_on_a_gpu_agrees_with_that_on_a_cpu(device):
    """The recipe on 40 files.

    On a GPU nvJPEG decodes, within a level or two of libjpeg where chroma is whole.
    """
    whole = {"quality": 95, "subsampling": 0}
    split = Examples([file(picture(seed, (90, 70)), **whole) for seed in range(40)], [0, 1] * 20)
    transform = training_transform(PROCESSOR, Augmentation(rand_augment=None, on_device="decoding"))
    [batch] = TrainBatches(split, transform, batch_size=40, seed=0).epoch(0)
    plain = MODULE(batch)["pixel_values"]
    made = copy.deepcopy(MODULE).to(device)(batch)["pixel_values"]
    assert made.device.type == device
    assert (made.cpu() - plain).abs().mul(MODULE.std).max() <= 4


def test_quartered_chroma_on_a_gpu(device):
    """NvJPEG makes its pixels larger otherwise than libjpeg; the picture is the same."""
    files = [file(picture(seed, (90, 70)), quality=95) for seed in range(40)]
    images, plain = (images_of(files, where) for where in (device, "cpu"))
    errors = torch.stack(
        [(one.cpu().float() - other).abs().mean() for one, other in zip(images, plain, strict=True)]
    )
    assert errors.max() < 5, errors.max()  # some levels a pixel, in pictures that turn from color to color


def test_files_of_all_kinds(device):
    """Each in its place.

    Of one or three components, of odd sizes, and progressive, which a GPU's decoders refuse.
    """
    kinds = ({"subsampling": 0}, {"subsampling": 0, "progressive": True}, {})
    files = [
        file(
            picture(seed, (61 + seed, 45)).convert("L" if seed % 3 == 2 else "RGB"),
            quality=95,
            **kinds[seed % 3],
        )
        for seed in range(12)
    ]
    for some in (files, files[1::3]):
        images, plain = (images_of(some, where) for where in (device, "cpu"))
        for image, expected in zip(images, plain, strict=True):
            assert image.shape == expected.shape
            assert (image.cpu().int() - expected.int()).abs().max() <= 4


def test_each_decoder_has_its_files(monkeypatch):
    """A GPU's own decoders, here libjpeg, get what they may know.

    Torchvision gets what they refuse, and the rest.
    """
    files = [file(picture(seed, (61 + seed, 45)), progressive=seed % 3 == 0) for seed in range(9)]
    expected, seen = images_of(files, "cpu"), []

    def decoder(data: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(table[:, 4].tolist())
        images = decoding._by_torchvision(data, table, torch.device("cpu"))
        if len(images[0][0, 0]) == 61 + 4:
            raise RuntimeError("refused")
        block = torch.cat([image.flatten() for image in images])
        lengths = torch.tensor([image.numel() for image in images])
        return block, block.data_ptr() + lengths.cumsum(0) - lengths

    on_cpu = functools.partial(decoding._by_torchvision, device=torch.device("cpu"))
    monkeypatch.setattr(decoding, "FILES", 2)
    monkeypatch.setattr(decoding, "_hardware_decoder", lambda device: decoder)
    monkeypatch.setattr(decoding, "_decoding_stream", lambda device: mock.Mock(record_event=lambda: None))
    monkeypatch.setattr(decoding, "_by_torchvision", lambda data, table, device: on_cpu(data, table))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    found = decoded(files, "cuda")
    assert seen == [[1, 1]] * 3
    assert len(found.memory) == 2 + 5  # two blocks; the refused two and the progressive three
    for image, other in zip(found.images(), expected, strict=True):
        assert torch.equal(image, other)


@pytest.mark.gpu
def test_decoding_waits_for_nothing_and_spoils_nothing():
    """Images that were freed while the GPU has still to read them are read as they were, though others are decoded."""
    bright, dark = ([file(Image.new("RGB", (500, 375), color))] * 64 for color in ("white", "black"))
    decoded(dark, "cuda")  # what is made at the first time
    for attempt in range(5):
        images = images_of(bright, "cuda")
        torch.cuda._sleep(10**9)  # more than half a second
        read = torch.cuda.Event()
        sums = torch.stack([image.long().sum() for image in images])
        read.record()
        del images
        decoded(dark, "cuda")
        if attempt > 0:  # memory is there: allocating it waits for the GPU
            assert not read.query()  # else the next line shows nothing
        assert sums.tolist() == [255 * 3 * 500 * 375] * 64


@pytest.mark.parametrize("kind", ["png", "turned", "cmyk", "pixels"])
def test_what_the_device_cannot_decode_comes_as_pixels(kind):
    image, exif = picture(3, (50, 40)), Image.Exif()
    exif[0x0112] = 6
    encoded = {
        "png": lambda: file(image, "PNG"),
        "turned": lambda: file(image, exif=exif),
        "cmyk": lambda: file(image.convert("CMYK")),
        "pixels": lambda: image,
    }[kind]()
    made = []
    for on_device in ("augmentation", "decoding"):
        augmentation = Augmentation(on_device=on_device)
        with seeded(1):
            item = training_transform(PROCESSOR, augmentation)(Sample(encoded, 0, ""))
        batch = _collate([{**item, "labels": 0, "corrupt": {}}])
        made.append(batch_transform(PROCESSOR, augmentation)(batch)["pixel_values"])
    assert torch.equal(*made)


@pytest.mark.parametrize("on_device", ["augmentation", "decoding"])
def test_batches_are_a_pure_function_too(on_device):
    """Of seed, epoch and position: one process or two, from the start or resumed, alone or together."""
    forms = [("JPEG", "RGB"), ("PNG", "RGB"), ("JPEG", "L")]
    images = [file(picture(i, (40 + i, 36)).convert(mode), form) for i in range(4) for form, mode in forms]
    split, augmentation = Examples(images, [i % 2 for i in range(12)]), Augmentation(on_device=on_device)
    module, options = batch_transform(PROCESSOR, augmentation), {"seed": 1}

    def epoch(start: int = 0, ahead=module.decode, **more) -> list[dict]:
        batches = TrainBatches(split, training_transform(PROCESSOR, augmentation), **{**options, **more})
        return [module(ahead(batch)) for batch in batches.epoch(1, start)]

    whole = epoch(batch_size=6)
    assert whole[0].keys() == {"pixel_values", "labels"}
    assert (whole[0]["pixel_values"].shape, whole[0]["pixel_values"].dtype) == ((6, 3, 32, 32), torch.float32)
    assert torch.equal(whole[1]["pixel_values"], epoch(start=1, batch_size=6, workers=1)[0]["pixel_values"])
    assert torch.equal(
        whole[1]["pixel_values"], epoch(ahead=lambda batch: batch, batch_size=6)[1]["pixel_values"]
    )
    ranks = [epoch(batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    parts = torch.cat([rank[0]["pixel_values"] for rank in ranks])
    torch.testing.assert_close(parts, whole[0]["pixel_values"], rtol=0, atol=1e-5)
    assert torch.equal(torch.cat([rank[0]["labels"] for rank in ranks]), whole[0]["labels"])


@pytest.mark.parametrize("on_device", ["augmentation", "decoding"])
def test_broken_images_are_named_by_the_worker(tmp_path, on_device):
    broken = file(picture(0, (200, 200)))[:-400]
    transform = training_transform(PROCESSOR, Augmentation(on_device=on_device))
    for encoded, name in (
        (broken, "shard.tar/7.jpg"),
        (str(tmp_path / "gone.jpg"), str(tmp_path / "gone.jpg")),
    ):
        with pytest.raises(DataError, match=rf"^cannot read the image {re.escape(name)}: [^\n]+$"):
            transform(Sample(encoded, 0, name))
    split = Examples([broken, file(picture(1))], [0, 1], skip_corrupt=True)
    batch = next(iter(EvalBatches(split, transform, batch_size=2)))
    assert batch["labels"].tolist() == [1]


def test_operations_that_batches_do_not_know():
    with pytest.raises(
        ValueError, match="RandAugment's Desaturate cannot be done in batches; use on_device='nothing'"
    ):
        training_transform(PROCESSOR, Augmentation(rand_augment="rand-m9-t3a", on_device="augmentation"))
    for other in ({"crop": "moves"}, {"color_jitter": 0.4}):
        with pytest.raises(
            ValueError, match="on_device 'decoding' knows neither the crop 'moves' nor color_jitter"
        ):
            Augmentation(on_device="decoding", **other)
    assert batch_transform(PROCESSOR, Augmentation(on_device="nothing")) is None


def test_auto_is_decided_by_device_recipe_and_source(monkeypatch):
    monkeypatch.setattr(augmentation_module, "decodes", lambda device: device.index == 0)
    cpu, gpu, other = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
    found = [Augmentation(on_device="auto").resolved(device, False).on_device for device in (cpu, gpu, other)]
    assert found == ["nothing", "decoding", "augmentation"]
    assert Augmentation(on_device="auto").resolved(gpu, in_memory=True).on_device == "nothing"
    for unknown in ({"crop": "moves"}, {"color_jitter": 0.4}, {"rand_augment": "rand-m9-t3a"}):
        assert Augmentation(on_device="auto", **unknown).resolved(gpu, False).on_device == "nothing"
    assert Augmentation(on_device="augmentation").resolved(cpu, False).on_device == "augmentation"
    assert batch_transform(PROCESSOR, Augmentation(on_device="auto")) is None  # not decided


def test_decodes(device, monkeypatch):
    assert decodes(torch.device(device))

    def without_nvjpeg(data, files, device):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(decoding, "_by_torchvision", without_nvjpeg)
    assert not decodes(torch.device(device))
