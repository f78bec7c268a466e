"""The experiments of the FlashKAT paper (arXiv:2505.13813), rerun; `python -m benchmarks.paper --help`.

Files, in reading order:

- `published.py`: the paper's numbers. `triton_algorithms.py`: its two algorithms. `contenders.py`: who is
  compared.
- `settings.py`, `__main__.py`, `summary.py`: the command line, what is refused, the end of the output.
- `layers.py`: table 1. `configurations.py`: tables 6 and 7. `kernels.py`: tables 2 and 3, figures 2 and 3,
  memory accesses; `nsight.py` and `probe.py`: hardware counters. `precision.py`: tables 5 and 8.
  `training.py`: figure 1 and table 4.
- `results.py`, `statements.py`, `tables.py`, `figures.py`, `render.py`: docs/paper.md.
"""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))  # the scripts there import each other by bare names
