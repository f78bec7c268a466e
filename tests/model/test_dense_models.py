"""Dense models of transformers with FlashKAT as their backbone: each learns, at an image size of its own.

The rows of the table in docs/dense.md name these tests.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import micro_config
from transformers import (
    AutoModelForSemanticSegmentation,
    DetrConfig,
    DetrForObjectDetection,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from flashkat_hf import FlashKATBackbone

IMAGES = (2, 3, 32, 48)


def backbone_config(**overrides):
    """Return the config of a micro backbone of four blocks."""
    return micro_config(num_hidden_layers=4, **overrides)


def step(model: torch.nn.Module, backbone: torch.nn.Module, forward=None, **inputs) -> None:
    """Take one step: each parameter of the backbone has a gradient, and its feature maps change."""
    assert type(backbone) is FlashKATBackbone
    before = backbone(inputs["pixel_values"]).feature_maps[0]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    loss = (forward or model)(**inputs).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    optimizer.step()
    after = backbone(inputs["pixel_values"]).feature_maps[0]
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("pyramid_channels", [None, 16])
def test_upernet(pyramid_channels, tmp_path):
    features = {} if pyramid_channels else {"out_indices": [1, 2, 3, 4]}
    config = UperNetConfig(
        backbone_config=backbone_config(pyramid_channels=pyramid_channels, **features),
        hidden_size=16,
        pool_scales=[1, 2],
        use_auxiliary_head=True,
        auxiliary_in_channels=pyramid_channels or 64,
        auxiliary_channels=8,
        num_labels=3,
    )
    model = UperNetForSemanticSegmentation(config)
    images, labels = torch.randn(IMAGES), torch.randint(3, (2, 32, 48))
    labels[0, :4] = 255  # ignored
    step(model, model.backbone, pixel_values=images, labels=labels)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    torch.testing.assert_close(again(images).logits, model(images).logits)  # convolutions follow alignment
    assert again(images).logits.shape == (2, 3, 32, 48)


@pytest.mark.parametrize("registers", [0, 2])
def test_dpt(registers):
    """It takes tokens with the cls token in front; its loss for depth is the user's."""
    backbone = backbone_config(
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, num_register_tokens=registers
    )
    config = DPTConfig(backbone_config=backbone, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8)
    model = DPTForDepthEstimation(config)

    def depth_and_loss(pixel_values, labels):
        depth = model(pixel_values).predicted_depth
        return SimpleNamespace(loss=(depth - labels).abs().mean())

    images, depth = torch.randn(2, 3, 64, 48), torch.rand(2, 128, 96)  # sixteen pixels a patch
    step(model, model.backbone, depth_and_loss, pixel_values=images, labels=depth)


def targets() -> list[dict[str, torch.Tensor]]:
    """Return one box in each image: centre, width and height in parts of the image."""
    return [
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.4, 0.2, 0.3]])},
        {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.3, 0.6, 0.4, 0.5]])},
    ]


def test_detr():
    pytest.importorskip("scipy")
    config = DetrConfig(
        backbone_config=backbone_config(),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=4,
        num_labels=2,
    )
    model = DetrForObjectDetection(config)
    mask = torch.ones(2, 32, 48, dtype=torch.long)
    mask[1, :, 40:] = 0  # padded
    backbone = next(module for module in model.modules() if isinstance(module, FlashKATBackbone))
    step(model, backbone, pixel_values=torch.randn(IMAGES), pixel_mask=mask, labels=targets())


def test_rt_detr():
    """It takes three scales, which the pyramid has."""
    pytest.importorskip("scipy")
    config = RTDetrConfig(
        backbone_config=backbone_config(pyramid_channels=16, out_indices=[1, 2, 3]),
        encoder_in_channels=[16, 16, 16],
        feat_strides=[4, 8, 16],
        encoder_hidden_dim=16,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=6,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_n_points=2,
        num_denoising=0,
        num_labels=2,
        freeze_backbone_batch_norms=False,
    )
    model = RTDetrForObjectDetection(config)
    step(model, model.model.backbone.model, pixel_values=torch.randn(2, 3, 64, 64), labels=targets())


def test_mask2former():
    """It takes four scales, which the pyramid has."""
    pytest.importorskip("scipy")
    config = Mask2FormerConfig(
        backbone_config=backbone_config(pyramid_channels=16),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=4,
        feature_strides=[4, 8, 16, 32],
        train_num_points=64,
        num_labels=2,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    masks = [torch.zeros(2, 64, 64), torch.zeros(1, 64, 64)]
    masks[0][0, :32], masks[0][1, 32:], masks[1][0, 8:40, 8:40] = 1, 1, 1
    step(
        model,
        model.model.pixel_level_module.encoder,
        pixel_values=torch.randn(2, 3, 64, 64),
        mask_labels=masks,
        class_labels=[torch.tensor([0, 1]), torch.tensor([1])],
    )
