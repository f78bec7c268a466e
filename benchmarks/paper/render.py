"""Write docs/paper.md and its figures from benchmarks/results/paper.jsonl; `benchmarks/render.py` calls it.

Without that file nothing is written: what has not been measured is not claimed.
"""

import json
from collections.abc import Callable
from pathlib import Path

from plot import draw, is_current

from . import BENCHMARKS, tables
from .figures import FIGURES
from .results import Results, measured
from .statements import argument

RESULTS, PAGE = "benchmarks/results/paper.jsonl", "docs/paper.md"

INTRODUCTION = """\
# The FlashKAT paper's experiments, rerun

The FlashKAT paper (Raffel and Chen, AAAI 2026, arXiv:2505.13813) measures why a Kolmogorov-Arnold
Transformer (KAT) trains slowly. Its result is that the backward pass is to blame, because of how it adds up
the gradients of the rationals' coefficients. This page repeats the paper's tables and figures. Each shows the
published numbers, the same measurement on our GPU with the paper's two algorithms, which we wrote from its
text, and the measurement with this package's kernels ("ours").

- **Algorithm 1** is the original KAT's. It has a thread for each element of the input, and each thread makes
  an atomic addition for each coefficient.
- **Algorithm 2** is FlashKAT's. Its grid of blocks is two-dimensional; each block adds up its terms first and
  then makes one atomic addition for each coefficient, in float32.
- **Ours** makes no atomic additions. Each program writes its partial sums, which are added in a fixed order.

All three were compared with float64 before they were timed. Published numbers are those that the paper's
abstract and public notes on the paper quote. A dash stands where there is no number. In the tables, *dA* is
the gradient of the numerator's coefficients and *dB* that of the denominator's. T, S and B are the sizes
tiny, small and base.

`python benchmarks/render.py` writes this page from `benchmarks/results/paper.jsonl`. Measured on: """

# title, the kinds of lines that it needs, what is said before the table, the table
SECTIONS: tuple[tuple[str, tuple[str, ...], str, Callable[[Results], str]], ...] = (
    (
        "The argument, checked",
        ("kernel", "training", "error", "counters"),
        """\
The table lists the paper's statements, and whether they hold on our GPU. Where a statement names a factor, at
least half of it is asked; of the factor between the backward and the forward pass at least 50, of that of the
long scoreboard at least 100, and of those of the rounding errors at least 10. "Leaves the pass as it is"
allows a tenth more time, "alone" asks for nine tenths of the waiting, "not used up" for less than half of the
peak, and "25%" for 20% to 30%. The last four statements are about this package's kernels.""",
        argument,
    ),
    (
        "Figure 1: forward and backward pass",
        ("training",),
        """\
The models run in eager mode under bfloat16 autocast. The table shows the mean time of an image and its 95%
interval. KAT's backward pass takes hundreds of times as long as the ViT's, so KAT was measured with a smaller
batch and fewer passes than the others.""",
        tables.figure1,
    ),
    (
        "Table 1: parameters and operations of a layer",
        ("layer",),
        """\
A layer here is the first linear map of a block's MLP with its activation. The formulas are the paper's. We
compare them with real layers: "as counted" says whether the layer has as many parameters as the formula says,
and "as expected" whether PyTorch's counter of operations finds as many in matrix products as the layer should
have. The counter sees nothing else: it misses activations and, for the KAN (cubic B-splines on three
intervals), the recursion that computes the splines.""",
        tables.table1,
    ),
    (
        "Table 2: arithmetic repeated",
        ("kernel",),
        """\
The paper repeats the arithmetic of a pass up to 8 times (x1 to x8) and finds that the time stays the same, so
arithmetic is not what makes the pass slow. The input x has 1024 x 197 x 768 float32 numbers in 8 groups, with
6 coefficients in the numerator and 4 in the denominator. SM, L1, L2 and HBM are the throughputs of the
multiprocessors, the two caches and the memory, in percent of their peak. Our kernels were measured without
repetition only.""",
        tables.table2,
    ),
    (
        "Figures 2 and 3: warp states",
        ("counters",),
        """\
Nsight Compute reports in which states the warps (groups of 32 threads) of a kernel spend their time. The
table shows, for the backward pass, how many cycles a warp spends in each state for one instruction that it
issues. "Long scoreboard" is waiting for data from memory, and "selected" is the issuing itself.""",
        tables.warp_states,
    ),
    (
        "Table 3: backward pass",
        ("kernel",),
        """\
The input is that of table 2. Cycles and throughputs are counted by Nsight Compute, and times are measured by
CUDA events without it. "Relaxed atomics" is algorithm 1 with the memory order of CUDA's atomicAdd in place of
Triton's default.""",
        tables.table3,
    ),
    (
        "Table 4: training throughput",
        ("training",),
        """\
A training step is forward, cross-entropy, backward and fused AdamW on synthetic images, without data loading.
The table shows the mean and its 95% interval. KAT was not measured compiled, since nearly all of its step is
spent in its kernel, which a compiler does not change. The last column but one compares each model's faster
mode with the ViT's faster mode. The accuracy (top-1) is as published and was not measured here.""",
        tables.table4,
    ),
    (
        "Table 5: rounding of the gradients",
        ("error",),
        """\
The table shows the mean absolute error of the coefficients' gradients against float64, and its variance, with
95% intervals over random draws of the inputs. x and the gradient of the output are normally distributed, and
the coefficients are near those of the swish function. The paper's inputs are not known, so compare the ratios
of the errors, not the errors. For bfloat16 the float64 result is that of the rounded inputs.""",
        tables.table5,
    ),
    (
        "Table 8: rounding against the batch",
        ("error",),
        """\
The same errors for inputs of 1 to 1024 images. We did not have the published numbers of this table.""",
        tables.table8,
    ),
    (
        "Memory accesses",
        ("accesses",),
        """\
The left part of the table counts, as the paper does, the numbers that a backward pass reads, writes and adds
atomically. m and n are the degrees of numerator and denominator, and an atomic addition is a read and a
write. For each element algorithm 1 then makes 3 (m + n + 2) accesses, and algorithm 2 makes
3 ((m + n + 1) / (S d) + 1), where a block has S rows and d channels. The right part has the bytes that Nsight
Compute counted.""",
        tables.memory,
    ),
    (
        "Table 6: models",
        ("model",),
        "The paper's model sizes, and those of this package's `FlashKATConfig.from_size`.",
        tables.table6,
    ),
    (
        "Table 7: hyperparameters",
        ("recipe",),
        "The paper's training settings, and those of this package's pretraining recipes.",
        tables.table7,
    ),
)

END = """\
## To rerun it

You need a GPU, PyTorch, triton, timm and this package, and Nsight Compute (`ncu`) for cycles, throughputs and
warp states:

    python -m benchmarks.paper all --output DIR
    cp DIR/paper.jsonl benchmarks/results/
    python benchmarks/render.py

In place of `all` you can name single tables, which `--help` lists. `--quick` makes a fifth of the passes.
`--peer PATH` also measures the original kernels, from clones of their repositories. `--toy` runs everything
on tiny inputs in Triton's interpreter, on any machine.
"""


def page(lines: list[dict]) -> str:
    """Return the document."""
    results, present = Results(lines), {each["what"] for each in lines}
    parts = [INTRODUCTION + measured(lines) + "."]
    for title, needs, text, section in SECTIONS:
        if present & set(needs):
            parts.append(f"## {title}\n\n{text}\n\n{section(results)}")
    return "\n\n".join([*parts, END])


def update(root: Path = BENCHMARKS.parent, check: bool = False) -> None:
    """Write the page and draw its figures; with `check`, end with one line where they differ."""
    path = root / RESULTS
    if not path.exists():
        return
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise SystemExit(f"{RESULTS} cannot be read: {error}") from error
    text, document = page(lines), root / PAGE
    if not check:
        document.write_text(text)
    elif not document.exists() or document.read_text() != text:
        raise SystemExit(f"{PAGE} differs from the results file: run python benchmarks/render.py")
    for name, (drawable, function) in FIGURES.items():
        figure = root / "docs" / name
        if drawable(lines) and not is_current(figure, path):
            if check:
                raise SystemExit(
                    f"docs/{name} is not drawn from {RESULTS} as it is: run python benchmarks/render.py"
                )
            draw(figure, path, function)
