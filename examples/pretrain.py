"""Train a FlashKAT from scratch by the paper's recipe, on one GPU, several, or several machines.

    accelerate launch examples/pretrain.py --data imagenet --size small
    accelerate launch examples/pretrain.py --data imagenet --size small --resume
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/pretrain.py --data imagenet

The same as `flashkat pretrain`. The recipes are pretrain-tiny, -small and -base; a flag on the command line
goes before a recipe's. docs/training.md says what is in them, what a run leaves, and how to launch on several
machines.
"""

import sys

from flashkat_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
