"""`flashkat predict` and `embed` on a GPU: CUDA graphs, files that it decodes, and the same rows as a CPU."""

import multiprocessing

import pyarrow.parquet as parquet
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from data_helpers import encoded_picture

from flashkat_hf.checkpoints.loading import load_checkpoint
from flashkat_hf.graphs import GraphedForward
from flashkat_hf.inference import commands
from flashkat_hf.inference.questions import Forward, features, predictions

pytestmark = pytest.mark.gpu


@pytest.fixture
def ask(model_folder, tmp_path, monkeypatch):
    """Return a function that runs a command and returns its rows."""

    def ask(kind: str, *arguments: str, on_cpu: bool = False) -> list[dict]:
        if on_cpu:
            monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        else:
            monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        path = tmp_path / "out.parquet"
        plain = ["-o", str(path), "--no-progress", "--overwrite", "--batch-size", "4"]
        try:
            getattr(commands, kind)([str(model_folder), *arguments, *plain])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        return parquet.read_table(path).to_pylist()

    return ask


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for seed in range(10):
        picture = encoded_picture(seed, (60 + seed, 50), "JPEG", quality=95, subsampling=0)
        (folder / f"{seed}.jpg").write_bytes(picture)
    (folder / "5.jpg").write_bytes(b"no picture")
    (folder / "7.png").write_bytes(encoded_picture(7, (60, 50), "PNG"))
    return folder


@pytest.mark.parametrize("decoder", ["workers", "gpu"])
@pytest.mark.parametrize("kind", ["predict", "embed"])
def test_rows_are_those_of_a_cpu(kind, decoder, ask, photographs):
    expected = ask(kind, str(photographs), on_cpu=True)
    replays = []
    call = GraphedForward.__call__

    def noted(self, **batch):
        replays.append(len(batch["pixel_values"]))
        return call(self, **batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphedForward, "__call__", noted)
        rows = ask(kind, str(photographs), "--decoder", decoder, "--workers", "2")
    assert replays == [4], "batches of 4, 3 (one is unreadable) and 3 pictures"
    assert [row["name"] for row in rows] == [row["name"] for row in expected]
    assert [row["error"] is None for row in rows] == [row["error"] is None for row in expected]
    column = "probabilities" if kind == "predict" else "pooled"
    for row, other in zip(rows, expected, strict=True):
        if row["error"] is None:
            pair = torch.tensor(row[column]), torch.tensor(other[column])
            torch.testing.assert_close(*pair, rtol=0.05, atol=0.05)  # TF32, and nvJPEG's own rounding


def test_workers_end_at_once(ask, photographs):
    """PyTorch waits 5 seconds for each worker that is left to the interpreter's exit."""
    ask("predict", str(photographs), "--workers", "4")
    assert not multiprocessing.active_children()


def test_full_batches_are_replayed(model_folder):
    model = load_checkpoint(str(model_folder))[0].eval().cuda()
    pixels = torch.randn(3, *(model.config.num_channels, 32, 32), device="cuda")

    def context():
        return torch.autocast("cuda", dtype=torch.bfloat16)

    forward = Forward(model, 3, context)
    labels = [str(number) for number in range(model.config.num_labels)]
    with torch.no_grad(), context():
        expected = model(pixels).logits.float().softmax(-1).topk(2)
    answers = predictions(forward, labels, 2).compute(pixels)
    assert torch.equal(answers["labels"], expected.indices)
    assert torch.equal(answers["probabilities"], expected.values)
    assert forward.graph is not None
    short = predictions(forward, labels, 2).compute(pixels[:2])
    torch.testing.assert_close(short["probabilities"], expected.values[:2], rtol=0.02, atol=0.02)
    pooled = features(Forward(model.flashkat, 3, context), False).compute(pixels)["pooled"]
    with torch.no_grad(), context():
        assert torch.equal(pooled, model.flashkat(pixels).pooler_output.float())
