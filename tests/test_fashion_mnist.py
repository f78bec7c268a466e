"""The folder of Fashion-MNIST, and the tables about the defaults, on files and results that are made up."""

import gzip
import sys

import numpy
import pytest
from helpers import ROOT
from PIL import Image

sys.path.append(str(ROOT / "benchmarks"))

from learning import default_tables
from learning.fashion_mnist import CLASSES, choose, load, write_folder

from flashkat_hf.data.image_folder import load_image_folder


def write_idx(path, values) -> None:
    header = bytes([0, 0, 8, values.ndim]) + numpy.array(values.shape, ">u4").tobytes()
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def source(tmp_path):
    """Four files of 40 and 20 pictures; the pixels of a picture are its number."""
    folder = tmp_path / "source"
    folder.mkdir()
    for part, count in (("train", 40), ("t10k", 20)):
        pictures = numpy.broadcast_to(numpy.arange(count, dtype=numpy.uint8)[:, None, None], (count, 28, 28))
        labels = (numpy.arange(count) * 7 % 10).astype(numpy.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", pictures)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return folder


def test_the_files_are_read(source):
    train, train_labels, test, test_labels = load(source)
    assert (train.shape, test.shape, train.dtype) == ((40, 28, 28), (20, 28, 28), numpy.uint8)
    assert train[3, 5, 6] == 3
    assert train_labels.tolist()[:4] == [0, 7, 4, 1]
    assert numpy.bincount(test_labels).tolist() == [2] * 10


def test_the_folder_is_one_that_training_reads(source, tmp_path):
    write_folder(tmp_path / "all", source=source)
    data = load_image_folder(tmp_path / "all")
    assert (len(data.train), len(data.test), data.class_names) == (40, 20, sorted(CLASSES))
    _, labels, *_ = load(source)
    for index in range(len(data.train)):
        with Image.open(data.train.images[index]) as picture:
            number = picture.getpixel((3, 4))
        assert CLASSES[labels[number]] == data.class_names[data.train.labels[index]]
    write_folder(tmp_path / "some", 20, source=source)
    assert len(load_image_folder(tmp_path / "some").train) == 20
    with pytest.raises(ValueError, match="some is there already"):
        write_folder(tmp_path / "some", source=source)


def test_as_many_of_each_class_by_the_seed():
    labels = numpy.arange(100) % 10
    chosen = choose(labels, 30)
    assert numpy.bincount(labels[chosen]).tolist() == [3] * 10
    assert chosen.tolist() == choose(labels, 30, seed=0).tolist() != choose(labels, 30, seed=1).tolist()


@pytest.mark.parametrize("count", [0, 15, 110])
def test_a_number_that_cannot_be_had(count):
    with pytest.raises(ValueError, match=rf"--train: {count} must be a multiple of 10 from 10 to 100"):
        choose(numpy.arange(100) % 10, count)


def test_a_package_that_is_not_installed_says_how(tmp_path):
    with pytest.raises(
        ValueError, match=r"is missing; apt-get install dataset-fashion-mnist, or --source"
    ) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


# mtime=0: the test has the same name in each process of pytest-xdist
@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b"\0\0\x08\x03 too short", mtime=0)])
def test_a_file_that_is_none(source, content):
    (source / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz") as error:
        load(source)
    assert "\n" not in str(error.value)


ABOUT = {"device": "CPU", "versions": {"torch": "2", "timm": "1"}, "commit": "0123456789"}


def test_the_table_of_the_defaults():
    runs = [
        {
            "data": "digits",
            "model": model,
            "top1": top1,
            "seconds": 100.4,
            "process_seconds": 90.2,
            "epochs": 7,
        }
        for model, accuracies in (("flashkat", (0.98, 0.99)), ("vit", (0.5,)))
        for top1 in accuracies
    ]
    text = default_tables.defaults_table([each | ABOUT for each in runs])
    assert (
        "| scikit-learn's digits | FlashKAT | 98.50% ± 0.50% | 2 | 7 | 100 s, 90 s of the process |" in text
    )
    assert "| scikit-learn's digits | ViT (timm) | 50.00% | 1 |" in text
    assert "CPU, torch 2, timm 1, commit 0123456" in text


def test_the_table_of_checkpoints_compares_seed_by_seed():
    common = {"model": "flashkat", "data": "digits", "pictures": 5, "epochs": 2, "learning_rate": 1e-3}
    accuracies = {"middle": (0.5, 0.7), "rate 3e-4": (0.6, 0.9)}
    runs = [
        {"way": way, "seed": seed, "accuracy": value} | common | ABOUT
        for way, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    text = default_tables.checkpoints_table(runs)
    assert "| middle | 60.00% |  |" in text
    assert "| rate 3e-4 | 75.00% | +15.00 ± 5.00 |" in text
