"""The contenders: a small ViT with GELU or SwiGLU, and FlashKATs whose rationals differ in one thing each.

All are of one width, depth and number of heads. A run's seed gives a FlashKAT's start; the ViTs take over all
of it that they have a place for, so that contenders of one seed start from the same attention, embeddings,
head and (but for SwiGLU) linear maps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification
from flashkat_hf.conversion.tensor_names import to_flashkat, to_original
from flashkat_hf.training.optimization import parameter_groups

from .low_precision import round_tables, sum_atomically

TABLES = ("*.numerator", "*.denominator")
GELU, SWIGLU, RATIONAL = "gelu", "swiglu", "rational"  # families: each has a learning rate of its own
CONVERTED = {"act1_init": "identity", "act2_init": "gelu"}


@dataclass(frozen=True)
class Contender:
    """A contender: a model with its start and its training, and how it differs from the others."""

    text: str  # for the tables
    family: str = RATIONAL
    config: Mapping[str, Any] = field(default_factory=dict)  # fields of `FlashKATConfig` beside the size
    frozen: tuple[str, ...] = ()  # patterns of parameters that stay as they start
    decays: bool = True  # whether the coefficients have weight decay
    coefficient_rate: float = 1.0  # their learning rate, in learning rates of the others
    swiglu_width: int = 0  # channels between the linear maps
    own_start: bool = False  # timm's start in place of ours
    precision: str | None = None  # "float32", "bfloat16" or "float16"; default: the device's
    tables: str = "float32"  # dtype of the coefficients
    atomic: bool = False  # whether their gradients are added in bfloat16 in a random order
    distilled: str | None = None  # fixed functions fitted to learned ones: "own" or "one"


CONTENDERS: dict[str, Contender] = {
    "gelu": Contender("ViT, GELU", GELU),
    "swiglu": Contender("ViT, SwiGLU of 85 channels (equal parameters)", SWIGLU, swiglu_width=85),
    "flashkat": Contender("FlashKAT as released: identity and swish, shared numerators"),
    "fixed": Contender("FlashKAT, tables frozen at their start", frozen=TABLES),
    "separate": Contender("separate numerators", config={"num_numerator_groups": 8}),
    "gelu-mean": Contender("ViT, GELU, mean pooling", GELU, {"pooling": "mean"}),
    "flashkat-mean": Contender("FlashKAT, mean pooling", config={"pooling": "mean"}),
    "swiglu-88": Contender("ViT, SwiGLU of 88 channels (fit for tensor cores)", SWIGLU, swiglu_width=88),
    "gelu-own-start": Contender("ViT, GELU, timm's start (attention not mimetic)", GELU, own_start=True),
    "gelu-table": Contender("act2 starts as GELU", config=CONVERTED),
    "variance": Contender("variance-preserving start", config={"initializer": "variance_preserving"}),
    "undecayed": Contender("coefficients not decayed", decays=False),
    "rate-10": Contender("ten times the learning rate for coefficients", coefficient_rate=10.0),
    "rate-0.1": Contender("a tenth of the learning rate for coefficients", coefficient_rate=0.1),
    "groups-1": Contender("1 group", config={"num_groups": 1}),
    "groups-4": Contender("4 groups", config={"num_groups": 4}),
    "groups-16": Contender("16 groups", config={"num_groups": 16}),
    "frozen-denominators": Contender("denominators frozen", frozen=("*.denominator",)),
    "act1-alone": Contender("act1 alone learns, act2 stays swish", frozen=("*.act2.*",)),
    "act2-alone": Contender("act2 alone learns, act1 stays the identity", frozen=("*.act1.*",)),
    "converted": Contender("made a FlashKAT", config=CONVERTED),
    "converted-fixed": Contender("made a FlashKAT, tables frozen", config=CONVERTED, frozen=TABLES),
    "distilled": Contender(
        "each group's learned function, of another seed, frozen", frozen=TABLES, distilled="own"
    ),
    "distilled-one": Contender(
        "one function for all act1 and one for all act2, fitted to the learned, frozen",
        frozen=TABLES,
        distilled="one",
    ),
    "bfloat16": Contender("bfloat16 autocast, float32 coefficients", precision="bfloat16"),
    "float32": Contender("float32 (on a GPU with TF32 products)", precision="float32"),
    "bfloat16-tables": Contender("bfloat16 coefficients, our sums", precision="bfloat16", tables="bfloat16"),
    "bfloat16-atomic": Contender(
        "bfloat16 coefficients, gradients added in bfloat16 in random order",
        precision="bfloat16",
        tables="bfloat16",
        atomic=True,
    ),
    "atomic": Contender(
        "float32 coefficients, gradients added in bfloat16 in random order",
        precision="bfloat16",
        atomic=True,
    ),
    "float16": Contender("float16 autocast with a scaler, float32 coefficients", precision="float16"),
}
PRIMARY = ("gelu", "swiglu", "flashkat", "fixed", "separate")
VARIANTS = tuple(CONTENDERS)[len(PRIMARY) : tuple(CONTENDERS).index("converted")]
UPCYCLED = ("gelu", "converted", "converted-fixed")
DISTILLED = ("distilled", "distilled-one")
PRECISIONS = tuple(CONTENDERS)[tuple(CONTENDERS).index("bfloat16") :]
# what has a step of its own; the others' steps are FlashKAT's
TIMED = (*PRIMARY, "gelu-mean", "flashkat-mean", "swiglu-88", "groups-1", "groups-16", "frozen-denominators")


def make(name: str, seed: int, sizes: Mapping[str, Any]) -> nn.Module:
    """Return a contender as it starts; `sizes` are fields of `FlashKATConfig`."""
    contender = CONTENDERS[name]
    torch.manual_seed(seed)
    config = FlashKATConfig.from_size("micro", **{**sizes, **contender.config})
    start = FlashKATForImageClassification(config)
    model = start if contender.family == RATIONAL else vit(start, contender)
    return finished(model, contender)


def finished(model: nn.Module, contender: Contender) -> nn.Module:
    """Freeze what the contender does not train, and bring in its precision."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(fnmatch(name, pattern) for pattern in contender.frozen)
    if contender.tables != "float32":
        round_tables(model, getattr(torch, contender.tables))
    if contender.atomic:
        sum_atomically(model)
    return model


def vit(start: FlashKATForImageClassification, contender: Contender) -> nn.Module:
    """Return timm's ViT with what it can take from a FlashKAT's start."""
    config = start.config
    ratio, layer = config.intermediate_size / config.hidden_size, {}
    if contender.swiglu_width:  # timm states the width of gates and values together
        ratio, layer = 2 * contender.swiglu_width / config.hidden_size, {"mlp_layer": SwiGLUPacked}
    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        num_classes=config.num_labels,
        global_pool="avg" if config.pooling == "mean" else "token",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=ratio,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        **layer,
    )
    if not contender.own_start:
        theirs = model.state_dict()
        ours = to_original(start.state_dict(), "flashkat", config.pooling)
        kept = {
            name: ours[name]
            for name, tensor in theirs.items()
            if name in ours and ours[name].shape == tensor.shape
        }
        model.load_state_dict({**theirs, **kept})
    return model


def upcycled(name: str, source: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> nn.Module:
    """Return a contender that goes on from a trained ViT: that ViT, or the FlashKAT made of it."""
    contender = CONTENDERS[name]
    if contender.family == GELU:
        model = make(name, 0, sizes)
        model.load_state_dict(dict(source))
        return model
    heads = FlashKATConfig.from_size("micro", **sizes).num_attention_heads
    config, state = to_flashkat(source, {"num_attention_heads": heads, **contender.config})
    model = FlashKATForImageClassification(config)
    model.load_state_dict({**state, **missing_tables(model, state)})
    return finished(model, contender)


def missing_tables(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tables of a model that a ViT's state dict has not."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in state}


def groups(model: nn.Module, name: str, rate: float, decay: float) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups with their learning rates."""
    contender = CONTENDERS[name]
    plain = parameter_groups(model, decay, contender.decays)
    tables = {
        id(parameter)
        for path, parameter in model.named_parameters()
        if any(fnmatch(path, pattern) for pattern in TABLES)
    }
    result = []
    for group in plain:
        for factor, mine in ((1.0, False), (contender.coefficient_rate, True)):
            parameters = [each for each in group["params"] if (id(each) in tables) == mine]
            if parameters:
                result.append({**group, "params": parameters, "lr": rate * factor})
    return result


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
