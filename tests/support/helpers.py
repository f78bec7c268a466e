"""Several test files share these: stored reference numbers, gradients, and the bound on errors."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import triton
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from flashkat_hf import FlashKATConfig
from flashkat_hf.conversion.tensor_names import to_flashkat
from flashkat_hf.model.reference import rational_decomposed, rational_gradients, rational_value

# Kernels by their launchers: on CPU tensors under TRITON_INTERPRET=1, on a GPU otherwise.
INTERPRETED = triton.knobs.runtime.interpret
KERNEL_DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/fixtures"
CASES = list(json.loads((DATA / "rational_reference.json").read_text())["cases"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Groups of 1, 24, 3, 5; one row; no rows.
SHAPES = [(1, 8), (2, 197, 192), (3, 7, 24), (5, 40), (8,), (0, 64)]
ORDERS = 7  # in which the plain formula adds up the same sums, beside their own
ROWS = [(1, 8), (8, 8), (8, 1), (1, 1)]  # rows of numerator and denominator: shared or one for each group

MICRO = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 32,
    "patch_size": 8,
}


def micro_config(**overrides) -> FlashKATConfig:
    """Return the config of the stored micro models."""
    return FlashKATConfig(**{**MICRO, "num_labels": 10, **overrides})


def reference_case(name: str) -> dict[str, Tensor]:
    """Return a stored case: float32 `x`, `numerator`, `denominator`, `grad_output`, float64 `y`, `dx`..."""
    tensors = load_file(DATA / "rational_reference.safetensors")
    return {
        key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")
    }


def original_state(kind: str, prefix: str = "state_dict.") -> dict[str, Tensor]:
    """Return state or gradients of a stored micro model ("kat" or "flashkat") in the original's names."""
    tensors = load_file(DATA / f"{kind}_micro_timm.safetensors")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def timm_vit(**arguments) -> VisionTransformer:
    """Return a micro ViT of timm's, every parameter random and large enough to matter."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = VisionTransformer(**{**sizes, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def stored_model(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return state and gradients of a stored micro model in our names, and its other tensors."""
    tensors = load_file(DATA / f"{kind}_micro_timm.safetensors")
    state, gradients = (
        to_flashkat(original_state(kind, prefix), {"num_attention_heads": 2})[1]
        for prefix in ("state_dict.", "grad.")
    )
    return state, gradients, tensors


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return max |actual - exact| / max |exact|, the measure of the stored numbers."""
    exact = exact.to(actual.device, torch.float64)
    return ((actual.detach().double() - exact).abs().max() / exact.abs().max()).item()


def random_inputs(
    shape, dtype: torch.dtype, device: str, rows: tuple[int, int] = (1, 8)
) -> tuple[Tensor, ...]:
    """Return x, numerator, denominator and grad_y; the tables are float32."""
    x, grad_y = torch.randn(2, *shape, device=device).to(dtype)
    return x, torch.randn(rows[0], 6, device=device), torch.randn(rows[1], 4, device=device), grad_y


def value_and_gradients(
    function: Callable, x: Tensor, numerator: Tensor, denominator: Tensor, grad_y: Tensor
) -> list:
    """Return the output, and `torch.autograd.grad` of all three inputs."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, numerator, denominator)]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]


def exact_value_and_gradients(
    x: Tensor, numerator: Tensor, denominator: Tensor, grad_y: Tensor
) -> list[Tensor]:
    """Return the reference's value and gradients in float64, on the inputs as they are."""
    x, numerator, denominator, grad_y = (tensor.double() for tensor in (x, numerator, denominator, grad_y))
    return [rational_value(x, numerator, denominator), *rational_gradients(grad_y, x, numerator, denominator)]


def assert_no_worse(
    actual: Tensor, baseline: Tensor | Sequence[Tensor], exact: Tensor, slack: float = 5.0
) -> None:
    """`actual` may be at most `slack` times as far from `exact` as `baseline` is, plus one rounding.

    Of several baselines, which are the same sums in other orders, it is the distance in the root mean square:
    one sum alone can be right by luck.
    """
    baselines = [baseline] if isinstance(baseline, Tensor) else baseline
    assert (actual.dtype, actual.shape) == (baselines[0].dtype, exact.shape)
    if exact.numel():
        errors = torch.stack([(each - exact).abs().max() for each in baselines])
        allowed = slack * errors.square().mean().sqrt() + torch.finfo(actual.dtype).eps * exact.abs().max()
        error = (actual - exact).abs().max()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_value_and_gradients(results: Sequence[Tensor], *inputs: Tensor) -> None:
    """Value and gradients of a rational are no worse than the plain formula's, its sums in several orders."""
    x, numerator, denominator, grad_y = inputs
    baseline = value_and_gradients(rational_decomposed, *inputs)
    rows, grad_rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, grad_y))
    sums = []
    for _ in range(ORDERS):
        order = torch.randperm(len(rows), device=x.device)
        permuted = value_and_gradients(
            rational_decomposed, rows[order], numerator, denominator, grad_rows[order]
        )
        sums.append(permuted[2:])
    tables = [[own, *others] for own, *others in zip(baseline[2:], *sums, strict=True)]
    exact = exact_value_and_gradients(*inputs)
    for actual, one_or_more, true in zip(results, [*baseline[:2], *tables], exact, strict=True):
        assert_no_worse(actual, one_or_more, true)
