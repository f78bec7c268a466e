"""A checkpoint's config and weights, read and held against each other without importing the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..files import check_utf8, read_json
from ..messages import one_line
from ..model.configuration_flashkat import FlashKATConfig
from .downloads import Repository
from .names import HINT, WEIGHT_SUFFIXES, check_model_name
from .weights import DTYPES, HEAD, check_num_layers, check_state, read_state

SOURCES = ("vit", "deit")  # model types of what may convert; timm's configs have an "architecture"
FOREIGN_SETTINGS = ("quantization_config", "fusion_config")  # they choose other code than the model's


class Checkpoint(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
        folder: on disk or in the cache of the Hub.
        config: of its config.json.
        state: the weights of the classifier, by name.
    """

    folder: Path
    config: FlashKATConfig
    state: dict[str, Tensor]


def read_checkpoint(name_or_path: str, **overrides: Any) -> Checkpoint:
    """Read the config and the weights of a folder or Hub id; they fit, and every weight is finite.

    Args:
        name_or_path: folder or Hub id of a FlashKAT.
        **overrides: fields of the config to replace; with any, the head may be missing, and goes if it does
            not fit.

    Raises:
        ValueError: in one line, for whatever the Hub or safetensors found; a model of another kind; weights
            or labels that do not fit the config.
    """
    check_model_name(name_or_path)
    with one_line_errors(name_or_path):
        folder, settings = _find(name_or_path)
        state = read_state(folder, HINT.format(name_or_path))
        config = read_settings(settings, state, **overrides)
        if overrides and len(state.get(f"{HEAD}bias", ())) != config.num_labels:
            state = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
        check_state(state, config, any_head=bool(overrides))
        return Checkpoint(folder, config, state)


def _find(name_or_path: str) -> tuple[Path, dict[str, Any]]:
    """Return a checkpoint's folder, on disk or in the cache of the Hub, and what its config.json says.

    Raises:
        ValueError: it is another model's; with what to do where that is known.
    """
    path, hint = Path(name_or_path), HINT.format(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            has_weights = any(file.suffix in WEIGHT_SUFFIXES for file in path.iterdir())
            raise ValueError(f"it has no config.json{hint if has_weights else ''}")
        return path, _flashkat_settings(path / "config.json", hint)
    repository = Repository(name_or_path)
    if (config := repository.get("config.json")) is None:
        raise repository.absence(f"it has no config.json{hint}")
    settings = _flashkat_settings(config, hint)
    return repository.weights().parent, settings


def _flashkat_settings(config: Path, hint: str) -> dict[str, Any]:
    """Read the config.json of a FlashKAT.

    Raises:
        ValueError: it is no JSON object, or another model's.
    """
    settings = read_json(config)
    kind = settings.get("model_type") or settings.get("architecture")
    if kind != "flashkat":
        fits = kind in SOURCES or "architecture" in settings
        what = f"it is a {kind} model" if kind else "its config.json names no model_type"
        raise ValueError(f"{what}, not a FlashKAT{hint if fits else ''}")
    return settings


def read_settings(settings: dict[str, Any], state: dict[str, Any], **overrides: Any) -> FlashKATConfig:
    """Make the config of what config.json says, which may be anything.

    Args:
        settings: what config.json says.
        state: the weights that it is for.
        **overrides: fields to replace.

    Raises:
        ValueError: a field is absurd, or chooses other code than the model's.
    """
    for name in FOREIGN_SETTINGS:
        if settings.get(name):
            raise ValueError(f"config.json has {name}, which a FlashKAT has not")
    dtype = settings.get("dtype", settings.get("torch_dtype"))
    if dtype is not None and f"torch.{dtype}".replace("torch.torch.", "torch.") not in map(str, DTYPES):
        raise ValueError(f"config.json has dtype {dtype!r}, in which a FlashKAT does not compute")
    check_num_layers(state, settings.get("num_hidden_layers"))  # a config of a million would take hours
    _check_labels(settings, len(state.get(f"{HEAD}weight", ())))
    kept = {name: value for name, value in settings.items() if name != "auto_map"}
    return FlashKATConfig.from_dict(kept, **overrides)


def _check_labels(settings: dict[str, Any], outputs: int) -> None:
    """Refuse labels that are no names for the outputs 0, 1, ..., of which the weights have `outputs`."""
    labels, number = settings.get("id2label"), settings.get("num_labels")
    if labels is None:
        if number is not None and (type(number) is not int or not 0 <= number <= max(outputs, 2)):
            raise ValueError(f"config.json has num_labels {number!r}, but the weights have {outputs} outputs")
        return
    if not isinstance(labels, dict):
        raise ValueError(f"config.json has id2label {labels!r}, no names by number")
    expected = {str(index) for index in range(len(labels))}
    if surplus := sorted(labels.keys() - expected):
        raise ValueError(
            f"config.json has {len(labels)} labels in id2label, numbered 0 to {len(labels) - 1}, "
            f"but one has the number {surplus[0]}"
        )
    for index, label in labels.items():
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"config.json has {label!r} as the label of output {index}, which is no name")
        check_utf8(label, f"output {index} in config.json")


@contextmanager
def one_line_errors(name_or_path: str) -> Iterator[None]:
    """Turn any error into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot load {name_or_path}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return in one line why something cannot be loaded, without the libraries' advice to run its code."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is never run"
    if "weights_only" in str(error):
        return "its weights are damaged, no PyTorch file, or would run code when unpickled"
    return one_line(error, longest=1000)
