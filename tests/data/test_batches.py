"""Order, parts, resuming, seeds and corrupt images of batches, for splits with random access and streams."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
import weakref
from collections import Counter
from dataclasses import replace

import numpy
import pytest
import torch
from data_helpers import PLAIN, PROCESSOR, encoded, image_dataset, numbers, write_folder, write_shards
from PIL import Image

from flashkat_hf.data import open_data
from flashkat_hf.data.augmentation import SIGNS, Augmentation, training_transform
from flashkat_hf.data.batches import EvalBatches, TrainBatches, checked
from flashkat_hf.data.samples import DataError, Examples
from flashkat_hf.data.seeding import seeded
from flashkat_hf.data.workers import collate

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning"
)  # Python 3.12, where threads run
TRAIN, TEST = 23, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return open_data(write_folder(tmp_path_factory.mktemp("folder"), TRAIN, TEST))


@pytest.fixture(scope="module", params=["folder", "shards", "saved", "stream"])
def data(request, tmp_path_factory, folder):
    """The same images in every form."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "folder":
        return folder
    if request.param == "shards":
        return open_data(write_shards(root, [7, 11, 5], [6, 4]))
    import datasets

    splits = {"train": image_dataset(0, TRAIN), "validation": image_dataset(TRAIN, TRAIN + TEST)}
    datasets.disable_progress_bars()
    datasets.DatasetDict(splits).save_to_disk(root)
    return open_data(root, streaming=request.param == "stream")


def training(split, rank=0, world_size=1, **options) -> TrainBatches:
    options = {"batch_size": 3, "seed": 5, "transform": PLAIN, **options}
    return TrainBatches(split, rank=rank, world_size=world_size, **options)


def equal(one: list[dict], other: list[dict]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


class Counted:
    """A transform that counts its calls in all processes."""

    takes_sample = True

    def __init__(self):
        self.calls = multiprocessing.get_context("fork").Value("i", 0)

    def __call__(self, sample) -> dict[str, torch.Tensor]:
        with self.calls.get_lock():
            self.calls.value += 1
        return {"pixel_values": torch.zeros(1, 1)}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_epochs_that_follow_each_other_are_the_same(folder, workers):
    """Also when one is left, begun again, or left out; a batch never comes twice, and none is missed."""
    expected = [list(training(folder.train).epoch(epoch)) for epoch in range(4)]
    batches = training(folder.train, epochs=3, workers=workers)
    for epoch in (0, 1, 2, 3, 1):  # the fourth is more than was said
        assert equal(list(batches.epoch(epoch)), expected[epoch])
    left = batches.epoch(0)
    assert equal([next(left), next(left)], expected[0][:2])
    assert equal(list(batches.epoch(0, 2)), expected[0][2:])  # goes on
    left = batches.epoch(1)
    next(left)
    assert equal(list(batches.epoch(1)), expected[1])
    assert equal(list(batches.epoch(2, 3)), expected[2][3:])


def test_the_next_epochs_batches_are_made_while_one_ends(folder):
    """Up to the last epoch, and not without worker processes."""
    for workers, epochs, made_ahead in ((1, 3, True), (1, 1, False), (1, None, False), (0, 3, False)):
        transform = Counted()
        batches = training(folder.train, transform=transform, workers=workers, epochs=epochs)
        number = 3 * len(list(batches.epoch(0)))
        deadline = time.monotonic() + (20 if made_ahead else 0.3)
        while transform.calls.value == number and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (transform.calls.value > number) == made_ahead


def test_closing_leaves_no_open_generator(folder):
    """The interpreter complains of an open generator when it ends."""
    batches = training(folder.train, workers=1)
    next(batches.epoch(0))
    ahead = weakref.ref(batches.ahead)
    batches.close()
    assert ahead() is None


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="Linux says who has sent a signal")
def test_workers_end_by_their_own_process_alone(data):
    """Batch systems may signal every process of a job; the main one has still to save."""
    batches = training(data.train, workers=2)
    epoch = batches.epoch(0)
    found = [next(epoch), next(epoch)]  # one of each worker, so that both have begun
    workers = batches.loader._iterator._workers
    for worker in workers:
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    time.sleep(0.5)
    found += epoch
    assert equal(found, list(training(data.train, workers=2).epoch(0)))
    for worker in workers:
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_has_every_image_once_less_the_last_incomplete_batch(data, world_size):
    assert (data.train.num_images, data.test.num_images) == (TRAIN, TEST)
    ranks = [training(data.train, rank, world_size) for rank in range(world_size)]
    epochs = [
        [[numbers(batch) for batch in batches.epoch(epoch)] for batches in ranks] for epoch in (0, 1, 0)
    ]
    assert epochs[0] == epochs[2] != epochs[1]
    for epoch in epochs[:2]:
        assert (
            [len(batches) for batches in epoch]
            == [TRAIN // (3 * world_size)] * world_size
            == [*map(len, ranks)]
        )
        seen = [number for batches in epoch for batch in batches for number in batch]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(TRAIN))
        assert seen != sorted(seen)
    assert epochs[0] != [
        [[numbers(b) for b in training(data.train, r, world_size, seed=6).epoch(0)] for r in range(1)]
    ]


@pytest.mark.parametrize(("keep", "room", "calls"), [(True, 40, 10), (True, 39, 20), (False, 40, 20)])
def test_a_second_evaluation_reads_nothing(folder, keep, room, calls, monkeypatch):
    """The batches of a first whole pass are kept if they fit; those of a pass that ended early are not."""
    monkeypatch.setattr("flashkat_hf.data.batches.EVALUATION_BYTES", room + 10 * 8)  # pixels, and labels
    counted, split = Counted(), folder.test
    batches = EvalBatches(split, counted, batch_size=4, keep=keep)
    next(iter(batches))["labels"] = None
    counted.calls.value = 0
    first, second = list(batches), list(batches)
    assert equal(first, second)
    assert sum(len(batch["labels"]) for batch in second) == len(split)
    assert counted.calls.value == calls


@pytest.mark.parametrize(
    ("worker", "shape", "strategy", "keeps"),
    [
        (True, (5,), "file_descriptor", True),  # a file's bytes
        (False, (5,), "file_descriptor", False),
        (True, (1, 2, 2), "file_descriptor", False),  # pixels
        (True, (5,), "file_system", False),  # a worker's end would not free them
    ],
)
def test_a_worker_keeps_its_last_batch_of_files(worker, shape, strategy, keeps, monkeypatch):
    """Then the main process, which has copied it by the next one, is not the one that frees its memory."""
    monkeypatch.setattr("flashkat_hf.data.workers.get_worker_info", lambda: object() if worker else None)
    monkeypatch.setattr(torch.multiprocessing, "get_sharing_strategy", lambda: strategy)
    items = [[{"pixel_values": torch.zeros(shape, dtype=torch.uint8), "corrupt": {}}] for _ in range(2)]
    made = [weakref.ref(collate(items[0])["pixel_values"])]
    assert (made[0]() is not None) == keeps
    made.append(weakref.ref(collate(items[1])["pixel_values"]))
    assert [reference() is not None for reference in made] == [False, keeps]


@pytest.mark.parametrize("problem", ["unable to allocate shared memory(shm) for file </t>", "Bus error"])
def test_full_shared_memory_is_one_line(problem):
    """Docker gives a container 64 MiB of shared memory, which a few batches fill."""

    def loader():
        raise RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nTraceback ...\n{problem}")
        yield

    with pytest.raises(DataError, match=r"do not fit into shared memory \(/dev/shm\).*--workers"):
        list(checked(loader(), {}))


def test_batches_that_are_kept_hold_no_shared_memory(folder):
    """A worker's tensors are open files in shared memory, of which a system allows few."""
    batches = EvalBatches(folder.test, PLAIN, batch_size=4, workers=2, keep=True)
    first, second = list(batches), list(batches)
    assert equal(first, second)
    assert all(tensor.is_shared() for batch in first for tensor in batch.values())
    assert not any(tensor.is_shared() for batch in second for tensor in batch.values())


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_has_every_image_once_over_all_processes(data, world_size):
    batches = [
        EvalBatches(data.test, PLAIN, batch_size=2, rank=r, world_size=world_size) for r in range(world_size)
    ]
    found = [batch for share in batches for batch in share]
    assert sorted(number for batch in found for number in numbers(batch)) == list(range(TRAIN, TRAIN + TEST))
    assert all(
        label == number % 3 for b in found for number, label in zip(numbers(b), b["labels"], strict=True)
    )
    counts = [sum(len(batch["labels"]) for batch in share) for share in batches]
    assert max(counts) - min(counts) <= (1 if isinstance(data.train, Examples) else 4)


def test_resuming_in_an_epoch_gives_the_rest_of_it(data):
    transform = training_transform(PROCESSOR, Augmentation())
    batches = training(data.train, transform=transform)
    whole = list(batches.epoch(2))
    torch.rand(3), random.random(), numpy.random.rand()  # nothing that the process draws matters
    assert equal(whole[4:], list(training(data.train, transform=transform).epoch(2, start=4)))
    assert whole[0]["pixel_values"].shape == (3, 3, 8, 8)
    assert {name: tensor.dtype for name, tensor in whole[0].items()} == {
        "pixel_values": torch.float32, "labels": torch.int64,
    }  # fmt: skip
    assert not equal(whole[:1], list(training(data.train, transform=transform).epoch(3))[:1])


def test_workers_and_persistence_change_nothing(folder):
    transform = training_transform(PROCESSOR, Augmentation())
    alone, helped = (training(folder.train, transform=transform, workers=workers) for workers in (0, 2))
    for epoch, start in ((0, 0), (1, 5), (0, 3)):
        assert equal(list(alone.epoch(epoch, start)), list(helped.epoch(epoch, start)))
    next(helped.epoch(4))  # an epoch that is broken off leaves nothing behind
    assert equal(list(alone.epoch(5)), list(helped.epoch(5)))


@pytest.mark.parametrize("kind", ["shards"])
def test_a_streams_workers_share_it_and_resume(tmp_path, kind):
    split = open_data(write_shards(tmp_path, [7, 11, 5], [6, 4])).train
    batches = training(split, workers=2)
    whole = list(batches.epoch(0))
    seen = Counter(number for batch in whole for number in numbers(batch))
    assert len(seen) == 21
    for start in (2, 3):
        assert equal(whole[start:], list(batches.epoch(0, start)))
    share = EvalBatches(split, PLAIN, batch_size=4, workers=2)
    assert sorted(n for batch in share for n in numbers(batch)) == list(range(TRAIN))


def test_a_hub_streams_workers_share_it_and_resume(tmp_path):
    """In worker processes that are started afresh: forked ones hang."""
    import datasets

    datasets.disable_progress_bars()
    splits = {"train": image_dataset(0, TRAIN), "validation": image_dataset(TRAIN, TRAIN + TEST)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    batches = training(open_data(tmp_path, streaming=True).train, workers=2)
    whole = list(batches.epoch(0))
    assert (
        len({number for batch in whole for number in numbers(batch)}) >= 20
    )  # workers may have unequal shares
    assert equal(whole[3:], list(batches.epoch(0, 3)))


def test_two_processes_or_micro_batches_see_what_one_process_sees(folder):
    """Global batch 6: at once, on two processes, and in two micro-batches."""
    transform = training_transform(PROCESSOR, Augmentation())
    whole = list(training(folder.train, batch_size=6, transform=transform).epoch(1))
    ranks = [list(training(folder.train, rank, 2, transform=transform).epoch(1)) for rank in range(2)]
    micro = list(training(folder.train, transform=transform).epoch(1))
    for index, batch in enumerate(whole):
        for parts in ([rank[index] for rank in ranks], micro[2 * index : 2 * index + 2]):
            assert all(torch.equal(batch[name], torch.cat([part[name] for part in parts])) for name in batch)


def test_the_order_is_independent_of_the_augmentations_draws(folder):
    moved = training(folder.train, transform=training_transform(PROCESSOR, SIGNS))
    assert [b["labels"].tolist() for b in moved.epoch(3)] == [
        b["labels"].tolist() for b in training(folder.train).epoch(3)
    ]


def test_loading_leaves_the_generators_as_they_were(data):
    def states():
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    list(training(data.train, transform=training_transform(PROCESSOR, Augmentation())).epoch(0))
    list(EvalBatches(data.test, PLAIN, batch_size=4))
    assert states() == before


def test_seeded_is_a_function_of_its_numbers():
    def draws(*seeds):
        with seeded(*seeds):
            return random.random(), numpy.random.rand(), torch.rand(()).item()

    assert draws(1, 2, 3) == draws(1, 2, 3)
    values = [draws(*seeds) for seeds in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3))]
    assert all(len(set(column)) == 4 for column in zip(*values, strict=True))


def test_resuming_opens_no_image_of_the_batches_before(folder):
    opened = []
    images = [image.name for image in map(folder.train.__getitem__, range(TRAIN))]

    class Watched(list):
        def __getitem__(self, index):
            opened.append(index)
            return images[index]

    split = replace(folder.train, images=Watched(images))
    list(training(split).epoch(0, start=5))
    assert len(opened) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(tmp_path, workers):
    root = write_folder(tmp_path, 6, 3)
    bad = root / "train" / "bee" / "001.png"
    data = open_data(root)
    bad.write_bytes(bad.read_bytes()[:-30])
    for batches in (
        training(data.train, workers=workers).epoch(0),
        EvalBatches(data.train, PLAIN, batch_size=3),
    ):
        with pytest.raises(DataError, match=rf"^cannot read the image {bad}: [^\n]*$"):
            list(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_are_replaced_or_left_out(tmp_path, workers):
    root = write_folder(tmp_path, 9, 3)
    bad = [root / "train" / "bee" / f"00{number}.png" for number in (1, 4)]
    for path in bad:
        path.write_bytes(b"no image")
    data = open_data(root, skip_corrupt=True)
    batches = training(data.train, workers=workers)
    seen = [n for batch in batches.epoch(0) for n in numbers(batch)]
    # by name within a class: 0 3 6, 1 4 7, 2 5 8; 1 and 4 become 7, the next that can be read
    assert sorted(seen) == [0, 2, 3, 5, 6, 7, 7, 7, 8]
    assert batches.corrupt.keys() == {str(path) for path in bad}
    share = EvalBatches(data.train, PLAIN, batch_size=1, workers=workers)
    assert sorted(n for batch in share for n in numbers(batch)) == [0, 2, 3, 5, 6, 7, 8]
    assert all(message.startswith("cannot read the image ") for message in share.corrupt.values())


def test_corrupt_images_of_a_stream_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("data_helpers.encoded", lambda number: b"no" if number == 3 else encoded(number))
    split = open_data(write_shards(tmp_path, [9], [3]), skip_corrupt=True).train
    batches = training(split)
    whole = list(batches.epoch(0))
    seen = [n for batch in whole for n in numbers(batch)]
    assert len(seen) == 9
    assert Counter(seen).most_common(1)[0][1] == 2  # the one after it stands for it, and for itself
    assert 3 not in seen
    assert equal(whole[1:], list(batches.epoch(0, 1)))
    assert [name.rpartition("/")[2] for name in batches.corrupt] == ["0003.png"]


def test_nothing_readable_ends(tmp_path):
    root = write_folder(tmp_path, 6, 3)
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^6 images in a row cannot be read: cannot read the image "):
        next(training(open_data(root, skip_corrupt=True).train).epoch(0))


def test_more_images_in_a_batch_than_there_are(folder):
    with pytest.raises(DataError, match="2 x 12 images make a batch, but there are only 23 for training"):
        training(folder.train, world_size=2, batch_size=12)


def test_signals_to_the_process_group_reach_the_main_process_alone(folder):
    """Ctrl-C goes to a whole group; a worker that it kills would end training before it has saved."""
    batches = training(folder.train, workers=1)
    iterator = batches.epoch(0)
    first = next(iterator)
    (worker,) = batches.loader._iterator._workers
    assert os.getpgid(worker.pid) != os.getpgid(0)
    assert len([first, *iterator]) == len(batches)
    os.kill(worker.pid, signal.SIGTERM)  # as the end of the process does
    worker.join(10)
    assert not worker.is_alive()


def test_images_of_every_mode_make_one_batch():
    images = [Image.new(mode, (9, 9)) for mode in ("RGB", "L", "RGBA", "P", "CMYK", "1")]
    batch = next(iter(EvalBatches(Examples(images, [0] * 6), PLAIN, batch_size=6)))
    assert batch["pixel_values"].shape == (6, 3, 8, 8)
