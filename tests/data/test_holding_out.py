"""Training images that are held out."""

from collections import Counter

import numpy
import pytest
from PIL import Image
from small_runs import make_images

from flashkat_hf.data.holding_out import FEWEST, hold_out
from flashkat_hf.data.image_folder import load_image_folder
from flashkat_hf.data.samples import DataError, Examples, ImageData


def data_of(counts: list[int]) -> ImageData[Examples]:
    """Examples whose images are named by class and number, in a mixed order."""
    labels = numpy.random.default_rng(0).permutation(numpy.repeat(range(len(counts)), counts))
    names = [f"{label}/{number}" for number, label in enumerate(labels)]
    test = Examples(["a test image"], [0])
    return ImageData(Examples(names, labels), test, [str(label) for label in range(len(counts))], "")


def test_each_class_gives_its_part_and_no_image_is_in_both():
    data = data_of([400, 200, 37, 1])
    held = hold_out(data, 0.1, seed=0)
    assert held.val is not None
    assert Counter(held.val.labels.tolist()) == {0: 40, 1: 20, 2: 4}
    assert len(held.train) + len(held.val) == len(data.train)
    both = [[part[i].image for i in range(len(part))] for part in (held.train, held.val)]
    assert sorted(both[0] + both[1]) == sorted(data.train.images)
    for part in (held.train, held.val):
        assert all(part[i].image.startswith(f"{part[i].label}/") for i in range(len(part)))
    assert held.test is data.test


def test_the_seed_says_which():
    data = data_of([100, 100])
    parts = [list(hold_out(data, 0.2, seed).val.images) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


def test_many_small_classes_share_the_part():
    held = hold_out(data_of([3] * 100), 0.1, seed=0)
    assert len(held.val) == 30
    assert max(Counter(held.val.labels.tolist()).values()) == 1


@pytest.mark.parametrize("counts", [[1] * 50, [2, 2], [FEWEST * 5 - 10, FEWEST * 5 - 10]])
def test_too_few_to_hold_any_out(counts):
    data = data_of(counts)
    assert hold_out(data, 0.1, seed=0) is data


def test_nothing_is_held_out_of_a_stream_or_where_none_is_wanted():
    data = data_of([400])
    assert hold_out(data, 0.0, seed=0) is data
    stream = ImageData(object(), data.test, ["0"], "")
    assert hold_out(stream, 0.1, seed=0) is stream


def test_messages_have_the_number_in_the_whole():
    images = [Image.new("RGB", (1, 1))] * 100
    data = ImageData(Examples(images, [0, 1] * 50, name="train of it"), Examples([], []), ["a", "b"], "")
    held = hold_out(data, 0.1, seed=0)
    assert held.val[3].name == f"number {held.val.images.numbers[3]} of train of it"


def test_a_folder_of_three_splits(tmp_path):
    root = make_images(tmp_path, train=4, val=3)
    two = load_image_folder(root)
    assert (two.val, len(two.test)) == (None, 6)
    (root / "val").rename(root / "test")
    assert load_image_folder(root).val is None
    make_images(tmp_path / "other", train=1, val=2)
    (tmp_path / "other" / "val").rename(root / "validation")
    three = load_image_folder(root)
    assert (len(three.train), len(three.val), len(three.test)) == (8, 4, 6)
    assert "/validation/" in three.val.images[0]
    assert "/test/" in three.test.images[0]
    assert three.fingerprint != two.fingerprint
    (root / "test" / "red").rename(root / "test" / "blue")
    with pytest.raises(DataError, match=r"train has classes that .* has not: red"):
        load_image_folder(root)


def test_a_test_folder_without_classes_is_passed_over(tmp_path):
    """ImageNet's has images without labels."""
    root = make_images(tmp_path, train=4, val=3)
    (root / "test").mkdir()
    Image.new("RGB", (4, 4)).save(root / "test" / "1.png")
    (root / "test" / "all").mkdir()
    data = load_image_folder(root)
    assert (data.val, len(data.test)) == (None, 6)
