"""The experiments of the FlashKAT paper (arXiv:2505.13813), rerun; `python -m benchmarks.paper --help`.

Files, in reading order: `published.py` the paper's numbers; `triton_algorithms.py` its two algorithms;
`contenders.py` what is compared; `layers.py` table 1; `kernels.py` tables 2 and 3, figures 2 and 3, memory
accesses; `nsight.py` and `probe.py` the hardware counters; `training.py` figure 1 and table 4; `precision.py`
tables 5 and 8; `figures.py` and `render.py` docs/paper.md.
"""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))  # the scripts there import each other by bare names
