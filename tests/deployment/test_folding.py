"""Folded rationals compute what their originals do, in fewer operations."""

import pytest
import torch
from helpers import assert_no_worse, micro_config, relative_error, stored_model

from flashkat_hf import FlashKATForImageClassification, GroupRational
from flashkat_hf.deployment.folding import FoldedRational, folded


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_value(rows, divides):
    act = GroupRational(24, 4, rows, "gelu")
    with torch.no_grad():
        act.numerator.add_(torch.rand_like(act.numerator))
        act.denominator.add_(torch.randn_like(act.denominator))
    x = 3 * torch.randn(2, 5, 24)
    new = FoldedRational(act, divides)
    assert (new.scale is not None) == divides
    scale = 1 if new.scale is None else new.scale
    assert_no_worse(new(x) * scale, act(x), act.double()(x.double()))
    assert sum(buffer.shape == (24,) for buffer in new.buffers()) == (4 if rows == 1 else 10 - divides)


def operations(module: torch.nn.Module) -> int:
    program = torch.export.export(module, (torch.randn(2, 8),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return sum(not name.startswith(("aten.to.", "aten._assert")) for name in names)


def test_zeros_and_ones_cost_nothing():
    identity = GroupRational(8, init="identity")
    x = torch.randn(2, 8)
    assert torch.equal(FoldedRational(identity)(x), x)
    assert operations(FoldedRational(identity)) == 0
    gelu = FoldedRational(GroupRational(8, init="gelu"), divides=True)
    assert gelu.numerator[0] is None  # a_0, b_1 and b_3 are 0
    # numerator 4 products and 4 sums (leading 1, no constant), |x|, denominator 4 and 2, quotient
    assert operations(gelu) <= 16


@pytest.mark.parametrize("kind", ["kat", "flashkat"])
def test_model(kind):
    state, _, stored = stored_model(kind)
    model = FlashKATForImageClassification(micro_config()).eval()
    model.load_state_dict(state)
    before = [parameter.clone() for parameter in model.parameters()]
    copy = folded(model)
    assert not any(isinstance(module, GroupRational) for module in copy.modules())
    with torch.no_grad():
        assert relative_error(copy(stored["input"]).logits, stored["logits_f64"]) < 2e-6
    assert all(map(torch.equal, model.parameters(), before)), "the model itself was changed"
    assert isinstance(copy, FlashKATForImageClassification)
