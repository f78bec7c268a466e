"""Every source of data, what is wrong with it, and how images are opened."""

import io
import json
import os
import struct
import sys
import tarfile

import numpy
import pytest
import torch
from data_helpers import (
    CLASSES,
    PLAIN,
    PROCESSOR,
    add,
    encoded,
    image_dataset,
    image_file,
    smooth_picture,
    write_folder,
    write_shards,
)
from PIL import Image
from transformers.image_utils import load_image

from flashkat_hf.data.augmentation import Augmentation, training_transform
from flashkat_hf.data.batches import EvalBatches
from flashkat_hf.data.digits import load_digits
from flashkat_hf.data.image_folder import load_image_folder
from flashkat_hf.data.names import check_source
from flashkat_hf.data.samples import DataError, Partition, Sample, open_image
from flashkat_hf.data.seeding import seeded
from flashkat_hf.data.sources import open_data


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
    pixels = {
        name: [image.tobytes() for image in split.images]
        for name, split in (("a", data.train), ("b", data.test))
    }
    assert pixels["b"] == [image.tobytes() for image in again.test.images]
    # Every image of the data set is in one split as often as it is there: no two of these scans are alike.
    assert len(set(pixels["a"]) | set(pixels["b"])) == 1797
    everything = zip(pixels["a"] + pixels["b"], [*data.train.labels, *data.test.labels], strict=True)
    expected = [
        Image.fromarray((p * 255 / 16).round().astype("uint8")).convert("RGB") for p in original().images
    ]
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
    assert list(data.train.labels) == [0, 0, 0, 1, 1]
    assert list(data.test.labels) == [0, 0, 1, 1]
    names = ["cat/0.png", "cat/1.png", "cat/more/DEEP.JPG", "dog/0.png", "dog/1.png"]
    assert list(data.train.images) == [str(folder / "train" / name) for name in names]
    assert data.train[2] == (
        str(folder / "train/cat/more/DEEP.JPG"),
        0,
        str(folder / "train/cat/more/DEEP.JPG"),
    )


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


RAMP = numpy.arange(64).reshape(8, 8) / 63  # black to white
LEVELS = numpy.rint(RAMP * 255).astype("uint8")


def deep_image(kind: str) -> bytes:
    """A file of RAMP whose levels have more than 8 bits."""
    sixteen = numpy.rint(RAMP * 65535).astype("uint16")
    if kind == "12-bit TIFF":  # which PIL does not write: a header, and two levels in three bytes
        rows = numpy.rint(RAMP * 4095).astype(int)
        first, second = rows[:, ::2], rows[:, 1::2]
        packed = numpy.stack((first >> 4, (first & 15) << 4 | second >> 8, second & 255), 2)
        tags = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 8), (279, 96)]
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        return (
            b"II*\0\x08\0\0\0" + struct.pack("<H", 9) + entries + bytes(4) + packed.astype("uint8").tobytes()
        )
    if kind == "PGM":
        return b"P5 8 8 65535\n" + sixteen.astype(">u2").tobytes()
    if kind == "float TIFF":
        return image_file(Image.fromarray(RAMP.astype("float32")), "TIFF")
    if kind == "int32 TIFF":
        return image_file(Image.fromarray(sixteen.astype("int32")), "TIFF")
    return image_file(Image.fromarray(sixteen), kind)


@pytest.mark.parametrize(
    "kind", ["PNG", "TIFF", "JPEG2000", "PGM", "12-bit TIFF", "int32 TIFF", "float TIFF"]
)
def test_levels_of_more_than_8_bits_are_scaled_by_their_depth(kind):
    content = deep_image(kind)
    opened = numpy.asarray(open_image(content)).astype(int)
    assert opened.shape == (8, 8, 3)
    assert numpy.array_equal(opened, numpy.stack([LEVELS] * 3, 2))
    for loaded in (False, True):
        in_memory = Image.open(io.BytesIO(content))
        if loaded:
            in_memory.load()
        for _ in range(2):  # it stays open, and as it is
            assert numpy.array_equal(opened, open_image(in_memory))


@pytest.mark.parametrize(("form", "mode"), [("TIFF", "RGB"), ("TIFF", "L"), ("JPEG", "RGB"), ("PNG", "RGB")])
def test_an_image_that_was_opened_elsewhere_is_upright_too(form, mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = image_file(smooth_picture(0, (40, 24)).convert(mode), form, exif=exif)
    in_memory = Image.open(io.BytesIO(content))
    assert open_image(in_memory).tobytes() == open_image(content).tobytes()
    assert open_image(in_memory).size == (24, 40)
    transform, pixels = training_transform(PROCESSOR, Augmentation(on_device="augmentation")), []
    for image in (in_memory, content, open_image(content)):
        with seeded(0):
            pixels.append(transform(Sample(image, 0, "x"))["pixel_values"].float())
    for other in pixels[:2]:  # a JPEG file is decoded at a fraction
        assert (other - pixels[2]).abs().mean() <= (5 if form == "JPEG" else 0)


def test_frames_of_an_image_that_was_opened_elsewhere_stay(tmp_path):
    frames = [Image.new("L", (8, 8), level) for level in (10, 200)]
    frames[0].save(tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "x.tif") as image:
        assert open_image(image).getpixel((0, 0)) == (10, 10, 10)
        image.seek(1)
        assert open_image(image).getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (RAMP * 255, "its pixels are floats from 0.0 to 255.0; 0 to 1 is expected"),
        (RAMP - 0.5, "its pixels are floats from -0.5 to 0.5; 0 to 1 is expected"),
        (RAMP * numpy.nan, "its pixels are floats from nan to nan; 0 to 1 is expected"),
        (RAMP * 2**20, "its pixels are integers from 0 to 1048576; 0 to 65535 is expected"),
        (RAMP * 200, "its pixels are 32-bit integers from 0 to 200, whose white may be 255 or 65535; save"),
    ],
)
def test_levels_of_an_unknown_range_are_refused(pixels, message):
    floats = pixels.min() < 0 or pixels.max() in (255, 0.5) or numpy.isnan(pixels).any()
    image = Image.fromarray(pixels.astype("float32" if floats else "int32"))
    for form in (image, image_file(image, "TIFF")):
        with pytest.raises(DataError, match=f"^cannot read the image x: {message}"):
            open_image(form, "x")


@pytest.mark.parametrize("where", ["nothing", "augmentation", "decoding"])
def test_training_sees_16_bit_images_as_8_bit_ones(where):
    """On each path: the one for GPUs leaves such files to the worker."""
    recipe = Augmentation(crop_area=(1, 1), flip=0, rand_augment=None, erasing=0, on_device=where)
    transform = training_transform(PROCESSOR, recipe)
    deep, plain = deep_image("PNG"), image_file(Image.fromarray(LEVELS), "PNG")
    pixels = []
    for file in (deep, plain):
        with seeded(0):
            made = transform(Sample(file, 0, "x") if where != "nothing" else open_image(file))
        pixels.append(made if where == "nothing" else made["pixel_values"])
    assert pixels[0].float().std() > 0.1
    assert torch.equal(*pixels)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "val").rename(root / "held_out"),
            "ROOT must hold train/ and val/.* val/ is missing",
        ),
        (
            lambda root: (root / "train" / "dog").rename(root / "dog"),
            "ROOT/train holds only the class cat; at least two",
        ),
        (
            lambda root: [(root / "train" / name).rename(root / name) for name in ("cat", "dog")],
            "ROOT/train holds no classes; at least two",
        ),
        (
            lambda root: [p.unlink() for p in (root / "train" / "dog").iterdir()],
            "ROOT/train/dog has no images",
        ),
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


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of loading a folder."""
    lines: list[str] = []
    monkeypatch.setattr("flashkat_hf.data.image_folder.logger.warning", lines.append)
    return lines


@pytest.mark.parametrize("skip_corrupt", [False, True])
def test_pipes_are_passed_over(folder, warnings, tmp_path, skip_corrupt):
    """Named as images are, too, which would be waited for."""
    os.mkfifo(folder / "train/cat/pipe.png")
    os.mkfifo(tmp_path / "pipe")
    (folder / "val/dog/link.png").symlink_to(tmp_path / "pipe")
    data = load_image_folder(folder, skip_corrupt=skip_corrupt)
    assert [len(data.train), len(data.test)] == [4, 4]
    assert warnings == [f"passed over 2 files in {folder} that are no images: 2 special files"]


@pytest.mark.parametrize("target", ["..", "../..", ".", "../cat", "loop"])
def test_a_link_to_a_folder_that_holds_it_is_passed_over(folder, warnings, target):
    link = folder / "train" / "cat" / "loop"
    link.symlink_to(target)
    data = load_image_folder(folder, skip_corrupt=True)
    assert list(data.train.labels) == [0, 0, 1, 1]
    assert all(
        f"/{'cat' if label == 0 else 'dog'}/" in data.train[i].name for i, label in enumerate([0, 0, 1, 1])
    )
    assert len(warnings) == 1
    assert warnings[0].endswith(f": {link}")


def test_two_linked_folders_that_hold_each_other(folder, tmp_path_factory):
    """Outside of the data set: each image is taken once."""
    pools = [tmp_path_factory.mktemp(name) for name in ("one", "other")]
    for pool, other in zip(pools, reversed(pools), strict=True):
        (pool / "more").symlink_to(other)
        (pool / "7.png").write_bytes(encoded(7))
    (folder / "train" / "cat" / "pool").symlink_to(pools[0])
    data = load_image_folder(folder)
    assert [path.rpartition("cat/")[2] for path in data.train.images][:4] == [
        "0.png", "1.png", "pool/7.png", "pool/more/7.png"
    ]  # fmt: skip
    assert list(data.train.labels) == [0] * 4 + [1] * 2


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("train/cat/more", "../dog", "train/cat/more/0.png .*in train/cat and train/dog"),
        ("train/cat/more", "../../val", "in train/cat and val/cat"),
        ("train/cat/9.png", "../../val/cat/1.png", "val/cat/1.png and ROOT/train/cat/9.png are one file"),
        ("train/dog/9.png", "../cat/1.png", "train/cat/1.png and ROOT/train/dog/9.png are one file"),
        ("validation", "train", "in train/cat and validation/cat"),
        ("train/cat/9", "nowhere", "^ROOT/train/cat/9 is a link to nowhere, which does not exist$"),
        ("train/cow", "nowhere", "^ROOT/train/cow is a link to nowhere, which does not exist$"),
        ("train/cat/9.png", "/no/x.png", "cannot read the image .*9.png: No such file or directory$"),
    ],
)  # fmt: skip
def test_links_that_would_mix_up_classes_or_splits_or_lead_nowhere(folder, link, target, message):
    if link == "validation":
        (folder / "val").rename(folder / "old")
    (folder / link).symlink_to(target)
    with pytest.raises(DataError, match=message.replace("ROOT", str(folder))) as caught:
        load_image_folder(folder)
    assert "\n" not in str(caught.value)


def test_links_that_lead_nowhere_are_skipped_with_skip_corrupt(folder, warnings):
    (folder / "train" / "cat" / "9.png").symlink_to("/nowhere/annex/x.png")
    (folder / "train" / "cat" / "9").symlink_to("/nowhere/annex")
    data = open_data(folder, skip_corrupt=True)
    batches = EvalBatches(data.train, PLAIN, batch_size=8)
    assert [len(batch["labels"]) for batch in batches] == [4]
    assert list(batches.corrupt) == [str(folder / "train" / "cat" / "9.png")]
    assert warnings == [f"passed over 1 links that lead nowhere: {folder / 'train' / 'cat' / '9'}"]


def test_links_to_classes_and_to_files_elsewhere(folder, tmp_path_factory):
    """A store of files by their content may have one file for two images."""
    store = tmp_path_factory.mktemp("store")
    (folder / "train" / "cat").rename(store / "cats")
    (folder / "train" / "cat").symlink_to(store / "cats")
    (store / "0f3a").write_bytes(encoded(9))
    for place in ("train/dog", "val/dog"):
        (folder / place / "9.png").symlink_to(store / "0f3a")
    data = load_image_folder(folder)
    assert list(data.train.labels) == [0, 0, 1, 1, 1]
    assert list(data.test.labels) == [0, 0, 1, 1, 1]


def test_hidden_folders_are_passed_over_and_other_files_are_counted(folder, warnings):
    hidden = folder / "train" / "dog" / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "0-checkpoint.png").write_bytes(encoded(0))
    for name in ("a.txt", "b.TXT", "c.mp4", "README", ".DS_Store"):
        (folder / "train" / "cat" / name).touch()
    data = load_image_folder(folder)
    assert len(data.train) == 4
    kinds = "2 .txt, 1 .mp4, 1 no suffix"
    assert sorted(warnings[0].rpartition(": ")[2].split(", ")) == sorted(kinds.split(", "))
    assert warnings[0].startswith(f"passed over 4 files in {folder} that are no images: 2 .txt, ")
    load_image_folder(folder, rank=1, world_size=2)
    assert len(warnings) == 1


@pytest.mark.parametrize("suffix", ["gif", "avif", "jfif", "jp2", "tga", "JPE", "pgm"])
def test_what_pillow_reads_is_read(folder, suffix):
    path = folder / "train" / "cat" / f"9.{suffix}"
    Image.new("L", (16, 16), 200).save(path)
    data = load_image_folder(folder)
    assert list(data.train.labels) == [0, 0, 0, 1, 1]
    assert abs(open_image(data.train[2].image).getpixel((0, 0))[0] - 200) < 3


@pytest.mark.parametrize("name", ["test", "valid", "validation"])
def test_other_names_of_the_test_folder(folder, name):
    (folder / "val").rename(folder / name)
    data = open_data(folder)
    assert [path.split("/")[-3] for path in data.test.images] == [name] * 4
    for later in ("test", "valid"):  # ImageNet's folder has one without labels
        (folder / later).mkdir(exist_ok=True)
    if name == "validation":
        assert list(open_data(folder).test.images) == list(data.test.images)


@pytest.mark.parametrize("stray", ["images.tar", "train/cat.tar", "index.parquet", "train/index.parquet"])
def test_an_archive_or_a_parquet_file_beside_an_image_folder(folder, stray):
    (folder / stray).touch()
    assert len(open_data(folder).train) == 4


def test_class_names_that_unicode_composes_in_two_ways(folder):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (folder / "train" / "cat").rename(folder / "train" / composed)
    (folder / "val" / "cat").rename(folder / "val" / decomposed)
    (folder / "val" / composed).mkdir()
    (folder / "val" / composed / "2.png").write_bytes(encoded(2))
    data = load_image_folder(folder)
    assert data.class_names == [composed, "dog"]
    assert list(data.test.labels) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("place", ["train/cat/caf\udce9.png", "val/dog/caf\udce9/1.png"])
def test_a_file_name_that_is_no_utf_8_is_refused(folder, place):
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(encoded(1))
    with pytest.raises(
        DataError, match=r"^the name of a file or folder in .*(cat|dog), 'caf\\udce9.*no UTF-8"
    ):
        open_data(folder)


def test_other_names_that_are_no_utf_8(folder, warnings, tmp_path):
    """Files that are no images only count; the folder itself is refused, before anything is imported."""
    (folder / "train/cat/notes.caf\udce9").write_text("")
    load_image_folder(folder)
    assert warnings[0].endswith(r"that are no images: 1 .caf\udce9")
    with pytest.raises(ValueError, match=r"^the name of the data, '.*caf\\udce9', is no UTF-8; rename it$"):
        check_source(str(tmp_path / "caf\udce9"))


def test_a_class_name_that_is_no_utf_8_is_refused(folder):
    for split in ("train", "val"):
        (folder / split / "cat").rename(os.fsdecode(os.fsencode(folder / split) + b"/caf\xe9"))
    with pytest.raises(
        DataError, match=r"^the name of a class in .*/train, 'caf\\udce9', is no UTF-8; rename it$"
    ):
        load_image_folder(folder)


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
        sample = data.train[list(data.train.images).index(str(path))]
        with pytest.raises(DataError, match=f"cannot read the image {path}: ."):
            open_image(sample.image, sample.name)


def test_a_missing_image_is_named():
    with pytest.raises(DataError, match=r"^cannot read the image nowhere.png: No such file or directory$"):
        open_image("nowhere.png")


@pytest.mark.parametrize("source", ["digits", "shards", "saved"])
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch, tmp_path, source):
    module = {"digits": "sklearn.datasets", "shards": "webdataset", "saved": "datasets"}[source]
    if source == "shards":
        write_shards(tmp_path, [2], [2])
    elif source == "saved":
        (tmp_path / "state.json").touch()
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    with pytest.raises(ImportError, match=rf"{module} is missing: pip install 'flashkat_hf\[train\]'"):
        open_data("digits" if source == "digits" else tmp_path)


@pytest.mark.parametrize("change", ["pixel", "rename", "remove", "class"])
def test_a_folders_fingerprint_changes_with_the_data_and_not_with_its_place(tmp_path, change):
    one, other = (write_folder(tmp_path / name, 6, 3) for name in ("one", "other"))
    assert load_image_folder(one).fingerprint == load_image_folder(other).fingerprint
    image = other / "train" / "bee" / "004.png"
    if change == "pixel":
        image.write_bytes(encoded(7))
    elif change == "rename":
        image.rename(image.with_name("9.png"))
    elif change == "remove":
        image.unlink()
    else:
        for split in ("train", "val"):
            (other / split / "bee").rename(other / split / "bat")
    assert load_image_folder(one).fingerprint != load_image_folder(other).fingerprint


def test_a_large_folders_fingerprint_is_of_names_and_sizes(tmp_path, monkeypatch):
    root = write_folder(tmp_path, 6, 3)
    monkeypatch.setattr("flashkat_hf.data.image_folder.FINGERPRINT_BYTES", 10)
    before = load_image_folder(root).fingerprint
    (root / "train" / "bee" / "004.png").write_bytes(encoded(4, "BMP"))
    assert load_image_folder(root).fingerprint != before


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "DIR/missing"])
def test_what_is_no_source(tmp_path, source):
    source = source.replace("DIR", str(tmp_path))
    with pytest.raises(DataError, match=f"^{source} is not a folder$"):
        open_data(source)


# shards -----------------------------------------------------------------------------------------------------


def opened(stream) -> list[int]:
    return [open_image(sample.image).getpixel((0, 0))[0] for sample in stream.samples(None, Partition())]


@pytest.mark.parametrize("layout", ["folder", "pattern", "split folders", "sizes.json"])
def test_shards(tmp_path, layout, monkeypatch):
    root, source = write_shards(tmp_path / "data", [4, 3], [5]), tmp_path / "data"
    if layout == "pattern":
        source = f"{root}/{{train-{{000..001}},val-000}}.tar"
    elif layout == "split folders":
        for split in ("train", "val"):
            (root / split).mkdir()
            for shard in root.glob(f"{split}-*.tar"):
                shard.rename(root / split / shard.name.removeprefix(f"{split}-"))
    elif layout == "sizes.json":
        (root / "sizes.json").write_text(
            json.dumps({"train-000.tar": 4, "train-001.tar": 3, "val-000.tar": 5})
        )
        monkeypatch.setattr("tarfile.open", None)
    data = open_data(source)
    assert data.class_names == CLASSES
    assert (data.train.num_images, data.test.num_images) == (7, 5)
    monkeypatch.undo()
    assert opened(data.train) == list(range(7))
    assert opened(data.test) == list(range(7, 12))
    other = write_shards(tmp_path / "other", [4, 4], [5])
    assert open_data(other).fingerprint != open_data(root).fingerprint == open_data(root).fingerprint


@pytest.mark.parametrize(
    "content",
    ['["ant", "bee", "cow"]', '{"0": "ant", "1": "bee", "2": "cow"}', '{"bee": 1, "cow": 2, "ant": 0}'],
)
def test_class_names_of_shards(tmp_path, content):
    write_shards(tmp_path, [4], [5], classes=False)
    with pytest.raises(DataError, match=r"needs class names: classes\.txt beside the shards"):
        open_data(tmp_path)
    assert open_data(tmp_path, class_names=CLASSES).class_names == CLASSES
    (tmp_path / "classes.json").write_text(content)
    assert open_data(tmp_path).class_names == CLASSES


def test_a_shard_is_read_through_a_command(tmp_path):
    """Webdataset's URLs: what it opens by a program, as it does for http and s3."""
    root = write_shards(tmp_path, [4], [5])
    (root / "sizes.json").write_text(json.dumps({"train-000.tar": 4, "val-000.tar": 5}))
    url = f"pipe:cat {root}/train-000.tar::pipe:cat {root}/val-000.tar"
    (data,) = [open_data(url, class_names=CLASSES, train_split="train", test_split="val")]
    assert opened(data.train) == list(range(4))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "val-000.tar").unlink(),
            r"ROOT has no test shards: names that begin with val or valid or",
        ),
        (
            lambda root: (root / "classes.txt").write_text("ant\n"),
            "ROOT holds only the class ant; at least two",
        ),
        (lambda root: (root / "classes.txt").write_text("a\nb\na\n"), "ROOT names a class twice: a"),
        (lambda root: (root / "classes.json").write_text("[1"), "ROOT/classes.json is damaged: "),
        (
            lambda root: (root / "classes.json").write_text('{"a": 0, "b": 2}'),
            "must be a list of names, or an object",
        ),
        (
            lambda root: (root / "train-000.tar").write_bytes(b"no tar"),
            "cannot read the shard ROOT/train-000.tar: .",
        ),
        (lambda root: write_shards(root, [0], [2]), "the train shards of ROOT have no images"),
    ],
)
def test_bad_shards(tmp_path, damage, message):
    damage(write_shards(tmp_path, [4], [5]))
    with pytest.raises(DataError, match=message.replace("ROOT", str(tmp_path))) as caught:
        open_data(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (("7.cls", b"3"), r"label 3 of ROOT/train-000.tar/7.png is not one of the 3 classes"),
        (("7.cls", b"-1"), r"no label for ROOT/train-000.tar/7.png: its label is none of the class names"),
        (("7.txt", b"1"), r"no label for ROOT/train-000.tar/7.png: it has none, .cls or .json"),
        (("7.json", b"{}"), r"no label for ROOT/train-000.tar/7.png: its label is none"),
    ],
)
def test_bad_labels_in_shards(tmp_path, label, message):
    write_shards(tmp_path, [1], [2])
    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        add(tar, "7.png", encoded(7))
        add(tar, *label)
    message = f"^{message.replace('ROOT', str(tmp_path))}"
    with pytest.raises(DataError, match=message):
        open_data(tmp_path)
    (tmp_path / "sizes.json").write_text(
        json.dumps({"train-000.tar": 1, "val-000.tar": 2})
    )  # nothing is counted
    with pytest.raises(DataError, match=message):
        opened(open_data(tmp_path).train)


def write_shard(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add(tar, name, content)


@pytest.mark.parametrize("counted", [True, False])
def test_names_with_dots_in_shards(tmp_path, counted):
    """The last dot ends the name, in folders too; files that macOS adds are no images."""
    names = ["photo_0", "photo.v1.1", "photo.v1.2", "v1.0/photo.a.3", "photo..4", "5"]
    for split in ("train", "val"):
        members = {"._photo_0.png": b"of macOS"}
        for number, name in enumerate(names):
            members |= {f"{name}.PNG": encoded(number), f"{name}.cls": str(number % 2).encode()}
        write_shard(tmp_path / f"{split}-000.tar", members)
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    if not counted:
        (tmp_path / "sizes.json").write_text(json.dumps({"train-000.tar": 6, "val-000.tar": 6}))
    data = open_data(tmp_path)
    assert data.train.num_images == 6
    assert opened(data.train) == list(range(6))
    assert [sample.label for sample in data.train.samples(None, Partition())] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["7.png", "7.jpg", "7.cls"], "train-000.tar/7.png has a second image of the same name, .jpg"),
        (["7.png", "7.seg.png", "7.cls"], "no label for ROOT/train-000.tar/7.png: it has none"),
        (["7.image.png", "7.label.cls"], "no label for ROOT/train-000.tar/7.image.png: it has none"),
        (["7.png", "7.cls", "7.CLS"], "train-000.tar has two files 7.cls"),
    ],
)
def test_samples_of_which_it_is_not_clear_what_they_are(tmp_path, members, message):
    write_shards(tmp_path, [1], [2])
    content = {name: b"1" if name.lower().endswith("cls") else encoded(7) for name in members}
    write_shard(tmp_path / "train-000.tar", content)
    with pytest.raises(DataError, match=message.replace("ROOT", str(tmp_path))):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("classes", "label", "expected"),
    [
        ("1 2 3", ("7.cls", b"3"), 2),
        ("1 2 3", ("7.cls", b"1\n"), 0),
        ("1 2 3", ("7.json", b'{"label": "3"}'), 2),
        ("1 2 3", ("7.json", b'{"label": 2}'), 2),
        ("1 2 3", ("7.cls", b"0"), None),
        ("2 10", ("7.cls", b"1"), None),
        ("0 1 2", ("7.cls", b"2"), 2),
        ("ant bee", ("7.cls", b"1"), 1),
        ("ant caf\u00e9", ("7.cls", "cafe\u0301".encode()), 1),
        ("ant bee", ("7.json", b'{"label": true}'), None),
    ],
)
def test_labels_that_are_numbers_or_names(tmp_path, classes, label, expected):
    write_shards(tmp_path, [1], [1])
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}-000.tar", {"7.png": encoded(7), label[0]: label[1]})
    (tmp_path / "classes.txt").write_text(classes.replace(" ", "\n"))
    if expected is None:
        with pytest.raises(DataError, match=r"7\.png: its label is none of the class names"):
            open_data(tmp_path)
    else:
        assert [s.label for s in open_data(tmp_path).train.samples(None, Partition())] == [expected]


def test_options_that_a_source_does_not_have(tmp_path):
    """They are not passed over."""
    folder, shards = write_folder(tmp_path / "folder", 6, 6), write_shards(tmp_path / "shards", [4], [5])
    with pytest.raises(DataError, match=r"^the digits take no train_split, streaming$"):
        open_data("digits", train_split="train", streaming=True)
    with pytest.raises(
        DataError, match=f"^{folder} is no data set .* image folders take no subset, class_names$"
    ):
        open_data(folder, subset="small", class_names=["ant", "bee"])
    with pytest.raises(DataError, match=f"^{shards} holds WebDataset shards, which take no label_column$"):
        open_data(shards, label_column="kind", streaming=True)


def test_a_truncated_shard_and_a_wrong_count_are_named(tmp_path):
    shard = write_shards(tmp_path, [4], [5]) / "train-000.tar"
    (tmp_path / "sizes.json").write_text(json.dumps({"train-000.tar": 5, "val-000.tar": 5}))
    with pytest.raises(DataError, match=f"^{shard} has fewer images than the 5 that it should have$"):
        opened(open_data(tmp_path).train)
    shard.write_bytes(shard.read_bytes()[: 3 * 1024 + 600])
    with pytest.raises(DataError, match=f"^cannot read the shard {shard}: [^\n@]*$"):
        opened(open_data(tmp_path).train)


# datasets ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits():
    import datasets

    datasets.disable_progress_bars()
    return {"train": image_dataset(0, 7), "validation": image_dataset(7, 12)}


def save(splits, root):
    import datasets

    datasets.DatasetDict(splits).save_to_disk(root)
    return root


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_a_data_set(splits, tmp_path, form, streaming):
    """Columns and class names are found by their types."""
    if form == "saved":
        save(splits, tmp_path)
    else:
        for name, split in splits.items():
            split.to_parquet(tmp_path / f"{name}-0.parquet")
    data = open_data(tmp_path, streaming=streaming, train_size=7 if streaming else None)
    assert data.class_names == CLASSES
    assert data.train.num_images == 7
    assert data.fingerprint == open_data(tmp_path, streaming=streaming).fingerprint
    samples = list(data.test.samples(None, Partition())) if streaming else [data.test[i] for i in range(5)]
    assert [open_image(sample.image).getpixel((0, 0))[0] for sample in samples] == list(range(7, 12))
    assert [sample.label for sample in samples] == [number % 3 for number in range(7, 12)]
    assert samples[2].name.endswith(f"number 2 of validation of {tmp_path}")


def test_columns_and_splits_by_name(splits, tmp_path):
    splits = {
        "one": splits["train"].add_column("other", splits["train"]["kind"]),
        "two": splits["validation"],
    }
    splits["two"] = splits["two"].add_column("other", splits["two"]["kind"])
    save(splits, tmp_path)
    names = {"train_split": "one", "test_split": "two"}
    data = open_data(tmp_path, image_column="picture", label_column="other", **names)
    assert data.class_names == ["0", "1", "2"]
    texts = open_data(tmp_path, label_column="note", **{**names, "test_split": "one"})
    assert texts.class_names == list("0123456")
    with pytest.raises(
        DataError, match=r"the column note of .* has no class names; give them \(class_names\)"
    ):
        open_data(tmp_path, label_column="note", streaming=True, **names)
    stream = open_data(
        tmp_path, label_column="note", class_names=list("0123456"), streaming=True, **names
    ).train
    assert [sample.label for sample in stream.samples(None, Partition())] == list(range(7))


def bad_splits(kind, splits):
    train, test = splits["train"], splits["validation"]
    import datasets

    if kind == "order":
        return {"train": train, "validation": image_dataset(7, 12, ["bee", "ant", "cow"])}
    if kind == "classes":
        return {"train": train, "validation": image_dataset(7, 12, ["ant", "bee", "cat"])}
    if kind == "split":
        return {"train": train}
    if kind == "empty":
        return {"train": train, "validation": test.select([])}
    if kind == "one":
        label = datasets.ClassLabel(names=["ant"])
        parts = {"train": image_dataset(0, 1), "validation": image_dataset(3, 4)}
        return {name: part.cast_column("kind", label) for name, part in parts.items()}
    if kind == "unlabelled":
        columns = {"picture": [{"bytes": encoded(1), "path": None}], "kind": [-1], "note": [""]}
        return {"train": train, "validation": datasets.Dataset.from_dict(columns, features=train.features)}
    return {name: part.remove_columns(kind) for name, part in splits.items()}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("order", "train and validation of ROOT have different classes, or in another order"),
        ("classes", "train and validation of ROOT have different classes: only one of them has cat, cow"),
        ("split", "ROOT has no split validation; it has train"),
        ("empty", "validation of ROOT has no images"),
        ("one", "ROOT holds only the class ant; at least two are needed"),
        ("unlabelled", "validation of ROOT: label -1 of image 0 is not one of the 3 classes"),
        ("picture", r"ROOT has no image column; name one of kind, note \(image_column\)"),
        ("kind", r"ROOT has no label column; name one of picture, note \(label_column\)"),
    ],
)
def test_bad_data_sets(monkeypatch, splits, tmp_path, kind, message):
    save(splits, tmp_path)
    parts = bad_splits(kind, splits)  # not saved: datasets cannot load an empty split that it has saved
    monkeypatch.setattr("flashkat_hf.data.hub_datasets._load", lambda *arguments: parts)
    with pytest.raises(DataError, match=f"^{message.replace('ROOT', str(tmp_path))}$"):
        open_data(tmp_path)


def test_a_data_set_without_splits_and_one_that_is_damaged(splits, tmp_path):
    splits["train"].save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match="one is one split; save a DatasetDict with train and validation"):
        open_data(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match=r"^cannot load the data set .*two: .") as caught:
        open_data(tmp_path / "two")
    assert "\n" not in str(caught.value)


def test_a_stream_names_an_image_without_a_class(splits, tmp_path):
    save(bad_splits("unlabelled", splits), tmp_path)
    with pytest.raises(DataError, match=r"label -1 of number 0 of .* is not one of the 3 classes"):
        list(open_data(tmp_path, streaming=True).test.samples(None, Partition()))


def labelled_rows(labels: list, kind: str, images: list | None = None):
    """A split of images 0, 1, ... with such labels, or with such images."""
    import datasets

    files = [{"bytes": encoded(number), "path": None} for number in range(len(labels))]
    features = {"image": datasets.Image(), "number": datasets.Value("int64"), "label": datasets.Value(kind)}
    columns = {"image": images or files, "number": [0] * len(labels), "label": labels}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [
        ("int64", [7, 1000, 7, 1000], ["7", "1000"]),
        ("int64", [2, 0, 1, 0], ["0", "1", "2"]),
        ("float32", [1.0, 0.0, 1.0, 0.0], ["0", "1"]),
        ("bool", [True, False, True, True], ["0", "1"]),
        ("string", ["b", "cafe\u0301", "caf\u00e9", "b"], ["b", "caf\u00e9"]),
    ],
)
def test_a_column_of_labels_makes_the_classes_that_it_has(tmp_path, kind, labels, names):
    part = labelled_rows(labels, kind)
    save({"train": part, "validation": part}, tmp_path)
    data = open_data(tmp_path)
    assert data.class_names == names
    expected = [v.replace("e\u0301", "\u00e9") if isinstance(v, str) else str(int(v)) for v in labels]
    assert [names[label] for label in data.test.labels] == expected
    if max(map(len, names)) == 1 or kind == "string":  # a stream takes numbers as indices
        stream = open_data(tmp_path, streaming=True, class_names=names).test
        assert [names[sample.label] for sample in stream.samples(None, Partition())] == expected


@pytest.mark.parametrize(
    ("kind", "labels", "options", "message"),
    [
        ("float32", [0.0, 0.5], {}, "label 0.5 of train of ROOT is neither a text nor a whole number"),
        ("int64", [0, -1], {}, "label -1 of train of ROOT is negative"),
        ("int64", [0, 1], {"image_column": "number"},
         "the column number of ROOT holds no images but int64; it has image, number, label"),
        ("int64", [0, 1], {"label_column": "image"},
         "the column image of ROOT holds no labels but PIL.Image.Image; it has image, number, label"),
        ("int64", [0, None, 1], {}, "number 1 of train of ROOT has no label"),
        ("float64", [0, None, float("nan"), 1], {}, "number 1 of train of ROOT has no label, and 1 more"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_used(tmp_path, kind, labels, options, message):
    part = labelled_rows(labels, kind)
    save({"train": part, "validation": part}, tmp_path)
    for streaming in (False, True) if options else (False,):
        with pytest.raises(DataError, match=f"^{message.replace('ROOT', str(tmp_path))}$"):
            open_data(tmp_path, streaming=streaming, **options)


def test_classes_that_only_the_test_split_has(tmp_path):
    save({"train": labelled_rows([7, 9], "int64"), "validation": labelled_rows([7, 8], "int64")}, tmp_path)
    with pytest.raises(
        DataError, match=f"^validation of {tmp_path} has classes that the training .* not: 8$"
    ):
        open_data(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_cannot_be_used_are_named_and_skipped(monkeypatch, streaming):
    images = [
        {"bytes": encoded(0), "path": None},
        None,
        {"bytes": b"", "path": None},
        {"bytes": None, "path": "/nowhere/x.png"},
        {"bytes": encoded(4), "path": None},
        {"bytes": encoded(5), "path": None},
        {"bytes": None, "path": "nowhere://x.png"},
    ]
    part = labelled_rows([0, 1, 0, 1, None, 1, 0], "int64", images)
    parts = {"train": part, "validation": part}  # not saved: datasets would read the files
    monkeypatch.setattr("flashkat_hf.data.hub_datasets._load", lambda *arguments: parts)
    monkeypatch.setattr("flashkat_hf.data.hub_datasets._fingerprint", lambda *arguments: "x")
    options = {"class_names": ["ant", "bee"], "streaming": streaming}
    data = open_data("owner/pictures", skip_corrupt=True, **options)
    batches = EvalBatches(data.test, PLAIN, batch_size=7)
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1]]
    of = "of validation of owner/pictures"
    names = [f"number {number} {of}" for number in (1, 2, 3, 4, 6)]
    names[2] = "/nowhere/x.png"
    if streaming:
        names[2], names[4] = f"/nowhere/x.png {of}", f"nowhere://x.png {of}"
    assert list(batches.corrupt) == names
    reasons = [message.partition(": ")[2] for message in batches.corrupt.values()]
    assert reasons[:2] == ["its row has no image", "not a known image format"]
    assert reasons[3] == "its row has no label"
    assert reasons[4].startswith("nowhere://x.png: ")
    with pytest.raises(DataError, match=r"has no label|its row has no image"):
        list(EvalBatches(open_data("owner/pictures", **options).test, PLAIN, batch_size=7))


def test_a_stream_of_files_on_a_file_system_of_fsspec(monkeypatch):
    import datasets
    import fsspec

    files = fsspec.filesystem("memory")
    for split, first in (("train", 0), ("validation", 2)):
        for number, name in enumerate(("ant", "bee"), first):
            with files.open(f"/pictures/{split}/{name}/0.png", "wb") as file:
                file.write(encoded(number))
    places = {split: f"memory://pictures/{split}/**" for split in ("train", "validation")}
    whole = datasets.load_dataset("imagefolder", data_files=places, streaming=True)
    monkeypatch.setattr("flashkat_hf.data.hub_datasets._load", lambda *arguments: whole)
    monkeypatch.setattr("flashkat_hf.data.hub_datasets._fingerprint", lambda *arguments: "x")
    data = open_data("owner/pictures", streaming=True, train_size=2, test_size=2)
    samples = list(data.test.samples(None, Partition()))
    assert sorted((open_image(s.image).getpixel((0, 0))[0], s.label) for s in samples) == [(2, 0), (3, 1)]
    assert "pictures/validation/ant/0.png" in samples[0].name
    files.rm("/pictures/validation/ant/0.png")
    batches = EvalBatches(data.test, PLAIN, batch_size=2)
    with pytest.raises(
        DataError, match=r"^cannot read the image memory://.*ant/0.png of validation of owner/"
    ):
        list(batches)


def test_labels_of_images_that_pillow_does_not_read_are_counted(tmp_path, monkeypatch):
    """Not those of texts alone; a label is one in `name.json`, too."""
    lines: list[str] = []
    monkeypatch.setattr("flashkat_hf.data.shards.logger.warning", lines.append)
    write_shards(tmp_path, [2], [2])
    with tarfile.open(tmp_path / "train-000.tar", "a") as tar:
        for name, content in (
            ("a.heic", b"x"), ("a.cls", b"1"), ("b.heic", b"x"), ("b.json", b'{"label": 2}'), ("c.cls", b"0"),
            ("d.txt", b"a text"), ("d.json", b'{"words": 2}'),
        ):  # fmt: skip
            add(tar, name, content)
    assert open_data(tmp_path).train.num_images == 2
    assert lines == ["passed over 3 labels without an image that Pillow reads: 2 .heic, 1 without any"]


def test_names_in_shards_that_are_no_utf_8(tmp_path):
    write_shards(tmp_path, [2], [2])
    with tarfile.open(tmp_path / "train-000.tar", "a") as tar:
        add(tar, "caf\udce9.png", encoded(1))
        add(tar, "caf\udce9.cls", b"1")
    with pytest.raises(
        DataError, match=r"^the name of an image in .*train-000.tar, 'caf\\udce9', is no UTF-8"
    ):
        open_data(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"cat\ncaf\xe9\ncow\n")
    with pytest.raises(DataError, match=r"classes.txt is damaged: .*utf-8"):
        open_data(tmp_path)


def test_the_mark_that_windows_editors_write_first_counts_for_nothing(tmp_path):
    write_shards(tmp_path, [3], [3])
    (tmp_path / "classes.txt").write_bytes("\ufeff".encode() + "\r\n".join(CLASSES).encode())
    with tarfile.open(tmp_path / "train-000.tar", "a") as tar:
        add(tar, "x.png", encoded(3))
        add(tar, "x.cls", "\ufeffant\r\n".encode())
    data = open_data(tmp_path)
    assert (data.class_names, data.train.num_images) == (CLASSES, 4)


def test_a_class_without_a_name_is_refused(tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path} has a class without a name, number 1: ' '$"):
        open_data(write_shards(tmp_path, [3], [3]), class_names=["ant", " ", "cow"])
