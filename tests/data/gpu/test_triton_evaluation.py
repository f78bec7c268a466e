"""Evaluation on a device, from files to normalised pixels: on a GPU, or in Triton's interpreter."""

import io

import pytest
import torch
from data_helpers import encoded_picture
from helpers import KERNEL_DEVICES
from PIL import Image

from flashkat_hf import make_image_processor
from flashkat_hf.data.augmentation import evaluation_in_batches, evaluation_transform
from flashkat_hf.data.samples import DataError, Sample
from flashkat_hf.data.workers import collate
from flashkat_hf.inference.inputs import Inputs

pytestmark = pytest.mark.parametrize("device", KERNEL_DEVICES)
SIZES = [(50, 40), (41, 97), (33, 32), (200, 35), (20, 23)]


def files(kind: str = "JPEG") -> list[bytes]:
    return [encoded_picture(seed, size, kind, quality=95) for seed, size in enumerate(SIZES)]


def levels(pixels: torch.Tensor, processor) -> torch.Tensor:
    mean, std = (
        255 * torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std)
    )
    return pixels.cpu() * std + mean


def by_both(processor, images: list[bytes], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The evaluation transform's result and the device's, in levels."""
    transform = evaluation_transform(processor)
    worker, module = evaluation_in_batches(transform)
    items = [{**worker(Sample(image, 0, "it")), "corrupt": {}} for image in images]
    expected = [transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]
    made = module.to(device)(collate(items))["pixel_values"]
    return levels(torch.stack(expected), processor), levels(made, processor)


@pytest.mark.parametrize("settings", [{}, {"resample": 2}, {"size": {"height": 40, "width": 36}}])
def test_it_is_the_evaluation_transform(settings, device):
    """Shorter side or both sides, either filter, and files that a device does not decode."""
    processor = make_image_processor(32)
    for name, value in settings.items():
        setattr(processor, name, value)
    for kind in ("JPEG", "PNG"):
        expected, made = by_both(processor, files(kind), device)
        if device == "cuda":  # nvJPEG enlarges quartered chroma otherwise
            assert (expected - made).abs().mean() < 5
        else:
            assert (expected - made).abs().max() <= 2.01  # PIL rounds twice


def test_what_a_device_does_not_know(device):
    """A crop with a border, and a long thin image, come as pixels from the worker."""
    processor = make_image_processor(32)
    worker, _ = evaluation_in_batches(evaluation_transform(processor))
    long = encoded_picture(0, (500, 3), "JPEG")
    assert worker(Sample(long, 0, "long"))["crop"][2] == 0
    processor.size = {"shortest_edge": 20}
    expected, made = by_both(processor, files(), device)
    assert (expected - made).abs().max() <= 1e-3
    assert evaluation_in_batches(lambda image: image) is None


def test_files_that_a_decoder_refuses_are_tried_by_pil(device, monkeypatch):
    transform = evaluation_transform(make_image_processor(32))
    inputs = Inputs(transform, torch.device(device), "gpu")
    images = [*files(), encoded_picture(9, (40, 40), "PNG")]
    items = [{**inputs.transform(Sample(image, 0, "it")), "corrupt": {}} for image in images]
    batch = {
        "names": [*map(str, range(7))],
        "errors": [None, "missing", *[None] * 5],
        "inputs": collate(items),
    }
    refuse = lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))  # noqa: E731
    monkeypatch.setattr(inputs.module, "crops", refuse)
    monkeypatch.setattr(inputs.module, "decode", refuse)
    read = inputs.evaluation.pixels
    broken = iter([False, False, True, False, False])

    def pixels(image):
        if next(broken):
            raise DataError("no end in 3")
        return read(image)

    monkeypatch.setattr(inputs, "evaluation", inputs.evaluation._replace(pixels=pixels))
    (found, made) = next(iter(inputs.batches([batch])))
    assert [error is None for error in found["errors"]] == [True, False, True, False, True, True, True]
    assert "3" in found["errors"][3]
    good = [images[number] for number in (0, 1, 3, 4, 5)]
    expected = torch.stack([transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in good])
    assert torch.allclose(made.cpu(), expected, atol=1e-5)
