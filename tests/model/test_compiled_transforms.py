"""Transforms of torch.func inside torch.compile: the compiled function has the eager one's derivatives."""

import pytest
import torch

from flashkat_hf import GRKANMlp

TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x[:, None]),
    "hessian's product": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_transforms(name, device):
    mlp = GRKANMlp(16, 32, act1_init="swish").to(device).requires_grad_(False)
    x = torch.randn(3, 16, device=device)

    def transformed(x):
        return TRANSFORMS[name](lambda x: mlp(x).square().sum(), x)

    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), transformed(x), rtol=1e-4, atol=1e-4)
