"""Rationals in the place of other libraries' activations: found, wide enough, the same function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from flashkat_hf import GroupRational, replace_activations

IDS = {"input_ids": torch.arange(24).view(2, 12)}
IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)
TEXT = {"vocab_size": 99, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
TEXT |= {"num_attention_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.low, self.up = self.block(3, 16), self.block(16, 32), self.block(48, 16)
        self.head = nn.Conv2d(16, 3, 1)

    @staticmethod
    def block(width: int, out: int) -> nn.Sequential:
        first = nn.Conv2d(width, out, 3, padding=1), nn.GroupNorm(4, out), nn.SiLU()
        return nn.Sequential(*first, nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out), nn.SiLU(True))

    def forward(self, x):
        high = self.down(x)
        low = nn.functional.interpolate(self.low(nn.functional.max_pool2d(high, 2)), scale_factor=2)
        return self.head(self.up(torch.cat([high, low], 1)))


class Foreign(NamedTuple):
    make: Callable[[], nn.Module]
    act: Any
    inputs: Any
    places: dict[str, tuple[int, int]]  # name of an activation: channels and their dimension
    number: int


CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (32, 64, 128, 256), "num_classes": 10}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "timm ConvNeXt": Foreign(
        lambda: timm.models.ConvNeXt(**CONVNEXT),
        nn.GELU,
        IMAGES,
        {"stages.0.blocks.0.mlp.act": (128, -1), "stages.3.blocks.0.mlp.act": (1024, -1)},
        5,
    ),
    "timm ConvNeXt, convolutions": Foreign(
        lambda: timm.models.ConvNeXt(**CONVNEXT, conv_mlp=True),
        nn.GELU,
        IMAGES,
        {"stages.0.blocks.0.mlp.act": (128, 1)},
        5,
    ),
    "torchvision ViT": Foreign(
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10),
        nn.GELU,
        IMAGES,
        {"encoder.layers.encoder_layer_1.mlp.1": (64, -1)},
        2,
    ),
    "transformers BERT": Foreign(
        lambda: BertModel(BertConfig(**TEXT)),
        nn.GELU,
        IDS,
        {"encoder.layer.1.intermediate.intermediate_act_fn": (64, -1)},
        2,
    ),
    "transformers GPT-2": Foreign(
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), nn.GELU, IDS, {"transformer.h.0.mlp.act": (128, -1)}, 2
    ),
    "transformers Llama": Foreign(
        lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
        nn.SiLU,
        IDS,
        {"model.layers.1.mlp.act_fn": (64, -1)},
        2,
    ),
    "U-Net": Foreign(UNet, nn.SiLU, IMAGES, {"low.2": (32, 1), "up.5": (16, 1)}, 6),
}


def enlarged(model: nn.Module) -> nn.Module:
    """Return a model in evaluation mode whose activations meet numbers of about 1, as in a trained one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn_like(parameter), alpha=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            )
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_foreign_models(name):
    make, act, inputs, places, number = MODELS[name]
    model = enlarged(make())
    spread = []
    for module in model.modules():
        if any(name in type(module).__name__ for name in ("GELU", "SiLU")):
            module.register_forward_pre_hook(lambda _, args: spread.append(args[0].std().item()))
    report = replace_activations(model, act, inputs=inputs)
    assert min(spread) > 0.1
    assert len(report.layers) == number
    for place, (width, dim) in places.items():
        layer = model.get_submodule(place)
        assert layer is report.layers[place]
        assert (layer.hidden_size, layer.dim, layer.training) == (width, dim, False)
    assert 0 < report.change < 1e-2, report
    assert f"{number} activations are rationals with {38 * number} parameters" in str(report)
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    output = output if isinstance(output, torch.Tensor) else output[0]
    output.square().mean().backward()
    assert all(
        parameter.grad.abs().sum() > 0 for layer in report.layers.values() for parameter in layer.parameters()
    )


def test_resnet_shares_its_activations():
    """One module at several places becomes one rational there."""
    model = torchvision.models.resnet18(num_classes=3).train()
    report = replace_activations(model, torch.relu, inputs=IMAGES, num_groups=4, num_numerator_groups=4)
    assert len(report.layers) == 9
    assert model.layer1[0].relu.training
    assert model.layer1[0].relu.numerator.shape == (4, 6)
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())


def test_an_attribute_that_is_a_function():
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0).train()
    report = replace_activations(model, nn.ReLU, inputs=torch.randn(5, 2, 16))
    assert list(report.layers) == ["activation"]
    assert isinstance(model.activation, GroupRational)
    assert sum(name.startswith("activation") for name, _ in model.named_parameters()) == 2


def test_a_function_without_a_table_is_fitted():
    model = nn.Sequential(nn.Linear(8, 16), nn.Mish(inplace=True), nn.Linear(16, 2))
    replace_activations(model, nn.Mish, inputs=torch.randn(4, 8))
    x = torch.linspace(-5, 5, 100)[:, None].expand(-1, 16)
    torch.testing.assert_close(model[1](x), nn.functional.mish(x), rtol=0, atol=5e-3)


def test_half_precision_keeps_its_start():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU()).bfloat16()
    replace_activations(model, inputs=torch.randn(4, 8).bfloat16())
    assert model[1].numerator.dtype == torch.float32


ONE = torch.ones(1, 8)


class Called(nn.Module):
    def __init__(self, times: int):
        super().__init__()
        self.act, self.times, self.maps = nn.GELU(), times, nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 16)])

    def forward(self, x):
        for linear in self.maps[: self.times]:
            x = self.act(linear(x))
        return x


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (UNet(), {"inputs": IMAGES}, r"UNet has no activation that computes GELU; its.*are: SiLU \(6\)$"),
        (nn.Linear(3, 3), {"inputs": torch.ones(3)}, r"Linear has no activation.*: none$"),
        (nn.Sequential(nn.Linear(8, 12), nn.GELU()), {"inputs": ONE}, "1 is 12 channels wide"),
        (Called(0), {"inputs": ONE}, "act needs one width.*never called"),
        (Called(2), {"inputs": ONE}, "8 in dimension -1, 16 in dimension -1"),
        (nn.Sequential(nn.Unflatten(1, (4, 2)), nn.GELU()), {"inputs": ONE}, r"of \(1, 4, 2\) the ch"),
        (nn.Linear(3, 3), {"act": nn.Linear, "inputs": torch.ones(3)}, r"act \(Linear\) is no activation"),
        (nn.Linear(3, 3), {"act": torch.sum, "inputs": torch.ones(3)}, r"\(sum\) is no.*keep the shape"),
    ],
)  # fmt: skip
def test_errors_leave_the_model_alone(model, arguments, message):
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=message):
        replace_activations(model, **arguments)
    assert list(model.named_modules()) == before


def test_dim_decides():
    model = nn.Sequential(nn.Unflatten(1, (8, 4)), nn.GELU())
    assert replace_activations(model, inputs=torch.ones(1, 32), dim=1).layers["1"].dim == 1
