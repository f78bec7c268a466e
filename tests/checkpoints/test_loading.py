"""What `load_checkpoint` refuses, in one line, and what it never runs; processors that are not ours."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from helpers import ROOT, micro_config
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    DeiTImageProcessor,
    PreTrainedModel,
    SiglipImageProcessor,
    ViTImageProcessor,
    pipeline,
)

from flashkat_hf import FlashKATForImageClassification, FlashKATModel
from flashkat_hf.checkpoints import load_checkpoint
from flashkat_hf.checkpoints.image_processor import resize_processor
from flashkat_hf.checkpoints.weights import check_state
from flashkat_hf.data.augmentation import SIGNS, Augmentation, evaluation_transform, training_transform
from flashkat_hf.training.commands import classify

NORM = "flashkat.layers.1.norm1.weight"


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def one_value(value: float):
    """Return a change that sets one number of a norm, in every other weight nothing."""

    def change(state) -> None:
        state[NORM][5] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_value(float("nan")), f"{NORM} has 1 values of 64 that are NaN or infinite"),
        (one_value(float("-inf")), f"{NORM} has 1 values of 64 that are NaN or infinite"),
        (
            lambda state: state.update({NORM: state[NORM].long()}),
            f"{NORM} is int64 in the weights, not a floating point number",
        ),
        (
            lambda state: state.update({NORM: state[NORM].to(torch.float8_e4m3fn)}),
            f"{NORM} is float8_e4m3fn in the weights",
        ),
        (
            lambda state: state.update(
                {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in state.items()}
            ),
            "the weights have 3 layers, but config.json 2",
        ),
        (lambda state: state.update(more=torch.zeros(1)), "the weights have 1 tensors .*not call for: more"),
    ],
)  # fmt: skip
def test_weights(bare_folder, change, message):
    edit_weights(bare_folder, change)
    with pytest.raises(ValueError, match=f"^cannot load {bare_folder}: {message}") as caught:
        load_checkpoint(str(bare_folder))
    assert "\n" not in str(caught.value)


def test_a_number_that_is_not_finite_in_half_precision(bare_folder):
    """The sum of a tensor in float16 may pass the largest number though each value is finite."""
    edit_weights(bare_folder, lambda state: state.update({NORM: torch.full((64,), 60000).half()}))
    load_checkpoint(str(bare_folder))
    edit_weights(bare_folder, one_value(float("inf")))
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_checkpoint(str(bare_folder))


def test_a_new_head_is_the_only_thing_that_is_made_up(bare_folder):
    labels = {0: "a", 1: "b", 2: "c"}
    before = load_file(bare_folder / "model.safetensors")
    model, _ = load_checkpoint(str(bare_folder), id2label=labels)
    assert model.classifier.weight.shape == (3, 64)
    assert model.config.id2label == labels
    after = model.state_dict()
    assert all(
        torch.equal(after[name], before[name]) for name in before if not name.startswith("classifier.")
    )
    edit_weights(bare_folder, one_value(float("nan")))
    with pytest.raises(ValueError, match="NaN"):
        load_checkpoint(str(bare_folder), id2label=labels)


def test_a_model_without_a_head_is_a_start(bare_folder):
    """Saved as `FlashKATModel`, its names lack "flashkat."."""
    body = FlashKATModel(micro_config())
    body.save_pretrained(bare_folder)
    model, _ = load_checkpoint(str(bare_folder), drop_path_rate=0.1)
    assert torch.equal(model.flashkat.norm.weight, body.norm.weight)
    assert model.config.drop_path_rate == 0.1
    with pytest.raises(ValueError, match=r"lack 2 tensors .*classifier"):
        load_checkpoint(str(bare_folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 1_000_000}, "the weights have 2 layers, but config.json 1000000"),
        ({"hidden_size": 64 * 10**6}, r"\(1, 1, 64\) in the weights, but \(1, 1, 64000000\) by config.json"),
        ({"id2label": None, "num_labels": 10**9}, "num_labels 1000000000, but the weights have 10 outputs"),
        ({"id2label": {"0": "a", "2": "b"}}, "labels in id2label, numbered 0 to 1, but one has the number 2"),
        ({"id2label": {"a": "a"}}, "one has the number a"),
        ({"id2label": {"0": 5}}, "config.json has 5 as the label of output 0, which is no name"),
        ({"id2label": {"0": None}}, "config.json has None as the label of output 0"),
        ({"id2label": ["a", "b"]}, r"config.json has id2label \['a', 'b'\]"),
        ({"layer_norm_eps": float("inf")}, "must be positive and finite; got layer_norm_eps=inf"),
        ({"layer_norm_eps": float("nan")}, "must be positive and finite; got layer_norm_eps=nan"),
        ({"dtype": "int64"}, "config.json has dtype 'int64'"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "config.json has quantization_config"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
    ],
)  # fmt: skip
def test_configs(bare_folder, values, message):
    edit_json(bare_folder / "config.json", **values)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"^cannot load {bare_folder}: .*{message}") as caught:
        load_checkpoint(str(bare_folder))
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 20  # a million layers would take an hour


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_mean": [0.5, 0.5]}, r"image_mean \[0.5, 0.5\], but the model takes 3 channels"),
        ({"image_std": [0.5, 0, 0.5]}, r"image_std \[0.5, 0, 0.5\], which must be positive"),
        ({"image_std": [0.5, float("inf"), 0.5]}, r"image_std \[0.5, inf, 0.5\], no finite numbers"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean .* no finite numbers"),
        ({"image_mean": "grey"}, "image_mean"),
        ({"rescale_factor": 0}, "rescale_factor 0, which must be finite and positive"),
        ({"crop_size": {"height": 24, "width": 32}}, "makes images of 24x32 pixels, but the model takes 32"),
        ({"do_center_crop": False}, "makes images of .* pixels, but the model takes 32"),
        ({"image_processor_type": "MyProcessor", "auto_map": {"AutoImageProcessor": "mine.MyProcessor"}},
         "its image processor cannot be loaded: it brings code of its own, which is never run"),
    ],
)  # fmt: skip
def test_processors_that_do_not_serve(bare_folder, values, message):
    edit_json(bare_folder / "preprocessor_config.json", **values)
    with pytest.raises(ValueError, match=f"^cannot load {bare_folder}: .*{message}") as caught:
        load_checkpoint(str(bare_folder))
    assert "\n" not in str(caught.value)


SQUARE = {"size": {"height": 32, "width": 32}}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
PROCESSORS = {
    "ViT": ViTImageProcessor(**SQUARE),
    "ViT, pixels of 0 to 255": ViTImageProcessor(**SQUARE, do_rescale=False, do_normalize=False),
    "ViT, pixels of -1 to 1": ViTImageProcessor(
        **SQUARE, rescale_factor=1 / 127.5, image_mean=[1.0, 1.0, 1.0], image_std=1.0
    ),
    "SigLIP": SiglipImageProcessor(**SQUARE),
    "DeiT": DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}),
    "CLIP": CLIPImageProcessor(**CROPPED),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_of_other_models(bare_folder, name):
    """What we make of them gives the numbers that the original gives, in evaluation and in `pipeline`."""
    PROCESSORS[name].save_pretrained(bare_folder)
    pixels = numpy.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
    image = Image.fromarray(numpy.kron(pixels, numpy.ones((3, 3, 1), dtype=numpy.uint8)))
    expected = PROCESSORS[name](image, return_tensors="pt")["pixel_values"][0].float()
    model, processor = load_checkpoint(str(bare_folder))
    close = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"][0], expected, **close)
    answers = pipeline("image-classification", model=model, image_processor=processor)(image)
    assert len(answers) == 5
    # timm resizes with PIL, the processor with torchvision: rounded to whole pixels, a step apart at most
    step = (expected.max() - expected.min()).item() / 255
    evaluated = evaluation_transform(processor)(image)
    assert evaluated.shape == (3, 32, 32)
    assert (evaluated - expected).abs().max() <= 4 * step
    for augmentation in (SIGNS, Augmentation(rand_augment=None, erasing=0, on_device="nothing")):
        trained = training_transform(processor, augmentation)(image)
        assert trained.shape == (3, 32, 32)
        assert trained.min() >= expected.min() - 60 * step
        assert trained.max() <= expected.max() + 60 * step
        assert trained.std() > 10 * step
    resize_processor(processor, 48)
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)
    processor.save_pretrained(bare_folder / "again")
    assert evaluation_transform(processor)(image).shape == (3, 48, 48)


@pytest.mark.parametrize(
    "name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_a_config_fetches_no_kernel(bare_folder, name, monkeypatch):
    """By itself transformers would download the kernel from the Hub and run it, in every class of it."""
    asked = []

    def adjust(model, requested, *args, **kwargs):
        asked.append(requested)
        return original(model, requested, *args, **kwargs)

    original = PreTrainedModel._check_and_adjust_attn_implementation
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", adjust)
    edit_json(bare_folder / "config.json", **{name: "someone/kernel"})
    model, _ = load_checkpoint(str(bare_folder))
    FlashKATForImageClassification.from_pretrained(bare_folder)
    assert asked
    assert "someone/kernel" not in asked
    assert model.config._attn_implementation == "sdpa"


def test_an_adapter_beside_the_weights_is_not_followed(bare_folder):
    """By itself transformers would load the model that adapter_config.json names, another one."""
    (bare_folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}'
    )
    model, _ = load_checkpoint(str(bare_folder))
    assert torch.equal(model.state_dict()[NORM], load_file(bare_folder / "model.safetensors")[NORM])


class Malicious:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("content", ["pickle", "bytes"])
def test_pickled_weights_run_no_code(bare_folder, content):
    """PyTorch's advice, to load with weights_only=False, is not passed on."""
    (bare_folder / "model.safetensors").unlink()
    marker, path = bare_folder / "ran", bare_folder / "pytorch_model.bin"
    if content == "pickle":
        torch.save({"classifier.bias": Malicious(marker)}, path)
    else:
        path.write_bytes(b"no PyTorch file")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin") as caught:
        load_checkpoint(str(bare_folder))
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_read(bare_folder):
    state = load_file(bare_folder / "model.safetensors")
    torch.save(state, bare_folder / "pytorch_model.bin")
    (bare_folder / "model.safetensors").unlink()
    loaded = load_checkpoint(str(bare_folder))[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PreTrainedConfig, ViTImageProcessor
class Config(PreTrainedConfig):
    model_type = "own"
class Processor(ViTImageProcessor):
    pass
"""
COMMANDS = {
    "info": ["-m", "flashkat_hf", "info", "FOLDER"],
    "push": ["-m", "flashkat_hf", "push", "FOLDER", "alice/model", "--what-if"],
    "classify": ["examples/classify.py", "FOLDER", "IMAGE"],
    "evaluate": ["examples/evaluate.py", "FOLDER"],
    "finetune": ["examples/finetune.py", "--model", "FOLDER", "--output", "FOLDER/run", "--max_steps", "1"],
}


@pytest.mark.parametrize("kind", ["own model", "own processor"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_or_asks_to_run_a_checkpoints_code(bare_folder, tmp_path, command, kind):
    """On a terminal, where transformers asks "Do you wish to run the custom code? [y/N]", and y is typed."""
    marker, image = tmp_path / "ran", tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    (bare_folder / "own.py").write_text(CODE.format(marker=str(marker)))
    if kind == "own model":
        auto_map = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
        edit_json(bare_folder / "config.json", model_type="own", auto_map=auto_map)
    else:
        auto_map = {"AutoImageProcessor": "own.Processor"}
        processor = bare_folder / "preprocessor_config.json"
        edit_json(processor, image_processor_type="Processor", auto_map=auto_map)
    names = {"FOLDER": str(bare_folder), "IMAGE": str(image)}
    arguments = [names.get(part, part.replace("FOLDER", str(bare_folder))) for part in COMMANDS[command]]
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 5)
    process = subprocess.run(
        [sys.executable, *arguments],
        stdin=theirs,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": "hf_alice",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        },
        cwd=ROOT,
        timeout=300,
    )
    os.close(ours)
    os.close(theirs)
    output = process.stdout + process.stderr
    assert process.returncode == 1, output
    assert not marker.exists()
    assert "[y/N]" not in output
    assert "trust_remote_code" not in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("spoil", "hinted"),
    [
        (lambda folder: edit_json(folder / "config.json", model_type="vit"), True),
        (lambda folder: (folder / "config.json").unlink(), True),  # weights of an unknown kind
        (lambda folder: edit_json(folder / "config.json", model_type="resnet"), False),
        (lambda folder: (folder / "config.json").write_text("{"), False),
        (lambda folder: edit_json(folder / "config.json", num_attention_heads=7), False),
        (lambda folder: [path.unlink() for path in folder.iterdir()], False),
    ],
)
def test_the_hint_about_conversion_only_where_it_fits(bare_folder, spoil, hinted):
    spoil(bare_folder)
    with pytest.raises(ValueError, match="cannot load") as caught:
        load_checkpoint(str(bare_folder))
    assert ("flashkat convert" in str(caught.value)) == hinted


def test_hints_for_names(bare_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    run, file = tmp_path / "run", tmp_path / "kat.pth"
    run.mkdir()
    bare_folder.rename(run / "best")
    file.write_bytes(b"")
    for name, message in (
        (str(run), f"is the folder of a run, not of a model; try {run / 'best'}$"),
        (
            str(file),
            f"{file} is not a folder; a KAT, ViT or DeiT is converted first: flashkat convert {file} ",
        ),
        (
            "kat-tiny",
            "kat-tiny is the name of a published KAT, not a folder; .*flashkat convert kat-tiny OUTPUT",
        ),
        (str(tmp_path / "typo"), "typo is not a folder$"),
        ("someone/typo", "no network or offline mode, and it is not in the cache(?!.*flashkat convert)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(name)


def test_the_check_reads_the_weights_once(bare_folder, monkeypatch):
    """No temporary as large as a tensor: `isfinite` runs on two numbers of each."""
    sizes = []
    isfinite = torch.Tensor.isfinite
    monkeypatch.setattr(
        torch.Tensor, "isfinite", lambda tensor: sizes.append(tensor.numel()) or isfinite(tensor)
    )
    model, _ = load_checkpoint(str(bare_folder))
    assert set(sizes) == {2}
    check_state(model.state_dict(), model.config)


def test_classify_names_no_score_that_is_not_finite(bare_folder, tmp_path):
    """Finite weights may be so large that their products are not."""
    edit_weights(bare_folder, lambda state: state["classifier.weight"].fill_(3e38))
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match=r"^the model's outputs for .*image.png are not finite$"):
        classify(str(bare_folder), [tmp_path / "image.png"], top_k=3)
