"""A FlashKAT's weights in the naming of the original code: the way back of a conversion."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoints.loading import load_checkpoint
from .conversion import written_whole
from .source import timm_arguments
from .tensor_names import to_flashkat, to_original


def export_original(
    source: str | Path, output: str | Path, *, naming: str | None = None, overwrite: bool = False
) -> str:
    """Write a FlashKAT's weights in KAT's or FlashKAT's naming, as a `.safetensors` or `.pth` state dict.

    Args:
        source: folder or Hub id of a FlashKAT.
        output: the file to make.
        naming: "kat" or "flashkat"; by default KAT's where one numerator serves all groups.
        overwrite: replace the file.

    Returns:
        The arguments of timm's VisionTransformer, and so of the original models, that fit the weights.

    Raises:
        ValueError: in one line; nothing is written then.
    """
    output = Path(output).expanduser()
    if output.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"{output} must end in .safetensors or .pth")
    if output.is_dir() or (output.exists() and not overwrite):
        raise ValueError(f"{output} exists" + ("" if output.is_dir() else "; --overwrite replaces it"))
    model, _ = load_checkpoint(str(source))
    config, state = model.config, model.state_dict()
    if config.simplified_functions:
        raise ValueError(f"{source} has simplified functions, which the original code does not know")
    naming = naming or ("kat" if config.num_numerator_groups == 1 else "flashkat")
    original = to_original(state, naming, config.pooling)
    with written_whole(output, folder=False) as path:
        written = _write_and_read(original, path, output.suffix)
        _, converted = to_flashkat(written, {"num_attention_heads": config.num_attention_heads})
        if converted.keys() != state.keys() or not all(
            torch.equal(converted[name], tensor) for name, tensor in state.items()
        ):
            raise ValueError(f"{output} read back differs from {source}; nothing is written")
    arguments = ", ".join(f"{name}={value!r}" for name, value in timm_arguments(config).items())
    text = f"{naming} naming, {arguments}"
    if (eps := config.layer_norm_eps) != 1e-6:
        text += f"; mind that it normalises with eps {eps:g}, the original code with 1e-06"
    return text


def _write_and_read(state: Mapping[str, Tensor], path: Path, suffix: str) -> dict[str, Tensor]:
    """Write a state dict in the format of a suffix; return what the file then holds."""
    if suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {"format": "pt"})
        return load_file(path)
    try:
        torch.save(state, path)
    except RuntimeError as error:  # PyTorch's way to say that the disk is full
        raise OSError(f"PyTorch cannot write the file, perhaps the disk is full ({error})") from error
    return torch.load(path, weights_only=True)
