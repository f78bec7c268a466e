"""Loading a checkpoint to work with: whole, or an error of one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, AutoImageProcessor

from ..files import check_model_path
from ..messages import one_line
from ..model.modeling_flashkat import FlashKATForImageClassification
from .downloads import check_cached_weights


def load_checkpoint(name_or_path: str, **overrides):
    """Load the classifier and the image processor of a folder or Hub id.

    transformers makes up weights that are missing or misshapen, with a warning. Here only the head may be
    made up, and only where `overrides` (fields of the config, such as `id2label`) ask for another.

    Returns:
        `(FlashKATForImageClassification, image processor)`.

    Raises:
        ValueError: in one line, for whatever the Hub, safetensors or transformers found; a model of another
            kind; weights or a processor that do not fit the config.
    """
    path = Path(name_or_path)
    check_model_path(name_or_path)  # sooner than the Hub says so
    hint = f"a KAT, ViT or DeiT is converted first: flashkat convert {name_or_path} OUTPUT"
    with _one_line_errors(name_or_path, hint):
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type != "flashkat":
            raise ValueError(f"it is a {config.model_type} model, not a FlashKAT")
        model, info = FlashKATForImageClassification.from_pretrained(
            name_or_path, **overrides, ignore_mismatched_sizes=True, output_loading_info=True
        )
    with _one_line_errors(name_or_path):
        names = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        if overrides:
            names = {name for name in names if not name.startswith("classifier.")}
        if names:
            example = f"{len(names)} are missing or differ, such as {min(names)}"
            raise ValueError(f"the weights do not fit the config: {example}")
        if not path.is_dir():
            check_cached_weights(name_or_path)
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        if (crop := processor.crop_size["height"]) != config.image_size:
            size = config.image_size
            raise ValueError(f"its processor makes images of {crop} pixels, but the model takes {size}")
    return model, processor


@contextmanager
def _one_line_errors(name_or_path: str, hint: str = "") -> Iterator[None]:
    """Turn any error into a ValueError of one line, with a hint unless the error has it already."""
    try:
        yield
    except Exception as error:
        message = one_line(error, longest=1000)
        hint = f"; {hint}" if hint and hint not in message else ""
        raise ValueError(f"cannot load {name_or_path}: {message}{hint}") from error
