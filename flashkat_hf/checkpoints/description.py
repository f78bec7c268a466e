"""A FlashKAT checkpoint in a few lines of text: `flashkat info`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_json
from ..model.coefficients import start_table
from ..model.configuration_flashkat import FlashKATConfig, pair
from ..model.reference import rational_value
from .reading import one_line_errors, read_checkpoint
from .weights import PREFIX

GRID = torch.linspace(-3, 3, 601)  # where nearly all of an activation's input lies
PROCESSOR_TYPES = {1: "GreyViTImageProcessor", 3: "ViTImageProcessor"}  # by channels
PLAIN_PROCESSOR = {  # what `make_image_processor` writes whatever it is asked for
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
}


def describe(name_or_path: str) -> str:
    """Describe architecture, labels, image transform, and how far each activation is from its start table.

    Neither the model nor, as a rule, the image processor is imported, which would take seconds.

    Args:
        name_or_path: folder or Hub id of a FlashKAT.

    Raises:
        ValueError: in one line, as `load_checkpoint`.
    """
    folder, config, state = read_checkpoint(name_or_path)
    with one_line_errors(name_or_path):
        mean, std = _statistics(folder, config)
    names: Any = config.id2label
    labels = [names[index] for index in sorted(names)]
    shown = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
    rows = config.num_numerator_groups
    numerators = "one numerator" if rows == 1 else f"{rows} numerators"
    num_parameters = sum(tensor.numel() for tensor in state.values())
    dtype = config.dtype or next(iter(state.values())).dtype
    lines = [
        f"{name_or_path}: FlashKATForImageClassification, {num_parameters:,} parameters, {dtype}",
        f"layers      {config.num_hidden_layers} of {config.hidden_size} channels, "
        f"{config.num_attention_heads} heads, MLP {config.intermediate_size}",
        f"image       {pixels(config.image_size)} pixels, {config.num_channels} channels, "
        f"patches of {pixels(config.patch_size)}; mean {mean}, std {std}",
        f"pooling     {config.pooling}",
        f"labels      {config.num_labels}" + (f": {shown}" if labels else ", no head"),
        f"rationals   {config.num_groups} groups, {numerators}; "
        f"starts {config.act1_init}, {config.act2_init}",
    ]
    if config.num_register_tokens:
        lines.insert(3, f"registers   {config.num_register_tokens} tokens without a place")
    simpler = [
        name for row in (config.simplified_functions or {}).values() for name in row if name != "rational"
    ]
    if simpler:
        kinds = ", ".join(f"{simpler.count(name)} {name}" for name in sorted(set(simpler)))
        lines.append(f"simplified  {len(simpler)} functions are no rationals any more: {kinds}")
    moves = [
        [_move(config, state, layer, act) for act in ("act1", "act2")]
        for layer in range(config.num_hidden_layers)
    ]
    if all(move == 0 for pair in moves for move in pair):
        return "\n".join([*lines, "activations at their start tables"])
    lines.append("activations learned; largest distance from the start on [-3, 3], any group:")
    lines.append("  layer      act1      act2")
    lines += [f"  {index:5d}  {act1:8.4f}  {act2:8.4f}" for index, (act1, act2) in enumerate(moves)]
    return "\n".join(lines)


def pixels(size: int | Sequence[int]) -> str:
    """Return the size of an image or a patch in words: 224, or 48x32 for height and width."""
    height, width = pair(size)
    return f"{height}" if height == width else f"{height}x{width}"


def _statistics(folder: Path, config: FlashKATConfig) -> tuple[str, str]:
    """Return mean and standard deviation of a folder's image processor, which makes what the model takes.

    The file of a processor by `make_image_processor` says that itself; others are imported and tried.

    Raises:
        ValueError: as `load_processor`.
    """
    path, channels, size = folder / "preprocessor_config.json", config.num_channels, config.image_size
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    varying: dict[str, Any] = {name: settings.get(name) for name in ("image_mean", "image_std", "size")}
    mean, std, edge = varying.values()
    plain = PLAIN_PROCESSOR | varying | {"crop_size": {"height": size, "width": size}}
    plain["image_processor_type"] = PROCESSOR_TYPES.get(channels)
    has_edge = isinstance(edge, dict) and edge == {"shortest_edge": edge.get("shortest_edge")}
    if (
        isinstance(size, int)
        and settings == plain
        and has_edge
        and edge["shortest_edge"] in range(1, 4 * size)
        and all(_are_numbers(values, channels) for values in (mean, std))
        and min(std) > 0
    ):
        return _numbers(mean), _numbers(std)
    from .loading import load_processor

    processor = load_processor(folder, config)
    return _numbers(processor.image_mean), _numbers(processor.image_std)


def _are_numbers(values: Any, count: int) -> bool:
    is_list = isinstance(values, list) and len(values) == count
    return is_list and all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _move(config: FlashKATConfig, state: Mapping[str, Tensor], layer: int, name: str) -> float:
    """Return the largest |r(x) - start(x)| of an activation, "act1" or "act2", over groups and x in [-3, 3].

    It is 0 for the start table itself, rounded.
    """
    start = f"{PREFIX}layers.{layer}.mlp.{name}."
    tables = {key.removeprefix(start): table for key, table in state.items() if key.startswith(start)}
    init = config.act1_init if name == "act1" else config.act2_init
    if functions := (config.simplified_functions or {}).get(f"{layer}.{name}"):
        return _simplified_move(config, tables, init, functions)
    learned = tables["numerator"], tables["denominator"]
    starts = [
        torch.tensor(row).expand(table.shape).to(table.dtype)
        for row, table in zip(start_table(init), learned, strict=True)
    ]
    if all(map(torch.equal, learned, starts)):
        return 0.0
    x = GRID.double()[:, None].expand(-1, config.num_groups).contiguous()  # one channel for each group
    y, y_start = (rational_value(x, *(table.double() for table in pair)) for pair in (learned, starts))
    return (y - y_start).abs().max().item()


def _simplified_move(
    config: FlashKATConfig, tables: dict[str, Tensor], init: str, functions: list[str]
) -> float:
    from ..model.layers import activation
    from .functions import model_functions

    rows = config.num_groups, config.num_numerator_groups
    act = activation(config.num_groups, *rows, init, functions)  # one channel for each group
    act.load_state_dict(tables)
    return max(
        (function(GRID) - function.start(GRID)).abs().max().item() for function in model_functions(act)
    )


def _numbers(values: Any) -> str:
    return " ".join(f"{value:g}" for value in values)
