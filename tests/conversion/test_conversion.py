"""Conversions of every kind of source, what they leave behind, and the way back."""

import errno
import json
import subprocess
import sys

import pytest
import torch
from helpers import DATA, original_state, relative_error, stored_model, timm_vit
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, convert, make_image_processor
from flashkat_hf.checkpoints import load_checkpoint
from flashkat_hf.checkpoints.remote_code import CODE_FILES
from flashkat_hf.conversion import conversion
from flashkat_hf.data.augmentation import evaluation_transform

HEADS = {"num_attention_heads": 2}
VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96} | {
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture
def kat(tmp_path):
    torch.save(original_state("kat"), tmp_path / "kat.pth")
    return tmp_path / "kat.pth"


def vit_folder(path, model_class=ViTForImageClassification, **changes):
    model = model_class(ViTConfig(**{**VIT, "num_labels": 3, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(path)
    return model.eval()


def listing(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["kat", "flashkat"])
def test_stored_logits_through_the_auto_class(kind, tmp_path):
    """Numbers that the original code computed, from the written folder, in float32."""
    torch.save({"state_dict": original_state(kind)}, tmp_path / "x.pth")
    report = convert(tmp_path / "x.pth", tmp_path / "out", settings=HEADS)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    stored = stored_model(kind)[2]
    assert relative_error(model(stored["input"]).logits, stored["logits_f64"]) <= 2e-5
    assert report.proof.outputs == "logits"
    assert report.proof.rounding < 1e-12
    assert report.proof.agreement == 1
    assert report.parameters == model.num_parameters() == 114402
    base = AutoModel.from_pretrained(tmp_path / "out")
    assert relative_error(base(stored["input"]).pooler_output, stored["pooled"]) <= 2e-5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *CODE_FILES,
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"global_pool": "avg"},
        {"qkv_bias": False},
        {"init_values": 0.5},
        {"init_values": 0.5, "no_embed_class": True},  # DeiT-III
        {"num_classes": 0},
        {"in_chans": 1, "mlp_ratio": 2},
    ],
    ids=str,
)
def test_timm_vits(arguments, tmp_path):
    """With the result's tables timm's model gives the same numbers to rounding; more is the table's error."""
    model = timm_vit(**arguments)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    report = convert(tmp_path / "x.pth", tmp_path / "out", settings=HEADS)
    assert report.title == "timm ViT"
    assert len({path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}) == 1
    assert report.proof.rounding < (1e-6 if "init_values" in arguments else 1e-12)
    assert 0 < report.proof.difference < 0.1 * report.proof.spread
    assert report.proof.outputs == ("pooled features" if arguments.get("num_classes") == 0 else "logits")
    result = FlashKATForImageClassification.from_pretrained(tmp_path / "out")
    images = torch.randn(2, arguments.get("in_chans", 3), 32, 32)
    with torch.no_grad():
        expected, actual = model(images), result(images).logits
    assert (expected - actual).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_a_one_channel_vit_gets_a_processor_that_fits(tmp_path, kind):
    """A grey image, a coloured one and a tensor go through; numbers are those of the source, by hand."""
    if kind == "timm":
        model = timm_vit(in_chans=1)
        torch.save(model.state_dict(), tmp_path / "x.pth")
        source, mean, std = tmp_path / "x.pth", 0.5, 0.5
    else:
        source = tmp_path / "vit"
        model = vit_folder(source, num_attention_heads=2, num_channels=1, num_labels=10)
        mean, std = 0.3, 0.2
        settings = {"do_normalize": True, "image_mean": [mean], "image_std": [std], "size": 32}
        (source / "preprocessor_config.json").write_text(json.dumps(settings))
    report = convert(source, tmp_path / "out", settings=HEADS, transform="augreg" if kind == "timm" else None)
    assert report.config.num_channels == 1
    assert any("become grey" in note for note in report.notes)
    result, processor = load_checkpoint(str(tmp_path / "out"))
    pixels = torch.randint(256, (32, 32), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize((64, 64), Image.Resampling.NEAREST)
    values = processor(image, return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 1, 32, 32)
    assert values.min() >= (0 - mean) / std - 1e-6
    assert values.max() <= (1 - mean) / std + 1e-6
    assert evaluation_transform(processor)(image.convert("RGB")).equal(values[0])
    answers = pipeline("image-classification", model=str(tmp_path / "out"))(image)
    with torch.no_grad():
        expected = model(values)
        expected = getattr(expected, "logits", expected)
        assert (result(values).logits - expected).abs().max() < 0.1 * expected.std()
        best = result(values).logits.softmax(-1).max().item()
    assert answers[0]["score"] == pytest.approx(best, rel=1e-4)
    coloured = Image.new("RGB", (64, 64), (200, 100, 50))
    grey = coloured.convert("L").getpixel((0, 0)) / 255
    made = processor(coloured, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made, torch.full((1, 1, 32, 32), (grey - mean) / std), rtol=1e-5, atol=1e-6)


def test_a_vit_of_many_channels_says_that_no_image_fits(tmp_path):
    torch.save(timm_vit(in_chans=5).state_dict(), tmp_path / "x.pth")
    report = convert(tmp_path / "x.pth", tmp_path / "out", settings=HEADS)
    assert "no image file has 5 channels: give the model tensors" in report.notes
    model, processor = load_checkpoint(str(tmp_path / "out"))
    assert processor.image_mean == [0.5] * 5
    assert model(torch.randn(1, 5, 32, 32)).logits.shape == (1, 10)


def test_timm_folder_with_its_architecture(tmp_path):
    """Heads and the rest from timm's own model of that name, which also evaluates it."""
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    source = tmp_path / "timm"
    source.mkdir()
    save_file(timm_vit(**args).state_dict(), source / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 10,
        "model_args": args,
        "global_pool": "token",
    }
    config |= {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}}
    (source / "config.json").write_text(json.dumps(config))
    report = convert(source, tmp_path / "out")
    assert report.config.num_attention_heads == 4
    assert report.notes == ()
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size["shortest_edge"] == 32
    with pytest.raises(ValueError, match="does not compute the same function"):
        convert(source, tmp_path / "wrong", settings=HEADS)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_transformers_folder(tmp_path, qkv_bias, act):
    labels = {0: "cat", 1: "dog", 2: "other"}
    changes = {"id2label": labels, "qkv_bias": qkv_bias, "hidden_act": act, "layer_norm_eps": 1e-3}
    model = vit_folder(tmp_path / "vit", **changes)
    report = convert(tmp_path / "vit", tmp_path / "out")
    assert report.config.num_attention_heads == 4
    assert report.proof.rounding < 1e-12
    result, _ = load_checkpoint(str(tmp_path / "out"))
    assert result.config.id2label == labels
    assert result.config.layer_norm_eps == 1e-3
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, actual = model(images).logits, result(images).logits
    assert (expected - actual).abs().max() < 0.1 * expected.std()


def test_transformers_state_dict_in_memorys_names(tmp_path):
    """torch.save writes the names in memory, which differ from those in files since transformers 5."""
    model = vit_folder(tmp_path / "vit")
    torch.save(model.state_dict(), tmp_path / "x.pth")
    settings = {"num_attention_heads": 4}
    from_file = convert(tmp_path / "x.pth", tmp_path / "one", settings=settings)
    assert from_file.title == "transformers 5 ViT"
    assert "eps 1e-12 assumed; --set layer_norm_eps=X says otherwise" in from_file.notes
    convert(tmp_path / "vit", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_vit_model_without_a_head(tmp_path):
    vit_folder(tmp_path / "vit", ViTModel)
    report = convert(tmp_path / "vit", tmp_path / "out", num_labels=5)
    assert "pooler left out: no classifier uses it" in report.notes
    assert report.proof.outputs == "pooled features"
    result, _ = load_checkpoint(str(tmp_path / "out"))
    assert result.classifier.weight.shape == (5, 64)
    assert result.classifier.weight.detach().std() == pytest.approx(0.02, rel=0.3)
    assert not result.classifier.bias.detach().any()
    bare = convert(tmp_path / "vit", tmp_path / "bare")
    assert bare.config.num_labels == 0
    assert "the source has no head; --num-labels N makes a fresh one" in bare.notes
    assert load_checkpoint(str(tmp_path / "bare"))[0](torch.randn(1, 3, 32, 32)).logits.shape == (1, 64)


def test_fresh_head_keeps_the_rest(kat, tmp_path):
    convert(kat, tmp_path / "old", settings=HEADS)
    report = convert(kat, tmp_path / "new", settings=HEADS, num_labels=4)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("old", "new"))
    assert [name for name in old if not torch.equal(old[name], new[name])] == [
        "classifier.bias",
        "classifier.weight",
    ]
    assert report.config.num_labels == len(report.config.id2label) == 4
    assert "fresh head of 4 labels: random, to be trained" in report.notes


@pytest.mark.parametrize("source", ["kat", "no position for the class token", "transformers"])
def test_image_size(source, kat, tmp_path):
    """Other positions compute what the model's own interpolation of the old ones does."""
    settings = HEADS
    if source == "transformers":
        vit_folder(tmp_path / "vit")
        kat, settings = tmp_path / "vit", {}
    elif source != "kat":
        torch.save(timm_vit(no_embed_class=True).state_dict(), kat)
    convert(kat, tmp_path / "old", settings=settings)
    report = convert(kat, tmp_path / "new", settings=settings, image_size=48)
    (old, _), (new, processor) = (load_checkpoint(str(tmp_path / name)) for name in ("old", "new"))
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(new(images).logits, old(images, interpolate_pos_encoding=True).logits)
    assert report.config.image_size == new.config.image_size == processor.crop_size["height"] == 48
    with pytest.raises(ValueError, match=r"image_size \(50\) must be a multiple of patch_size \(8\)"):
        convert(kat, tmp_path / "bad", settings=settings, image_size=50)


def test_imagenet_labels(tmp_path):
    torch.save(timm_vit(num_classes=1000).state_dict(), tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "out", settings=HEADS)
    config = load_checkpoint(str(tmp_path / "out"))[0].config
    assert len(config.id2label) == len(config.label2id) == 1000
    assert config.id2label[0] == "tench, Tinca tinca"
    assert config.id2label[134] == "crane (n02012849)"  # the bird; 517 is the machine
    assert config.id2label[999].startswith("toilet tissue")


def test_image_processor_is_written(kat, tmp_path):
    convert(kat, tmp_path / "out", settings=HEADS)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (36, 32)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    convert(kat, tmp_path / "half", settings=HEADS, transform="augreg")
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "half").image_mean) == [0.5] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, r"image_size \(0\) must be at least 1"),
        ({"num_labels": -1}, r"num_labels \(-1\) must be at least 1"),
        ({"settings": {"width": 3}}, "width is no field of the config"),
        ({"settings": {"hidden_size": 3}}, "the settings say hidden_size=3, but the weights hidden_size=64"),
        ({"transform": "clip"}, "unknown transform 'clip'"),
    ],
)
def test_bad_arguments_leave_nothing(kat, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(kat, tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["kat.pth"]


def test_existing_output(kat, tmp_path):
    """Refused without overwrite; with it, only what is a FlashKAT and not the source gives way."""
    out = tmp_path / "out"
    convert(kat, out, settings=HEADS)
    before = listing(out)
    with pytest.raises(ValueError, match="out exists; --overwrite replaces it"):
        convert(kat, out, settings=HEADS)
    assert listing(out) == before
    convert(kat, out, settings=HEADS, num_labels=4, overwrite=True)
    assert json.loads((out / "config.json").read_text())["id2label"].keys() == {"0", "1", "2", "3"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kat.pth", "out"]
    home = tmp_path / "home"
    home.mkdir()
    convert(kat, home, settings=HEADS, overwrite=True)  # an empty folder holds nothing to lose
    for path in home.iterdir():
        path.unlink()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds something else than a FlashKAT"):
        convert(kat, home, settings=HEADS, overwrite=True)
    assert listing(home) == {"letter.txt": b"dear"}
    with pytest.raises(ValueError, match="is no folder, so --overwrite does not"):
        convert(kat, kat, settings=HEADS, overwrite=True)
    inside = out / "kat.pth"
    inside.write_bytes(kat.read_bytes())
    with pytest.raises(ValueError, match=r"cannot replace .* from which it is made"):
        convert(inside, out, settings=HEADS, overwrite=True)
    with pytest.raises(ValueError, match=r"kat.pth is no folder"):
        convert(inside, kat / "deep" / "out", settings=HEADS)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["weights", "processor"])
@pytest.mark.parametrize("existing", [False, True])
def test_full_disk(kat, tmp_path, monkeypatch, when, existing):
    out = tmp_path / "deep" / "out"
    if existing:
        convert(kat, out, settings=HEADS)
    before = listing(tmp_path)
    writer = {
        "weights": "flashkat_hf.FlashKATForImageClassification",
        "processor": "transformers.image_processing_base.ImageProcessingMixin",
    }[when]
    monkeypatch.setattr(f"{writer}.save_pretrained", full_disk)
    with pytest.raises(ValueError, match=r"cannot write .*out: No space left on device; nothing is written"):
        convert(kat, out, settings=HEADS, overwrite=True)
    assert listing(tmp_path) == before
    assert (tmp_path / "deep").exists() == existing


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_trouble_between_the_two_renamings(kat, tmp_path, monkeypatch, error):
    """The old folder has moved away, the new one has not come: the old one comes back."""
    out = tmp_path / "out"
    convert(kat, out, settings=HEADS)
    before, rename = listing(tmp_path), type(out).rename

    def fail_once(self, target):
        if target == out and self.name == ".out.new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", fail_once)
    with pytest.raises(error if error is KeyboardInterrupt else ValueError):
        convert(kat, out, settings=HEADS, num_labels=4, overwrite=True)
    assert listing(tmp_path) == before


def test_safetensors_own_error_of_a_full_disk(kat, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise conversion.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(FlashKATForImageClassification, "save_pretrained", fail)
    with pytest.raises(
        ValueError, match=r"cannot write .*No space left on device \(os error 28\); nothing is written"
    ):
        convert(kat, tmp_path / "out", settings=HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["kat.pth"]


def test_interrupt_leaves_nothing(kat, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "prove", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(kat, tmp_path / "out", settings=HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["kat.pth"]


def test_an_original_is_never_a_random_model(kat, tmp_path):
    """Neither without weights, nor with a few names that fit; and `load_checkpoint` names the command."""
    config = {**VIT, "num_attention_heads": 2, "intermediate_size": 256}
    with pytest.raises(OSError, match="no file named"):
        FlashKATForImageClassification.from_pretrained(tmp_path)
    save_file(original_state("kat"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"architecture": "kat_tiny_patch16_224", "num_classes": 10}')
    with pytest.raises(RuntimeError):  # norm.weight is found, of another shape
        FlashKATForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds none of"):  # norm.weight is found, and fits
        FlashKATForImageClassification.from_pretrained(tmp_path, **config)
    for kind in ("KAT", "FlashKAT"):
        with pytest.raises(ValueError, match=f"flashkat convert {tmp_path} OUTPUT") as caught:
            load_checkpoint(str(tmp_path))
        assert str(caught.value).count("flashkat convert") == 1, kind
        FlashKATConfig(**config, num_labels=10).save_pretrained(tmp_path)
        make_image_processor(32).save_pretrained(tmp_path)


def test_memory_of_a_full_size_conversion(tmp_path):
    """The base size, proved, takes under 1.5 GB beyond two copies of the weights, and under a minute."""
    script = f"""
import json, resource, time, torch
from flashkat_hf import convert
shapes = json.load(open({str(DATA / "kat_state_dict_shapes.json")!r}))["kat"]["base"]["tensors"]
torch.save({{name: 0.03 * torch.randn(shape) for name, shape in shapes.items()}}, {str(tmp_path / "x.pth")!r})
import timm, transformers.models.vit  # what the proof imports counts as no memory of it
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
report = convert({str(tmp_path / "x.pth")!r}, {str(tmp_path / "out")!r})
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seconds = time.monotonic() - start
print(json.dumps([1024 * (after - before), 4 * report.parameters, seconds, report.proof.rounding]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, weights, seconds, rounding = json.loads(done.stdout.splitlines()[-1])
    assert grown < 1.5e9 + 2 * weights
    assert seconds < 60
    assert rounding < 1e-12
