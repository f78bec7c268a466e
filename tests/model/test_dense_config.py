"""What the config has for dense tasks: pairs of sizes, registers, masks, features; and what is not used."""

import json

import pytest
import torch
from helpers import micro_config, relative_error, stored_model
from huggingface_hub.errors import StrictDataclassError

from flashkat_hf import (
    FlashKATConfig,
    FlashKATForImageClassification,
    FlashKATForMaskedImageModeling,
    FlashKATModel,
)
from flashkat_hf.model.masked_image_flashkat import random_mask

SAVED_FIELDS = {  # of a classifier, as it was saved before there were dense tasks
    *("act1_init", "act2_init", "attention_probs_dropout_prob", "auto_map", "drop_path_rate"),
    *("hidden_dropout_prob", "hidden_size", "id2label", "image_size", "initializer", "initializer_range"),
    *("intermediate_size", "label2id", "layer_norm_eps", "model_type", "num_attention_heads", "num_channels"),
    *("num_groups", "num_hidden_layers", "num_numerator_groups", "patch_size", "pooling", "qkv_bias"),
    *("simplified_functions", "transformers_version"),
}


def random_model(model_class=FlashKATModel, *arguments, **overrides):
    """Return a model in evaluation mode, every parameter random and large enough to matter."""
    model = model_class(micro_config(**overrides), *arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def test_a_classifier_is_saved_as_ever(tmp_path):
    config = micro_config()
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.keys() == SAVED_FIELDS
    assert (saved["image_size"], saved["patch_size"]) == (32, 8)
    names = {name for name in FlashKATForImageClassification(config).state_dict() if "layers" not in name}
    embeddings = {"cls_token", "position_embeddings", "patch_embeddings.weight", "patch_embeddings.bias"}
    assert names == {
        *(f"flashkat.embeddings.{name}" for name in embeddings),
        *(f"{part}.{kind}" for part in ("flashkat.norm", "classifier") for kind in ("weight", "bias")),
    }


def test_dense_fields_come_back(tmp_path):
    fields = {
        "image_size": (32, 48),
        "patch_size": [4, 8],
        "num_register_tokens": 3,
        "apply_layernorm": False,
        "reshape_hidden_states": False,
        "out_indices": [1, 2],
    }
    config = micro_config(**fields)
    config.save_pretrained(tmp_path)
    loaded = FlashKATConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.image_size, loaded.patch_size) == ((32, 48), (4, 8))
    assert (loaded.out_features, loaded.out_indices) == (["stage1", "stage2"], [1, 2])
    assert FlashKATConfig.from_pretrained(tmp_path, out_features=["stem"]).out_indices == [0]
    pyramid = micro_config(pyramid_channels=16)
    assert pyramid.out_features == ["pyramid1", "pyramid2", "pyramid3", "pyramid4"]
    assert "out_features" not in pyramid.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (32, 44)}, r"image_size must be a multiple of patch_size; got image_size=\(32, 44\)"),
        ({"image_size": [32, 32, 3]}, "Field 'image_size' expected a tuple of length 2, got 3"),
        ({"image_size": (32, 0)}, "image_size must be positive"),
        ({"patch_size": (8, 0)}, "patch_size must be positive"),
        ({"image_size": 32.5}, "image_size"),
        ({"num_register_tokens": -1}, "num_register_tokens must be 0 or more; got num_register_tokens=-1"),
        ({"pyramid_channels": 0}, "pyramid_channels must be positive"),
        ({"hidden_size": 96, "num_attention_heads": None}, "num_attention_heads must be given where"),
        ({"out_features": ["stage9"]}, r"subset of stage_names: \['stem', 'stage1', 'stage2'\].*stage9"),
        ({"out_features": ["stage2", "stage1"]}, "same order as stage_names"),
        ({"out_indices": [3]}, r"out_indices must be in \[-3, 3\); got 3"),
        ({"out_indices": [-4]}, r"out_indices must be in \[-3, 3\); got -4"),
        ({"pyramid_channels": 8, "out_features": ["stage1"]}, "subset of stage_names: .*pyramid1"),
    ],
)
def test_bad_dense_fields(fields, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message) as error:
        micro_config(**fields)
    assert str(error.value).count("\n") <= 1  # huggingface_hub's own has a title


def test_heads_follow_the_width():
    assert FlashKATConfig(hidden_size=64).num_attention_heads == 1
    assert FlashKATConfig().num_attention_heads == 12
    assert FlashKATConfig(hidden_size=96, num_attention_heads=4).num_attention_heads == 4


def test_pairs_of_sizes():
    """Patches of 4x8 in images of 16x32 are those of an image cut by hand."""
    model = random_model(image_size=(16, 32), patch_size=(4, 8))
    images = torch.randn(2, 3, 16, 32)
    assert model(images).last_hidden_state.shape == (2, 17, 64)
    embeddings = model.embeddings
    patch = images[:, :, 8:12, 16:24]  # row 2, column 2
    token = torch.einsum("bchw,dchw->bd", patch, embeddings.patch_embeddings.weight)
    token = token + embeddings.patch_embeddings.bias + embeddings.position_embeddings[:, 1 + 2 * 4 + 2]
    torch.testing.assert_close(embeddings(images)[:, 1 + 2 * 4 + 2], token)
    with pytest.raises(ValueError, match="images are 32x16 but the model takes 16x32"):
        model(images.mT.contiguous())
    with pytest.raises(ValueError, match=r"16x28 must be a multiple of patch_size \(4x8\)"):
        model(images[..., :28], interpolate_pos_encoding=True)
    assert model(images[..., :24], interpolate_pos_encoding=True).last_hidden_state.shape == (2, 13, 64)


def test_images_that_are_not_square_classify_and_resize(tmp_path):
    model = random_model(FlashKATForImageClassification, image_size=(16, 32), patch_size=8)
    model.save_pretrained(tmp_path)
    again = FlashKATForImageClassification.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 32)
    assert torch.equal(again(images).logits, model(images).logits)
    larger = torch.randn(2, 3, 40, 24)
    interpolated = model(larger, interpolate_pos_encoding=True).logits
    model.flashkat.embeddings.resize(40, 24)
    torch.testing.assert_close(model(larger).logits, interpolated)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_register_tokens(pooling):
    """They stand between cls and patches, have no position, and no mean counts them."""
    model = random_model(num_register_tokens=3, pooling=pooling)
    images = torch.randn(2, 3, 32, 32)
    tokens = model.embeddings(images)
    assert tokens.shape == (2, 1 + 3 + 16, 64)
    registers = model.embeddings.register_tokens.expand(2, -1, -1)
    torch.testing.assert_close(tokens[:, 1:4], registers)
    outputs = model(images)
    pooled = outputs.last_hidden_state[:, 0]
    if pooling == "mean":
        pooled = model.norm(outputs.last_hidden_state[:, 4:].mean(1))
    torch.testing.assert_close(outputs.pooler_output, pooled)
    plain = random_model(pooling=pooling)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "register" not in k})
    plain_tokens = plain.embeddings(images)
    torch.testing.assert_close(torch.cat((tokens[:, :1], tokens[:, 4:]), 1), plain_tokens)
    fresh = FlashKATModel(micro_config(num_register_tokens=3)).embeddings.register_tokens
    assert 0 < fresh.abs().max() < 1e-5


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_without_a_pooled_vector(pooling):
    """Tokens are normalised with both poolings; the parameters stay."""
    state, _, stored = stored_model("kat")
    state = {k.removeprefix("flashkat."): v for k, v in state.items() if "classifier" not in k}
    model = FlashKATModel(micro_config(pooling=pooling), add_pooling_layer=False).eval()
    model.load_state_dict(state)
    outputs = model(stored["input"])
    assert outputs.pooler_output is None
    assert relative_error(outputs.last_hidden_state, stored["hidden_state"]) <= 2e-5


def test_hidden_patches():
    model = random_model(FlashKATForMaskedImageModeling, image_size=(16, 32), patch_size=(4, 8))
    images, mask = torch.randn(2, 3, 16, 32), random_mask(2, (4, 4), 0.5)
    assert mask.sum(1).tolist() == [8, 8]
    outputs = model(images, bool_masked_pos=mask)
    assert outputs.reconstruction.shape == images.shape
    pixels = mask.reshape(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    error = (outputs.reconstruction - images).abs()
    torch.testing.assert_close(outputs.loss, error[pixels].mean())
    outputs.loss.backward()
    assert model.flashkat.embeddings.mask_token.grad.abs().sum() > 0
    changed = torch.where(pixels, torch.randn_like(images), images)  # nothing of what is hidden gets through
    again = model(changed, bool_masked_pos=mask)
    torch.testing.assert_close(again.reconstruction, outputs.reconstruction)
    assert model(images).loss is None
    assert model(images, return_dict=False)[0].shape == images.shape


def test_masked_training_then_classes(tmp_path):
    """The pretraining lines of docs/dense.md: steps on one batch, then a classifier of the same weights."""
    model = FlashKATForMaskedImageModeling(micro_config())
    images = torch.randn(8, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    mask = random_mask(8, (4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = model(images, bool_masked_pos=mask).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    classifier, info = FlashKATForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    layer = "layers.1.mlp.fc1.weight"
    assert torch.equal(classifier.flashkat.get_parameter(layer), model.flashkat.get_parameter(layer))


def test_bad_masks():
    images, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="bool_masked_pos needs a model with a mask token"):
        FlashKATModel(micro_config())(images, bool_masked_pos=mask)
    model = FlashKATModel(micro_config(), use_mask_token=True)
    with pytest.raises(
        ValueError, match=r"must have shape \(batch, patches\), here \(2, 16\), not \(2, 15\)"
    ):
        model(images, bool_masked_pos=mask[:, 1:])
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\]; got 1\.5"):
        random_mask(2, (4, 4), 1.5)


@pytest.mark.parametrize(
    "model_class", [FlashKATModel, FlashKATForImageClassification, FlashKATForMaskedImageModeling]
)
def test_an_argument_that_is_not_used_is_an_error(model_class):
    model, images = model_class(micro_config()).eval(), torch.randn(1, 3, 32, 32)
    model(images, input_ids=None)  # peft passes what nobody gave it
    for name in ("head_mask", "output_atentions", "is_causal"):
        with pytest.raises(ValueError, match=f"{name} is no argument that FlashKATModel uses"):
            model(images, **{name: True})


def test_multi_hot_labels_need_their_problem_named():
    model, images = FlashKATForImageClassification(micro_config()).eval(), torch.randn(2, 3, 32, 32)
    mixed = torch.full((2, 10), 0.1).bfloat16()
    assert model(images, labels=mixed).loss.isfinite()
    several = torch.eye(10)[:2] + torch.eye(10)[3:5]
    with pytest.raises(ValueError, match=r'a row of labels sums to 2, .*"multi_label_classification"'):
        model(images, labels=several)
    model.config.problem_type = "multi_label_classification"
    outputs = model(images, labels=several)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits, several)
    torch.testing.assert_close(outputs.loss, expected)
