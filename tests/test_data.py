"""Digits, image folders, their errors, and transforms that agree with the image processor and the pipeline."""

import pickle
import sys

import numpy
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from flashkat_hf import make_image_processor
from flashkat_hf.data import (
    DataError,
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


def test_the_digits_split_is_disjoint_stratified_and_always_the_same():
    from sklearn.datasets import load_digits as original

    data, again = load_digits(), load_digits()
    assert data.class_names == list("0123456789")
    assert (len(data.train.images), len(data.test.images)) == (1437, 360)
    pixels = {name: [image.tobytes() for image in split.images] for name, split in zip("ab", data[:2], strict=True)}
    assert pixels["b"] == [image.tobytes() for image in again.test.images]
    # Every image of the data set is in one split as often as it is there: no two of these scans are alike.
    assert len(set(pixels["a"]) | set(pixels["b"])) == 1797
    everything = zip(pixels["a"] + pixels["b"], [*data.train.labels, *data.test.labels], strict=True)
    expected = [Image.fromarray((p * 255 / 16).round().astype("uint8")).convert("RGB") for p in original().images]
    assert dict(everything) == {
        image.tobytes(): label for image, label in zip(expected, original().target, strict=True)
    }
    whole, held_out = numpy.bincount(original().target), numpy.bincount(data.test.labels)
    assert numpy.abs(held_out - whole / 5).max() <= 1


def test_image_folder(folder):
    (folder / "train" / "cat" / "more").mkdir()
    Image.new("L", (3, 3)).save(folder / "train" / "cat" / "more" / "DEEP.JPG")
    (folder / "train" / "cat" / "notes.txt").write_text("not an image by its name")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    data = load_image_folder(folder)
    assert data.class_names == ["cat", "dog"]
    assert data.train.labels == [0, 0, 0, 1, 1]
    assert data.test.labels == [0, 0, 1, 1]
    names = ["cat/0.png", "cat/1.png", "cat/more/DEEP.JPG", "dog/0.png", "dog/1.png"]
    assert data.train.images == [str(folder / "train" / name) for name in names]


def test_evaluation_sees_what_the_processor_makes(folder):
    processor = make_image_processor(image_size=24)
    data = load_image_folder(folder)
    example = ImageDataset(data.test, evaluation_transform(processor))[2]
    expected = processor(open_image(data.test.images[2]), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(example["pixel_values"], expected)
    assert example["labels"] == 1


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_images_are_opened_as_the_pipeline_opens_them(tmp_path, mode, orientation):
    """Of any mode, and upright: a phone stores how it was held beside the pixels."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    image = Image.fromarray(pixels).convert("L" if mode in ("LA", "1") else "RGB").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path, exif=exif)
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", (5, 7) if orientation == 6 else (7, 5))
    assert opened.tobytes() == load_image(str(path)).tobytes()


@pytest.mark.parametrize("flip", [True, False])
def test_training_transform_is_random_and_normalised_alike(folder, flip):
    processor = make_image_processor(image_size=24)
    transform = training_transform(processor, flip=flip)
    flat = Image.new("RGB", (40, 40), (124, 116, 104))
    made, evaluated = transform(flat), evaluation_transform(processor)(flat)
    assert type(made) is torch.Tensor
    assert (made.shape, made.dtype) == (evaluated.shape, evaluated.dtype)
    middle = (slice(None), slice(8, 16), slice(8, 16))  # shifts bring black in at the borders only
    torch.testing.assert_close(made[middle], evaluated[middle])
    textured = open_image(load_image_folder(folder).train.images[0])
    assert not torch.equal(transform(textured), transform(textured))


def test_digits_are_moved_but_never_mirrored():
    """A bright left half stays at the left, and the image is scaled as evaluation scales it."""
    processor = make_image_processor(image_size=24, crop=0.5)
    image = Image.new("RGB", (48, 48))
    image.paste((255, 255, 255), (0, 0, 24, 48))
    transform = training_transform(processor, flip=False)
    for _ in range(20):
        made = transform(image)
        assert made[:, :, :4].mean() > 1 > -1 > made[:, :, -4:].mean()


@pytest.mark.parametrize("flip", [True, False])
def test_a_data_set_can_be_sent_to_worker_processes(folder, flip):
    processor = make_image_processor(image_size=24)
    for transform in (training_transform(processor, flip), evaluation_transform(processor)):
        dataset = pickle.loads(pickle.dumps(ImageDataset(load_image_folder(folder).train, transform)))
        assert dataset[0]["pixel_values"].shape == (3, 24, 24)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "val").rename(root / "test"), "ROOT must hold train/ and val/.* val/ is missing"),
        (
            lambda root: (root / "train" / "dog").rename(root / "dog"),
            "ROOT/train holds only the class cat; at least two",
        ),
        (
            lambda root: [(root / "train" / name).rename(root / name) for name in ("cat", "dog")],
            "ROOT/train holds no class folders; at least two",
        ),
        (lambda root: [p.unlink() for p in (root / "train" / "dog").iterdir()], "ROOT/train/dog has no images"),
        (lambda root: [p.unlink() for p in (root / "val" / "cat").iterdir()], "ROOT/val/cat has no images"),
        (lambda root: (root / "val" / "cow").mkdir(), "ROOT/val has classes that ROOT/train has not: cow"),
        (lambda root: (root / "train" / "cow").mkdir(), "ROOT/train has classes that ROOT/val has not: cow"),
        (
            lambda root: (root / "val" / "cat" / "1.png").write_text("no"),
            "cannot read the image ROOT/val/cat/1.png: not a known image format$",
        ),
        (
            lambda root: [p.write_bytes(b"") for p in (root / "train" / "cat").iterdir()],
            "cannot read the image ROOT/train/cat/0.png: not a known image format, and 1 more$",
        ),
    ],
)
def test_bad_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message.replace("ROOT", str(folder))) as caught:
        load_image_folder(folder)
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_image_folder(tmp_path / "nowhere")


def test_processes_share_the_checks(folder):
    """Of eight images, process 1 of 2 checks the odd ones."""
    (folder / "train" / "cat" / "1.png").write_text("no")
    load_image_folder(folder, rank=0, world_size=2)
    with pytest.raises(DataError, match=r"cat/1.png"):
        load_image_folder(folder, rank=1, world_size=2)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_truncated_image_is_named_when_it_is_opened(folder, suffix):
    path = folder / "train" / "cat" / f"0.{suffix}"
    open_image(folder / "train" / "cat" / "1.png").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    try:
        data = load_image_folder(folder)  # most headers are whole
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017 - PIL reads a little further in some formats
    else:
        dataset = ImageDataset(data.train, evaluation_transform(make_image_processor(24)))
        with pytest.raises(DataError, match=f"cannot read the image {path}: ."):
            dataset[data.train.images.index(str(path))]


def test_a_missing_image_is_named():
    with pytest.raises(DataError, match=r"^cannot read the image nowhere.png: No such file or directory$"):
        open_image("nowhere.png")


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("sklearn.datasets", load_digits),
        ("torchvision.transforms.v2", lambda: training_transform(make_image_processor(24))),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch, module, use):
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    with pytest.raises(ImportError, match=rf"{module} is missing: pip install 'flashkat_hf\[train\]'"):
        use()
