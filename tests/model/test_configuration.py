"""FlashKATConfig: named sizes, round trip, and a clear error for each bad field."""

import pytest
from huggingface_hub.errors import StrictDataclassError

from flashkat_hf import FlashKATConfig


@pytest.mark.parametrize(
    ("size", "hidden_size", "heads", "intermediate_size"),
    [("tiny", 192, 3, 768), ("small", 384, 6, 1536), ("base", 768, 12, 3072)],
)
def test_named_sizes(size, hidden_size, heads, intermediate_size):
    config = FlashKATConfig.from_size(size, num_labels=7, pooling="mean")
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (
        hidden_size,
        heads,
        intermediate_size,
    )
    assert (config.num_hidden_layers, config.num_labels, config.pooling) == (12, 7, "mean")


def test_the_micro_size():
    config = FlashKATConfig.from_size("micro")
    assert (config.image_size, config.patch_size, config.num_hidden_layers, config.hidden_size) == (
        16,
        4,
        4,
        64,
    )
    assert FlashKATConfig.from_size("micro", image_size=32, patch_size=8).patch_size == 8


def test_unknown_size():
    with pytest.raises(ValueError, match="unknown size 'huge'; known sizes: micro, tiny, small, base"):
        FlashKATConfig.from_size("huge")


def test_round_trip(tmp_path):
    config = FlashKATConfig.from_size(
        "tiny",
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
        drop_path_rate=0.1,
        num_numerator_groups=8,
        act1_init="tanh",
        initializer="variance_preserving",
    )
    config.save_pretrained(tmp_path)
    assert FlashKATConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "wide", "hidden_size"),
        ("hidden_size", 20.5, "hidden_size"),
        ("hidden_size", 0, "hidden_size must be positive; got hidden_size=0"),
        (
            "hidden_size",
            772,
            "hidden_size must be a multiple of num_groups; got hidden_size=772, num_groups=8",
        ),
        ("intermediate_size", 3073, "intermediate_size must be a multiple of num_groups"),
        ("num_attention_heads", 7, "hidden_size must be a multiple of num_attention_heads"),
        ("image_size", 225, "image_size must be a multiple of patch_size; got image_size=225, patch_size=16"),
        ("num_numerator_groups", 4, "num_numerator_groups must be 1 or num_groups"),
        ("drop_path_rate", 1.0, r"drop_path_rate must be in \[0, 1\); got drop_path_rate=1.0"),
        ("hidden_dropout_prob", -0.1, r"hidden_dropout_prob must be in \[0, 1\)"),
        ("layer_norm_eps", 0.0, "layer_norm_eps must be positive"),
        ("act1_init", "softplus", "'softplus'"),
        ("act2_init", 3, "act2_init"),
        ("pooling", "max", "pooling"),
        ("initializer", "zeros", "initializer"),
        ("qkv_bias", "yes", "qkv_bias"),
    ],
)
def test_bad_fields(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        FlashKATConfig(**{field: value})
