"""Reading a checkpoint to convert: a file, folder, Hub id or published name, never by running code in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
)

from ..checkpoints.downloads import Repository, check_sha256, download
from ..checkpoints.image_processor import make_image_processor
from ..checkpoints.names import WEIGHT_SUFFIXES, check_source_name
from ..checkpoints.published import PUBLISHED, RELEASE_REPOSITORY, Published
from ..checkpoints.weights import WEIGHT_FILES, read_tensors
from ..files import read_json
from ..messages import one_line
from ..model.configuration_flashkat import FlashKATConfig, pair
from .tensor_names import CONFIG_FIELDS, READABLE, detect_naming, strip_prefix

EMA_KEYS, STATE_KEYS = (
    ("state_dict_ema", "model_ema", "ema_state_dict"),
    (
        "state_dict",
        "model_state_dict",
        "model",
        "module",
        "network",
        "net",
    ),
)
TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate")  # within 5e-4 of the others
TRANSFORMERS_KINDS = ("vit", "deit", "dinov2", "dinov2_with_registers")
GELUS = ("gelu", "gelu_python", *TANH_GELUS)
TRANSFORMS = {  # crop, mean, standard deviation
    "imagenet": (0.875, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),  # KAT, DeiT
    "augreg": (0.9, IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}


@dataclass
class Source:
    """A checkpoint as it was read."""

    name: str  # what was asked for
    title: str  # the naming, a key of `tensor_names.NAMINGS`
    state: dict[str, Tensor]  # in its own names
    config: dict[str, Any] = field(default_factory=dict)  # its config.json, transformers' or timm's, or empty
    processor: dict[str, Any] = field(default_factory=dict)  # its preprocessor_config.json, or empty
    hints: dict[str, Any] = field(default_factory=dict)  # fields of `FlashKATConfig` that its config tells
    architecture: str | None = None  # timm's name of it, where timm knows it
    published: Published | None = None  # its row in the table of published ones
    notes: list[str] = field(default_factory=list)  # what was chosen in reading it, for the report

    @property
    def is_kat(self) -> bool:
        return self.title in ("KAT", "FlashKAT")


def read_source(
    source: str | Path, *, ema: bool = True, revision: str | None = None, token: str | None = None
) -> Source:
    """Read a checkpoint in one of the namings of `tensor_names.NAMINGS`.

    Args:
        source: a file or folder, a name in `published.PUBLISHED`, or a Hub id.
        ema: take the averaged weights of a training checkpoint that has both.
        revision: branch, tag or commit on the Hub.
        token: for private repositories on the Hub.

    Raises:
        ValueError: in one line: there is no such thing, it is damaged, would run code, or is of another
            architecture.
    """
    name, path = str(source), Path(source).expanduser()
    folder = published = None
    if path.is_dir():
        weights, folder = _weights_of_folder(path), path
    elif path.is_file():
        weights = path
        published = next((row for row in PUBLISHED.values() if row.file == path.name), None)
    elif published := PUBLISHED.get(name):
        weights = download(RELEASE_REPOSITORY, published.file, revision, token)
        if weights is None:
            raise ValueError(
                f"{RELEASE_REPOSITORY} no longer has {published.file}; try {published.repository}"
            )
    else:
        check_source_name(name)
        weights = Repository(name, revision, token).weights()
        folder = weights.parent
        published = next((row for row in PUBLISHED.values() if row.repository == name), None)
    check_sha256(weights)
    try:
        return _read_weights(name, weights, folder, published, ema)
    except ValueError as error:
        raise ValueError(f"cannot convert {name}: {error}") from error


def _read_weights(
    name: str, weights: Path, folder: Path | None, published: Published | None, ema: bool
) -> Source:
    """Read the weights, and the configs beside them if they stand in a folder of their own."""
    config = _read_json(folder / "config.json") if folder else {}
    processor = _read_json(folder / "preprocessor_config.json") if folder else {}
    if "auto_map" in config and config.get("model_type") != "flashkat":
        raise ValueError("it brings its own code (auto_map), which is never run")
    state, architecture, notes = load_state(weights, ema)
    plain_state = strip_prefix(state)
    title = detect_naming(plain_state)
    if title.startswith("transformers"):
        architecture, hints = None, _transformers_hints(config)
    else:
        architecture, hints = _timm_hints(config.get("architecture") or architecture, config)
        pooling = config.get("global_pool")
        if pooling == "avg" and "norm.weight" in plain_state:
            raise ValueError("it averages after the norm (global_pool avg); a FlashKAT averages before it")
        if pooling not in (None, "token", "avg"):
            raise ValueError(f"its pooling is {pooling}; a FlashKAT has token or avg")
    return Source(name, title, state, config, processor, hints, architecture, published, notes)


def load_state(path: Path, ema: bool = True) -> tuple[dict[str, Tensor], str | None, list[str]]:
    """Load a state dict from a safetensors or PyTorch file or index.

    Returns:
        `(state dict, name of the architecture or None, notes on what was chosen)`.

    Raises:
        ValueError: the file is damaged, would run code when unpickled, or holds no state dict.
    """
    content = read_tensors(path)
    if path.suffix in (".json", ".safetensors"):
        return content, None, []
    return _pick_state(content, ema)


def _pick_state(content: Any, ema: bool) -> tuple[dict[str, Tensor], str | None, list[str]]:
    """Pick the state dict out of what a PyTorch file holds, as `load_state` returns it."""
    architecture, notes = None, []
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__} and no state dict")
    keys = [key for key in (*EMA_KEYS, *STATE_KEYS) if isinstance(content.get(key), Mapping)]
    if keys:
        chosen = next((key for key in keys if ema or key not in EMA_KEYS), None)
        if chosen is None:
            raise ValueError(f"it has only averaged weights ({keys[0]})")
        notes.append(f"weights from {chosen}" + (f", not {keys[-1]}" if keys[-1] != chosen else ""))
        if isinstance(content.get("arch"), str):
            architecture = content["arch"]
        content = content[chosen]
    if not content or not all(isinstance(name, str) for name in content):
        raise ValueError("it holds no state dict")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"it holds no state dict: {name} is a {type(tensor).__name__}")
    return dict(content), architecture, notes


def _weights_of_folder(folder: Path) -> Path:
    """Return the file of weights in a folder: one of the usual names, else the only one there is."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    paths = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file())
    if len(paths) != 1:
        content = ", ".join(path.name for path in paths) or f"neither {' nor '.join(WEIGHT_FILES)}"
        raise ValueError(f"{folder} has {content}; give the path of one file of weights")
    return paths[0]


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty where there is no such file."""
    try:
        return read_json(path) if path.is_file() else {}
    except ValueError as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"{path.name} is damaged or no JSON file ({reason})") from error


def _transformers_hints(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of our config that a transformers ViT's tells."""
    if (kind := config.get("model_type", "vit")) not in TRANSFORMERS_KINDS:
        raise ValueError(f"it is a {kind} model; {', '.join(TRANSFORMERS_KINDS)} are known")
    if (act := config.get("hidden_act", "gelu")) not in GELUS:
        raise ValueError(f"its activation is {act}; only gelu has a start table that keeps the function")
    shared = {*READABLE, "num_attention_heads", "layer_norm_eps"}
    shared |= {"hidden_dropout_prob", "attention_probs_dropout_prob"}
    hints = {name: config[name] for name in sorted(shared & CONFIG_FIELDS & config.keys())}
    if labels := config.get("id2label"):
        hints["id2label"] = {int(index): label for index, label in labels.items()}
        hints["num_labels"] = len(labels)
    return hints


def _timm_hints(architecture: str | None, config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the architecture's name, if timm knows it, and the fields of our config that timm tells."""
    hints: dict[str, Any] = {"num_labels": config["num_classes"]} if "num_classes" in config else {}
    size = (config.get("model_args") or {}).get("img_size") or config.get("pretrained_cfg", {}).get(
        "input_size", [0, 0, 0]
    )
    if isinstance(size, list) and size[-2] != size[-1]:  # the weights tell the sides of squares alone
        hints["image_size"] = size[-2:]
    try:
        import timm
    except ImportError:
        return None, hints
    if not architecture or not timm.is_model(architecture.partition(".")[0]):
        return None, hints
    block: Any = timm_model(architecture, config).blocks[0]
    if (act := type(block.mlp.act).__name__) not in ("GELU", "GELUTanh"):
        raise ValueError(f"its activation is {act}; only gelu has a start table that keeps it")
    hints |= {"num_attention_heads": block.attn.num_heads, "layer_norm_eps": block.norm1.eps}
    return architecture, hints


def timm_model(architecture: str, config: Mapping[str, Any], **arguments):
    """Make timm's model of that name, on the meta device.

    Raises:
        ValueError: it is no plain ViT.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    arguments = {**(config.get("model_args") or {}), **arguments}
    with torch.device("meta"):
        model = timm.create_model(architecture, pretrained=False, **arguments)
    if type(model) is not VisionTransformer:
        raise ValueError(f"{architecture} is a {type(model).__name__}, not timm's plain VisionTransformer")
    return model


def timm_arguments(config: FlashKATConfig) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer, and so of the original models, for a config."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": config.num_labels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "qkv_bias": config.qkv_bias,
        "global_pool": "avg" if config.pooling == "mean" else "token",
    }


def gelu_form(source: Source) -> str:
    """Return a ViT's GELU as PyTorch's `approximate`, "tanh" or "none"; exact where no config says it."""
    if source.architecture:
        block: Any = timm_model(source.architecture, source.config).blocks[0]
        return "tanh" if type(block.mlp.act).__name__ == "GELUTanh" else "none"
    return "tanh" if source.config.get("hidden_act") in TANH_GELUS else "none"


def image_processor(
    source: Source, image_size: int | Sequence[int], transform: str | None = None, num_channels: int = 3
):
    """Make the image processor of a source: from its own config, else as its kind usually has it.

    Args:
        source: of `read_source`.
        image_size: height and width that the model takes, one number or two.
        transform: a key of `TRANSFORMS`, which overrides.
        num_channels: of the images that the model takes.

    Returns:
        `(processor, note)`; the note says what had to be assumed, or is None.

    Raises:
        ValueError: unknown transform, or a config that makes square images for a model of others, or others
            for one of square images.
    """
    if transform is not None and transform not in TRANSFORMS:
        raise ValueError(f"unknown transform {transform!r}; known are {', '.join(TRANSFORMS)}")
    note = None
    timm_config = source.config.get("pretrained_cfg", source.config)
    if transform is None and source.processor:
        return _rescaled_processor(source.processor, image_size, num_channels), None
    if transform is None and {"mean", "std"} <= timm_config.keys():
        crop, mean, std = timm_config.get("crop_pct") or 0.875, timm_config["mean"], timm_config["std"]
    else:
        if transform is None:
            is_deit = "deit" in (source.architecture or Path(source.name).name).lower()
            transform = "imagenet" if source.is_kat or is_deit or "DINOv2" in source.title else "augreg"
            if not source.is_kat:
                others = " or ".join(name for name in TRANSFORMS if name != transform)
                note = f"image transform {transform} assumed; --transform {others} says otherwise"
        crop, mean, std = TRANSFORMS[transform]
    height, _ = pair(image_size)
    resized = math.floor(height / crop)  # as timm rounds
    return make_image_processor(image_size, height / resized, tuple(mean), tuple(std), num_channels), note


def _rescaled_processor(settings: Mapping[str, Any], image_size: int | Sequence[int], num_channels: int):
    """Make a ViT's processor with the settings of transformers, for another image size in proportion."""
    processor = make_image_processor(image_size, num_channels=num_channels)
    kept = (
        "do_resize",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
        "resample",
    )
    for name in kept:
        if settings.get(name) is not None:
            setattr(processor, name, settings[name])
    for name in ("image_mean", "image_std"):  # a processor of colours, for a model of another kind of images
        if isinstance(values := getattr(processor, name), list) and values and len(values) != num_channels:
            setattr(processor, name, [sum(values) / len(values)] * num_channels)
    size, crop = settings.get("size", 224), settings.get("crop_size")
    size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    final = crop if settings.get("do_center_crop") and crop else size
    height, width = pair(image_size)
    sides = final.get("height"), final.get("width")
    if None in sides or (sides[0] == sides[1]) != (height == width):
        wanted = "no square images" if height == width else f"no images of {height}x{width} pixels"
        raise ValueError(f"its preprocessor_config.json makes {wanted}: size {size}, crop {crop}")
    scales = {"height": height / final["height"], "width": width / final["width"]}
    sizes = {side: round(pixels * scales.get(side, scales["height"])) for side, pixels in size.items()}
    processor.size = type(processor.size)(**sizes)
    processor.do_center_crop = final is crop
    return processor
