"""The settings of a training run: one dataclass, read from a recipe and the command line, then checked."""

import argparse
import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, get_args, get_origin, get_type_hints

from ..data.options import BY_THE_DATA, PHOTOGRAPHS, SIGNS, Augmentation
from ..messages import extra, one_line

RECIPES = Path(__file__).with_name("recipes")  # the named ones: YAML files
TRACKERS = ("tensorboard", "trackio", "wandb")
# Marks of settings: their ranges (the least value, and one that all are below), and where they go.
COUNT = (1, math.inf)
POSITIVE = (1e-12, math.inf)
FROM_ZERO = (0, math.inf)
BELOW_ONE = (0, 1)
PROBABILITY = (0, 1 + 1e-12)
SEED = (0, 2**31)
FRESH = ("size", "patch_size", "pooling", "initializer")  # settings of a model without weights
FIXED = {  # without `fit_defaults`, as the packaged recipes are
    "epochs": 50,
    "batch_size": 64,
    "holdout": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "mix_probability": 1.0,
    "evaluate_epochs": 1,
}
DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)", re.IGNORECASE)
SECONDS = {"s": 1, "m": 60, "h": 3600}
FREE = "free"  # it cannot change the weights, so that a resumed run may have another value
DATA = "data"  # `open_data` takes it


def setting(default: Any, text: str, *marks: Any) -> Any:
    """Return the field of a setting, which holds all that is known of it: its default, help and marks."""
    limits = next((mark for mark in marks if isinstance(mark, tuple)), None)
    kind: dict[str, Any] = {"default_factory": list} if default == [] else {"default": default}
    return field(metadata={"help": text, "limits": limits, "marks": marks}, **kind)


@dataclass
class Settings:
    """The settings of a run; their names are the flags of the command line and the keys of a recipe.

    Raises:
        ValueError: a value is out of its range, or two contradict each other; the message names both.
    """

    # data and output
    data: str | None = setting(None, "image folder, data set or shards; default: scikit-learn's digits")
    skip_corrupt: bool = setting(False, "leave out images that cannot be read, and count them", DATA)
    streaming: bool = setting(False, "read a data set of the Hub without downloading it first", DATA)
    subset: str | None = setting(None, "of a data set: name of the configuration", DATA)
    revision: str | None = setting(None, "of a data set on the Hub: branch, tag or commit", DATA)
    image_column: str | None = setting(None, "of a data set; default: found by its type", DATA)
    label_column: str | None = setting(None, "of a data set; default: found by its type", DATA)
    class_names: list[str] = setting([], "by index, where the data do not say", DATA)  # noqa: RUF009
    train_split: str | None = setting(None, "of a data set or shards; default: train", DATA)
    test_split: str | None = setting(None, "of a data set or shards; default: validation, val or test", DATA)
    train_size: int | None = setting(None, "images of a stream that does not know it", COUNT, DATA)
    test_size: int | None = setting(None, "images of a stream that does not know it", COUNT, DATA)
    shuffle_buffer: int = setting(1000, "images that a worker shuffles a stream among", COUNT, DATA)
    workers: int | None = setting(
        None, "processes for each device that read images; default: as the data need", FROM_ZERO, FREE
    )
    output: Path = setting(None, "folder of the run; default: runs/ and the data's name", FREE)  # noqa: RUF009
    resume: bool = setting(False, "go on from the newest complete checkpoint in the output", FREE)
    overwrite: bool = setting(False, "replace an earlier run in the output", FREE)
    push_to: str | None = setting(
        None, "owner/name on the Hub for the best model; branch checkpoints while training", FREE
    )
    push_private: bool = setting(False, "make that repository private, if it is new", FREE)
    holdout: float = setting(
        None,
        "part of the training images on which the best epoch is chosen, where there is no third folder;"
        " 0: on the test images; default: 0.1, with a packaged recipe 0",
        BELOW_ONE,
    )
    # model
    fit_defaults: bool = setting(
        True, "choose what is not given by the data, as docs/training.md says; false: fixed values", FREE
    )
    model: str | None = setting(None, "FlashKAT folder or Hub id to start from; default: a fresh model")
    size: Literal["micro", "tiny", "small", "base"] | None = setting(
        None, "of a fresh model; default: by the data"
    )
    image_size: int | None = setting(
        None, "height and width in pixels; default: the model's, of a fresh one by the data", COUNT
    )
    patch_size: int | None = setting(None, "height and width of a patch; default: by the data", COUNT)
    pooling: Literal["cls", "mean"] | None = setting(
        None, "of a fresh model, before the classifier; default: by the data"
    )
    initializer: Literal["trunc_normal", "variance_preserving"] | None = setting(
        None, "of a fresh model's MLPs: the released start or the paper's; default: by the data"
    )
    head: Literal["auto", "fresh", "keep"] = setting("auto", "of --model; auto: fresh where labels differ")
    drop_path: float = setting(0.0, "stochastic depth of the last block", BELOW_ONE)
    freeze_backbone: bool = setting(False, "train the classifier only")
    lora_rank: int | None = setting(
        None, "train low-rank updates of the linear maps, and the rationals in full", COUNT
    )
    lora_modules: list[str] = setting([], "maps with such updates, or all-linear; default: qkv proj fc1 fc2")  # noqa: RUF009
    lora_alpha: float = setting(16.0, "scale of the low-rank updates, divided by their rank", POSITIVE)
    gradient_checkpointing: bool = setting(False, "compute activations twice to save memory")
    # optimisation
    epochs: int = setting(None, "passes over the training images; default: by the data", COUNT)
    time: str | None = setting(
        None, "such as 10m, 90s or 1.5h: as many epochs as fit, by the speed of the first updates"
    )
    max_steps: int | None = setting(None, "end after so many updates, in the schedule of all epochs", COUNT)
    batch_size: int = setting(None, "images of one update, over all devices; default: by the data", COUNT)
    micro_batch: int | None = setting(None, "images of a device at a time; default: its share", COUNT)
    learning_rate: float = setting(None, "the highest; default: by the data and the model", POSITIVE)
    min_learning_rate: float = setting(0.0, "at the end of the cosine", FROM_ZERO)
    warmup_epochs: float = setting(None, "in which the rate rises; default: a tenth, 5 at most", FROM_ZERO)
    warmup_learning_rate: float = setting(1e-5, "where it rises from", FROM_ZERO)
    schedule: Literal["epoch", "update"] = setting("update", "when the learning rate changes")
    weight_decay: float = setting(0.05, "of matrices and rational coefficients", FROM_ZERO)
    decay_coefficients: bool = setting(True, "decay the rational coefficients too, as the released weights")
    layer_decay: float | None = setting(
        None,
        "learning rate of a block as part of the next one's, 1: all alike; default: by the model",
        PROBABILITY,
    )
    beta1: float = setting(0.9, "of AdamW", BELOW_ONE)
    beta2: float = setting(0.999, "of AdamW", BELOW_ONE)
    eps: float = setting(1e-8, "of AdamW", POSITIVE)
    clip_norm: float | None = setting(None, "largest norm of the gradient; default: no clipping", POSITIVE)
    mixup: float = setting(None, "alpha of mixup, 0: off; default: by the data", FROM_ZERO)
    cutmix: float = setting(None, "alpha of cutmix, 0: off; default: by the data", FROM_ZERO)
    mix_switch: float = setting(0.5, "probability of cutmix where both are on", PROBABILITY)
    mix_probability: float = setting(
        None,
        "probability that a batch is mixed at all; default: by the data",
        PROBABILITY,
    )
    label_smoothing: float = setting(0.1, "part of each label that is spread over all", BELOW_ONE)
    ema_decay: float | None = setting(None, "of averaged weights, evaluated too; default: none", BELOW_ONE)
    precision: Literal["no", "bf16"] | None = setting(None, "default: accelerate's, else bf16 on a GPU")
    compile: bool | None = setting(None, "torch.compile; default: on a GPU without CUDA graphs")
    cuda_graphs: bool = setting(True, "replay each update on a GPU, the same bits in less time", FREE)
    seed: int = setting(0, "of weights, order, augmentation, mixing and stochastic depth", SEED)
    # what is shown and kept
    evaluate_epochs: int = setting(
        None, "evaluate after so many epochs, and after the last; default: by their number", COUNT
    )
    log_steps: int = setting(
        None,
        "updates between lines of metrics; each waits for the device; default: 10, 50 with --data",
        COUNT,
        FREE,
    )
    trackers: list[str] = setting([], f"accelerate's, beside metrics.jsonl: {', '.join(TRACKERS)}", FREE)  # noqa: RUF009
    film: bool = setting(False, "leave functions.gif, a picture of the learned functions an epoch", FREE)
    checkpoint_steps: int | None = setting(None, "updates between checkpoints; default: by time", COUNT, FREE)
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints", POSITIVE, FREE)
    keep_checkpoints: int = setting(1, "older ones are removed when a new one is complete", COUNT, FREE)
    save_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "of the weights in best/ and last/, which are evaluated so; training is in float32"
    )
    keep_after_success: bool = setting(False, "keep checkpoints when the run is complete", FREE)
    skip_nonfinite: bool = setting(False, "skip updates whose loss or gradient is not finite", FREE)

    augmentation: Augmentation = field(default=BY_THE_DATA, init=False)

    def __post_init__(self):
        for item in fields(self):
            value, limits = getattr(self, item.name), item.metadata.get("limits")
            if value is not None and limits and not limits[0] <= value < limits[1]:
                below = "" if limits[1] == math.inf else f" and below {limits[1]}"
                limit = " and at most 1" if limits == PROBABILITY else below
                raise ValueError(f"--{item.name}: {value} must be at least {limits[0]:g}{limit}")
        if not self.fit_defaults:
            self._take_fixed()
        if self.warmup_epochs is None and self.epochs:
            self.warmup_epochs = warmup(self.epochs)
        if problem := self._contradiction():
            raise ValueError(problem)
        for name in ("data", "model"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, os.path.expanduser(value))  # of --data=~/photos the shell does not
        if self.output is None:
            name = "digits" if self.in_memory else Path(str(self.data)).resolve().name
            self.output = Path("runs", name or "data")
        self.output = self.output.expanduser()
        if self.log_steps is None:
            self.log_steps = 10 if self.in_memory else 50

    def fixed(self) -> "Settings":
        """Return the settings with nothing left to the rule; what is given stays."""
        others, given = replace(self, fit_defaults=False), self.augmentation
        open_ = [name for name in ("crop", "crop_area", "flip") if getattr(given, name) in (None, "auto")]
        values = {name: getattr(others.augmentation, name) for name in open_}
        others.augmentation = replace(given, **values) if self.fit_defaults else given
        return others

    def _take_fixed(self) -> None:
        """Give what is not set the values that the packaged recipes were released with."""
        for name, value in FIXED.items():
            if getattr(self, name) is None and not (name == "epochs" and self.time):
                setattr(self, name, value)
        if self.model is None and self.size is None:
            self.size = "micro" if self.in_memory else "tiny"
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if self.model else 3e-3 if self.size == "micro" else 5e-4
        self.augmentation = SIGNS if self.in_memory else PHOTOGRAPHS

    def _contradiction(self) -> str | None:
        """Return what is wrong with two settings together, or None."""
        for name in FRESH if self.model is not None else ():
            if (value := getattr(self, name)) is not None:
                return f"--{name}: {value} is for a fresh model, but --model {self.model} has its own"
        if self.model is None and self.head != "auto":
            return f"--head: {self.head} is for --model; a fresh model has a fresh head"
        if self.freeze_backbone and self.lora_rank:
            return f"--freeze_backbone contradicts --lora_rank {self.lora_rank}"
        if self.lora_modules and not self.lora_rank:
            return f"--lora_modules: {' '.join(self.lora_modules)} are for --lora_rank, which is not given"
        if self.time is not None and not self.seconds:
            return f"--time: {self.time} is no time such as 10m, 90s or 1.5h"
        if self.time and self.epochs:
            return f"--time: {self.time} chooses the epochs, but --epochs {self.epochs} is given"
        if self.warmup_epochs and self.epochs and self.warmup_epochs >= self.epochs:
            return f"--warmup_epochs: {self.warmup_epochs:g} must be below --epochs {self.epochs}"
        if self.resume and self.overwrite:
            return "--resume contradicts --overwrite"
        if unknown := sorted(set(self.trackers) - set(TRACKERS)):
            return f"--trackers: {unknown[0]} is unknown; known: {', '.join(TRACKERS)}"
        if self.micro_batch and self.batch_size and self.batch_size % self.micro_batch:
            return f"--batch_size: {self.batch_size} must be a multiple of --micro_batch {self.micro_batch}"
        return None

    @property
    def in_memory(self) -> bool:
        """True if the images are in memory and no file is read: the digits."""
        return self.data in (None, "digits")

    @property
    def seconds(self) -> float | None:
        """The time that the run may take, in seconds, or None."""
        match = DURATION.fullmatch(self.time or "")
        return float(match[1]) * SECONDS[match[2].lower()] if match else None

    def data_options(self) -> dict[str, Any]:
        """Return the options of `open_data` that are set."""
        names = (item.name for item in fields(self) if DATA in item.metadata.get("marks", ()))
        return {name: value for name in names if (value := getattr(self, name))}

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, flat, as JSON takes them."""
        flat = asdict(self)
        flat.update(flat.pop("augmentation"))
        return {key: str(value) if isinstance(value, Path) else value for key, value in flat.items()}


def warmup(epochs: int) -> float:
    """Return the epochs in which the learning rate rises, where nothing else is said."""
    return min(5.0, epochs / 10)


FIELDS = [item for cls in (Settings, Augmentation) for item in fields(cls) if item.init]
NAMES = [item.name for item in FIELDS]
FREE_NAMES = frozenset(item.name for item in FIELDS if FREE in item.metadata.get("marks", ()))
TRUE, FALSE = ("true", "yes", "on", "y", "t", "1"), ("false", "no", "off", "n", "f", "0")
LISTS = {item.name for item in FIELDS if item.default_factory is list or isinstance(item.default, tuple)}


TYPES = {item: kind for cls in (Settings, Augmentation) for item, kind in get_type_hints(cls).items()}
GROUPS = {  # the first setting of each group of `--help`
    "data": "data and output",
    "model": "model",
    "epochs": "optimisation",
    "evaluate_epochs": "what is shown and kept",
    "crop": "augmentation",
}
NICKNAMES = {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size", "ema": "ema_decay"}


class _Formatter(argparse.HelpFormatter):
    """Help that adds the default to each text which states none, and has one spelling of each flag."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        known = action.default in (None, False, argparse.SUPPRESS) or action.default == []
        return text if known or "default:" in text else f"{text} (default: %(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {values}".rstrip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X", _truth: "true|false"}.get(action.type, "VALUE")  # pyright: ignore[reportArgumentType]


class _Parser(argparse.ArgumentParser):
    """A parser of all settings, whose errors are exceptions."""

    def __init__(self, command: str, description: str):
        spelling = {"usage": f"flashkat {command} [--SETTING VALUE ...]", "formatter_class": _Formatter}
        super().__init__(description=description, allow_abbrev=False, **spelling)
        group: Any = self
        for item in FIELDS:
            if item.name in GROUPS:
                group = self.add_argument_group(GROUPS[item.name])
            options = _options(item)
            if item.name in Augmentation.__dataclass_fields__:
                options["default"] = argparse.SUPPRESS  # then it is that of the settings
            group.add_argument(*_spellings(item.name), help=item.metadata["help"], **options)
            if item.default is True:
                opposite = {"dest": item.name, "action": "store_false", "default": argparse.SUPPRESS}
                text = f"--{item.name} false"
                group.add_argument(*_spellings(f"no_{item.name}"), help=text, **opposite)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _options(item: Field) -> dict[str, Any]:
    """Return what argparse needs to know of a setting: how its value is read, and its default."""
    kind = TYPES[item.name]
    if type(None) in get_args(kind):
        kind = next(one for one in get_args(kind) if one is not type(None))
    default = [] if item.default_factory is list else item.default
    if kind is bool:
        return {"default": default, "type": _truth, "nargs": "?", "const": True}
    if get_origin(kind) is Literal:
        return {"default": default, "choices": get_args(kind)}
    if get_origin(kind) is list:
        return {"default": default, "nargs": "+", "metavar": "NAME"}
    if get_origin(kind) is tuple:
        return {"default": default, "nargs": len(get_args(kind)), "type": float}
    if item.name == "rand_augment":
        return {"default": default, "type": _text_or_none}
    return {"default": default, "type": kind}  # of text, a number or a path


def _truth(text: str) -> bool:
    word = text.lower()
    if word not in (*TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return word in TRUE


def _text_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def parse(arguments: Sequence[str], command: str = "finetune", description: str = "") -> Settings:
    """Return the settings of a command line; what it does not name comes from a recipe.

    Args:
        arguments: the command line, less the command; its `--recipe` is a file or a name in `RECIPES`.
        command: "finetune" or "pretrain"; decides which recipe is taken where the command line names none.
        description: for `--help`.

    Raises:
        ValueError: in one line: an unknown recipe, key or flag, a value of the wrong type or out of range.
    """
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    parser = _Parser(command, description)
    parser.add_argument(
        "--recipe", help=f"YAML file, or one of {', '.join(known)}; default of pretrain: by --size"
    )
    named = parser.parse_known_args(list(arguments))[0]
    recipe, values = named.recipe, {}
    if recipe is None and command == "pretrain":
        recipe = f"pretrain-{named.size or 'small'}"
    if recipe is not None:
        path = RECIPES / f"{recipe}.yaml" if recipe in known else Path(recipe).expanduser()
        if not path.is_file():
            raise ValueError(f"--recipe: {recipe} is no file and none of {', '.join(known)}")
        values = read_recipe(path)
    if named.model:  # of the fresh model that the recipe is for
        values = {name: value for name, value in values.items() if name not in FRESH}
    if named.time:
        values.pop("epochs", None)
    options, unknown = parser.parse_known_args([*_as_flags(values), *arguments])
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}{_suggestion(unknown[0], '--')}")
    settings = Settings(**{item.name: getattr(options, item.name) for item in fields(Settings) if item.init})
    given = {item.name for item in fields(Augmentation)} & vars(options).keys()
    settings.augmentation = replace(settings.augmentation, **{name: getattr(options, name) for name in given})
    return settings


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the names and values of a YAML recipe; values are texts as written, or None.

    Raises:
        ValueError: it is no YAML mapping, has a key that is no setting, or one twice; the message names it.
    """
    yaml = extra("yaml")

    class Texts(yaml.SafeLoader):  # no, on and 010 are texts, too: the command line's parser reads them
        yaml_implicit_resolvers: ClassVar = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            names = [key.value for key, _ in node.value]
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{path}: {repeated[0]} is set twice")
            return super().construct_mapping(node, deep)

    Texts.add_implicit_resolver(
        "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
    )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Texts)
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold names and values, one setting a line")
        for name, value in values.items():
            if name not in NAMES:
                raise ValueError(f"{path}: {name} is no setting{_suggestion(str(name))}")
            if isinstance(value, dict) or (isinstance(value, list) and name not in LISTS):
                raise ValueError(f"{path}: {name} is one value, not {value}")
            if isinstance(value, list) and None in value:
                raise ValueError(f"{path}: {name} has an empty entry; null and ~ as names need quotes")
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    return values


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _as_flags(values: dict[str, Any]) -> list[str]:
    """Return a recipe's values as the command line would give them, so that both are checked alike."""
    flags = []
    for name, value in values.items():
        if value != [] and (
            value is not None or name not in Settings.__dataclass_fields__
        ):  # None: the default
            flags += [f"--{name}", *map(str, _list(value))]
    return flags


def _suggestion(name: str, dashes: str = "") -> str:
    """Return the end of a message that names the setting which was probably meant, or nothing."""
    name = name.lstrip("-").partition("=")[0].replace("-", "_")
    close = [NICKNAMES[name]] if name in NICKNAMES else difflib.get_close_matches(name, NAMES, 1)
    close = close or sorted((known for known in NAMES if known in name), key=len)[-1:]  # num_train_epochs
    return f"; perhaps {dashes}{close[0]}" if close else ""
