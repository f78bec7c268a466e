"""Two processes on one machine, by gloo: DDP and FSDP2 train as one process does; see processes.py."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file
from small_runs import losses, make_images, metrics
from transformers import AutoModelForImageClassification

from flashkat_hf.training.initial_model import build_model, save_model
from flashkat_hf.training.recipe import Settings

# Without what is drawn for a process or a micro-batch as a whole (mixing, stochastic depth). The large eps
# keeps Adam from blowing up the rounding where the gradient is 0, as of the keys' bias. 7 test images: shares
# of 4 and 3.
SETTINGS = {"ema_decay": 0.5, "eps": 0.1, "learning_rate": 3e-3, "epochs": 3}
DRAWN = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3}  # to be repeated to the bit by a resumed run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """All runs of this file, one after the other; each exit status."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_images(folder / "images", val=4)
    (data / "val" / "red" / "3.png").unlink()

    def job(name: str, processes: int, **others) -> dict:
        settings = {**SETTINGS, **others.pop("settings", {}), "data": str(data), "output": str(folder / name)}
        return {"processes": processes, "settings": settings, **others}

    jobs = [
        job("one", 1),
        job("ddp", 2),
        job("fsdp", 2, sharded=True),
        job("both", 2, settings={"micro_batch": 2}),
    ]
    for sharded, name in ((False, "ddp"), (True, "fsdp")):
        jobs += [
            job(f"{name}-whole", 2, sharded=sharded, settings=DRAWN),
            job(f"{name}-stopped", 2, sharded=sharded, settings=DRAWN, signal=[4, signal.SIGTERM]),
            job(f"{name}-stopped", 2, sharded=sharded, settings={**DRAWN, "resume": True}),
        ]
    torch.manual_seed(0)
    model, processor = build_model(Settings(data=str(data), size="micro"), ["a", "b", "c"])
    save_model(model.to(torch.bfloat16), processor, folder / "bfloat16")
    start = {"size": None, "model": str(folder / "bfloat16"), "eps": 1e-8, "learning_rate": 1e-4}
    jobs.append(job("fsdp-bfloat16", 2, sharded=True, settings={**start, "save_dtype": "bfloat16"}))
    jobs.append(job("fsdp-float32", 2, sharded=True, settings=start))
    mixed = {"precision": "bf16"}
    jobs += [job(f"{name}-mixed", 2, sharded=name == "fsdp", settings=mixed) for name in ("ddp", "fsdp")]
    jobs.append(job("ddp-bad", 2, settings={"batch_size": 7}))
    return folder, ended(jobs, CUDA_VISIBLE_DEVICES="")


def ended(jobs: list[dict], **variables: str) -> list[list[int]]:
    """Run the jobs; each exit status."""
    result = subprocess.run(
        [sys.executable, ROOT / "tests/support/processes.py"],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_how_the_processes_ended(runs):
    """Each of them alike: a signal to one process stops both."""
    stopped = [[0, 0], [143, 143], [0, 0]]
    assert runs[1] == [[0], [0, 0], [0, 0], [0, 0], *stopped, *stopped, *[[0, 0]] * 4, [1, 1]]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "both"])
def test_several_processes_train_as_one(runs, name):
    """The same losses, weights and averages to the rounding of float32, and every test image counted once."""
    one, several = runs[0] / "one", runs[0] / name
    assert len(losses(one)) == 9
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    summaries = [json.loads((output / "summary.json").read_text()) for output in (one, several)]
    assert [summary["num_processes"] for summary in summaries] == [1, 2]
    assert [summary["num_test_images"] for summary in summaries] == [7, 7]
    for line, other in zip(metrics(one), metrics(several), strict=True):
        assert line == {**other, "loss": pytest.approx(other["loss"], rel=1e-5)}
    for folder in ("best", "last"):
        expected, found = (load_file(output / folder / "model.safetensors") for output in (one, several))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        AutoModelForImageClassification.from_pretrained(several / folder)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_several_processes_go_on_to_the_bit(runs, name):
    whole, stopped = runs[0] / f"{name}-whole", runs[0] / f"{name}-stopped"
    assert metrics(stopped) == metrics(whole)
    for folder in ("best", "last"):
        expected, found = (load_file(output / folder / "model.safetensors") for output in (whole, stopped))
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_sharded_weights_of_a_bfloat16_checkpoint_learn(runs):
    """In float32, which is saved; in bfloat16 where that is asked for."""
    start, whole, half = (
        load_file(runs[0] / name / "model.safetensors")
        for name in ("bfloat16", "fsdp-float32/last", "fsdp-bfloat16/last")
    )
    names = [name for name in start if not name.startswith("classifier")]
    changed = [(whole[name] != start[name].float()).flatten() for name in names]
    assert torch.cat(changed).float().mean() > 0.99
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert all(torch.equal(half[name], tensor.to(torch.bfloat16)) for name, tensor in whole.items())


def test_sharded_weights_are_computed_with_in_the_precision_of_whole_ones(runs):
    """In bfloat16 what autocast takes there, but not the loss, the coefficients and the gradients' sums."""
    sharded, whole = (losses(runs[0] / f"{name}-mixed") for name in ("fsdp", "ddp"))
    assert sharded == pytest.approx(whole, rel=1e-5)
    assert sharded != pytest.approx(losses(runs[0] / "one"), rel=1e-5)


def test_processes_draw_differently(runs):
    """Mixing and stochastic depth are each process's own, in each update.

    Else two processes would repeat one.
    """
    first, second = (json.loads((runs[0] / f"ddp-whole-seeds-{rank}.json").read_text()) for rank in range(2))
    assert first[0] == second[0]  # of the model, that they make alike
    assert len({*first[1:], *second[1:]}) == 2 * len(losses(runs[0] / "ddp-whole"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_replay_what_they_launch(tmp_path):
    """CUDA graphs give the bits that a step without them gives."""
    settings = {**DRAWN, "data": str(make_images(tmp_path / "images")), "ema_decay": 0.5, "epochs": 3}
    jobs = [
        {
            "processes": 2,
            "settings": {**settings, "output": str(tmp_path / name), "cuda_graphs": name == "replayed"},
        }
        for name in ("launched", "replayed")
    ]
    assert ended(jobs) == [[0, 0], [0, 0]]
    launched, replayed = tmp_path / "launched", tmp_path / "replayed"
    assert metrics(replayed) == metrics(launched)
    expected, found = (load_file(output / "last" / "model.safetensors") for output in (launched, replayed))
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
