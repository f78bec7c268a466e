"""Loading a checkpoint to work with: whole, without running code in it, or an error of one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..files import read_json
from ..messages import one_line
from ..model.configuration_flashkat import FlashKATConfig
from ..model.modeling_flashkat import FlashKATForImageClassification
from .downloads import Repository
from .image_processor import fit_processor
from .published import PUBLISHED
from .weights import DTYPES, HEAD, WEIGHT_SUFFIXES, check_num_layers, check_numbers, check_state, read_state

HINT = "; a KAT, ViT or DeiT is converted first: flashkat convert {} OUTPUT"
SOURCES = ("vit", "deit")  # model types of what may convert; timm's configs have an "architecture"
FOREIGN_SETTINGS = ("quantization_config", "fusion_config")  # they choose other code than the model's


def load_checkpoint(name_or_path: str, **overrides):
    """Load the classifier and the image processor of a folder or Hub id.

    Weights are held against the config and must be finite (`check_state`). Only the head may be made up, and
    only where `overrides` (fields of the config, such as `id2label`) ask for another. Nothing that a
    checkpoint brings is run: no code (`auto_map`), no pickles, no kernels or adapters of its choice.

    Returns:
        `(FlashKATForImageClassification, image processor)`; the processor makes what the model takes.

    Raises:
        ValueError: in one line, for whatever the Hub, safetensors or transformers found; a model of another
            kind; weights, labels or a processor that do not fit the config.
    """
    _check_name(str(name_or_path))
    with _one_line_errors(name_or_path):
        folder, settings = _find(str(name_or_path))
        state = read_state(folder, HINT.format(name_or_path))
        config = read_settings(settings, state, **overrides)
        if overrides and len(state.get(f"{HEAD}bias", ())) != config.num_labels:
            state = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
        check_state(state, config, any_head=bool(overrides))
        model: Any = FlashKATForImageClassification.from_pretrained(None, config=config, state_dict=state)
        model.name_or_path = model.config.name_or_path = str(name_or_path)  # for peft's adapters
        return model, load_processor(folder, config)


def _check_name(name_or_path: str) -> None:
    """Refuse what is neither a folder nor a Hub id, sooner than the Hub says so.

    Raises:
        ValueError: in one line; with the command that converts, for a file of weights or a published KAT.
    """
    path, hint = Path(name_or_path), HINT.format(name_or_path)
    if path.is_dir():
        return
    if name_or_path in PUBLISHED and not path.exists():
        raise ValueError(f"{name_or_path} is the name of a published KAT, not a folder{hint}")
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name_or_path, flags=re.ASCII)
    if path.exists() or not is_id or (len(path.parts) > 1 and path.parent.is_dir()):
        is_source = path.is_file() and path.suffix in WEIGHT_SUFFIXES
        raise ValueError(f"{name_or_path} is not a folder{hint if is_source else ''}")


def _find(name_or_path: str) -> tuple[Path, dict[str, Any]]:
    """Return a checkpoint's folder, on disk or in the cache of the Hub, and what its config.json says.

    Raises:
        ValueError: it is another model's; with what to do where that is known.
    """
    path, hint = Path(name_or_path), HINT.format(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            has_weights = any(file.suffix in WEIGHT_SUFFIXES for file in path.iterdir())
            best = f"; try {path / 'best'}" if (path / "best" / "config.json").is_file() else ""
            raise ValueError(f"it has no config.json{best or (hint if has_weights else '')}")
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


def load_processor(folder: Path, config: FlashKATConfig):
    """Load a folder's image processor, which must make what the model takes; its own code is never run.

    Raises:
        ValueError: there is none that transformers knows, or its images are not the model's.
    """
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"it has no image processor ({names[0]})")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"its image processor cannot be loaded: {reason(error)}") from error
    fit_processor(processor, config.num_channels, config.image_size)
    return processor


def load_other(name_or_path: str, config: Any) -> tuple[Any, Any]:
    """Load an image classifier of transformers that is no FlashKAT, and its image processor, to compare with.

    Args:
        name_or_path: folder or Hub id.
        config: of it, by `AutoConfig`; a kernel of the Hub that it names for the attention is not fetched.

    Raises:
        ValueError: tensors of the model are missing, of another shape, or not finite.
        Exception: whatever transformers raises; `reason` makes a line of it.
    """
    config._attn_implementation = None
    model, info = AutoModelForImageClassification.from_pretrained(
        name_or_path, config=config, trust_remote_code=False, output_loading_info=True
    )
    if wrong := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
        raise ValueError(
            f"its weights do not fit its config: {len(wrong)} are missing or differ, such as {wrong[0]}"
        )
    if surplus := sorted(name for name in info["unexpected_keys"] if "layer" in name):
        raise ValueError(
            f"its weights have {len(surplus)} tensors that its config does not call for: {surplus[0]}"
        )
    for name, tensor in model.named_parameters():
        check_numbers(name, tensor)
    return model, AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)


@contextmanager
def _one_line_errors(name_or_path: str) -> Iterator[None]:
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
