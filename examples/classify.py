"""Name what is in image files, with a FlashKAT folder or Hub id.

python examples/classify.py runs/digits picture.png another.jpg --top-k 3
"""

import argparse
from pathlib import Path

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

import flashkat_hf  # noqa: F401 - registers the model with transformers
from flashkat_hf.data import DataError, open_image


def load(model: str):
    """The pipeline; `pipeline("image-classification", model=model)` also makes up missing weights."""
    config = AutoConfig.from_pretrained(model)
    if config.model_type != "flashkat":
        raise ValueError(f"it is a {config.model_type} model, not a FlashKAT")
    network, info = AutoModelForImageClassification.from_pretrained(model, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"its weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
    return pipeline("image-classification", model=network, image_processor=AutoImageProcessor.from_pretrained(model))


def main(model: str, images: list[Path], top_k: int) -> None:
    if top_k < 1:
        raise SystemExit(f"--top-k: {top_k} must be at least 1")
    try:
        for path in images:  # before the model, which may take long to load
            open_image(path)
    except DataError as error:
        raise SystemExit(f"classify.py: {error}") from error
    folder = Path(model)
    if folder.exists() != folder.is_dir() or (len(folder.parts) > 1 and folder.parent.is_dir() and not folder.is_dir()):
        raise SystemExit(f"classify.py: {model} is not a folder")  # sooner than the Hub says so
    try:
        classify = load(model)
    except Exception as error:  # whatever the Hub, safetensors and transformers raise
        raise SystemExit(f"classify.py: cannot load {model}: {' '.join(str(error).split())}") from error
    for path in images:
        answers = classify(open_image(path), top_k=top_k)
        print(f"{path}: " + ", ".join(f"{answer['label']} {answer['score']:.1%}" for answer in answers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("images", type=Path, nargs="+", metavar="image", help="image file")
    parser.add_argument("--top-k", "--top_k", type=int, default=3, help="labels to name for each image (default: 3)")
    main(**vars(parser.parse_args()))
