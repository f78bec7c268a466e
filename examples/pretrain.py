"""Train a FlashKAT from scratch by the paper's recipe, on one GPU, several, or several machines.

    accelerate launch examples/pretrain.py --data imagenet --size small
    accelerate launch examples/pretrain.py --data imagenet --size small --resume
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/pretrain.py --data imagenet

This is the command `flashkat pretrain`. The recipes are pretrain-tiny, pretrain-small and pretrain-base; a
setting on the command line goes before the recipe's. docs/training.md describes the recipes, what a run
writes, and how to start it on several machines.
"""

import sys

from flashkat_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
