"""Train a FlashKAT from scratch by the paper's recipe, on one GPU, several, or several machines.

    accelerate launch examples/pretrain.py --data imagenet --size small
    accelerate launch examples/pretrain.py --data imagenet --size small --resume
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/pretrain.py --data imagenet

The recipes are examples/recipes/pretrain-tiny, -small and -base; a flag on the command line goes before a
recipe's. docs/training.md says what is in them, what a run leaves, and how to launch on several machines.
"""

import argparse
import sys
from pathlib import Path

from flashkat_hf.messages import warn
from flashkat_hf.training import train
from flashkat_hf.training.recipe import parse

HERE = Path(__file__).parent


def main(arguments: list[str]) -> None:
    sizes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    sizes.add_argument("--size", default="small")
    size = sizes.parse_known_args(arguments)[0].size
    try:
        settings = parse(arguments, f"pretrain-{size}", HERE / "recipes", __doc__.partition("\n")[0])
        if settings.data is None:
            raise ValueError("--data is needed: a folder with train/ and val/, a data set, or shards")
        summary = train(settings)
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"pretrain.py: {error}") from error
    except KeyboardInterrupt:
        warn("interrupted")
        raise SystemExit(130) from None
    if summary:
        accuracy = f"top-1 {summary['top1']:.2%}, top-5 {summary['top5']:.2%}"
        print(f"{accuracy} on {summary['num_test_images']} images; saved in {settings.output / 'best'}")


if __name__ == "__main__":
    main(sys.argv[1:])
