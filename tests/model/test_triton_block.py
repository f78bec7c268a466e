"""A whole block by one operator, beside the same block put together from smaller ones."""

import pytest
import torch
from helpers import INTERPRETED, KERNEL_DEVICES, micro_config
from torch import nn
from torch.autograd.graph import save_on_cpu

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.model import fusing, op_block, operators, triton_launch, triton_sums
from flashkat_hf.model.modeling_flashkat import FlashKATDropPath

pytestmark = pytest.mark.parametrize("device", KERNEL_DEVICES)
# Triton's interpreter multiplies matrices of bfloat16 by the integers that they are stored as.
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _kernels(device, monkeypatch):
    """Let the kernels serve the device, the CPU in the interpreter."""
    for module in (fusing, operators):
        monkeypatch.setattr(module, "TRITON_DEVICES", (device,))


@pytest.fixture
def blocks(monkeypatch) -> list[str]:
    """Return a list that grows with each block that is computed by one node, "whole" or its "tail"."""
    calls: list[str] = []
    whole = op_block.block_forward

    def counted(x, mixed, parameters, block, keep):
        calls.append(("whole" if mixed is None else "tail") + ("" if keep else ", nothing kept"))
        return whole(x, mixed, parameters, block, keep)

    monkeypatch.setattr(op_block, "block_forward", counted)
    return calls


@pytest.fixture
def long(monkeypatch) -> None:
    """Let sequences count as too long for our attention kernel, so that a block calls PyTorch's."""
    monkeypatch.setattr(fusing, "MAX_TOKENS", 4)


def random_model(device, **overrides) -> FlashKATForImageClassification:
    config = micro_config(**{"num_hidden_layers": 1, **overrides})
    model = FlashKATForImageClassification(config).to(device).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def step(model: nn.Module, dtype: torch.dtype | None, batch: int = 1) -> dict[str, torch.Tensor]:
    """Return logits and gradients of a step of a model, under autocast unless dtype is None."""
    parameter = next(model.parameters())
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, device=parameter.device, requires_grad=True)
    model.zero_grad()
    with torch.autocast(parameter.device.type, dtype, enabled=dtype is not None):
        logits = model(images).logits
    logits.float().square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), "images": images.grad, **grads}  # pyright: ignore[reportReturnType]


def check_bits(model, dtype, monkeypatch, **sizes) -> None:
    """Every number of a step is what the smaller operators give, bit for bit."""
    whole = step(model, dtype, **sizes)
    with monkeypatch.context() as context:
        context.setattr(fusing, "tail_parameters", lambda *_: None)
        pieces = step(model, dtype, **sizes)
    for name, expected in pieces.items():
        if expected is None or whole[name] is None:
            assert expected is None
            assert whole[name] is None
        else:
            assert torch.equal(whole[name], expected), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"qkv_bias": False, "num_numerator_groups": 8},
        # widths that are no multiples of a line, products by cuBLAS, tokens with a rest
        {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 72},
    ],
    ids=str,
)
def test_bits_under_autocast(overrides, dtype, device, blocks, monkeypatch):
    check_bits(random_model(device, **overrides), dtype, monkeypatch, batch=2)
    assert blocks == ["whole"]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "overrides",
    [{}, {"qkv_bias": False}, {"hidden_size": 48, "num_attention_heads": 4}],
    ids=str,
)
def test_a_block_calls_the_attention_of_pytorch(overrides, dtype, device, blocks, long, monkeypatch):
    """It is the attention of the smaller operators, up to roundings."""
    model = random_model(device, **overrides)
    whole = step(model, dtype, batch=2)
    with save_on_cpu():
        kept = step(model, dtype, batch=2)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32, device=device)
    with torch.no_grad(), torch.autocast(device, dtype):
        assert torch.equal(model(images).logits, whole["logits"])
    assert blocks == ["whole", "whole", "whole, nothing kept"]
    monkeypatch.setattr(fusing, "tail_parameters", lambda *_: None)
    for name, expected in step(model, dtype, batch=2).items():
        assert (whole[name] is None) == (expected is None), name
        if expected is not None:
            assert torch.equal(whole[name], kept[name]), name
            # roundings of the scores' and the bias's gradients to half precision
            allowed = 8 * torch.finfo(dtype).eps * expected.abs().max()
            assert (whole[name] - expected).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", [*HALF, None], ids=str)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attn_implementation": "eager"},
        {"hidden_size": 320, "num_attention_heads": 5, "intermediate_size": 320},  # a program has one row
    ],
    ids=str,
)
def test_stochastic_depth(overrides, dtype, device, blocks, monkeypatch):
    """A block drops branches as its modules do, up to roundings, which one node of autograd has fewer of."""
    model = random_model(device, **overrides)
    drop_path = model.flashkat.layers[0].drop_path
    drop_path.rate = 0.25
    factors = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.float32, device=device) / 0.75

    def drawn(x, branches=1):
        rows = iter([factors] if branches == 2 else [factors[:1], factors[1:]])
        drop_path.factors = lambda *_, **__: next(rows)
        return next(rows)

    found = {}
    for name in ("whole", "pieces"):
        drop_path.factors = drawn
        found[name] = step(model, dtype, batch=5)
        monkeypatch.setattr(fusing, "tail_parameters", lambda *_: None)
    assert blocks == ["tail" if "attn_implementation" in overrides or dtype is None else "whole"]
    for name, expected in found["pieces"].items():
        actual = found["whole"][name]
        assert (actual is None) == (expected is None), name
        if expected is not None:
            allowed = (16 * torch.finfo(dtype).eps if dtype else 1e-5) * expected.abs().max()
            assert (actual - expected).abs().max() <= allowed, name


def test_a_block_draws_for_both_branches(device, blocks):
    """The seed decides which branches are dropped; a block returns a sample as it is if it drops both."""
    model = random_model(device)
    layer = model.flashkat.layers[0]
    layer.drop_path.rate = 0.5
    x, passed = torch.randn(64, 5, layer.norm1.weight.numel(), device=device), []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.autocast(device, torch.float16):
            y = layer(x)
        passed.append((y == x).flatten(1).all(1))
    torch.manual_seed(3)
    kept = FlashKATDropPath(0.5).train().factors(x, branches=2) > 0
    assert torch.equal(passed[0], passed[1])
    assert torch.equal(passed[0], ~kept.any(0))
    assert 4 < passed[0].sum() < 32
    assert blocks == ["whole"] * 2


def test_gradients_of_a_long_sequence_twice_and_by_checkpoints(device, blocks, long):
    model = random_model(device)
    plain = step(model, torch.float16)
    with torch.autocast(device, torch.float16):
        loss = model(torch.randn(2, 3, 32, 32, device=device)).logits.float().square().sum()
    once, again = (torch.autograd.grad(loss, [*model.parameters()], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.23
    (enable or model.gradient_checkpointing_enable)()
    for name, expected in step(model, torch.float16).items():
        assert torch.equal(plain[name], expected), name
    assert blocks == ["whole"] * 4


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_bits_of_a_model_in_half_precision(dtype, device, blocks, monkeypatch):
    check_bits(random_model(device).to(dtype), None, monkeypatch)
    assert blocks == ["whole"]


def test_bits_of_the_tail_alone(device, blocks, monkeypatch):
    """Where PyTorch's attention serves, what stands behind it is one node, in any precision."""
    check_bits(random_model(device, attn_implementation="eager"), torch.float16, monkeypatch)
    check_bits(random_model(device), None, monkeypatch)
    assert blocks == ["tail"] * 2


def test_bits_where_parameters_are_frozen(device, blocks, monkeypatch):
    """What needs no gradient gets none; images get theirs through it all."""
    model = random_model(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("fc1" in name or "norm1" in name)
    check_bits(model, torch.float16, monkeypatch)
    model.requires_grad_(False)
    assert step(model, torch.float16)["images"].isfinite().all()
    assert blocks == ["whole"] * 2


def test_bits_of_checkpoints_and_of_tensors_kept_elsewhere(device, blocks, monkeypatch):
    model = random_model(device)
    plain = step(model, torch.float16)
    with save_on_cpu():
        kept = step(model, torch.float16)
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.23
    (enable or model.gradient_checkpointing_enable)()
    again = step(model, torch.float16)
    assert blocks == ["whole"] * 4
    for name, expected in plain.items():
        assert torch.equal(kept[name], expected), name
        assert torch.equal(again[name], expected), name


def test_inference_keeps_nothing_and_gives_the_same(device, blocks):
    model = random_model(device)
    logits = step(model, torch.float16)["logits"]
    torch.manual_seed(0)
    images = torch.randn(1, 3, 32, 32, device=device)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), torch.autocast(device, torch.float16):
            assert torch.equal(model(images).logits, logits)
    assert blocks == ["whole", *["whole, nothing kept"] * 2]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's launches are not kept")
@pytest.mark.parametrize("overrides", [{}, {"attn_implementation": "eager"}], ids=str)
def test_kept_launches_change_no_bit(overrides, device, monkeypatch):
    """A step by kept launches is the step by Triton's own, bit for bit."""
    model = random_model(device, **overrides)
    monkeypatch.setattr(triton_launch, "_kept", {})
    kept = [step(model, torch.bfloat16) for _ in range(2)][1]
    assert triton_launch._kept
    monkeypatch.setattr(triton_launch, "KEPT_DEVICES", ())
    for name, expected in step(model, torch.bfloat16).items():
        assert torch.equal(kept[name], expected), name


def test_gradients_twice_from_one_forward(device, blocks):
    """A kept graph gives the same again: backward writes over nothing that forward saved."""
    model = random_model(device)
    with torch.autocast(device, torch.float16):
        loss = model(torch.randn(2, 3, 32, 32, device=device)).logits.float().square().sum()
    once, again = (torch.autograd.grad(loss, [*model.parameters()], retain_graph=True) for _ in range(2))
    assert blocks == ["whole"]
    assert all(map(torch.equal, once, again))


def test_a_second_derivative_is_refused(device, blocks):
    model = random_model(device)
    with torch.autocast(device, torch.float16):
        loss = model(torch.randn(1, 3, 32, 32, device=device)).logits.float().sum()
    with pytest.raises(RuntimeError, match=r"take them with torch\.func"):
        torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
    assert blocks == ["whole"]


def touch(name: str):
    return lambda layer: layer.get_submodule(name).register_forward_hook(lambda *_: None)


def transpose_fc1(layer):
    layer.mlp.fc1.weight = nn.Parameter(layer.mlp.fc1.weight.detach().T.contiguous().T)


@pytest.mark.parametrize(
    ("change", "left"),
    [
        *((touch(name), ["tail"]) for name in ("norm1", "attention.qkv")),
        *((touch(name), []) for name in ("attention.dropout", "mlp", "mlp.act1", "drop_path")),
        (transpose_fc1, []),
        (lambda layer: setattr(layer.drop_path, "rate", 0.5), ["whole"]),
        (lambda layer: setattr(layer.mlp.dropout, "p", 0.5), []),
    ],
)
def test_a_touched_block_is_put_together_from_pieces(change, left, device, blocks):
    model = random_model(device)
    change(model.flashkat.layers[0])
    step(model, torch.float16)
    assert blocks == left


def test_sums_of_many_rows(device):
    """One launch adds up in the order of the launches that it stands for, also over several tiles."""
    from flashkat_hf.model.triton_block_sums import gather_block_sums_kernel, gather_plan
    from flashkat_hf.model.triton_launch import launch

    sizes = {"hidden_size": 40, "inner_size": 72, "mlp_rows": 2100, "mlp_segments": 18}
    sizes |= {"norm2_rows": 70, "norm2_segments": 10, "norm1_rows": 530, "attention_rows": 3}
    plan = gather_plan(*sizes.values(), 5, 7, 0, 1, 1, 8, 8)
    scratch = torch.randn(plan.scratch.size, device=device)
    partial1, partial2, *columns, _, _ = plan.scratch.cut(scratch)
    denominators = torch.randn(1, 4, device=device), torch.randn(8, 4, device=device)
    sums = torch.full((plan.sums.size,), torch.nan, device=device)
    tensors = scratch, *denominators, sums
    launch(gather_block_sums_kernel, (plan.programs, 1, 1), tensors, plan.numbers, plan.constants, 16)
    results = plan.sums.cut(sums)
    expected = []
    for rows, partial, segments, denominator in (
        (1, partial1, 10, denominators[0]),
        (8, partial2, 18, denominators[1]),
    ):
        tables = torch.empty(rows, 6, device=device), denominator
        expected += triton_sums.gather_sums(tables, partial.view(10, -1, segments), None)
    for column, count, width in zip(columns, (4, 1, 1, 2), (40, 72, 120, 40), strict=True):
        expected += triton_sums.gather_sums(None, None, column.view(count, -1, width))[0].unbind()
    assert len(results) == len(expected)
    assert all(map(torch.equal, results, (tensor.flatten() for tensor in expected)))
