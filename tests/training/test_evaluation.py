"""Exact accuracies on any number of processes, matched classes, and the script as a user runs it."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from data_helpers import CLASSES, write_folder, write_shards
from helpers import ROOT
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, make_image_processor
from flashkat_hf.cli import main
from flashkat_hf.data import open_data
from flashkat_hf.data.augmentation import evaluation_transform
from flashkat_hf.data.batches import EvalBatches
from flashkat_hf.data.digits import load_digits
from flashkat_hf.data.samples import Examples, open_image
from flashkat_hf.training.evaluation import Stopped, evaluate, match_classes

MICRO = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SIZE = {"image_size": 16, "patch_size": 8}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(autouse=True)
def _states() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights large enough that the answers differ from image to image."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A FlashKAT of the ten digits."""
    folder = tmp_path_factory.mktemp("models") / "flashkat"
    torch.manual_seed(0)
    names = {i: str(i) for i in range(10)}
    model = lively(FlashKATForImageClassification(FlashKATConfig(**MICRO, **SIZE, id2label=names)))
    model.save_pretrained(folder)
    make_image_processor(16, crop=1.0).save_pretrained(folder)
    return folder


def expected(model, transform, split, outputs=None) -> dict[str, float]:
    """One image after another, in float64 sums."""
    top1 = top5 = loss = 0
    for index in range(len(split)):
        sample = split[index]
        label = sample.label if outputs is None else outputs[sample.label]
        with torch.no_grad():
            output = model(transform(open_image(sample.image))[None])
        logits = getattr(output, "logits", output)[0].double()
        order = logits.argsort(descending=True).tolist()
        top1 += order[0] == label
        top5 += label in order[:5]
        loss += logits.logsumexp(0).item() - logits[label].item()
    count = len(split)
    return {"top1": top1 / count, "top5": top5 / count, "loss": loss / count, "count": count}


def assert_same(result: dict, truth: dict) -> None:
    assert {key: result[key] for key in ("top1", "top5", "count")} == {
        k: truth[k] for k in ("top1", "top5", "count")
    }
    assert result["loss"] == pytest.approx(truth["loss"], rel=1e-5)  # float32 logits, batched or not


def test_it_is_the_mean_over_the_images(checkpoint):
    """Batches of 50 of 130 images: the last one is short."""
    model, test = FlashKATForImageClassification.from_pretrained(checkpoint), load_digits().test
    split = Examples(test.images[:130], test.labels[:130])
    transform = evaluation_transform(make_image_processor(16, crop=1.0))
    truth = expected(model, transform, split)
    assert 0.02 < truth["top1"] < truth["top5"] < 1
    model.train()
    result = evaluate(model, EvalBatches(split, transform, batch_size=50), Accelerator(cpu=True))
    assert_same(result, truth)
    assert model.training


def test_mixed_precision_is_for_those_who_ask(checkpoint):
    model = FlashKATForImageClassification.from_pretrained(checkpoint)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    dtypes = []
    model.classifier.register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
    batches = [{"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 9])}]
    for mixed in (True, False):
        evaluate(prepared, batches, accelerator, mixed_precision=mixed)
    assert dtypes == [torch.bfloat16, torch.float32]


class Fixed(torch.nn.Module):
    """Logits that are the images themselves."""

    def forward(self, pixel_values):
        return pixel_values


def test_outputs_stand_for_classes_and_fewer_than_five_count():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    batches = [{"pixel_values": logits, "labels": torch.tensor([0, 1])}]
    result = evaluate(Fixed(), batches, Accelerator(cpu=True))
    assert (result["top1"], result["top5"]) == (0.5, 1.0)
    result = evaluate(Fixed(), batches, Accelerator(cpu=True), outputs=[0, 2])
    assert result["top1"] == 1.0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no images to evaluate"),
        (
            [{"pixel_values": torch.zeros(2, 3), "labels": torch.tensor([0, 3])}],
            "label 0 or 3 has no output of the 3",
        ),
    ],
)
def test_nothing_to_evaluate_and_labels_without_an_output(batches, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Fixed(), batches, Accelerator(cpu=True))


def test_names_match_however_unicode_composes_them():
    data, model = ["caf\u00e9", "dog"], ["dog", "cafe\u0301"]
    assert match_classes(data, model) == ([1, 0], "by name")
    assert match_classes(model, data) == ([1, 0], "by name")


def test_an_evaluation_says_how_far_it_is_in_a_log_file(monkeypatch, capsys):
    monkeypatch.setattr("flashkat_hf.training.progress.SECONDS", 0.0)
    batches = [{"pixel_values": torch.eye(3), "labels": torch.arange(3)}] * 2
    for keep in (True, False):  # as `flashkat evaluate` and as training has it
        evaluate(Fixed(), batches, Accelerator(cpu=True), progress="evaluating", keep_progress=keep)
        lines = capsys.readouterr().err.splitlines()
        assert [line.split("[")[0] for line in lines] == ["evaluating:  50% 1/2 ", "evaluating: 100% 2/2 "]


def test_sharded_models_make_as_many_passes_in_every_process(monkeypatch):
    """A process whose share has ended goes on with an image that does not count, until all have ended."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    others = iter([1, 1, 1, 0])  # this process has one batch, the other three
    reduce, calls = accelerator.reduce, []

    def with_another(tensor, how):
        return tensor + next(others) if tensor.ndim == 0 else reduce(tensor, how)

    monkeypatch.setattr(accelerator, "reduce", with_another)
    model = Fixed()
    model.register_forward_hook(lambda *_: calls.append(1))
    batch = {"pixel_values": torch.eye(3), "labels": torch.arange(3)}
    assert evaluate(model, [batch], accelerator)["count"] == 3
    assert len(calls) == 3


def test_another_process_may_stop_an_evaluation(monkeypatch):
    accelerator, votes = Accelerator(cpu=True), []
    reduce = accelerator.reduce
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)

    def with_another(tensor, how):  # which is told to stop before its second batch
        if tensor.ndim == 0:
            votes.append(tensor.item())
            return tensor + (1 if len(votes) == 1 else -(2**20))
        return reduce(tensor + 1, how)

    monkeypatch.setattr(accelerator, "reduce", with_another)
    batch = {"pixel_values": torch.eye(3), "labels": torch.arange(3)}
    with pytest.raises(Stopped):
        evaluate(Fixed(), [batch] * 5, accelerator, stop=lambda: 0)
    assert votes == [1, 1]


def test_an_error_in_a_batch_is_raised_where_it_may_be_stopped():
    def batches():
        yield {"pixel_values": torch.eye(3), "labels": torch.arange(3)}
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        evaluate(Fixed(), batches(), Accelerator(cpu=True), stop=lambda: 0)


# classes ----------------------------------------------------------------------------------------------------

IMAGENET = timm.data.ImageNetInfo()
SYNSETS, LEMMAS = IMAGENET.label_names(), IMAGENET.label_descriptions()


@pytest.mark.parametrize(
    ("classes", "outputs", "matched", "how"),
    [
        (["a", "b", "c"], ["c", "a", "b"], [1, 2, 0], "by name"),
        (["b", "c"], ["c", "a", "b"], [2, 0], "by name"),
        (SYNSETS[5:8], LEMMAS, [5, 6, 7], "by WordNet id"),
        (SYNSETS, [f"LABEL_{i}" for i in range(1000)], list(range(1000)), "by WordNet id"),
        (SYNSETS[3:5], SYNSETS, [3, 4], "by name"),
        (
            ["tench", "Great_White shark"],
            ["great white shark, man-eater", "tench, Tinca tinca"],
            [1, 0],
            "by name, with",
        ),
        (["a", "b"], ["LABEL_0", "LABEL_1"], [0, 1], "in the data's order"),
        (["10", "2"][::-1], ["LABEL_0", "LABEL_1"], [0, 1], "in the data's order"),  # as a data set has them
    ],
)
def test_matched_classes(classes, outputs, matched, how):
    indices, words = match_classes(classes, outputs)
    assert indices == matched
    assert words.startswith(how)


@pytest.mark.parametrize(
    ("classes", "outputs", "message"),
    [
        (
            ["a", "d"],
            ["a", "b"],
            "2 classes cannot be matched with the model's 2 outputs: 1 .*'d' beside 'a'",
        ),
        (
            ["a", "b"],
            ["LABEL_0", "LABEL_1", "LABEL_2"],
            "the data's 2 classes cannot be matched with the model's 3",
        ),
        (["tench", "Tench"], ["tench, x", "eel"], "cannot be matched"),
        (SYNSETS[:2], LEMMAS[::-1], "cannot be matched"),  # ImageNet's classes in another order
        (
            ["1", "10", "2"],
            ["LABEL_0", "LABEL_1", "LABEL_2"],
            r"two orders: 1, 10, 2, ... as texts, 1, 2, 10, ... as numbers; name the outputs in config.json",
        ),
        (["run 10", "run 9"], ["0", "1"], "two orders: run 10, run 9, ... as texts, run 9, run 10"),
    ],
)
def test_classes_that_do_not_match(classes, outputs, message):
    with pytest.raises(ValueError, match=message):
        match_classes(classes, outputs)


class Sure(torch.nn.Module):
    """Says class k for images of k, for `value` that it never saw."""

    def forward(self, images):
        return 5 * functional.one_hot(images[:, 0].long(), 4).float() / (images[:, :1] != 3)


def score(labels: torch.Tensor, outputs=None, images=(0, 1, 2)) -> dict:
    batch = {"pixel_values": torch.tensor(images, dtype=torch.float32)[:, None], "labels": labels}
    return evaluate(Sure(), [batch], Accelerator(cpu=True), outputs=outputs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64])
def test_labels_of_any_kind_of_number(dtype):
    """Bytes as an index would be a mask, floats none."""
    labels = torch.tensor([0, 1, 1], dtype=dtype)
    assert score(labels)["top1"] == pytest.approx(2 / 3)
    assert score(labels, outputs=[1, 0])["top1"] == 0
    assert score(1 - labels.long() if dtype == torch.uint8 else 1 - labels, [1, 0])["top1"] == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize(
    ("labels", "outputs", "message"),
    [
        ([0.0, 0.5, 1.0], None, "label 0.5 is no number of a class"),
        ([0.0, float("nan"), 1.0], None, "label nan is no number of a class"),
        ([0, 1, 4], None, "label 0 or 4 has no output of the 4"),
        ([0, 1, 2], [1, 0], "label 0 or 2 is none of the 2 classes"),
        ([0, -1, 1], [1, 0], "label -1 or 1 is none of the 2 classes"),
    ],
)
def test_labels_that_are_no_classes(labels, outputs, message):
    with pytest.raises(ValueError, match=message):
        score(torch.tensor(labels), outputs)


def test_a_score_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match=r"outputs for 3 images are not finite: the loss is (nan|inf)"):
        score(torch.tensor([0, 1, 2]), images=(0, 1, 3))


# the command ------------------------------------------------------------------------------------------------


def evaluated(capsys, *arguments) -> dict:
    assert main(["evaluate", *map(str, arguments), "--json", "--no-progress"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_on_the_digits(checkpoint, capsys):
    model, transform = (
        FlashKATForImageClassification.from_pretrained(checkpoint),
        make_image_processor(16, crop=1.0),
    )
    truth = expected(model, evaluation_transform(transform), load_digits().test)
    result = evaluated(capsys, checkpoint, "--batch-size", 100)
    assert_same(result, truth)
    assert (result["data"], result["classes_matched"], result["skipped"]) == ("digits", "by name", [])
    assert main(["evaluate", str(checkpoint), "--no-progress"]) == 0
    assert f"top-1 {truth['top1']:.2%}, top-5 {truth['top5']:.2%}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_the_command_on_a_plain_vit(tmp_path, capsys, kind):
    """Its classes stand in another order than the data's."""
    data, names = write_folder(tmp_path / "data", 3, 20), CLASSES[::-1]
    folder = tmp_path / "model"
    if kind == "transformers":
        model = lively(ViTForImageClassification(ViTConfig(**MICRO, **SIZE, id2label=dict(enumerate(names)))))
        model.save_pretrained(folder)
        processor = ViTImageProcessor(size={"height": 16, "width": 16})
        processor.save_pretrained(folder)
        transform = evaluation_transform(processor)
    else:
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
        model = lively(timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes))
        config = {
            "input_size": [3, 16, 16],
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        }
        folder.mkdir()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        text = {
            "architecture": "vit_tiny_patch16_224",
            "num_classes": 3,
            "label_names": names,
            "model_args": sizes,
        }
        stored = {**config, "input_size": [3, 16, 16], "label_names": names}
        (folder / "config.json").write_text(json.dumps({**text, "pretrained_cfg": stored}))
        transform = timm.data.create_transform(
            (3, 16, 16), interpolation="bicubic", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3
        )
    truth = expected(model, transform, open_data(data).test, outputs=[2, 1, 0])
    result = evaluated(capsys, folder, "--data", data, "--batch-size", 7)
    assert_same(result, truth)


def test_two_processes_count_every_image_once(tmp_path, capsys):
    """Shares of 18 and 17 images in batches of 4, of shards: neither divides."""
    data = write_shards(tmp_path / "data", [3], [20, 15])
    folder = tmp_path / "model"
    config = FlashKATConfig(**MICRO, **SIZE, id2label=dict(enumerate(CLASSES)))
    lively(FlashKATForImageClassification(config)).save_pretrained(folder)
    make_image_processor(16, crop=1.0).save_pretrained(folder)
    alone = evaluated(capsys, folder, "--data", data, "--batch-size", 4)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command = [*launcher, "examples/evaluate.py", folder, "--data", data, "--batch-size", 4, "--json"]
    run = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT
    )
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()  # the main process alone prints
    assert "evaluating" not in run.stderr  # no terminal, and less than a minute
    assert_same(json.loads(line), alone)
    assert alone["count"] == 35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/model"], "cannot load nowhere/model: "),
        (["MODEL", "--data", "nowhere"], "nowhere is not a folder"),
        (["MODEL", "--data", "FOLDER"], "the data's 3 classes cannot be matched with the model's 10 outputs"),
        (["local-dir:nowhere"], "cannot load local-dir:nowhere: "),
    ],
)
def test_the_command_fails_in_one_line(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = write_folder(tmp_path, 3, 3)
    arguments = [a.replace("MODEL", str(checkpoint)).replace("FOLDER", str(folder)) for a in arguments]
    assert main(["evaluate", *arguments, "--no-progress"]) == 1
    assert re.fullmatch(rf"flashkat evaluate: {message}[^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, name: state.update({name: state[name] * math.nan}), "NaN or infinite"),
        (lambda state, name: state.pop(name), "do not fit its config: 1 are missing or differ"),
        (
            lambda state, name: state.update({name.replace("layer.0", "layer.1"): state[name].clone()}),
            "1 tensors that its config does not call for",
        ),
    ],
)
def test_a_vit_of_other_weights_is_refused(tmp_path, change, message, capsys):
    """By itself transformers would make up what is missing, with a warning, and ignore the rest."""
    model = ViTForImageClassification(ViTConfig(**MICRO, **SIZE, id2label={i: str(i) for i in range(10)}))
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state, next(name for name in state if "layer.0" in name and name.endswith("bias")))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert main(["evaluate", str(tmp_path), "--no-progress"]) == 1
    assert re.fullmatch(
        rf"flashkat evaluate: cannot load {tmp_path}: [^\n]*{message}[^\n]*\n", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "arguments", [["m", "--batch-size", "0"], ["m", "--workers", "-1"], ["m", "--split", "all"]]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", *arguments])
    assert arguments[1] in capsys.readouterr().err
