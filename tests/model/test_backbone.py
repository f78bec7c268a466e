"""FlashKATBackbone: its feature maps, AutoBackbone, other image sizes, the pyramid."""

import pytest
import torch
from helpers import micro_config
from transformers import AutoBackbone, AutoConfig
from transformers.backbone_utils import load_backbone

from flashkat_hf import FlashKATBackbone, FlashKATConfig, FlashKATForImageClassification, FlashKATModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with registers, as a training run leaves it."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    model = FlashKATForImageClassification(micro_config(num_register_tokens=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    return folder


def test_feature_maps_are_the_models_hidden_states(folder):
    images = torch.randn(2, 3, 32, 32)
    model = FlashKATModel.from_pretrained(folder)
    expected = model(images, output_hidden_states=True)
    backbone, info = FlashKATBackbone.from_pretrained(
        folder, out_features=["stem", "stage1", "stage2"], output_loading_info=True
    )
    assert not info["missing_keys"]
    assert info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}
    outputs = backbone(images)
    assert (outputs.hidden_states, outputs.attentions) == (None, None)
    assert backbone.channels == [64, 64, 64]
    for feature_map, hidden in zip(outputs.feature_maps, expected.hidden_states, strict=True):
        tokens = model.norm(hidden)[:, 3:]
        for row, column in ((0, 0), (1, 2), (3, 3)):
            torch.testing.assert_close(feature_map[:, :, row, column], tokens[:, 4 * row + column])
    last = FlashKATBackbone.from_pretrained(folder)
    torch.testing.assert_close(last(images).feature_maps[0].flatten(2).mT, expected.last_hidden_state[:, 3:])
    raw = FlashKATBackbone.from_pretrained(folder, apply_layernorm=False, out_indices=[1])
    torch.testing.assert_close(raw(images).feature_maps[0].flatten(2).mT, expected.hidden_states[1][:, 3:])


def test_tokens_instead_of_maps(folder):
    backbone = FlashKATBackbone.from_pretrained(folder, reshape_hidden_states=False)
    images = torch.randn(2, 3, 32, 48)
    tokens = FlashKATModel.from_pretrained(folder)(images, interpolate_pos_encoding=True).last_hidden_state
    (features,) = backbone(images).feature_maps
    torch.testing.assert_close(features, torch.cat((tokens[:, :1], tokens[:, 3:]), 1))


def test_auto_backbone(folder):
    config = AutoConfig.from_pretrained(folder, out_indices=[0, 2])
    backbone = AutoBackbone.from_config(config)
    assert type(backbone) is FlashKATBackbone
    assert backbone.out_features == ["stem", "stage2"]
    assert type(load_backbone(AutoConfig.for_model("upernet", backbone_config=config))) is FlashKATBackbone


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (8, 64)])
def test_any_image_size(size):
    backbone = FlashKATBackbone(micro_config(pooling="mean"))
    (features,) = backbone(torch.randn(2, 3, *size)).feature_maps
    assert features.shape == (2, 64, size[0] // 8, size[1] // 8)
    assert features.is_contiguous()


def test_bad_images_and_arguments():
    backbone = FlashKATBackbone(micro_config())
    with pytest.raises(ValueError, match=r"image size 36x32 must be a multiple of patch_size \(8\)"):
        backbone(torch.randn(1, 3, 36, 32))
    with pytest.raises(ValueError, match="mask is no argument that FlashKATModel uses"):
        backbone(torch.randn(1, 3, 32, 32), mask=torch.ones(1))
    with pytest.raises(ValueError, match="subset of stage_names"):
        backbone.out_features = ["stage7"]


def test_outputs_that_are_asked_for():
    backbone = FlashKATBackbone(micro_config(attn_implementation="eager"))
    images = torch.randn(1, 3, 32, 32)
    outputs = backbone(images, output_hidden_states=True, output_attentions=True)
    assert [tuple(hidden.shape) for hidden in outputs.hidden_states] == [(1, 17, 64)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(1, 2, 17, 17)] * 2
    (feature_maps,) = backbone(images, return_dict=False)
    assert torch.equal(feature_maps[0], outputs.feature_maps[0])


def test_pyramid(folder):
    """Four scales of the last map; each has gradients, and they come back from a folder."""
    backbone, info = FlashKATBackbone.from_pretrained(folder, pyramid_channels=8, output_loading_info=True)
    assert all(name.startswith("pyramid.") for name in info["missing_keys"])
    assert backbone.channels == [8] * 4
    outputs = backbone(torch.randn(2, 3, 32, 48))
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [tuple(features.shape) for features in outputs.feature_maps] == [(2, 8, *size) for size in sizes]
    sum(features.square().mean() for features in outputs.feature_maps).backward()
    unmoved = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert unmoved == []
    two = FlashKATBackbone(
        FlashKATConfig(**{**backbone.config.to_dict(), "out_features": ["pyramid2", "pyramid3"]})
    )
    assert len(two(torch.randn(1, 3, 24, 40)).feature_maps) == len(two.channels) == len(two.pyramid) == 2
    two.out_features = ["pyramid1"]
    with pytest.raises(ValueError, match="built with the levels pyramid2, pyramid3, not with pyramid1"):
        two(torch.randn(1, 3, 24, 40))


def test_pyramid_is_made_of_the_last_map_alone():
    """Its coarsest map is that of each two by two patches' largest values, through its own convolutions."""
    backbone = FlashKATBackbone(micro_config(pyramid_channels=8)).eval()
    images = torch.randn(1, 3, 32, 32)
    tokens = backbone.flashkat(images).last_hidden_state[:, 1:]
    features = tokens.mT.unflatten(2, (4, 4))
    pooled = features.unflatten(2, (2, 2)).unflatten(4, (2, 2)).amax((3, 5))
    expected = backbone.pyramid["pyramid4"][1:](pooled)
    torch.testing.assert_close(backbone(images).feature_maps[3], expected)


def test_compiles_in_one_graph():
    backbone = FlashKATBackbone(micro_config(out_indices=[1, 2]))
    images = torch.randn(2, 3, 32, 48)
    compiled = torch.compile(backbone, backend="aot_eager", fullgraph=True)(images)
    for features, expected in zip(compiled.feature_maps, backbone(images).feature_maps, strict=True):
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_a_pyramid_that_a_checkpoint_lacks_starts_as_a_fresh_one(folder):
    """Its norms are ones and zeros, not what the memory held."""
    options = {"pyramid_channels": 32, "out_features": ["pyramid1", "pyramid3"]}
    backbone = FlashKATBackbone.from_pretrained(folder, **options)
    norms = [module for module in backbone.pyramid.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 5
    for norm in norms:
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
    for name, parameter in backbone.pyramid.named_parameters():
        assert parameter.abs().max() < 2, name
