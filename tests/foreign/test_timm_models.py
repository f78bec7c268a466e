"""FlashKAT by timm's interface, mostly in the micro size, by timm's arguments."""

import pytest
import timm
import torch
from helpers import MICRO
from timm.optim import create_optimizer_v2

import flashkat_hf.timm
from flashkat_hf import FlashKATForImageClassification

SIZES = {name: value for name, value in MICRO.items() if name != "image_size"}


def micro(**arguments):
    return timm.create_model(
        "flashkat_tiny_patch16_224", **{**SIZES, "img_size": 32, "num_classes": 10, **arguments}
    )


def test_registered_sizes():
    names = timm.list_models("flashkat_*")
    assert names == [f"flashkat_{size}_patch16_224" for size in ("base", "small", "tiny")]
    millions = []
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        assert isinstance(model, flashkat_hf.timm.TimmFlashKAT)
        millions.append(round(sum(parameter.numel() for parameter in model.parameters()) / 1e6))
    assert millions == [87, 22, 6]


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_a_folder_s_weights_give_its_logits(global_pool, bare_folder):
    """As timm's `validate --checkpoint FOLDER/model.safetensors` loads them."""
    images = torch.randn(2, 3, 32, 32)
    model = micro(checkpoint_path=str(bare_folder / "model.safetensors"), global_pool=global_pool).eval()
    plain = FlashKATForImageClassification.from_pretrained(
        bare_folder, pooling={"token": "cls", "avg": "mean"}[global_pool]
    ).eval()
    with torch.no_grad():
        assert torch.equal(model(images), plain(images).logits)
        assert torch.equal(model.forward_head(model.forward_features(images)), model(images))
    data = timm.data.resolve_model_data_config(model)
    assert (data["crop_pct"], data["interpolation"], data["mean"][0]) == (0.875, "bicubic", 0.485)


def test_features_only():
    images = torch.randn(2, 3, 32, 40)
    features = micro(features_only=True, out_indices=(0, -1), dynamic_img_size=True).eval()
    maps = features(images)
    assert [tuple(map_.shape) for map_ in maps] == [(2, 64, 4, 5)] * 2
    assert features.feature_info.channels() == [64, 64]
    assert features.feature_info.reduction() == [8, 8]
    model = features.model
    hidden = model.flashkat(images, True, output_hidden_states=True).hidden_states
    for map_, tokens in zip(maps, hidden[1:], strict=True):
        torch.testing.assert_close(map_.flatten(2).mT, tokens[:, 1:])


def test_intermediates_of_timm_s_interface():
    model, images = micro().eval(), torch.randn(2, 3, 32, 32)
    tokens, pairs = model.forward_intermediates(
        images, 1, return_prefix_tokens=True, norm=True, output_fmt="NLC"
    )
    torch.testing.assert_close(tokens, model.forward_features(images))
    torch.testing.assert_close(torch.cat(pairs[0][::-1], 1), tokens)
    assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
    assert len(model.flashkat.layers) == 1
    assert isinstance(model.get_classifier(), torch.nn.Identity)


def test_heads_and_training():
    model, images = micro(drop_path_rate=0.1), torch.randn(2, 3, 32, 32)
    model.reset_classifier(3, "avg")
    model.set_grad_checkpointing()
    assert model(images).shape == (2, 3)
    assert model.num_classes == 3
    model(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7).param_groups
    assert len({group["lr_scale"] for group in groups}) == 4  # embeddings, two layers, norm and head
    kept = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {id(p) for name, p in model.named_parameters() if name.endswith("numerator")} <= kept
    assert micro(num_classes=0)(images).shape == (2, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": True}, "has no weights in timm; convert published ones"),
        ({"global_pool": "map"}, r"global_pool \('map'\) must be one of token, avg"),
        ({"img_size": (32, 64)}, r"img_size \(32x64\) must be square"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        micro(**arguments)
