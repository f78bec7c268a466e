"""Reading files, folders and Hub repositories, and refusing them before any code in them runs."""

import argparse
import hashlib
import json
import os
import pickle

import pytest
import torch
from helpers import original_state, timm_vit
from safetensors.torch import save_file
from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig, ViTForImageClassification

from flashkat_hf.checkpoints import downloads
from flashkat_hf.checkpoints.published import PUBLISHED, Published
from flashkat_hf.conversion import source as source_module
from flashkat_hf.conversion.source import image_processor, load_state, read_source
from flashkat_hf.conversion.tensor_names import strip_prefix

VIT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96} | {
    "image_size": 32,
    "patch_size": 8,
}


def kat_file(path, **changes):
    torch.save(original_state("kat") | changes, path)
    return path


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_file_kinds(tmp_path):
    """Each format, and PyTorch's old one, gives the same tensors."""
    state = original_state("flashkat")
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pth", "a.bin"):
        source = read_source(tmp_path / name)
        assert source.title == "FlashKAT"
        assert all(torch.equal(tensor, state[key]) for key, tensor in source.state.items())
        assert source.state.keys() == state.keys()


def test_training_checkpoint(tmp_path):
    """EMA preferred, the flag chooses, and the arguments' Namespace is the only class let through."""
    state = original_state("kat")
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    checkpoint = {
        "epoch": 3,
        "arch": "kat_tiny_patch16_224",
        "state_dict": state,
        "state_dict_ema": averaged,
        "args": argparse.Namespace(lr=1e-3, data="x"),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }
    path = tmp_path / "last.pth.tar"
    torch.save(checkpoint, path)
    ema, plain = read_source(path), read_source(path, ema=False)
    assert torch.equal(ema.state["norm.bias"], averaged["norm.bias"])
    assert torch.equal(plain.state["norm.bias"], state["norm.bias"])
    assert ema.notes == ["weights from state_dict_ema, not state_dict"]
    assert plain.notes == ["weights from state_dict, not state_dict_ema"] or "state_dict" in plain.notes[0]
    torch.save({"model": state}, path)
    assert torch.equal(read_source(path).state["norm.bias"], state["norm.bias"])
    torch.save({"state_dict_ema": averaged}, path)
    with pytest.raises(ValueError, match=r"only averaged weights \(state_dict_ema\)"):
        read_source(path, ema=False)


@pytest.mark.parametrize("inside", ["alone", "beside weights"])
@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path, inside, new_format):
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    evil = Malicious(marker)
    content = evil if inside == "alone" else {"state_dict": original_state("kat"), "args": evil}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(
        ValueError, match=r"evil.pth would run .*mkdir when unpickled, so it is refused"
    ) as caught:
        read_source(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    path.write_bytes(pickle.dumps(content if inside == "alone" else {"args": evil}))
    with pytest.raises(ValueError, match="cannot convert"):
        read_source(path)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, 200_000, -30])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_truncated_files(tmp_path, suffix, keep):
    path = tmp_path / f"short{suffix}"
    if suffix == ".safetensors":
        save_file(original_state("kat"), path)
    else:
        torch.save(original_state("kat"), path, _use_new_zipfile_serialization=suffix == ".pth")
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(
        ValueError,
        match=rf"cannot convert .*short{suffix} is damaged or no (PyTorch|safetensors)|damaged, no",
    ) as caught:
        read_source(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds a list and no state dict"),
        ({}, "no state dict"),
        ({"epoch": 3}, "no state dict: epoch is a int"),
        ({"state_dict": {}}, "no state dict"),
        ({3: torch.zeros(1)}, "no state dict"),
        ({"conv1.weight": torch.zeros(1)}, "neither a KAT nor a ViT .*conv1.weight"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        read_source(tmp_path / "x.pth")


def test_a_page_of_text_is_no_checkpoint(tmp_path):
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"page{suffix}"
        path.write_text("<html>not found</html>")
        with pytest.raises(ValueError, match="damaged"):
            read_source(path)


def test_folders(tmp_path):
    with pytest.raises(ValueError, match=r"has neither model.safetensors .* give the path of one file"):
        read_source(tmp_path)
    kat_file(tmp_path / "one.pth")
    assert read_source(tmp_path).title == "KAT"
    kat_file(tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"has one.pth, two.pth; give the path of one"):
        read_source(tmp_path)
    save_file(original_state("flashkat"), tmp_path / "model.safetensors")
    assert read_source(tmp_path).title == "FlashKAT"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged or no JSON"):
        read_source(tmp_path)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "x.Y"}}')
    with pytest.raises(ValueError, match="brings its own code"):
        read_source(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_weights(tmp_path, suffix):
    state = original_state("kat")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, half = list(state), len(state) // 2
    shards = {f"{stem}-1.{suffix}": names[:half], f"{stem}-2.{suffix}": names[half:]}
    for shard, inside in shards.items():
        (save_file if suffix == "safetensors" else torch.save)(
            {n: state[n] for n in inside}, tmp_path / shard
        )
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = read_source(tmp_path).state
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    index.write_text(json.dumps({"weight_map": weight_map | {"lost": f"{stem}-1.{suffix}"}}))
    with pytest.raises(ValueError, match="names lost, which is in no shard"):
        read_source(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {"lost": f"../{stem}-1.{suffix}"}}))
    with pytest.raises(ValueError, match=r"names \.\./.*, which is not there"):
        read_source(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_state(index)


def test_names_that_are_nothing(tmp_path):
    for name in (
        "nothing",
        "lost.pth",
        "owner/lost.pth",
        str(tmp_path / "lost"),
        "a/b/c",
        f"{tmp_path.name}/x y",
    ):
        with pytest.raises(
            ValueError, match=r"is no file, no folder, no Hub id .* \(kat-tiny, kat-tiny-vitft"
        ):
            read_source(name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of files below a folder; returns the folder, and a list of what was asked for."""
    asked = []

    def fetch(repository, file, *, revision=None, token=None, local_files_only=False):
        asked.append((repository, file, revision, token))
        path = tmp_path / repository / file
        if not path.is_file():
            raise downloads.EntryNotFoundError(file)
        return str(path)

    monkeypatch.setattr(downloads, "hf_hub_download", fetch)
    return tmp_path, asked


def test_published_name(hub):
    folder, asked = hub
    row = PUBLISHED["kat-tiny"]
    with pytest.raises(ValueError, match=f"no longer has {row.file}; try adamdad/kat_tiny_patch16_224"):
        read_source("kat-tiny", revision="v1", token="secret")
    assert asked == [("adamdad/kat_pretained", row.file, "v1", "secret")]
    path = folder / "adamdad/kat_pretained" / row.file
    path.parent.mkdir(parents=True)
    kat_file(path)
    with pytest.raises(ValueError, match="its SHA-256 is"):
        read_source("kat-tiny")
    with pytest.raises(ValueError, match="its SHA-256 is"):  # the same file, downloaded by hand
        read_source(path)


def test_published_file_with_the_right_checksum(hub, monkeypatch):
    folder, _ = hub
    path = kat_file(folder / "kat.pth")
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    row = Published("kat-test", "owner/test", f"kat_{right}.pth", 1.0)
    monkeypatch.setitem(PUBLISHED, "kat-test", row)
    target = folder / "adamdad/kat_pretained" / row.file
    target.parent.mkdir(parents=True)
    path.rename(target)
    assert read_source("kat-test").published == row
    assert read_source(target).published == row


def test_hub_id(hub):
    folder, _ = hub
    with pytest.raises(ValueError, match=r"owner/name has neither model.safetensors"):
        read_source("owner/name")
    repository = folder / "owner/name"
    repository.mkdir(parents=True)
    kat_file(repository / "pytorch_model.bin")
    assert read_source("owner/name").title == "KAT"
    (repository / "config.json").write_text('{"num_classes": 10, "global_pool": "token"}')
    assert read_source("owner/name").hints == {"num_labels": 10}
    (repository / "config.json").write_text('{"global_pool": "avg"}')
    with pytest.raises(ValueError, match=r"averages after the norm"):
        read_source("owner/name")
    (repository / "config.json").write_text('{"global_pool": "max"}')
    with pytest.raises(ValueError, match=r"its pooling is max"):
        read_source("owner/name")


def test_cached_hub_id_without_network(monkeypatch, tmp_path):
    """The cached .bin is used offline, though no one can say that there is no .safetensors."""
    snapshot = tmp_path / "models--owner--name/snapshots/1234"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"cannot get model.safetensors of owner/name .*no network or offline"
    ):
        read_source("owner/name")
    kat_file(snapshot / "pytorch_model.bin")
    assert read_source("owner/name").title == "KAT"
    (snapshot / "config.json").write_text('{"num_classes": 10}')
    assert read_source("owner/name").hints == {"num_labels": 10}


def test_sharded_hub_id(hub):
    folder, _ = hub
    repository = folder / "owner/name"
    repository.mkdir(parents=True)
    state = original_state("kat")
    (repository / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(state, "model-1.safetensors")})
    )
    with pytest.raises(ValueError, match=r"names model-1.safetensors, which is not there"):
        read_source("owner/name")
    save_file(state, repository / "model-1.safetensors")
    assert read_source("owner/name").state.keys() == state.keys()


def test_transformers_folder(tmp_path):
    """The hints of its config are taken; an activation or model that ours is not is refused."""
    config = ViTConfig(**VIT, num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, hidden_dropout_prob=0.1)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    source = read_source(tmp_path)
    assert source.title == "transformers ViT"
    assert source.hints["id2label"] == {0: "a", 1: "b", 2: "c"}
    kept = {"num_attention_heads": 2, "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "num_labels": 3}
    assert kept.items() <= source.hints.items()
    content = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"hidden_act": "relu"}, "its activation is relu"),
        ({"hidden_act": "quick_gelu"}, "its activation is quick_gelu"),
        ({"model_type": "swin"}, "it is a swin model; vit, deit, dinov2"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            read_source(tmp_path)


def test_distilled_deit(tmp_path):
    from flashkat_hf.conversion.tensor_names import to_flashkat

    DeiTForImageClassification(DeiTConfig(**VIT)).save_pretrained(tmp_path)
    source = read_source(tmp_path)
    with pytest.raises(ValueError, match="a distillation token, which a FlashKAT has not"):
        to_flashkat(source.state, {}, source.hints)


def test_timm_architecture_tells_heads(tmp_path):
    """A model of timm says what the weights cannot, if timm knows the name."""
    save_file(timm_vit().state_dict(), tmp_path / "model.safetensors")

    def hints(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_source(tmp_path).hints

    assert hints(architecture="vit_large_patch14_224")["num_attention_heads"] == 16
    args = {"num_heads": 4, "depth": 2, "embed_dim": 64}
    assert hints(architecture="vit_tiny_patch16_224", model_args=args)["num_attention_heads"] == 4
    assert hints(architecture="kat_tiny_patch16_224") == {}
    for architecture, message in (
        ("vit_base_patch16_clip_quickgelu_224", "its activation is QuickGELU"),
        ("deit_tiny_distilled_patch16_224", "is a VisionTransformerDistilled"),
    ):
        with pytest.raises(ValueError, match=message):
            hints(architecture=architecture)


def processor_of(image_size=32, transform=None, **fields):
    source = source_module.Source(**{"name": "x.pth", "title": "timm ViT", "state": {}, **fields})
    return image_processor(source, image_size, transform)


def test_image_processor_by_kind():
    """KAT: 256, crop 224, ImageNet; augreg ViTs: timm's 248, mean and std 0.5; DeiT by its name."""
    kat, note = processor_of(224, title="KAT")
    assert (kat.size["shortest_edge"], kat.crop_size["height"], note) == (256, 224, None)
    assert list(kat.image_mean) == [0.485, 0.456, 0.406]
    vit, note = processor_of(224)
    assert (vit.size["shortest_edge"], list(vit.image_mean), list(vit.image_std)) == (
        248,
        [0.5] * 3,
        [0.5] * 3,
    )
    assert note == "image transform augreg assumed; --transform imagenet says otherwise"
    assert processor_of(224, name="deit_small.pth")[0].image_std == kat.image_std
    assert processor_of(224, transform="imagenet")[0].image_mean == kat.image_mean
    with pytest.raises(ValueError, match="unknown transform 'clip'; known are imagenet, augreg"):
        processor_of(transform="clip")


def test_image_processor_of_timms_config():
    config = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}}
    processor, note = processor_of(224, config=config)
    assert (processor.size["shortest_edge"], list(processor.image_mean), note) == (248, [0.1, 0.2, 0.3], None)
    assert list(processor_of(224, config=config["pretrained_cfg"])[0].image_std) == [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("settings", "size", "crop"),
    [
        ({"size": 16, "resample": 2}, {"height": 32, "width": 32}, False),
        ({"size": {"height": 16, "width": 16}, "do_center_crop": False}, {"height": 32, "width": 32}, False),
        (
            {"size": {"shortest_edge": 20}, "crop_size": 16, "do_center_crop": True},
            {"shortest_edge": 40},
            True,
        ),
        (
            {"size": 20, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True},
            {"height": 40, "width": 40},
            True,
        ),
    ],
)
def test_image_processor_of_transformers(settings, size, crop):
    """Its own, scaled from 16 to 32 pixels; and the images come out at that size."""
    processor, note = processor_of(processor=settings | {"image_mean": [0.2] * 3})
    assert note is None
    assert {side: pixels for side, pixels in dict(processor.size).items() if pixels} == size
    assert processor.do_center_crop == crop
    assert processor.crop_size["height"] == 32
    assert list(processor.image_mean) == [0.2] * 3
    assert processor.resample == settings.get("resample", 3)
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_image_processor_without_square_images():
    with pytest.raises(ValueError, match=r"makes no square images: size \{'shortest_edge': 20\}"):
        processor_of(processor={"size": {"shortest_edge": 20}})


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3}, "state_dict"),
        (lambda state: {"model_state_dict": state, "optimizer": {}}, "model_state_dict"),
        (lambda state: {"network": {f"_orig_mod.{k}": v for k, v in state.items()}}, "network"),
    ],
)
def test_checkpoints_of_other_trainers(tmp_path, content, note):
    """Lightning's has its module's name before each tensor."""
    state = original_state("kat")
    torch.save(content(state), tmp_path / "x.ckpt")
    source = read_source(tmp_path / "x.ckpt")
    assert source.notes == [f"weights from {note}"]
    assert strip_prefix(source.state).keys() == state.keys()
    assert source.title == "KAT"
