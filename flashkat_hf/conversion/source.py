"""Reading checkpoints to convert.

Files, folders, Hub ids and published names, never by running code in them.
"""

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
)

from ..checkpoints.downloads import NotReachableError, check_sha256, download
from ..checkpoints.image_processor import make_image_processor
from ..checkpoints.published import PUBLISHED, RELEASE_REPOSITORY, Published
from ..files import read_json
from ..messages import one_line
from .tensor_names import CONFIG_FIELDS, READABLE, detect_naming, strip_prefix

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # in the order of preference
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".ckpt")
EMA_KEYS, STATE_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict"), ("state_dict", "model")
TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate")  # within 5e-4 of the others
GELUS = ("gelu", "gelu_python", *TANH_GELUS)
TRANSFORMS = {  # crop, mean, standard deviation
    "imagenet": (0.875, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),  # KAT, DeiT
    "augreg": (0.9, IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}


@dataclass
class Source:
    """A checkpoint as it was found.

    Attributes:
        name: what was asked for.
        title: the naming, a key of `naming.NAMINGS`.
        state: its state dict, in its own names.
        config: its config.json, transformers' or timm's, or empty.
        processor: its preprocessor_config.json, or empty.
        hints: fields of `FlashKATConfig` that its config tells.
        architecture: timm's name of it, where timm knows it.
        published: the row of the published table.
        notes: what was chosen in reading it, for the report.
    """

    name: str
    title: str
    state: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    hints: dict[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    published: Published | None = None
    notes: list[str] = field(default_factory=list)


def read_source(
    source: str | Path, *, ema: bool = True, revision: str | None = None, token: str | None = None
) -> Source:
    """Read a checkpoint in one of the namings of `naming.NAMINGS`.

    Args:
        source: a file or folder, a name in `published.PUBLISHED`, or a Hub id.
        ema: take the averaged weights of a training checkpoint that has both.
        revision: branch, tag or commit on the Hub.
        token: for private repositories on the Hub.

    Raises:
        ValueError: in one line: there is no such thing, it is damaged, would run code, or is of another
            architecture.
    """
    source_name, path = str(source), Path(source).expanduser()
    published = None
    if path.is_dir():
        weights, folder = _weights_of_folder(path), path
    elif path.is_file():
        weights, folder = path, None
        published = next((row for row in PUBLISHED.values() if row.file == path.name), None)
    elif source_name in PUBLISHED:
        published, folder = PUBLISHED[source_name], None
        weights = download(RELEASE_REPOSITORY, published.file, revision, token)
        if weights is None:
            raise ValueError(
                f"{RELEASE_REPOSITORY} no longer has {published.file}; try {published.repository}"
            )
    else:
        if (
            not re.fullmatch(r"[\w.-]+/[\w.-]+", source_name)
            or path.suffix in SUFFIXES
            or path.parent.is_dir()
        ):
            raise ValueError(
                f"{source_name} is no file, no folder, no Hub id (owner/name) and no published name "
                f"({', '.join(PUBLISHED)})"
            )
        weights = _download_weights(source_name, revision, token)
        folder = weights.parent
        published = next((row for row in PUBLISHED.values() if row.repository == source_name), None)
    check_sha256(weights)
    try:
        return _assemble(source_name, weights, folder, published, ema)
    except ValueError as error:
        raise ValueError(f"cannot convert {source_name}: {error}") from error


def _assemble(
    source_name: str, weights: Path, folder: Path | None, published: Published | None, ema: bool
) -> Source:
    config = _read_json(folder / "config.json") if folder else {}
    if "auto_map" in config and config.get("model_type") != "flashkat":
        raise ValueError("it brings its own code (auto_map), which is never run")
    state, extra, notes = load_state(weights, ema)
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    hints: dict[str, Any] = {}
    architecture = config.get("architecture") or extra.get("arch")
    title = detect_naming(strip_prefix(state))
    if title.startswith("transformers"):
        hints = _transformers_hints(config)
        architecture = None
    else:
        hints = {
            ours: config[theirs] for ours, theirs in (("num_labels", "num_classes"),) if theirs in config
        }
        architecture, more = _timm_hints(architecture, config)
        hints |= more
        pooling = config.get("global_pool")
        if pooling == "avg" and "norm.weight" in strip_prefix(state):
            raise ValueError("it averages after the norm (global_pool avg); a FlashKAT averages before it")
        if pooling not in (None, "token", "avg"):
            raise ValueError(f"its pooling is {pooling}; a FlashKAT has token or avg")
    processor = _read_json(folder / "preprocessor_config.json") if folder else {}
    return Source(source_name, title, state, config, processor, hints, architecture, published, notes)


def load_state(path: Path, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """A state dict from a safetensors or PyTorch file or index, what else the file says, and notes on the choice.

    Raises:
        ValueError: the file is damaged, would run code when unpickled, or holds no state dict.
    """
    if path.name.endswith(".index.json"):
        names = _read_json(path).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{path.name} has no weight_map")
        state: dict[str, Tensor] = {}
        for shard in sorted(set(names.values())):
            if Path(shard).name != shard or not (path.parent / shard).is_file():
                raise ValueError(f"{path.name} names {shard}, which is not there")
            state |= load_state(path.parent / shard, ema)[0]
        if absent := sorted(names.keys() - state.keys()):
            raise ValueError(f"{path.name} names {absent[0]}, which is in no shard")
        return state, {}, []
    if path.suffix == ".safetensors":
        try:
            return load_file(path), {}, []
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} is damaged or no safetensors file ({one_line(error)})") from error
    return _pick_state(_load_pickle(path), ema)


def _load_pickle(path: Path) -> Any:
    """By PyTorch's restricted unpickler; of other classes, only the plain Namespace of training arguments."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if found := re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error)):
            raise ValueError(
                f"{path.name} would run {found[1]} when unpickled, so it is refused; save its state dict alone "
                "where you trust it"
            ) from error
        reason = (
            str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        )  # less PyTorch's advice
        raise ValueError(f"{path.name} is damaged, no PyTorch file, or would run code ({reason})") from error
    except (
        Exception
    ) as error:  # damaged bytes can ask the unpickler for anything, and it raises as many errors
        raise ValueError(f"{path.name} is damaged or no PyTorch file ({one_line(error)})") from error


def _pick_state(loaded: Any, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    notes = []
    extra: dict[str, Any] = {}
    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds a {type(loaded).__name__} and no state dict")
    wrapped = [key for key in (*EMA_KEYS, *STATE_KEYS) if isinstance(loaded.get(key), Mapping)]
    if wrapped:
        chosen = [key for key in wrapped if (key in EMA_KEYS) == ema] or [key for key in wrapped if ema]
        if not chosen:
            raise ValueError(f"it has only averaged weights ({wrapped[0]})")
        notes.append(
            f"weights from {chosen[0]}" + (f", not {wrapped[-1]}" if wrapped[-1] != chosen[0] else "")
        )
        extra = {key: loaded[key] for key in ("arch",) if isinstance(loaded.get(key), str)}
        loaded = loaded[chosen[0]]
    if not loaded or not all(isinstance(name, str) for name in loaded):
        raise ValueError("it holds no state dict")
    for name, tensor in loaded.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"it holds no state dict: {name} is a {type(tensor).__name__}")
    return dict(loaded), extra, notes


def _weights_of_folder(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if len(found) != 1:
        what = ", ".join(path.name for path in found) if found else f"neither {' nor '.join(WEIGHTS)}"
        raise ValueError(f"{folder} has {what}; give the path of one file of weights")
    return found[0]


def _download_weights(repository: str, revision: str | None, token: str | None) -> Path:
    unreachable: NotReachableError | None = None

    def get(name: str) -> Path | None:
        """Or None, and then only from the cache from now on: it may have what it takes."""
        nonlocal unreachable
        try:
            return download(repository, name, revision, token, offline=unreachable is not None)
        except NotReachableError as error:
            unreachable = unreachable or error
            return None

    for name in WEIGHTS:
        if weights := get(name):
            if name.endswith(".index.json"):
                for shard in sorted(set(_read_json(weights).get("weight_map", {}).values())):
                    if Path(shard).name != shard:
                        raise ValueError(f"{repository}: {name} names {shard}, which is no file beside it")
                    if get(shard) is None:
                        raise unreachable or ValueError(
                            f"{repository}: {name} names {shard}, which is not there"
                        )
            for optional in ("config.json", "preprocessor_config.json"):
                get(optional)
            return weights
    raise unreachable or ValueError(
        f"{repository} has neither {' nor '.join(WEIGHTS)}; download its weights and give the file's path"
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty where there is no such file."""
    try:
        return read_json(path) if path.is_file() else {}
    except ValueError as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"{path.name} is damaged or no JSON file ({reason})") from error


def _transformers_hints(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our config that a transformers ViT's tells."""
    if (kind := config.get("model_type", "vit")) not in ("vit", "deit"):
        raise ValueError(f"it is a {kind} model; vit and deit are known")
    if (act := config.get("hidden_act", "gelu")) not in GELUS:
        raise ValueError(f"its activation is {act}; only gelu has a start table that keeps the function")
    same = READABLE | {
        "num_attention_heads",
        "layer_norm_eps",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    }
    hints = {name: config[name] for name in sorted(same & CONFIG_FIELDS & config.keys())}
    if labels := config.get("id2label"):
        hints |= {
            "id2label": {int(index): label for index, label in labels.items()},
            "num_labels": len(labels),
        }
    return hints


def _timm_hints(architecture: str | None, config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The architecture as timm names it, if timm is there and knows it, and what its model tells."""
    try:
        import timm
    except ImportError:
        return None, {}
    if not architecture or not timm.is_model(architecture.partition(".")[0]):
        return None, {}
    model = timm_model(architecture, config)
    block: Any = model.blocks[0]
    if type(block.mlp.act).__name__ not in ("GELU", "GELUTanh"):
        raise ValueError(
            f"its activation is {type(block.mlp.act).__name__}; only gelu has a start table that keeps it"
        )
    return architecture, {"num_attention_heads": block.attn.num_heads, "layer_norm_eps": block.norm1.eps}


def timm_model(architecture: str, config: Mapping[str, Any], **arguments):
    """The model that timm makes of that name, on the meta device.

    Raises:
        ValueError: it is no plain ViT.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = timm.create_model(
            architecture, pretrained=False, **{**(config.get("model_args") or {}), **arguments}
        )
    if type(model) is not VisionTransformer:
        raise ValueError(f"{architecture} is a {type(model).__name__}, not timm's plain VisionTransformer")
    return model


def gelu_form(source: Source) -> str:
    """The GELU of a ViT as PyTorch's `approximate`, "tanh" or "none": exact where its config does not say."""
    if source.architecture:
        block: Any = timm_model(source.architecture, source.config).blocks[0]
        return "tanh" if type(block.mlp.act).__name__ == "GELUTanh" else "none"
    return "tanh" if source.config.get("hidden_act") in TANH_GELUS else "none"


def image_processor(source: Source, image_size: int, transform: str | None = None):
    """The image processor of the source for that image size.

    From its own config, else as its kind usually has.

    Args:
        source: of `read_source`.
        image_size: height and width that the model takes.
        transform: a key of `TRANSFORMS`, which overrides.

    Returns:
        `(processor, note)`; the note says what had to be assumed, or is None.

    Raises:
        ValueError: unknown transform, or a config that makes no square images.
    """
    if transform is not None and transform not in TRANSFORMS:
        raise ValueError(f"unknown transform {transform!r}; known are {', '.join(TRANSFORMS)}")
    if transform is None and source.processor:
        return _rescaled_processor(source.processor, image_size), None
    timm_config = source.config.get("pretrained_cfg", source.config)
    note = None
    if transform is None and {"mean", "std"} <= timm_config.keys():
        crop, mean, std = timm_config.get("crop_pct") or 0.875, timm_config["mean"], timm_config["std"]
    else:
        if transform is None:
            of_deit = "deit" in (source.architecture or Path(source.name).name).lower()
            transform = "imagenet" if "KAT" in source.title or of_deit else "augreg"
            if "KAT" not in source.title:
                others = " or ".join(name for name in TRANSFORMS if name != transform)
                note = f"image transform {transform} assumed; --transform {others} says otherwise"
        crop, mean, std = TRANSFORMS[transform]
    resized = math.floor(image_size / crop)  # as timm rounds
    return make_image_processor(image_size, image_size / resized, tuple(mean), tuple(std)), note


def _rescaled_processor(settings: Mapping[str, Any], image_size: int):
    """A ViT's processor with the settings of transformers, for another image size in proportion."""
    processor = make_image_processor(image_size)
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
    size, crop = settings.get("size", 224), settings.get("crop_size")
    size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    final = crop if settings.get("do_center_crop") and crop else size
    if final.get("height") != final.get("width") or not final.get("height"):
        raise ValueError(f"its preprocessor_config.json makes no square images: size {size}, crop {crop}")
    scale = image_size / final["height"]
    processor.size = type(processor.size)(**{side: round(pixels * scale) for side, pixels in size.items()})
    processor.do_center_crop = final is crop
    return processor
