"""JPEG files decoded on a device: by whom, and what comes out."""

import contextlib
import threading
import time
from unittest import mock

import pytest
import torch
from data_helpers import encoded_files, encoded_picture, image_file, images_of
from PIL import Image

from flashkat_hf.data.gpu import decoding, nvjpeg
from flashkat_hf.data.gpu.decoding import TorchvisionDecoder, decode_files, decodes
from flashkat_hf.data.gpu.records import DecodedImages, EncodedFiles


def decoded(files: list[bytes], device: str) -> DecodedImages:
    return decode_files(encoded_files(files), torch.device(device))


def test_quartered_chroma_on_a_gpu(device):
    """NvJPEG makes its pixels larger otherwise than libjpeg; the picture is the same."""
    files = [encoded_picture(seed, (90, 70), quality=95) for seed in range(40)]
    pairs = zip(images_of(decoded(files, device)), images_of(decoded(files, "cpu")), strict=True)
    errors = torch.stack([(image.cpu().float() - plain).abs().mean() for image, plain in pairs])
    assert errors.max() < 5, errors.max()  # some levels a pixel, in pictures that turn from color to color


def test_files_of_all_kinds(device):
    """Each in its place: one component or three, odd sizes, progressive ones that a GPU's decoders refuse."""
    kinds = ({"subsampling": 0}, {"subsampling": 0, "progressive": True}, {"mode": "L"})
    files = [encoded_picture(seed, (61 + seed, 45), quality=95, **kinds[seed % 3]) for seed in range(12)]
    for part in (files, files[1::3]):
        images, plain = images_of(decoded(part, device)), images_of(decoded(part, "cpu"))
        for image, expected in zip(images, plain, strict=True):
            assert image.shape == expected.shape
            assert (image.cpu().int() - expected.int()).abs().max() <= 4


def in_one_block(files: EncodedFiles) -> DecodedImages:
    """Decode as the hardware does, but by libjpeg."""
    images = TorchvisionDecoder(torch.device("cpu"))(files)
    block = torch.cat([image.flatten() for image in images.memory])
    lengths = 3 * images.height * images.width
    addresses = block.data_ptr() + lengths.cumsum(0) - lengths
    return DecodedImages(addresses, images.height, images.width, [block])


@pytest.fixture
def no_streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: mock.Mock(record_event=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)


@pytest.mark.parametrize("knows", [True, False])
def test_each_decoder_has_its_files(monkeypatch, no_streams, knows):
    """Hardware decoders, here libjpeg, get what they may know; torchvision the rest, or all if they refuse."""
    files = [encoded_picture(seed, (61 + seed, 45), progressive=seed % 3 == 0) for seed in range(9)]
    expected, seen = images_of(decoded(files, "cpu")), []

    def hardware(files: EncodedFiles) -> DecodedImages:
        seen.append(files.plain.tolist())
        if not knows:
            raise RuntimeError("refused")
        return in_one_block(files)

    monkeypatch.setattr(decoding, "FILES", 2)
    monkeypatch.setattr(decoding, "_hardware_decoder", lambda device: hardware)
    monkeypatch.setattr(decoding, "_fallback_decoder", lambda _: TorchvisionDecoder(torch.device("cpu")))
    monkeypatch.setattr(decoding, "_decoding_stream", torch.cuda.Stream)
    images = decoded(files, "cuda")
    assert seen == [[1] * 6]
    assert len(images.memory) == (1 + 3 if knows else 9)  # a block and the progressive three, or each alone
    for image, plain in zip(images_of(images), expected, strict=True):
        assert torch.equal(image, plain)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_hardware_decoders_share_files(monkeypatch, no_streams, count):
    """Each thread has its own decoder and as many files as the next; the images keep their order."""
    files = [encoded_picture(seed, (61 + seed, 45)) for seed in range(count)]
    shares = []

    def decode(files: EncodedFiles) -> DecodedImages:
        shares.append((threading.current_thread().name, len(files.start)))
        return in_one_block(files)

    monkeypatch.setattr(nvjpeg, "HardwareDecoder", lambda device: decode)
    images = nvjpeg.HardwareDecoders(torch.device("cuda"))(encoded_files(files))
    assert sorted(number for _, number in shares) == sorted(filter(None, [count // 2, count - count // 2]))
    assert all(name.startswith("nvjpeg") for name, _ in shares)
    for image, plain in zip(images_of(images), images_of(decoded(files, "cpu")), strict=True):
        assert torch.equal(image, plain)


def test_a_refusal_waits_for_the_other_thread(monkeypatch, no_streams):
    """A decoder that is still at work must not be given other files."""
    done = []

    def decode(files: EncodedFiles) -> DecodedImages:
        if files.width[0] == 61:
            raise RuntimeError("refused")
        time.sleep(0.2)
        done.append(True)
        return in_one_block(files)

    monkeypatch.setattr(nvjpeg, "HardwareDecoder", lambda device: decode)
    files = encoded_files([encoded_picture(seed, (61 + seed, 45)) for seed in range(2)])
    with pytest.raises(RuntimeError, match="refused"):
        nvjpeg.HardwareDecoders(torch.device("cuda"))(files)
    assert done == [True]


@pytest.mark.gpu
def test_decoding_waits_for_nothing_and_spoils_nothing():
    """Images that are freed before the GPU has read them are read as they were, though others are decoded."""
    bright, dark = ([image_file(Image.new("RGB", (500, 375), color))] * 64 for color in ("white", "black"))
    decoded(dark, "cuda")  # what is made at the first time
    for attempt in range(5):
        images = images_of(decoded(bright, "cuda"))
        torch.cuda._sleep(10**9)  # more than half a second
        read = torch.cuda.Event()
        sums = torch.stack([image.long().sum() for image in images])
        read.record()
        del images
        decoded(dark, "cuda")
        if attempt > 0:  # memory is there: allocating it waits for the GPU
            assert not read.query()  # else the next line shows nothing
        assert sums.tolist() == [255 * 3 * 500 * 375] * 64


def test_decodes(device, monkeypatch):
    assert decodes(torch.device(device))

    def without_nvjpeg(decoder, files):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(TorchvisionDecoder, "__call__", without_nvjpeg)
    assert not decodes(torch.device(device))
