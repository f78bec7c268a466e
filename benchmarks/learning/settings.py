"""The command line of the bench, checked before anything is trained."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_model import refuse

from .contenders import CONTENDERS
from .pictures import Pictures, load

STAGES = {  # in the order of their value
    "rates": "a learning rate for each family, chosen on held-out training pictures",
    "primary": "equal parameters: the contenders of the primary comparisons",
    "variants": "equal parameters: the other contenders, with half of the seeds",
    "upcycled": "a trained ViT goes on, as it is and made a FlashKAT",
    "distilled": "fixed functions fitted to the learned ones, trained from scratch",
    "time": "equal training time, by the measured time of a step",
    "precision": "coefficients and sums in bfloat16; float16 with a scaler",
    "more": "the other half of the seeds of variants, upcycled, distilled and precision",
}
PILOT = "pilot"  # for the design alone, and never in a table of results
DATA = ("fashion", "digits")
EPOCHS = {"fashion": 15, "digits": 100}
BATCH_SIZES = {"fashion": 256, "digits": 64}
TOY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TOY_PICTURES, TOY_EPOCHS = 130, 2


@dataclass(frozen=True)
class Settings:
    """The settings of the bench: its stages, contenders, data, device and time."""

    output: Path
    stages: tuple[str, ...]
    data: tuple[str, ...]
    contenders: tuple[str, ...]
    device: str
    seeds: int
    together: int
    minutes: float | None = None
    source: Path | None = None
    epochs: int | None = None
    pictures: int | None = None
    toy: bool = False
    commit: str | None = None

    def epochs_of(self, data: str) -> int:
        return self.epochs or (TOY_EPOCHS if self.toy else EPOCHS[data])

    def sizes(self, pictures: Pictures) -> dict[str, Any]:
        return pictures.sizes | (TOY if self.toy else {})


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of the command line.

    Raises:
        SystemExit: something is unknown or cannot be run; one line says what.
    """
    known = "\n".join(f"  {name:10} {text}" for name, text in STAGES.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks.learning",
        description="What learned rationals bring to a small ViT; results are JSON lines, added to a file; "
        "what it has already is not run again.",
        epilog=f"stages, in their order:\n{known}\n  {PILOT:10} a few runs for the design, never by default",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="results, JSON lines")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), metavar="STAGE")
    parser.add_argument("--data", nargs="+", default=list(DATA), metavar="SET", help=", ".join(DATA))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--source", type=Path, help="folder of Fashion-MNIST's four files; default: Debian's")
    parser.add_argument("--seeds", type=int, default=10, help="of each contender")
    parser.add_argument("--minutes", type=float, help="end before so many minutes have passed")
    parser.add_argument("--epochs", type=int, help="of each run; default: by the data set")
    parser.add_argument("--pictures", type=int, help="training pictures; default: all")
    parser.add_argument("--together", type=int, default=10 if gpu else 1, help="runs beside each other")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="cuda or cpu")
    parser.add_argument("--toy", action="store_true", help="a tiny model on few pictures, in seconds")
    parser.add_argument("--commit", help="of the code measured; default: asks git")
    options = vars(parser.parse_args(arguments))
    for name in ("stages", "data", "contenders"):
        options[name] = tuple(options[name])
    return checked(Settings(**options))


def checked(settings: Settings) -> Settings:
    for name, known in (("stages", (*STAGES, PILOT)), ("data", DATA), ("contenders", tuple(CONTENDERS))):
        unknown = [value for value in getattr(settings, name) if value not in known]
        refuse(unknown, f"--{name}: {', '.join(unknown)} unknown; known are {', '.join(known)}")
    for name in ("seeds", "together", "epochs", "pictures", "minutes"):
        value = getattr(settings, name)
        refuse(value is not None and value <= 0, f"--{name}: {value} must be above 0")
    refuse(settings.seeds < 2, f"--seeds: {settings.seeds} tells no spread; at least 2")
    refuse(settings.device not in ("cuda", "cpu"), f"--device: {settings.device!r} is neither cuda nor cpu")
    refuse(settings.device == "cuda" and not torch.cuda.is_available(), "--device: there is no GPU")
    refuse(settings.device == "cpu" and settings.together > 1, "--together: needs a GPU")
    refuse(settings.output.is_dir(), f"--output: {settings.output} is a folder")
    return settings


def open_pictures(settings: Settings) -> dict[str, Pictures]:
    """Return the data sets that are asked for, on the device.

    Raises:
        SystemExit: one is missing, or has fewer pictures than a batch.
    """
    sets = {}
    for name in settings.data:
        try:
            pictures = load(name, settings.source).first(TOY_PICTURES if settings.toy else settings.pictures)
        except (ValueError, ImportError) as error:
            raise SystemExit(f"--data {name}: {error}") from error
        few = len(pictures.train) * 0.9 < batch_size(settings, name)
        refuse(
            few, f"--pictures: {len(pictures.train)} are too few for a batch of {batch_size(settings, name)}"
        )
        sets[name] = pictures.to(settings.device)
    return sets


def batch_size(settings: Settings, data: str) -> int:
    """Return the pictures of an update: fewer where the set is cut down, so that there are enough updates."""
    if settings.toy:
        return 32
    return BATCH_SIZES[data] if settings.pictures is None else min(BATCH_SIZES[data], 128)
