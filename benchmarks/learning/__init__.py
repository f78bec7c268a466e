"""A fair bench of what learned rationals bring to a small ViT; `python -m benchmarks.learning --help`.

What is compared, how many seeds, and which difference that can show stood in `design.md` before the runs.
Files, in reading order:

- `contenders.py`: who is compared, and how each is made. `low_precision.py`: tables and sums in bfloat16.
- `fashion_mnist.py`, `pictures.py`: the pictures, and the augmentation on their device.
- `training.py`: several runs beside each other on one device, each update as a CUDA graph.
- `plan.py`: which runs, in which order. `settings.py`, `__main__.py`: the command line.
- `functions.py`: what the functions became, and functions that are fitted to them.
- `defaults.py`, `checkpoints.py`, `default_tables.py`: apart from the bench, what the defaults of
  `flashkat finetune` give, from scratch and from a checkpoint, and their tables in docs/training.md.
- `statistics.py`, `tables.py`, `figure.py`: the tables and the picture of docs/learning.md.
"""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))  # the scripts there import each other by bare names
