"""Loading a checkpoint to work with: whole, without running code in it, or an error of one line."""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..model.configuration_flashkat import FlashKATConfig
from ..model.modeling_flashkat import FlashKATForImageClassification
from .image_processor import fit_processor
from .reading import one_line_errors, read_checkpoint, reason
from .weights import check_numbers


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
    folder, config, state = read_checkpoint(str(name_or_path), **overrides)
    with one_line_errors(name_or_path):
        model: Any = FlashKATForImageClassification.from_pretrained(None, config=config, state_dict=state)
        model.name_or_path = model.config.name_or_path = str(name_or_path)  # for peft's adapters
        return model, load_processor(folder, config)


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
