"""Measure the top-1 and top-5 accuracy of a checkpoint, a FlashKAT or a ViT, on the test split of a data set.

    python examples/evaluate.py runs/digits/best                                # on scikit-learn's digits
    accelerate launch examples/evaluate.py runs/tiny/best --data imagenet --batch-size 256
    accelerate launch examples/evaluate.py google/vit-base-patch16-224 --data imagenet
    python examples/evaluate.py hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --data imagenet --json

This is the command `flashkat evaluate`. Every image counts exactly once, on any number of processes.
docs/data.md describes the forms of data that are read.
"""

import sys

from flashkat_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
