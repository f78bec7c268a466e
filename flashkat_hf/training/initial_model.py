"""The model that a run starts from, ready to train, and the folder that it leaves."""

import copy
from pathlib import Path
from typing import Any
from unicodedata import normalize

from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..checkpoints.image_processor import make_image_processor, resize_processor
from ..checkpoints.loading import load_checkpoint
from ..messages import extra, one_line
from ..model.configuration_flashkat import FlashKATConfig
from ..model.modeling_flashkat import FlashKATForImageClassification
from .recipe import Settings

LORA_MODULES = ["qkv", "proj", "fc1", "fc2"]  # linear maps whose updates have a low rank with LoRA
FULL_MODULES = ["act1", "act2", "classifier"]  # learned in full with LoRA
CLASSES = "single_label_classification"  # the problem that runs are about


def build_model(settings: Settings, class_names: list[str]) -> tuple[nn.Module, Any]:
    """Return the model with a head for these classes, and its image processor; random weights are torch's.

    The weights are float32, whatever the checkpoint has.

    Raises:
        ValueError: in one line, the checkpoint, its head or the image size does not serve.
    """
    if settings.model is None:
        model, processor = _fresh(settings, class_names)
    else:
        model, processor = _pretrained(settings, class_names)
        if settings.image_size not in (None, model.config.image_size):
            resize(model, processor, settings.image_size)
    if settings.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if settings.freeze_backbone:
        model.flashkat.requires_grad_(False)
    if settings.lora_rank:
        model = _with_lora(model, settings)
    return model, processor


def _with_lora(model: nn.Module, settings: Settings) -> Any:
    """Return the peft model whose maps have low-rank updates, and whose rationals and head learn in full."""
    peft, ranks = extra("peft"), {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha}
    full = [name for name in FULL_MODULES if name not in settings.lora_modules]
    targets = settings.lora_modules or LORA_MODULES
    if targets == ["all-linear"]:
        maps = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        targets = sorted(name for name in maps if name not in full)
    names = [f".{name}" for name, _ in model.named_modules()]
    if unknown := [target for target in targets if not any(name.endswith(f".{target}") for name in names)]:
        raise ValueError(f"--lora_modules: {unknown[0]} is no map of the model; qkv and patch_embeddings are")
    options = {"target_modules": targets, "modules_to_save": full}
    try:
        return peft.get_peft_model(model, peft.LoraConfig(**ranks, **options))
    except ValueError as error:
        raise ValueError(f"--lora_modules: {one_line(error)}") from error


def _fresh(settings: Settings, class_names: list[str]) -> tuple[FlashKATForImageClassification, Any]:
    overrides = _labels(class_names) | {"drop_path_rate": settings.drop_path}
    given = {name: getattr(settings, name) for name in ("image_size", "patch_size", "pooling", "initializer")}
    overrides |= {name: value for name, value in given.items() if value}
    try:
        config = FlashKATConfig.from_size(str(settings.size), **overrides)
    except StrictDataclassClassValidationError as error:
        flag = "--patch_size" if settings.patch_size else "--image_size"
        raise ValueError(f"{flag}: {error.__cause__}") from error
    crop = 1.0 if settings.augmentation.moved else 0.875  # a sign fills its image
    return FlashKATForImageClassification(config), make_image_processor(config.image_size, crop)


def _pretrained(settings: Settings, class_names: list[str]) -> tuple[FlashKATForImageClassification, Any]:
    try:
        model, processor = load_checkpoint(str(settings.model), drop_path_rate=settings.drop_path)
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error
    if (channels := model.config.num_channels) not in (1, 3):
        problem = f"takes images of {channels} channels, but image files have 1 or 3"
        raise ValueError(f"--model: {settings.model} {problem}")
    model.float()  # half-precision weights would lose AdamW's small steps in their rounding
    config = model.config
    labels = [config.id2label.get(index, "") for index in range(config.num_labels)]
    same = [normalize("NFC", label) for label in labels] == class_names
    before, num_labels = config.num_labels, len(class_names)
    if settings.head == "keep" and before != num_labels:
        raise ValueError(f"--head: keep, but {settings.model} has {before} labels, not {num_labels}")
    fresh = settings.head == "fresh" or (settings.head == "auto" and not same)
    if not fresh and config.problem_type not in (None, CLASSES):
        kept = f"--head: {settings.model} was made for {config.problem_type}, which is not trained here"
        raise ValueError(f"{kept}; --head fresh learns classes")
    config.problem_type = None
    for name, value in _labels(class_names).items():
        setattr(config, name, value)
    if fresh:
        model.num_labels = num_labels
        model.classifier = nn.Linear(config.hidden_size, num_labels)
        nn.init.trunc_normal_(model.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
    return model, processor


def _labels(class_names: list[str]) -> dict[str, Any]:
    names = dict(enumerate(class_names))
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def resize(model: FlashKATForImageClassification, processor: Any, image_size: int) -> None:
    """Let a model and its processor take images of another size; positions are interpolated, bicubic.

    Raises:
        ValueError: `image_size` is not a multiple of the patch size.
    """
    embeddings, config = model.flashkat.embeddings, model.config
    if any(image_size % patch for patch in embeddings.patch_size):
        raise ValueError(f"--image_size: {image_size} must be a multiple of the patches' {config.patch_size}")
    embeddings.resize(image_size, image_size)
    resize_processor(processor, image_size)
    config.image_size = image_size


def merged(model: Any) -> Any:
    """Return the model itself or, of a LoRA model, a copy with its updates merged in."""
    return copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model


def load_saved(model: nn.Module, folder: Path) -> None:
    """Fill a model with the weights that `save_model` wrote.

    Raises:
        ValueError: there are none, as a model of another's making may save them elsewhere; in one line.
    """
    path = folder / "model.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights {path}: {one_line(error)}") from error


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Write what `from_pretrained` loads; of a LoRA model the merged one, and the adapter beside it."""
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter")
    merged(model).save_pretrained(folder)
    processor.save_pretrained(folder)
