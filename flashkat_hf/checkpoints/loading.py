"""Loading a checkpoint to work with: whole, or an error of one line."""

from pathlib import Path

from transformers import AutoConfig, AutoImageProcessor

from ..model.modeling_flashkat import FlashKATForImageClassification
from .published import check_cached_weights


def load_checkpoint(name_or_path: str, **overrides):
    """The classifier and the image processor of a folder or Hub id.

    transformers makes up weights that are missing or misshapen, with a warning. Here only the head may be
    made up, and only where `overrides` (fields of the config, such as `id2label`) ask for another.

    Returns:
        `(FlashKATForImageClassification, image processor)`.

    Raises:
        ValueError: in one line, for whatever the Hub, safetensors or transformers found; a model of another
            kind; weights or a processor that do not fit the config.
    """
    path = Path(name_or_path)
    if path.exists() != path.is_dir() or (len(path.parts) > 1 and path.parent.is_dir() and not path.is_dir()):
        raise ValueError(f"{name_or_path} is not a folder")  # sooner than the Hub says so
    hint = f"; {convert_hint(name_or_path)}"
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type != "flashkat":
            raise ValueError(f"it is a {config.model_type} model, not a FlashKAT")
        hint = ""
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        if (crop := processor.crop_size["height"]) != config.image_size:
            raise ValueError(
                f"its processor makes images of {crop} pixels, but the model takes {config.image_size}"
            )
        model, info = FlashKATForImageClassification.from_pretrained(
            name_or_path, **overrides, ignore_mismatched_sizes=True, output_loading_info=True
        )
        made_up = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        if lost := sorted(name for name in made_up if not (overrides and name.startswith("classifier."))):
            raise ValueError(
                f"the weights do not fit the config: {len(lost)} are missing or differ, such as {lost[0]}"
            )
        if not path.is_dir():
            check_cached_weights(name_or_path)
    except Exception as error:
        raise ValueError(f"cannot load {name_or_path}: {' '.join(str(error).split())}{hint}") from error
    return model, processor


def convert_hint(name_or_path) -> str:
    return f"a KAT, ViT or DeiT is converted first: flashkat convert {name_or_path} OUTPUT"
