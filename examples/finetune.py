"""Fine-tune a FlashKAT on images; without arguments, train a micro one on scikit-learn's digits.

    python examples/finetune.py                                  # about two minutes on a CPU
    accelerate launch examples/finetune.py --data photos --size tiny
    accelerate launch examples/finetune.py --data photos --model CHECKPOINT --epochs 20
    accelerate launch examples/finetune.py --data photos --model CHECKPOINT --resume  # after an interruption

Settings come from a recipe (`--recipe`, a file in examples/recipes or your own) and from the command line.
The run's folder holds the model in best/ and last/. docs/training.md describes both.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from flashkat_hf.messages import warn
from flashkat_hf.training import train
from flashkat_hf.training.recipe import parse

HERE = Path(__file__).parent


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", default="digits")
    recipe = "finetune-digits" if parser.parse_known_args(arguments)[0].data == "digits" else "finetune"
    try:
        settings = parse(arguments, recipe, HERE / "recipes", __doc__.partition("\n")[0])
        summary = train(settings)
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"finetune.py: {error}") from error
    except KeyboardInterrupt:
        warn("interrupted")
        raise SystemExit(130) from None
    if summary:
        best, images = settings.output / "best", sorted((settings.output / "samples").glob("*.png"))
        print(f"test accuracy {summary['top1']:.2%} on {summary['num_test_images']} images; saved in {best}")
        command = ["python", os.path.relpath(HERE / "classify.py"), str(best)]
        command.append(str(images[-1]) if images else "IMAGE")
        print(f"now ask it about an image:\n{shlex.join(command)}")


if __name__ == "__main__":
    main(sys.argv[1:])
