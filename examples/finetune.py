"""Fine-tune a FlashKAT on images; without arguments, train a micro one on scikit-learn's digits.

    python examples/finetune.py                                 # digits, under three minutes on two CPU cores
    python examples/finetune.py --data photos --time 10m
    accelerate launch examples/finetune.py --data photos --model CHECKPOINT --epochs 20
    accelerate launch examples/finetune.py --data photos --model CHECKPOINT --resume  # after an interruption

This is the command `flashkat finetune`, whose code is in flashkat_hf/training/commands.py. Settings come from
the command line, from a recipe, or from a rule that fits them to the data; the output folder has the models
best/ and last/. docs/training.md describes both.
"""

import sys

from flashkat_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
