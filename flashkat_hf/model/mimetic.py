"""The mimetic start of self-attention: weights that look as training would leave them.

With U noise, uniform and of variance 1 / size: W_proj W_v near 0.4 (U - I), W_q^T W_k of a head near 0.7 (U +
I). By balanced factors A = L R of A = 0.4 (U - I), W_v = L and W_proj = R; W_q and W_k are leading columns of
L and rows of R of an A = 0.7 (U + I) for each head. The original factorises every one of these. But -1.75
times the first A has the law of the second, and has it in any orthonormal basis Z: here one factorisation
serves a block, and each head looks at it in a random basis of its own, (Z L)(R Z^T).

Source: Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, ICML 2023, as released with KAT.
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def mimetic_weights(size: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw packed query, key, value weights `(3 * size, size)` and output weights `(size, size)`, float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # many small steps: threads that wait for each other on a busy machine cost far more
    try:
        left, right = _balanced_factors(size, 0.4, device)
        # Z L[:, :k] and Z R[:k].T take Z on the span of these 2k columns only: an orthonormal frame, turned
        # at random
        basis, columns = torch.linalg.qr(
            1.75**0.5 * torch.cat((left[:, :head_dim], -right[:head_dim].T), dim=1)
        )
        turned = [nn.init.orthogonal_(torch.empty_like(basis)) @ columns for _ in range(size // head_dim)]
    finally:
        torch.set_num_threads(threads)
    query, key = torch.stack(turned).unflatten(-1, (2, head_dim)).permute(2, 0, 3, 1).flatten(1, 2)
    return torch.cat((query, key, left)), right


def _balanced_factors(size: int, scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return L = V sqrt(S) and R = sqrt(S) W^T, largest first, of the SVD V S W^T of `scale` (U - I).

    Through the eigenvectors of A^T A in float64, which is cheaper than an SVD.
    """
    noise = (3 / size) ** 0.5 * (2 * torch.rand(size, size, dtype=torch.float64, device=device) - 1)
    matrix = scale * (noise - torch.eye(size, dtype=torch.float64, device=device))
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    root = squares.flip(0).clamp_min(1e-24) ** 0.25
    vectors = vectors.flip(1)
    return (matrix @ vectors / root).float(), (vectors * root).T.float()
