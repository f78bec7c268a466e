"""Data sets of the Hub that are files, public and private, and rows that name files elsewhere."""

import fsspec
import pytest
from data_helpers import CLASSES, PLAIN, encoded, numbers
from huggingface_hub import HfFileSystem

from flashkat_hf.data import open_data
from flashkat_hf.data.batches import EvalBatches, TrainBatches
from flashkat_hf.data.samples import DataError

datasets = pytest.importorskip("datasets")

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})


@pytest.fixture
def pictures(hub, monkeypatch, tmp_path):
    """A private data set of files on the local Hub: 0 to 5 to train on, 6 to 8 to validate with."""
    files = {
        f"{'train' if number < 6 else 'validation'}/{CLASSES[number % 3]}/{number}.png": encoded(number)
        for number in range(9)
    }
    hub.add("alice/pictures", files, private=True, kind="datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    HfFileSystem.clear_instance_cache()
    yield hub
    HfFileSystem.clear_instance_cache()


def seen(split) -> list[int]:
    return sorted(number for batch in EvalBatches(split, PLAIN, batch_size=4) for number in numbers(batch))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_private_data_set(pictures, streaming):
    sizes = {"train_size": 6, "test_size": 3} if streaming else {}
    data = open_data("alice/pictures", streaming=streaming, **sizes)
    assert data.class_names == CLASSES
    assert (seen(data.train), seen(data.test)) == ([0, 1, 2, 3, 4, 5], [6, 7, 8])
    batches = TrainBatches(data.train, PLAIN, batch_size=3, seed=0)
    for epoch in range(2):
        trained = list(batches.epoch(epoch))
        assert sorted(number for batch in trained for number in numbers(batch)) == [0, 1, 2, 3, 4, 5]
        assert all(
            n % 3 == label
            for batch in trained
            for n, label in zip(numbers(batch), batch["labels"], strict=True)
        )


def test_another_ones_token(pictures, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    for streaming in (False, True):
        with pytest.raises(
            DataError, match=r"^cannot load the data set alice/pictures: .*alice/pictures"
        ) as caught:
            open_data("alice/pictures", streaming=streaming)
        assert "\n" not in str(caught.value)
        assert "hf_bob" not in str(caught.value)


def rows(paths: list[str]) -> datasets.DatasetDict:
    """A map-style data set whose rows name files, each of them for both splits."""
    columns = {
        "image": [{"bytes": None, "path": path} for path in paths],
        "label": [0, 1, 2, 0][: len(paths)],
    }
    part = datasets.Dataset.from_dict(columns, features=FEATURES)
    return datasets.DatasetDict(train=part, validation=part)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("system", ["memory", "hf", "http"])
def test_rows_that_name_files_elsewhere(pictures, tmp_path, monkeypatch, streaming, system):
    """On any file system of fsspec, on the Hub with the token; what is not there is named, and skippable."""
    files = fsspec.filesystem("memory")
    for number in range(3):
        files.pipe(f"/{tmp_path.name}/train/{CLASSES[number]}/{number}.png", encoded(number))
    root = {
        "memory": f"memory://{tmp_path.name}",
        "hf": "hf://datasets/alice/pictures@main",
        "http": f"{pictures.url}/datasets/alice/pictures/resolve/main",
    }[system]
    paths = [f"{root}/train/{CLASSES[number]}/{number}.png" for number in range(3)]
    paths.append(f"{root}/train/lost.png")
    monkeypatch.setattr("flashkat_hf.data.hub_datasets._load", lambda *arguments: rows(paths))
    data = open_data("owner/rows", streaming=streaming, skip_corrupt=True)
    batches = EvalBatches(data.test, PLAIN, batch_size=4)
    assert sorted(number for batch in batches for number in numbers(batch)) == [0, 1, 2]
    (message,) = batches.corrupt.values()
    assert message.startswith("cannot read the image ")
    assert f"{paths[3]}: no such file" in message
    data = open_data("owner/rows", streaming=streaming)
    with pytest.raises(DataError, match=r"cannot read the image .*lost.png: no such file$"):
        list(EvalBatches(data.test, PLAIN, batch_size=4))
