"""The rule that chooses what a run's settings leave open, by the data, the model and the device.

docs/training.md has the rule in words. Its values were chosen on held-out training images of Fashion-MNIST
and the digits; `benchmarks/learning/defaults.py` measures what it gives, `benchmarks/learning/checkpoints.py`
what serves a checkpoint.
"""

import statistics
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..data.options import Augmentation
from ..data.samples import Examples, ImageData, header
from ..model.configuration_flashkat import FlashKATConfig
from .launch import accumulation
from .recipe import Settings, warmup
from .selection import HOLDOUT

if TYPE_CHECKING:
    from accelerate import Accelerator

SMALL = 64  # pixels: images whose shorter side is at most that are used whole
LOOKED_AT = 64  # images whose size is read
SEEN_ON_CPU, SEEN_ON_GPU = 280_000, 8_000_000  # images that a run trains on, over all epochs
MANY = 20_000  # images from which a GPU trains a larger model, in larger batches
EPOCHS = 10, 150  # the fewest and the most
RATE_TIMES_WIDTH, WIDEST = 0.128, 768  # of checkpoints: 2e-3 for 64 channels, falling with their number
EVALUATIONS = 25  # of a run, about


@dataclass(frozen=True)
class Facts:
    """What the rule sees.

    Attributes:
        num_images: images to train on, less those that are held out; 0: unknown.
        side: median of some images' shorter sides in pixels; None where it cannot be read, as of a stream.
        gpu: whether the run is on a GPU.
        width: channels of the checkpoint that is started from; None of a fresh model, or if not known.
        share: what a batch has to be a multiple of, so that all processes can share it.
    """

    num_images: int
    side: int | None
    gpu: bool
    share: int = 1
    width: int | None = None


def facts(settings: Settings, data: ImageData, accelerator: "Accelerator") -> Facts:
    """Return what the rule sees of a run's data and devices."""
    config = model_config(settings) if settings.model and settings.fit_defaults else None
    share = accelerator.num_processes * (accumulation() or 1) * (settings.micro_batch or 1)
    return Facts(
        num_images=data.train.num_images or 0,
        side=shorter_side(data) if settings.fit_defaults else None,
        gpu=accelerator.device.type == "cuda",
        share=share,
        width=config.hidden_size if config else None,
    )


class Choices:
    """The settings of a run while they are completed; what is given stays."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.names = {item.name for item in fields(Augmentation)}
        self.chosen: dict[str, Any] = {}
        self.lines: list[str] = []

    def get(self, name: str) -> Any:
        """Return a setting as it is now; None while it is open."""
        source = self.settings.augmentation if name in self.names else self.settings
        value = self.chosen.get(name, getattr(source, name))
        return None if value == "auto" else value

    def choose(self, reason: str, **values: Any) -> None:
        """Give each of these settings that is open its value, and note which, with the reason."""
        taken = {name: value for name, value in values.items() if self.get(name) is None}
        self.chosen |= taken
        if taken and reason:
            texts = (f"--{name} {' '.join(map(_text, _list(value)))}" for name, value in taken.items())
            self.lines.append(f"{' '.join(texts)}: {reason}")

    def finish(self) -> Settings:
        """Return the completed settings, checked again."""
        parts = [{}, {}]
        for name, value in self.chosen.items():
            parts[name in self.names][name] = value
        completed = replace(self.settings, **parts[0])
        completed.augmentation = replace(self.settings.augmentation, **parts[1])
        return completed


def complete(settings: Settings, facts: Facts) -> tuple[Settings, list[str]]:
    """Return the settings with nothing left open but what `--time` will choose, and a line for each choice.

    Raises:
        ValueError: a choice contradicts what is given; in one line.
    """
    if not settings.fit_defaults:
        return settings, []
    choices = Choices(settings)
    choices.choose("", holdout=HOLDOUT)  # `select` has said it
    if settings.model is None:
        _choose_model(choices, facts)
    _choose_augmentation(choices, facts)
    _choose_training(choices, facts)
    return choices.finish(), choices.lines


def complete_epochs(settings: Settings, epochs: int) -> None:
    """Set the epochs of a run, and what follows from their number where it is open."""
    settings.epochs = epochs
    if settings.warmup_epochs is None:
        settings.warmup_epochs = warmup(epochs)
    if settings.evaluate_epochs is None:
        settings.evaluate_epochs = evaluations_apart(epochs)


def _choose_model(choices: Choices, facts: Facts) -> None:
    """Choose the shape of a fresh model: as many weights and patches as the device can train."""
    size = "tiny" if facts.gpu and facts.num_images >= MANY else "micro"
    choices.choose(f"{facts.num_images:,} images to train on, {_device(facts)}", size=size)
    side = facts.side or 224
    if side > SMALL:  # photographs
        side = 224 if facts.gpu else SMALL
    wanted = choices.get("image_size") or max(side, 16)
    across = 14 if wanted > SMALL else 7 if facts.gpu else 4  # patches
    patch = choices.get("patch_size") or _patch(wanted, -(-wanted // across), bool(choices.get("image_size")))
    across = -(-wanted // patch)
    text = "images" if facts.side is None else f"images of {facts.side} pixels"
    text = f"{text}, {across} x {across} patches {_device(facts)}"
    choices.choose(text, image_size=across * patch, patch_size=patch)
    choices.choose("learns faster than cls from scratch", pooling="mean")
    choices.choose(
        "learns better than the released start on Fashion-MNIST", initializer="variance_preserving"
    )


def _choose_augmentation(choices: Choices, facts: Facts) -> None:
    """Choose what is done to the images: of small ones no part is cut out, and none is mirrored."""
    if (facts.side or 224) <= SMALL:
        why = (
            "small images are used whole; whether they may be mirrored is not known, --flip 0.5 mirrors half"
        )
        choices.choose(why, crop="shifts", flip=0.0)
    else:
        why = "photographs, of which it is taken that they may be mirrored; --flip 0 mirrors none"
        choices.choose(why, crop="random", flip=0.5)
    choices.choose(
        "" if choices.get("crop") != "random" else "the crop keeps a good part", crop_area=(0.35, 1.0)
    )


def _choose_training(choices: Choices, facts: Facts) -> None:
    """Choose batch, epochs, learning rate and mixing."""
    fresh, many = choices.settings.model is None, facts.num_images >= MANY
    pair = facts.share if choices.get("micro_batch") else 2 * facts.share  # what mixing has to divide into
    given = choices.get("batch_size") or pair
    if fresh and facts.num_images >= pair and not given % pair and not (choices.get("micro_batch") or 0) % 2:
        choices.choose(
            "images and their labels are mixed in pairs, so that few images teach more",
            mixup=0.8,
            cutmix=1.0,
            mix_probability=0.8,
        )
    mixed = choices.get("mixup") or choices.get("cutmix")
    batch = _batch(facts.num_images, 512 if facts.gpu and many else 32, pair if mixed else facts.share)
    choices.choose("about a tenth of the images, within limits", batch_size=batch)
    if not choices.settings.time:
        seen = SEEN_ON_GPU if facts.gpu else SEEN_ON_CPU
        epochs = max(EPOCHS[0], min(EPOCHS[1], round(seen / max(1, facts.num_images))))
        reason = f"{EPOCHS[0]} to {EPOCHS[1]}, for {seen:,} images over all epochs; --time sets minutes"
        choices.choose(reason, epochs=epochs)
        choices.choose("", evaluate_epochs=evaluations_apart(choices.get("epochs")))
    if fresh:
        size = choices.get("size")
        choices.choose(f"the size {size}", learning_rate=2e-3 if size == "micro" else 1e-3)
    else:
        rate = min(2e-3, RATE_TIMES_WIDTH / (facts.width or WIDEST))
        text = "" if facts.width is None else f" of {facts.width} channels"
        choices.choose(f"from a checkpoint{text}", learning_rate=float(f"{rate:.1g}"))
    choices.choose("", layer_decay=1.0, mixup=0.0, cutmix=0.0, mix_probability=1.0)


def _patch(image_size: int, patch: int, given: bool) -> int:
    """Return the patch size nearest to one that fills images of this size.

    Where the size is not given, and so can be rounded up, it is at most one pixel away, or the one itself.
    """
    fitting = (size for size in range(1, image_size + 1) if image_size % size == 0)
    nearest = min(fitting, key=lambda size: abs(size - patch))
    return nearest if given or abs(nearest - patch) <= 1 else patch


def _batch(num_images: int, most: int, share: int) -> int:
    """Return a power of two of about a tenth of the images, or the next number that processes can share."""
    batch, tenth = 1, max(8, num_images // 10)
    while 2 * batch <= min(most, tenth, num_images or most):
        batch *= 2
    return -(-batch // share) * share


def model_config(settings: Settings) -> FlashKATConfig | None:
    """Return the config of a run's model, or None; building the model says what is wrong with it."""
    with suppress(Exception):  # the Hub's, transformers' and the config's own have no common class
        if settings.model:
            return FlashKATConfig.from_pretrained(settings.model)
        return FlashKATConfig.from_size(str(settings.size))
    return None


def _device(facts: Facts) -> str:
    return "on a GPU" if facts.gpu else "on a CPU"


def evaluations_apart(epochs: int) -> int:
    """Return after how many epochs to evaluate, so that a run has some `EVALUATIONS`."""
    return max(1, epochs // EVALUATIONS)


def shorter_side(data: ImageData) -> int | None:
    """Return the median of the shorter sides of some training images in pixels, or None."""
    if not isinstance(data.train, Examples):
        return None
    sides = []
    for index in range(0, len(data.train), max(1, len(data.train) // LOOKED_AT)):
        with suppress(Exception), header(data.train[index].image) as image:  # training says what is no image
            sides.append(min(image.size))
    return round(statistics.median(sides)) if sides else None


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
