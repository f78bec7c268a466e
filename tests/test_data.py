"""Digits, image folders, their errors, and transforms that agree with the image processor."""

import numpy
import pytest
import torch
from PIL import Image

from flashkat_hf import make_image_processor
from flashkat_hf.data import (
    ImageDataset,
    evaluation_transform,
    load_digits,
    load_image_folder,
    open_image,
    training_transform,
)


@pytest.fixture
def folder(tmp_path):
    """Two classes, two images each in train/ and val/."""
    generator = numpy.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = generator.integers(0, 256, (40, 50, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_digits():
    data = load_digits()
    assert data.class_names == list("0123456789")
    assert (len(data.train.images), len(data.test.images)) == (1437, 360)
    counts = numpy.bincount(data.test.labels, minlength=10)
    assert counts.min() >= 34  # stratified: 174 to 183 of each class
    assert counts.max() <= 37
    assert all(image.mode == "RGB" and image.size == (8, 8) for image in data.test.images)
    again = load_digits()
    assert [numpy.asarray(a).tobytes() for a in data.test.images] == [
        numpy.asarray(b).tobytes() for b in again.test.images
    ]


def test_image_folder(folder):
    data = load_image_folder(folder)
    assert data.class_names == ["cat", "dog"]
    assert data.train.labels == data.test.labels == [0, 0, 1, 1]
    assert [path.name for path in data.test.images] == ["0.png", "1.png", "0.png", "1.png"]


def test_evaluation_sees_what_the_processor_makes(folder):
    processor = make_image_processor(image_size=24)
    data = load_image_folder(folder)
    example = ImageDataset(data.test, evaluation_transform(processor))[2]
    expected = processor(open_image(data.test.images[2]), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(example["pixel_values"], expected)
    assert example["labels"] == 1


@pytest.mark.parametrize("flip", [True, False])
def test_training_transform_is_random_and_normalised_alike(folder, flip):
    processor = make_image_processor(image_size=24)
    transform = training_transform(processor, flip=flip)
    image = Image.new("RGB", (40, 40), (124, 116, 104))  # ImageNet's mean
    assert transform(image).shape == (3, 24, 24)
    middle = transform(image)[:, 8:16, 8:16]  # shifts bring black in at the borders only
    assert middle.abs().max() < 0.02
    textured = open_image(load_image_folder(folder).train.images[0])
    assert not torch.equal(transform(textured), transform(textured))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "val").rename(root / "test"), "val is not a folder; .* must hold train/ and val/"),
        (lambda root: (root / "train" / "dog").rename(root / "dog"), r"has 1 class folders \['cat'\]"),
        (lambda root: [p.unlink() for p in (root / "train" / "dog").iterdir()], "dog has no images"),
        (lambda root: (root / "val" / "dog").rename(root / "val" / "cow"), "only one of them has cow, dog"),
        (lambda root: (root / "val" / "cat" / "1.png").write_text("no"), "cannot read the image .*cat/1.png"),
    ],
)
def test_bad_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_image_folder(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere/train is not a folder"):
        load_image_folder(tmp_path / "nowhere")


def test_truncated_image_is_named_when_it_is_opened(folder):
    path = folder / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:400])
    data = load_image_folder(folder)  # the header is whole
    with pytest.raises(ValueError, match=r"cannot read the image .*cat/0.png"):
        ImageDataset(data.train, evaluation_transform(make_image_processor(24)))[0]
