"""Weights on disk: found, read without running code, and held against the config before a model is made."""

import argparse
import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files import read_json
from ..messages import one_line
from ..model.coefficients import SIMPLE_FUNCTIONS
from ..model.configuration_flashkat import FlashKATConfig, pair

WEIGHT_FILES = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that a model computes in
PREFIX, HEAD = "flashkat.", "classifier."


def find_weights(folder: Path) -> Path:
    """Return the file of weights, or the index of its shards, that transformers loads from a folder.

    Raises:
        ValueError: there is none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"it has neither {' nor '.join(WEIGHT_FILES)}")


def shard_map(index: Path) -> dict[str, str]:
    """Return which shard has which tensor, by an index of shards.

    Raises:
        ValueError: it is no such index.
    """
    try:
        names = read_json(index).get("weight_map")
    except ValueError as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"{index.name} is damaged or no JSON file ({reason})") from error
    if not isinstance(names, dict):
        raise ValueError(f"{index.name} has no weight_map")
    return names


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a folder's file of weights, or of all shards in the order of their names.

    Raises:
        ValueError: there are no weights.
        OSError: a file cannot be read.
    """
    weights, digest = find_weights(folder), hashlib.sha256()
    shards = set(map(str, shard_map(weights).values())) if weights.suffix == ".json" else {weights.name}
    for shard in sorted(shards):
        with (folder / Path(shard).name).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_tensors(path: Path) -> Any:
    """Read a file of weights, or all shards of an index; a PyTorch file may hold something else than tensors.

    Raises:
        ValueError: a file is missing, damaged, or would run code when unpickled.
    """
    if path.name.endswith(".index.json"):
        names, state = shard_map(path), {}
        for shard in sorted(set(map(str, names.values()))):
            if Path(shard).name != shard or not (path.parent / shard).is_file():
                raise ValueError(f"{path.name} names {shard}, which is not there")
            state |= read_tensors(path.parent / shard)
        if absent := sorted(names.keys() - state.keys()):
            raise ValueError(f"{path.name} names {absent[0]}, which is in no shard")
        return state
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} is damaged or no safetensors file ({one_line(error)})") from error
    return _read_pickle(path)


def _read_pickle(path: Path) -> Any:
    """Load a PyTorch file without running code; of classes, only the Namespace of arguments passes."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if code := re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error)):
            raise ValueError(
                f"{path.name} would run {code[1]} when unpickled, so it is refused; "
                "save its state dict alone where you trust it"
            ) from error
        # less PyTorch's advice
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise ValueError(f"{path.name} is damaged, no PyTorch file, or would run code ({reason})") from error
    except Exception as error:  # damaged bytes make the unpickler raise errors of any kind
        reason = one_line(error)
        if "weights_only" in reason:  # PyTorch's advice is to load without the restriction
            reason = type(error).__name__
        raise ValueError(f"{path.name} is damaged or no PyTorch file ({reason})") from error


def read_state(folder: Path, hint: str = "") -> dict[str, Tensor]:
    """Read the state dict of a FlashKAT's folder; that of a model without head gets the classifier's names.

    Args:
        folder: of the checkpoint.
        hint: what to do with another vision transformer, for the error.

    Raises:
        ValueError: there is none, it is damaged, would run code, or holds something else than tensors.
    """
    path = find_weights(folder)
    content = read_tensors(path)
    tensors = isinstance(content, Mapping) and content.values()
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ValueError(f"{path.name} holds no state dict")
    if any(name.startswith("layers.") for name in content):  # saved without a head
        content = {
            name if name.startswith(HEAD) else PREFIX + name: tensor for name, tensor in content.items()
        }
    if not any(name.startswith(f"{PREFIX}layers.") for name in content):
        others = f"{len(content)} others, such as {min(content)}"
        other = hint if any(name.endswith("cls_token") for name in content) else ""
        raise ValueError(f"{path.name} holds none of a FlashKAT's layer tensors, but {others}{other}")
    return dict(content)


def check_num_layers(state: Mapping[str, Tensor], num_layers: Any) -> None:
    """Compare the layers of a state dict with the number in the config, which may be absurd.

    Raises:
        ValueError: they differ.
    """
    found = (re.match(rf"{PREFIX}layers\.(\d+)\.", name) for name in state)
    layers = {int(match[1]) for match in found if match}
    if isinstance(num_layers, int) and len(layers) != num_layers:
        raise ValueError(f"the weights have {len(layers)} layers, but config.json {num_layers}")


def tensor_shapes(config: FlashKATConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a config's classifier, by name, without importing the model."""
    width, inner = config.hidden_size, config.intermediate_size
    image, patch = pair(config.image_size), pair(config.patch_size)
    patches = (image[0] // patch[0]) * (image[1] // patch[1])
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 1 + patches, width),
        "embeddings.patch_embeddings.weight": (width, config.num_channels, *patch),
        "embeddings.patch_embeddings.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if config.num_register_tokens:
        shapes["embeddings.register_tokens"] = (1, config.num_register_tokens, width)
    maps = {"attention.qkv": (3 * width, width), "attention.proj": (width, width)}
    maps |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
        for name, shape in maps.items():
            shapes[f"{layer}.{name}.weight"] = shape
            if name != "attention.qkv" or config.qkv_bias:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
        for act in ("act1", "act2"):
            functions = (config.simplified_functions or {}).get(f"{index}.{act}")
            tables = _activation_shapes(config, functions or ["rational"] * config.num_groups)
            shapes |= {f"{layer}.mlp.{act}.{name}": shape for name, shape in tables.items()}
    head = {"weight": (config.num_labels, width), "bias": (config.num_labels,)} if config.num_labels else {}
    shapes = {f"{PREFIX}{name}": shape for name, shape in shapes.items()}
    return shapes | {f"{HEAD}{name}": shape for name, shape in head.items()}


def _activation_shapes(config: FlashKATConfig, functions: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an activation's tensors; those without values are left out."""
    count = functions.count("rational")
    shapes = {
        "numerator": (min(config.num_numerator_groups, count), 6),
        "denominator": (count, 4),
        "coefficients": (sum(len(SIMPLE_FUNCTIONS.get(name, ())) for name in functions),),
    }
    return {name: shape for name, shape in shapes.items() if shape[0]}


def check_state(state: Mapping[str, Tensor], config: FlashKATConfig, any_head: bool = False) -> None:
    """Hold a state dict against the model of a config: names, shapes, kinds of numbers; every one is finite.

    It reads all weights once: 0.08 s for the base size on one core, beside the 0.11 s of `from_pretrained`.

    Args:
        state: of `read_state`.
        config: of the model.
        any_head: the head may be missing.

    Raises:
        ValueError: with the first tensor that does not fit.
    """
    check_num_layers(state, config.num_hidden_layers)
    expected = tensor_shapes(config)
    if any_head and not any(name.startswith(HEAD) for name in state):
        expected = {name: shape for name, shape in expected.items() if not name.startswith(HEAD)}
    if missing := sorted(expected.keys() - state.keys()):
        count = f"{len(missing)} tensors of the model in config.json"
        raise ValueError(f"the weights lack {count}, such as {missing[0]}")
    if surplus := sorted(state.keys() - expected.keys()):
        count = f"{len(surplus)} tensors that config.json does not call for"
        raise ValueError(f"the weights have {count}: {surplus[0]}, ...")
    for name, shape in expected.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            found = tuple(tensor.shape)
            raise ValueError(
                f"the weights do not fit: {name} is {found} in the weights, but {shape} by config.json"
            )
        check_numbers(name, tensor)


def check_numbers(name: str, tensor: Tensor) -> None:
    """Refuse a weight that does not hold finite floating point numbers.

    Raises:
        ValueError: with its name and dtype, or how many of its values are not finite.
    """
    if tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {kind} in the weights, not a floating point number of 16 bits or more")
    if not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():  # far faster than isfinite of all
        count = tensor.numel() - int(tensor.isfinite().sum())
        raise ValueError(f"{name} has {count} values of {tensor.numel()} that are NaN or infinite")
