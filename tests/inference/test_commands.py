"""`flashkat predict` and `embed`: a row for each picture, once, after a kill too, by several processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import ROOT
from PIL import Image

from flashkat_hf.checkpoints.loading import load_checkpoint
from flashkat_hf.cli import main
from flashkat_hf.data.augmentation import evaluation_transform
from flashkat_hf.inference import commands, pictures
from flashkat_hf.inference.parts import Parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder of 11 pictures in two sub-folders, one of which cannot be read."""
    root = tmp_path_factory.mktemp("pictures") / "some pictures"
    values = numpy.random.default_rng(0).integers(0, 256, (10, 40, 36, 3), dtype=numpy.uint8)
    for index, pixels in enumerate(values):
        path = root / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (root / "a" / "broken.jpg").write_bytes(b"no picture")
    (root / "a" / "notes.txt").write_text("none either")
    return root


@pytest.fixture
def ask(model_folder, tmp_path, monkeypatch):
    """Return a function that runs a command here, with parts of 3 pictures, and returns its rows."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(pictures.open_pictures, "__defaults__", ("test", 3))

    def ask(kind: str, data, *arguments: str, output: str = "out.parquet") -> list[dict]:
        path = tmp_path / output
        try:
            getattr(commands, kind)(
                [str(model_folder), str(data), "-o", str(path), "--no-progress", *arguments]
            )
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        return parquet.read_table(path).to_pylist()

    return ask


def expected(model_folder, paths) -> tuple[list, list[list[float]], torch.Tensor, torch.Tensor]:
    """Return labels, probabilities, pooled and patch features of pictures, one at a time by transformers."""
    model, processor = load_checkpoint(str(model_folder))
    pixels = torch.stack([evaluation_transform(processor)(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        best = model.eval()(pixels).logits.softmax(-1).topk(2)
        output = model.flashkat(pixels)
    labels = [[model.config.id2label[i] for i in row] for row in best.indices.tolist()]
    return labels, best.values.tolist(), output.pooler_output, output.last_hidden_state[:, 1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions(ask, folder, model_folder, tmp_path, workers):
    rows = ask("predict", folder, "--top-k", "2", "--batch-size", "2", "--workers", str(workers))
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))
    assert [row["name"] for row in rows] == paths
    broken = [row for row in rows if row["error"]]
    assert [Path(row["name"]).name for row in broken] == ["broken.jpg"]
    assert broken[0]["labels"] is None
    assert "not a known image format" in broken[0]["error"]
    good = [row for row in rows if not row["error"]]
    labels, chances, _, _ = expected(model_folder, [row["name"] for row in good])
    assert [row["labels"] for row in good] == labels
    torch.testing.assert_close(torch.tensor([row["probabilities"] for row in good]), torch.tensor(chances))
    assert set(os.listdir(tmp_path)) <= {"out.parquet", "model"}, "parts are left"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf_8(ask, tmp_path):
    """A picture with such a name is a row, whether it can be read or not."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    with (folder / os.fsdecode(b"p\xff.png")).open("wb") as file:
        Image.new("RGB", (40, 40)).save(file, "PNG")
    (folder / os.fsdecode(b"q\xff.png")).write_text("no picture")
    rows = {Path(row["name"]).name: row for row in ask("predict", folder, "--top-k", "1")}
    assert rows["p\\udcff.png"]["labels"]
    assert "q\\udcff.png" in rows["q\\udcff.png"]["error"]


def test_a_decoder_that_is_not_there(ask, folder):
    with pytest.raises(ValueError, match="--decoder gpu needs a GPU"):
        ask("predict", folder, "--decoder", "gpu")


def test_features(ask, folder, model_folder, tmp_path):
    rows = [row for row in ask("embed", folder, "--patches") if not row["error"]]
    vector = pyarrow.list_(pyarrow.float32())  # with a fixed length older versions would read no null
    schema = parquet.read_schema(tmp_path / "out.parquet")
    assert [schema.field(name).type for name in ("pooled", "patches")] == [vector, pyarrow.list_(vector)]
    _, _, pooled, patches = expected(model_folder, [row["name"] for row in rows])
    torch.testing.assert_close(torch.tensor([row["pooled"] for row in rows]), pooled)
    torch.testing.assert_close(torch.tensor([row["patches"] for row in rows]), patches)


def test_a_list_of_files_and_the_digits(ask, folder, tmp_path):
    listing = folder / "listing.txt"
    listing.write_text("b/1.png\n\na/missing.png\na/0.png\n")
    rows = ask("predict", listing, "--top-k", "1")
    assert [Path(row["name"]).name for row in rows] == ["1.png", "missing.png", "0.png"]
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    rows = ask("predict", "digits", "--top-k", "1", "--batch-size", "100", output="digits.parquet")
    assert len(rows) == 360
    assert {row["label"] for row in rows} == set(map(str, range(10)))


def test_data_that_training_reads(ask, images):
    rows = ask("predict", images, "--top-k", "1", "--split", "train")
    assert {Path(row["name"]).parent.name for row in rows} == {row["label"] for row in rows}
    assert len({row["name"] for row in rows}) == len(rows) == len(list((images / "train").rglob("*.*")))


def test_shards(ask, images, tmp_path):
    import webdataset

    for split, count in (("train", 5), ("val", 7)):
        with webdataset.TarWriter(str(tmp_path / f"{split}-0.tar")) as writer:
            paths = sorted((images / "val").rglob("*.*")) * 3
            for index, path in enumerate(paths[:count]):
                sample = {
                    "__key__": f"{split}{index}",
                    path.suffix[1:]: path.read_bytes(),
                    "cls": str(index % 2),
                }
                writer.write(sample)
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    rows = ask("predict", tmp_path / "{train,val}-0.tar", "--top-k", "1", "--workers", "2")
    assert [row["label"] for row in rows] == ["one", "two"] * 3 + ["one"]
    assert len({row["name"] for row in rows}) == 7


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on(ask, folder, monkeypatch):
    """Neither lost nor twice: parts that are whole stay, the one that was being written is made anew."""
    whole = ask("predict", folder, "--top-k", "1", "--batch-size", "2", output="whole.parquet")
    add, batches = Parts.add, []

    def killed(parts, part, table, last):
        batches.append(part)
        if len(batches) == 2:  # first rows of the second part, whose other rows may be computed by now
            raise Killed
        add(parts, part, table, last)

    monkeypatch.setattr(Parts, "add", killed)
    with pytest.raises(Killed):
        ask("predict", folder, "--top-k", "1", "--batch-size", "2")
    with pytest.raises(ValueError, match="was begun with another top_k; --overwrite starts it anew"):
        ask("predict", folder, "--top-k", "2")
    before = len(batches)
    assert ask("predict", folder, "--top-k", "1", "--batch-size", "2") == whole
    assert 0 not in batches[before:], "the first part was whole"
    with pytest.raises(ValueError, match="exists; --overwrite replaces it"):
        ask("predict", folder)
    assert ask("predict", folder, "--top-k", "1", "--batch-size", "2", "--overwrite") == whole


def test_full_shared_memory_is_one_line(ask, folder, monkeypatch):
    def full(reader, samples):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

    monkeypatch.setattr(pictures.Reader, "read", full)
    with pytest.raises(ValueError, match=r"do not fit into shared memory \(/dev/shm\)"):
        ask("predict", folder)


def test_two_processes(ask, folder, model_folder, tmp_path):
    """Run by accelerate's launcher as a user would; each process writes parts of its own."""
    alone = ask("embed", folder, output="alone.parquet")
    code = (
        "from flashkat_hf.inference import pictures; pictures.open_pictures.__defaults__ = ('test', 3)\n"
        "import sys; from flashkat_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "no"]
    output = tmp_path / "both.parquet"
    arguments = ["embed", str(model_folder), str(folder), "-o", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("11 pictures, 1 of them could not be read") == 1, "one process speaks"
    both = parquet.read_table(output).to_pylist()
    assert [row["name"] for row in both] == [row["name"] for row in alone]
    for one, other in zip(both, alone, strict=True):
        assert (one["error"], one["pooled"] is None) == (other["error"], other["pooled"] is None)
        if one["pooled"]:
            torch.testing.assert_close(torch.tensor(one["pooled"]), torch.tensor(other["pooled"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "11"], "--top-k: 11 is more than the model's 10 labels"),
        (["--subset", "x"], "holds pictures alone, which take no subset"),
    ],
)
def test_errors(arguments, message, folder, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    output = tmp_path / "out.parquet"
    try:
        assert main(["predict", str(model_folder), str(folder), "-o", str(output), *arguments]) == 1
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_another_suffix_is_refused(model_folder, folder, capsys):
    with pytest.raises(SystemExit):
        main(["predict", str(model_folder), str(folder), "-o", "out.csv"])
    assert "out.csv must end in .parquet" in capsys.readouterr().err
