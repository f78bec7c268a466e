"""Name what is in image files, with a FlashKAT folder or Hub id.

python examples/classify.py runs/digits picture.png another.jpg --top_k 3
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, pipeline

import flashkat_hf  # noqa: F401 - registers the model with transformers
from flashkat_hf.data import open_image


@dataclass(frozen=True)
class Settings:
    top_k: int = field(default=3, metadata={"help": "labels to name for each image"})


def main() -> None:
    parser = HfArgumentParser(Settings, description=__doc__)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    arguments = parser.parse_args()
    if arguments.top_k < 1:
        raise SystemExit(f"--top_k: {arguments.top_k} must be positive")
    try:
        images = [open_image(path) for path in arguments.images]
        classify = pipeline("image-classification", model=arguments.model)
    except Exception as error:  # whatever transformers and safetensors raise for a missing or broken checkpoint
        raise SystemExit(f"classify.py: {' '.join(str(error).split())}") from error
    for path, answers in zip(arguments.images, classify(images, top_k=arguments.top_k), strict=True):
        print(f"{path}: " + ", ".join(f"{answer['label']} {answer['score']:.1%}" for answer in answers))


if __name__ == "__main__":
    main()
