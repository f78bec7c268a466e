"""A FlashKAT checkpoint in a few lines of text: `flashkat info`."""

import torch

from ..model.layers import GroupRational, SimplifiedActivation
from ..model.reference import rational_value
from .functions import model_functions
from .loading import load_checkpoint

GRID = torch.linspace(-3, 3, 601)  # where nearly all of an activation's input lies


def describe(name_or_path: str) -> str:
    """Describe architecture, labels, image transform, and how far each activation is from its start table.

    Args:
        name_or_path: folder or Hub id of a FlashKAT.

    Raises:
        ValueError: in one line, as `load_checkpoint`.
    """
    model, processor = load_checkpoint(name_or_path)
    config = model.config
    labels = [config.id2label[index] for index in sorted(config.id2label)]
    shown = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
    mean, std = _numbers(processor.image_mean), _numbers(processor.image_std)
    rows = config.num_numerator_groups
    numerators = "one numerator" if rows == 1 else f"{rows} numerators"
    lines = [
        f"{name_or_path}: {type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}",
        f"layers      {config.num_hidden_layers} of {config.hidden_size} channels, "
        f"{config.num_attention_heads} heads, MLP {config.intermediate_size}",
        f"image       {config.image_size} pixels, {config.num_channels} channels, "
        f"patches of {config.patch_size}; mean {mean}, std {std}",
        f"pooling     {config.pooling}",
        f"labels      {config.num_labels}" + (f": {shown}" if labels else ", no head"),
        f"rationals   {config.num_groups} groups, {numerators}; "
        f"starts {config.act1_init}, {config.act2_init}",
    ]
    names = [
        name for row in (config.simplified_functions or {}).values() for name in row if name != "rational"
    ]
    if names:
        kinds = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
        lines.append(f"simplified  {len(names)} functions are no rationals any more: {kinds}")
    moves = [(_move(layer.mlp.act1), _move(layer.mlp.act2)) for layer in model.flashkat.layers]
    if all(move == 0 for pair in moves for move in pair):
        return "\n".join([*lines, "activations at their start tables"])
    lines.append("activations learned; largest distance from the start on [-3, 3], any group:")
    lines.append("  layer      act1      act2")
    lines += [f"  {index:5d}  {act1:8.4f}  {act2:8.4f}" for index, (act1, act2) in enumerate(moves)]
    return "\n".join(lines)


def _move(act: GroupRational | SimplifiedActivation) -> float:
    """Return the largest |r(x) - start(x)| over groups and x in [-3, 3]; 0 for the table itself, rounded."""
    if isinstance(act, SimplifiedActivation):
        functions = model_functions(act)
        return max((function(GRID) - function.start(GRID)).abs().max().item() for function in functions)
    start = tuple(table.to(act.numerator.dtype) for table in act.start())
    learned = act.numerator.detach(), act.denominator.detach()
    if all(map(torch.equal, learned, start)):
        return 0.0
    x = GRID.double()[:, None].expand(-1, len(act.denominator)).contiguous()  # one channel for each group
    y, y_start = (rational_value(x, *(table.double() for table in tables)) for tables in (learned, start))
    return (y - y_start).abs().max().item()


def _numbers(values) -> str:
    return " ".join(f"{value:g}" for value in values)
