"""Coefficients of a rational of any degrees that come close to a given function, by least squares.

For given b the best a solve a linear problem, so the search is over b alone: L-BFGS in float64 from several
starts, through the linear solution (variable projection).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import rational_of_form

STARTS = (
    0.01,
    0.1,
    0.5,
    1.0,
)  # of |b_j| for inputs scaled to [-1, 1]; even powers larger, as tables have them
RIDGE = 1e-10  # of the linear problem, relative: P and Q may nearly share a factor


def fit_rational(
    target: Callable[[Tensor], Tensor] | Tensor,
    x: Tensor | None = None,
    degrees: tuple[int, int] = (5, 4),
    form: str = "terms",
) -> tuple[Tensor, Tensor, float]:
    """Fit one rational to a function, or to samples of one, with the least sum of squared differences.

    Args:
        target: an elementwise function, or its values at `x`.
        x: where they are compared, any shape; by default 1,001 points on [-5, 5]. Elsewhere the result may
            be anything, so inputs that an activation has met serve best.
        degrees: of numerator and denominator.
        form: "terms" or "sum", as in `reference.FORMS`.

    Returns:
        Numerator `(degrees[0] + 1,)` and denominator `(degrees[1],)`, float64 on the CPU, and the largest
        difference at `x`.

    Raises:
        ValueError: the samples' shapes differ, are fewer than the coefficients, or are not finite.
    """
    x = torch.linspace(-5, 5, 1001) if x is None else x
    y = target(x.clone()) if callable(target) else target  # it may work in place
    if y.shape != x.shape:
        raise ValueError(f"the function's values have shape {tuple(y.shape)}, but x has {tuple(x.shape)}")
    x, y = (tensor.detach().double().cpu().flatten() for tensor in (x, y))
    if len(x) < sum(degrees) + 1:
        raise ValueError(
            f"{len(x)} samples are too few for the {sum(degrees) + 1} coefficients of a rational"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("the samples have values that are not finite")
    scale = x.abs().max().clamp(min=1e-6)
    z = x / scale
    powers = z[:, None] ** torch.arange(degrees[0] + 1, dtype=z.dtype)
    size = y.square().mean().clamp(min=1e-30)
    one = z.new_tensor([[1.0, 0.0]])

    def denominator(root: Tensor) -> Tensor:
        return root**2 if form == "terms" else root  # signs of "terms" are ignored

    def solve(root: Tensor) -> tuple[Tensor, Tensor]:
        columns = powers * rational_of_form(z[:, None], one, denominator(root)[None], form)
        gram = columns.T @ columns
        ridge = RIDGE * gram.diagonal().max() * torch.eye(len(gram), dtype=z.dtype)
        a = torch.linalg.solve(gram + ridge, columns.T @ y)
        return a, columns @ a - y

    fits = []
    with torch.enable_grad():
        for start in STARTS:
            powers_of_b = torch.arange(1, degrees[1] + 1)
            root = torch.where(powers_of_b % 2 == 1, start, 4 * start).double()
            root = (root.sqrt() if form == "terms" else root).requires_grad_()
            _minimise(lambda root=root: solve(root)[1].square().mean() / size, root)
            root = root.detach()
            fits.append((*solve(root), denominator(root)))
    a, error, b = min(fits, key=lambda fit: fit[1].square().sum().item())
    a, b = (c * scale ** -torch.arange(first, len(c) + first).double() for c, first in ((a, 0), (b, 1)))
    return a, b, error.abs().max().item()


def _minimise(loss: Callable[[], Tensor], parameter: Tensor) -> None:
    optimizer = torch.optim.LBFGS(
        [parameter], max_iter=150, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss().log()  # of errors over several decades
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType] - it takes tensors
