"""Name what is in image files, with a FlashKAT folder or Hub id.

python examples/classify.py runs/digits/best picture.png another.jpg --top-k 3
"""

import argparse
from pathlib import Path

from transformers import pipeline

from flashkat_hf.checkpoints import load_checkpoint
from flashkat_hf.data.samples import open_image


def main(model: str, images: list[Path], top_k: int) -> None:
    if top_k < 1:
        raise SystemExit(f"--top-k: {top_k} must be at least 1")
    try:
        for path in images:  # before the model, which may take long to load
            open_image(path)
        network, processor = load_checkpoint(model)
    except ValueError as error:
        raise SystemExit(f"classify.py: {error}") from error
    classify = pipeline("image-classification", model=network, image_processor=processor)
    for path in images:
        answers = classify(open_image(path), top_k=top_k)
        print(f"{path}: " + ", ".join(f"{answer['label']} {answer['score']:.1%}" for answer in answers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("images", type=Path, nargs="+", metavar="image", help="image file")
    parser.add_argument(
        "--top-k", "--top_k", type=int, default=3, help="labels to name for each image (default: 3)"
    )
    main(**vars(parser.parse_args()))
