"""Names: strict in both directions, for every tensor of the released models; what is refused, and how."""

import json

import pytest
import torch
from helpers import DATA, original_state, timm_vit
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.conversion.tensor_names import strip_prefix, to_flashkat, to_original

SHAPES = json.loads((DATA / "kat_state_dict_shapes.json").read_text())
HEADS = {"num_attention_heads": 2}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("kind", ["kat", "flashkat"])
def test_every_released_tensor_there_and_back(kind, size, tmp_path):
    """Random values through conversion, model, file, model and back, bit for bit."""
    shapes = SHAPES[kind][size]["tensors"]
    original = {name: torch.rand(shape) for name, shape in shapes.items()}
    config, state = to_flashkat(original)
    expected = SHAPES["config"][size]
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        expected["embed_dim"],
        expected["depth"],
        expected["num_heads"],
    )
    assert (config.image_size, config.patch_size, config.num_labels, config.pooling) == (224, 16, 1000, "cls")
    assert (config.num_groups, config.num_numerator_groups, config.intermediate_size) == (
        8,
        1,
        4 * expected["embed_dim"],
    )
    with torch.device("meta"):
        model = FlashKATForImageClassification(config)
    model.load_state_dict(state, strict=True, assign=True)
    assert model.num_parameters() == SHAPES[kind][size]["n_parameters"]
    model.save_pretrained(tmp_path)
    again = FlashKATForImageClassification.from_pretrained(tmp_path)
    assert equal(to_original(again.state_dict(), kind), original)
    del model, again, state
    assert equal(to_original(load_file(tmp_path / "model.safetensors"), kind), original)


def test_the_other_naming():
    """KAT's weights under FlashKAT's names are the same model."""
    _, state = to_flashkat(original_state("kat"), HEADS)
    other = to_original(state, "flashkat")
    assert other.keys() == original_state("flashkat").keys()
    assert equal(to_flashkat(other, HEADS)[1], state)


def test_numerators_for_each_group():
    original = {
        name: torch.rand(8, 6) if "numerator" in name else tensor
        for name, tensor in original_state("flashkat").items()
    }
    config, state = to_flashkat(original, HEADS)
    assert config.num_numerator_groups == 8
    assert equal(to_original(state, "flashkat"), original)
    with pytest.raises(
        ValueError, match=r"KAT shares one numerator, but flashkat.layers.0.mlp.act1.numerator has 8"
    ):
        to_original(state, "kat")


def test_mean_pooling_there_and_back():
    original = {
        name.replace("norm.", "fc_norm.") if name[0] == "n" else name: v for name, v in SHAPED.items()
    }
    config, state = to_flashkat(original, HEADS)
    assert config.pooling == "mean"
    assert equal(to_original(state, "kat", "mean"), original)


SHAPED = original_state("kat")
RENAMED = {f"module.{name}": tensor for name, tensor in SHAPED.items()}


def test_wrappers_prefixes():
    assert equal(strip_prefix(RENAMED), SHAPED)
    assert equal(to_flashkat(RENAMED, HEADS)[1], to_flashkat(SHAPED, HEADS)[1])


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.module.",
        "module._orig_mod.",
        "model.",
        "network.",
        "_orig_mod.model.network.module.",
        "module.module._orig_mod._orig_mod.",
        "model._fsdp_wrapped_module.",
        "student.backbone.",
    ],
)
def test_prefixes_in_any_order_and_number(prefix):
    assert equal(strip_prefix({prefix + name: tensor for name, tensor in SHAPED.items()}), SHAPED)


@pytest.mark.parametrize("outer", ["", "model.", "_orig_mod.module."])
def test_a_head_beside_the_model_under_a_prefix(outer):
    names = ("embeddings.cls_token", "encoder.layer.0.output.dense.weight", "classifier.weight")
    state = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    wrapped = {outer + "vit." * (name[0] == "e") + name: tensor for name, tensor in state.items()}
    assert equal(strip_prefix(wrapped), state)


def test_wrapped_parts():
    def wrapped(name: str) -> str:
        for part in ("blocks.0.", "blocks.1.mlp."):
            name = name.replace(part, f"{part}_checkpoint_wrapped_module.").replace(
                ".attn.", ".attn._orig_mod."
            )
        return name

    state = {wrapped(name): tensor for name, tensor in SHAPED.items()}
    assert state.keys() != SHAPED.keys()
    assert equal(strip_prefix(state), SHAPED)


def test_several_models_in_one_file():
    both = {f"{prefix}{name}": tensor for prefix in ("model.", "ema.") for name, tensor in SHAPED.items()}
    with pytest.raises(
        ValueError, match=r"it holds 2 models, ema\.\*, model\.\*; save the state dict of one"
    ):
        strip_prefix(both)
    with pytest.raises(ValueError, match=r"tensors of \d+ names, less what wrappers add"):
        strip_prefix(SHAPED | {"module.norm.weight": SHAPED["norm.weight"]})


def without(name: str) -> dict:
    return {key: tensor for key, tensor in SHAPED.items() if key != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "neither a KAT nor a ViT .* it has 0 tensors"),
        ({"conv1.weight": torch.zeros(3)}, "neither a KAT nor a ViT .* conv1.weight"),
        ({"flashkat.norm.weight": torch.zeros(3)}, "a FlashKAT of this package already"),
        (without("blocks.1.norm1.bias"), r"do not fit: 1 missing \(blocks.1.norm1.bias\)"),
        (without("cls_token"), "cls_token is missing"),
        (SHAPED | {"blocks.1.x": torch.zeros(2), "y": torch.zeros(2)}, r"2 unexpected \(blocks.1.x, y\)"),
        (SHAPED | {"blocks.3.norm1.bias": torch.zeros(64)}, r"1 unexpected \(blocks.3.norm1.bias\)"),
        (
            SHAPED | {"blocks.1.norm1.bias": torch.zeros(63), "cls_token": torch.zeros(1, 1, 60)},
            r"2 misshapen \(cls_token \(1, 1, 60\) instead of \(1, 1, 64\), blocks.1.norm1.bias \(63,\)",
        ),
        (
            SHAPED | {"blocks.0.mlp.act1.weight_numerator": torch.zeros(3, 6)},
            "3 numerators for 8 denominators",
        ),
        (SHAPED | {"blocks.0.mlp.act1.weight_numerator": torch.zeros(1, 4)}, r"\(1, 4\) instead of \(1, 6\)"),
        (SHAPED | {"pos_embed": torch.zeros(1, 20, 64)}, "20 positions are no square"),
        (SHAPED | {"pos_embed": torch.zeros(20, 64)}, "3 axes are expected"),
        (
            SHAPED
            | {"patch_embed.proj.weight": torch.zeros(64, 3, 8, 4), "pos_embed": torch.zeros(1, 33, 64)},
            r"33 positions are no square of patches, .*; image_size=\[HEIGHT, WIDTH\] says more",
        ),
        (
            SHAPED | {"head.bias": torch.zeros(10, dtype=torch.int8)},
            "head.bias is no tensor of floating .* torch.int8",
        ),
        (SHAPED | {"head.bias": None}, "head.bias is no tensor of floating point numbers but NoneType"),
        (SHAPED | {"blocks.0.ls1.gamma": torch.ones(64)}, "layer scale"),
        (SHAPED | {"dist_token": torch.ones(1, 1, 64)}, "a distillation token.*: dist_token"),
    ],
)
def test_refused_states(state, message):
    with pytest.raises(ValueError, match=message):
        to_flashkat(state, HEADS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qk_norm": True}, "normalised queries"),
        ({"pre_norm": True}, "a norm before the first block"),
        ({"global_pool": "map"}, "attention pooling"),
        ({"scale_mlp_norm": True}, "norms inside attention or MLP"),
        ({"class_token": False, "global_pool": "avg"}, "cls_token is missing"),
    ],
)
def test_refused_relatives_of_vit(arguments, message):
    state = VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2, **arguments}
    ).state_dict()
    with pytest.raises(ValueError, match=message):
        to_flashkat(state, HEADS)


@pytest.mark.parametrize(
    ("settings", "hints", "message"),
    [
        ({"hidden_size": 32}, {}, "the settings say hidden_size=32, but the weights hidden_size=64"),
        (HEADS, {"num_labels": 7}, "the source's config says num_labels=7, but the weights num_labels=10"),
        (
            {"heads": 2},
            {},
            "heads is no field of the config that can be set; known are .*num_attention_heads",
        ),
        ({"num_attention_heads": 5}, {}, "hidden_size must be a multiple of num_attention_heads"),
        ({"num_attention_heads": "two"}, {}, "num_attention_heads"),
        ({"act2_init": "step", **HEADS}, {}, "unknown start table 'step'"),
    ],
)
def test_refused_settings(settings, hints, message):
    with pytest.raises(ValueError, match=message) as caught:
        to_flashkat(SHAPED, settings, hints)
    assert "\n" not in str(caught.value)


def test_heads_of_64_channels_or_as_told():
    assert to_flashkat(SHAPED)[0].num_attention_heads == 1
    assert to_flashkat(SHAPED, {}, {"num_attention_heads": 4})[0].num_attention_heads == 4
    assert to_flashkat(SHAPED, HEADS, {"num_attention_heads": 4})[0].num_attention_heads == 2
    narrow = timm_vit(embed_dim=48).state_dict()
    with pytest.raises(ValueError, match="48 channels are no multiple of 64: set num_attention_heads"):
        to_flashkat(narrow)
    assert to_flashkat(narrow, {"num_attention_heads": 3})[0].hidden_size == 48


def test_start_tables_of_a_vit():
    """Ours by default; the original's swish, other groups and own numerators on request."""
    state = timm_vit().state_dict()
    config, ours = to_flashkat(state, HEADS)
    assert (config.act1_init, config.act2_init) == ("identity", "gelu")
    assert torch.equal(ours["flashkat.layers.1.mlp.act1.numerator"], torch.tensor([[0.0, 1, 0, 0, 0, 0]]))
    assert not ours["flashkat.layers.1.mlp.act1.denominator"].any()
    swish, other = to_flashkat(
        state,
        {**HEADS, "act2_init": "swish", "num_groups": 4, "num_numerator_groups": 4, "drop_path_rate": 0.1},
    )
    assert swish.drop_path_rate == 0.1
    assert other["flashkat.layers.1.mlp.act2.numerator"].shape == (4, 6)
    assert not torch.equal(
        other["flashkat.layers.1.mlp.act2.numerator"][:1], ours["flashkat.layers.1.mlp.act2.numerator"]
    )


def test_dtypes():
    """The widest of a KAT's is kept; a ViT's tables need float32."""
    half = {name: tensor.bfloat16() for name, tensor in SHAPED.items()}
    assert {tensor.dtype for tensor in to_flashkat(half, HEADS)[1].values()} == {torch.bfloat16}
    half["norm.weight"] = SHAPED["norm.weight"]
    assert {tensor.dtype for tensor in to_flashkat(half, HEADS)[1].values()} == {torch.float32}
    vit = {name: tensor.half() for name, tensor in timm_vit().state_dict().items()}
    assert {tensor.dtype for tensor in to_flashkat(vit, HEADS)[1].values()} == {torch.float32}


def test_views_and_tied_tensors_become_tensors_of_their_own(tmp_path):
    flat = torch.cat([tensor.flatten() for tensor in SHAPED.values()])
    parts = flat.split([tensor.numel() for tensor in SHAPED.values()])
    views = {
        name: part.view(tensor.shape) for (name, tensor), part in zip(SHAPED.items(), parts, strict=True)
    }
    views["blocks.1.norm1.bias"] = views["blocks.0.norm1.bias"]
    config, state = to_flashkat(views, HEADS)
    model = FlashKATForImageClassification(config)
    model.load_state_dict(state, assign=True)
    model.save_pretrained(tmp_path)
    assert equal(to_original(load_file(tmp_path / "model.safetensors")), views)


def test_unknown_naming():
    with pytest.raises(ValueError, match="unknown naming 'timm'; known are kat, flashkat"):
        to_original({}, "timm")
    with pytest.raises(ValueError, match=r"bert.x has no name in kat's naming"):
        to_original({"bert.x": torch.zeros(1)})
