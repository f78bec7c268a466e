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

The FlashKAT paper (Raffel and Chen, AAAI 2026, arXiv:2505.13813) argues by measurements that a
Kolmogorov-Arnold Transformer is slow because of how its backward pass adds up the coefficients' gradients.
Here is each of its tables and figures three times: as published, rerun here with the paper's two algorithms
written anew from its text, and with this package's kernels.

- **Algorithm 1** is KAT's: a thread an element, an atomic addition for each element and coefficient.
- **Algorithm 2** is FlashKAT's: a two-dimensional grid, sums inside a block, one atomic addition for each
  block and coefficient, in float32.
- **Ours** has no atomic addition.

Each was checked against float64 before it was timed. A dash stands where there is no number. Written by
`python benchmarks/render.py` from `benchmarks/results/paper.jsonl`; measured on: """

# title, the kinds of lines that it needs, what is said before the table, the table
SECTIONS: tuple[tuple[str, tuple[str, ...], str, Callable[[Results], str]], ...] = (
    (
        "The argument, checked",
        ("kernel", "training", "error", "counters"),
        """\
What the paper states, and whether it holds on the GPU at hand. A statement of how many times holds where at
least half of it was measured. "As it is" allows a tenth, "alone" asks for nine tenths, "not used up" for less
than half of the peak, and 25% for 20 to 30%.""",
        argument,
    ),
    (
        "Figure 1: forward and backward pass",
        ("training",),
        """\
Models in eager mode under bfloat16 autocast, mean and 95% interval. Algorithm 1 takes seconds a pass, so it
has a smaller batch and fewer passes; times are for an image.""",
        tables.figure1,
    ),
    (
        "Table 1: parameters and operations of a layer",
        ("layer",),
        """\
The first linear map of a block's MLP with its activation. Behind the KAN row stands a real layer of cubic
B-splines on three intervals. PyTorch's counter sees matrix products alone: for the KAN these are its splines
and its base function; the recursion of the splines goes element by element.""",
        tables.table1,
    ),
    (
        "Table 2: arithmetic repeated",
        ("kernel",),
        """\
x of 1024 x 197 x 768 float32 numbers, 8 groups, 6 and 4 coefficients. Ours does its arithmetic once.""",
        tables.table2,
    ),
    (
        "Figures 2 and 3: warp states",
        ("counters",),
        """\
The backward pass by Nsight Compute: cycles that a warp spends in a state for each instruction that it issues;
"selected" is the issuing itself.""",
        tables.warp_states,
    ),
    (
        "Table 3: backward pass",
        ("kernel",),
        """\
The same x. Cycles and throughputs by Nsight Compute, times by events without it. "Relaxed atomics" is
algorithm 1 with the memory order of CUDA's atomicAdd in place of Triton's default.""",
        tables.table3,
    ),
    (
        "Table 4: training throughput",
        ("training",),
        """\
A step is forward, cross-entropy, backward and fused AdamW on synthetic images, without data loading; mean and
95% interval. KAT is not compiled: its step is its kernel, which a compiler leaves as it is. Accuracy is the
paper's, measured by its authors.""",
        tables.table4,
    ),
    (
        "Table 5: rounding of the gradients",
        ("error",),
        """\
Mean absolute error and variance of the coefficients' gradients against float64, with 95% intervals over the
draws: x and the gradient of y are normal, the coefficients near the swish table. The paper's inputs are not
known, so compare ratios. bfloat16 is held against float64 of the rounded inputs.""",
        tables.table5,
    ),
    (
        "Table 8: rounding against the batch",
        ("error",),
        """\
The published numbers of this table were not at hand.""",
        tables.table8,
    ),
    (
        "Memory accesses",
        ("accesses",),
        """\
Numbers that a backward pass reads, writes and adds atomically, by the paper's count. An atomic addition reads
and writes, so algorithm 1 makes 3 (m + n + 2) accesses an element, and algorithm 2 makes
3 ((m + n + 1) / (S d) + 1), S being the rows and d the channels of a block. Beside them stand the bytes that
Nsight Compute counted.""",
        tables.memory,
    ),
    ("Table 6: models", ("model",), "Ours by `FlashKATConfig.from_size`.", tables.table6),
    ("Table 7: hyperparameters", ("recipe",), "Ours by the recipes.", tables.table7),
)

END = """\
## To rerun it

On a GPU, with PyTorch, triton, timm and this package; Nsight Compute (`ncu`) where cycles, throughputs and
warp states are wanted:

    python -m benchmarks.paper all --output DIR
    cp DIR/paper.jsonl benchmarks/results/
    python benchmarks/render.py

Single tables by name (`--help` lists them), `--quick` for a fifth of the passes, `--peer PATH` for the
original kernels from clones of their repositories, `--toy` anywhere, in Triton's interpreter.
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
