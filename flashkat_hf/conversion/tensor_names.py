"""State dicts of KAT, FlashKAT, ViT and DINOv2 (timm's, transformers') in our names, and back; no files.

A table for each naming says which tensors make up one of ours; sizes are read off the weights, and the model
with those sizes then says which tensors there must be, and of which shape: no more and no less.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..messages import one_line
from ..model.coefficients import start_table
from ..model.configuration_flashkat import FlashKATConfig, pair
from ..model.modeling_flashkat import FlashKATForImageClassification

State = dict[str, Tensor]

# ours, less "flashkat." and ".weight" or ".bias" -> theirs; * is the layer's index, {} are several, joined
TIMM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "layers.*.norm1": "blocks.*.norm1",
    "layers.*.attention.qkv": "blocks.*.attn.qkv",
    "layers.*.attention.proj": "blocks.*.attn.proj",
    "layers.*.norm2": "blocks.*.norm2",
    "layers.*.mlp.fc1": "blocks.*.mlp.fc1",
    "layers.*.mlp.fc2": "blocks.*.mlp.fc2",
    "norm": "norm",  # fc_norm with mean pooling
    "classifier": "head",
}
COEFFICIENTS = [f"{act}.{part}" for act in ("act1", "act2") for part in ("numerator", "denominator")]
KAT = TIMM | {
    f"layers.*.mlp.{name}": f"blocks.*.mlp.{name.replace('.', '.weight_')}" for name in COEFFICIENTS
}
FLASHKAT = TIMM | {f"layers.*.mlp.{name}": f"blocks.*.mlp.{name}_v" for name in COEFFICIENTS}
VIT = {
    "embeddings.cls_token": "embeddings.cls_token",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.patch_embeddings": "embeddings.patch_embeddings.projection",
    "layers.*.norm1": "encoder.layer.*.layernorm_before",
    "layers.*.attention.qkv": "encoder.layer.*.attention.attention.{query,key,value}",
    "layers.*.attention.proj": "encoder.layer.*.attention.output.dense",
    "layers.*.norm2": "encoder.layer.*.layernorm_after",
    "layers.*.mlp.fc1": "encoder.layer.*.intermediate.dense",
    "layers.*.mlp.fc2": "encoder.layer.*.output.dense",
    "norm": "layernorm",
    "classifier": "classifier",
}
# transformers 5 renames while it loads: a state dict of such a model, saved with torch.save
VIT_IN_MEMORY = VIT | {
    "layers.*.norm1": "layers.*.layernorm_before",
    "layers.*.attention.qkv": "layers.*.attention.{q_proj,k_proj,v_proj}",
    "layers.*.attention.proj": "layers.*.attention.o_proj",
    "layers.*.norm2": "layers.*.layernorm_after",
    "layers.*.mlp.fc1": "layers.*.mlp.fc1",
    "layers.*.mlp.fc2": "layers.*.mlp.fc2",
}
DINOV2 = VIT | {
    "embeddings.register_tokens": "embeddings.register_tokens",
    "layers.*.norm1": "encoder.layer.*.norm1",
    "layers.*.norm2": "encoder.layer.*.norm2",
    "layers.*.mlp.fc1": "encoder.layer.*.mlp.fc1",
    "layers.*.mlp.fc2": "encoder.layer.*.mlp.fc2",
}
DINOV2_IN_MEMORY = DINOV2 | {
    "layers.*.attention.qkv": "encoder.layer.*.attention.{q_proj,k_proj,v_proj}",
    "layers.*.attention.proj": "encoder.layer.*.attention.o_proj",
}
NAMINGS = {  # by title; the first whose first layer is there is the source's
    "KAT": KAT,
    "FlashKAT": FLASHKAT,
    "timm ViT": TIMM | {"embeddings.register_tokens": "reg_token"},
    "transformers ViT": VIT,
    "transformers 5 ViT": VIT_IN_MEMORY,
    "transformers DINOv2": DINOV2,
    "transformers 5 DINOv2": DINOV2_IN_MEMORY,
}
UNSUPPORTED = {  # what other relatives of ViT have, and FlashKATConfig has no field for
    r"dist_token$|distillation_token$|head_dist\.": "a distillation token",
    r"\.(q_norm|k_norm)\.": "normalised queries and keys",
    r"^norm_pre\.|^pre_layrnorm\.": "a norm before the first block",
    r"attn_pool\.": "attention pooling",
    r"\.attn\.norm\.|\.mlp\.norm\.": "norms inside attention or MLP",
    r"relative_position|rel_pos": "relative positions",
    r"mlp\.(fc1_g|fc1_x|w12|weights_in)\b": "a gated MLP",
    r"^pre_logits\.": "a layer before the head (pre_logits)",
    r"lambda_[12]$": "layer scale in another naming",
}
READABLE = {  # fields of the config that the weights tell
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "num_labels",
    "num_register_tokens",
}
CONFIG_FIELDS = {field.name for field in fields(FlashKATConfig)} & set(FlashKATConfig.__annotations__)  # pyright: ignore[reportArgumentType]
HEAD_NAMES = ("classifier.weight", "classifier.bias")
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
CLASS_TOKEN = r"(|.*?\.)(?:(?:flashkat\.)?embeddings\.)?cls_token"  # "flashkat." is a part of our names
LAYER_SCALE = r"(?:blocks|encoder\.layer)\.(\d+)\.(?:ls|layer_scale)([12])\.(?:gamma|lambda1)"


def detect_naming(state: Mapping[str, Tensor]) -> str:
    """Return the title in `NAMINGS` of a state dict, less `vit.` or `deit.` in front.

    Raises:
        ValueError: it is none of them.
    """
    if any(name.startswith("flashkat.") for name in state):
        raise ValueError("it is a FlashKAT of this package already; load it with from_pretrained")
    for title, table in NAMINGS.items():
        first_layer = source_names("flashkat.layers.0.mlp.fc1.weight", table)
        first_layer += source_names("flashkat.layers.0.mlp.act1.denominator", table)
        if "DINOv2" in title:  # there are two, with the same MLP
            first_layer += source_names("flashkat.layers.0.attention.proj.weight", table)
        if state.keys() >= set(first_layer):
            return title
    _refuse_relatives(state)
    raise ValueError(
        "it is neither a KAT nor a ViT or DINOv2 of timm's or transformers' naming: "
        f"it has {len(state)} tensors, {_listing(state)}"
    )


def _refuse_relatives(state: Mapping[str, Tensor]) -> None:
    for pattern, feature in UNSUPPORTED.items():
        if names := [name for name in state if re.search(pattern, name)]:
            raise ValueError(f"it has {feature}, which a FlashKAT has not: {_listing(names)}")


def source_names(ours: str, table: Mapping[str, str], pooling: str = "cls") -> list[str]:
    """Name the tensors of another naming that, joined along the first axis, are one of ours; maybe none."""
    name = ours.removeprefix("flashkat.")
    layer = re.search(r"\d+", name)
    key, ending = re.sub(r"\d+", "*", name, count=1) if layer and name.startswith("layers.") else name, ""
    if key not in table:
        key, _, ending = key.rpartition(".")
        ending = f".{ending}"
    if key not in table:
        return []
    theirs = table[key] + ending
    if layer:
        theirs = theirs.replace("*", layer[0])
    if key == "norm" and pooling == "mean":
        theirs = f"fc_{theirs}"
    if several := re.search(r"\{(.*)\}", theirs):
        return [theirs.replace(several[0], part) for part in several[1].split(",")]
    return [theirs]


def to_flashkat(
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None = None,
    hints: Mapping[str, Any] | None = None,
) -> tuple[FlashKATConfig, State]:
    """Make the config and our state dict of a KAT or ViT; tensors are shared with the source if they can be.

    A ViT's activation becomes the start tables of the config: act1 identity and act2 gelu unless `settings`
    say otherwise. Layer scale is multiplied into the maps before it, positions of register tokens are added
    to them, and a class token without a position gets a zero one: the same function. A mask token, which no
    classifier uses, is left out, and so is a head on the class token and the patches' mean together
    (DINOv2's).

    Args:
        state: a state dict in one of `NAMINGS`, all tensors of a floating point dtype.
        settings: fields of the config that the weights cannot tell, such as `num_attention_heads`.
        hints: what the source's own config says; must agree with the weights, gives way to `settings`.

    Returns:
        `(FlashKATConfig, state dict)`, in the widest dtype of the source.

    Raises:
        ValueError: a tensor is missing, not expected, or of another shape or kind; the architecture is
            another; a setting or hint contradicts the weights.
    """
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} is no tensor of floating point numbers but {kind}")
    state = strip_prefix(state)
    title = detect_naming(state)
    table = NAMINGS[title]
    _refuse_relatives(state)
    for name in ("embeddings.mask_token", *(HEAD_NAMES if has_double_head(state) else ())):
        state.pop(name, None)
    if title == "timm ViT" or "DINOv2" in title:
        _fold_layer_scale(state, table)
    elif has_layer_scale(state):
        raise ValueError(
            "it has layer scale (ls1.gamma, ls2.gamma), which is taken over from a plain ViT only"
        )
    stated = (settings or {}).get("image_size", (hints or {}).get("image_size"))
    config = _make_config(_read_sizes(state, title, stated), title, settings or {}, hints or {})
    _place_positions(state, config, table)
    return config, _rename(state, config, table)


def to_original(state: Mapping[str, Tensor], naming: str = "kat", pooling: str = "cls") -> State:
    """Rename our state dict for the original code, which loads it strictly; the tensors are shared.

    Args:
        state: of `FlashKATForImageClassification`.
        naming: "kat" or "flashkat".
        pooling: of the config.

    Raises:
        ValueError: unknown naming, a tensor without a name there, or numerators for each group under "kat".
    """
    tables = {"kat": KAT, "flashkat": FLASHKAT}
    if naming not in tables:
        raise ValueError(f"unknown naming {naming!r}; known are {', '.join(tables)}")
    original = {}
    for name, tensor in state.items():
        if not (theirs := source_names(name, tables[naming], pooling)):
            raise ValueError(f"{name} has no name in {naming}'s naming: it is no tensor of a FlashKAT")
        if naming == "kat" and name.endswith(".numerator") and len(tensor) > 1:
            raise ValueError(
                f"KAT shares one numerator, but {name} has {len(tensor)} rows; use the naming flashkat"
            )
        original[theirs[0]] = tensor
    return original


def strip_prefix(state: Mapping[str, Tensor]) -> State:
    """Take away what wrappers and transformers put before names, and the pooler that no classifier uses.

    What stands before the class token (`_orig_mod.module.`, `model.vit.`) goes from the front of every name,
    as far as the name begins like it; wrappers of parts of a model go from the middle, too.

    Raises:
        ValueError: there are several models, or two tensors would have one name.
    """
    plain = {name: WRAPPERS.sub("", name) for name in state}
    prefixes = {match[1] or "" for name in plain.values() if (match := re.fullmatch(CLASS_TOKEN, name))}
    if len(prefixes) > 1:
        listed = ", ".join(f"{prefix}*" for prefix in sorted(prefixes))
        raise ValueError(f"it holds {len(prefixes)} models, {listed}; save the state dict of one alone")
    prefix = next(iter(prefixes), "").split(".")[:-1]
    result: State = {}
    for name, tensor in state.items():
        parts = plain[name].split(".")
        same = next((i for i, part in enumerate(prefix) if parts[i : i + 1] != [part]), len(prefix))
        result[".".join(parts[same:])] = tensor
    if len(result) < len(state):
        raise ValueError(
            f"it has {len(state)} tensors of {len(result)} names, less what wrappers add to them"
        )
    if "classifier.weight" not in result and "embeddings.cls_token" in result:  # a ViTModel
        result = {name: tensor for name, tensor in result.items() if not name.startswith("pooler.")}
    return result


def has_layer_scale(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict of timm's naming, with a prefix or without, scales the residual branches."""
    return any(re.search(LAYER_SCALE, name) for name in state)


def num_patches(config: FlashKATConfig) -> int:
    """Return the number of patches of an image of the config's size."""
    return math.prod(edge // side for edge, side in zip(*_edges(config), strict=True))


def _edges(config: FlashKATConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    return pair(config.image_size), pair(config.patch_size)


def is_folded(state: Mapping[str, Tensor], config: FlashKATConfig) -> bool:
    """Tell whether `to_flashkat` changes numbers of a ViT's state: layer scale, or positions of registers."""
    positions = next((tensor for name, tensor in state.items() if name.endswith("pos_embed")), None)
    prefix = 0 if positions is None else positions.shape[1] - num_patches(config)
    return has_layer_scale(state) or prefix > 1


def has_double_head(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict less its prefix has a head on two vectors, as DINOv2's classifiers do."""
    head, token = state.get("classifier.weight"), state.get("embeddings.cls_token")
    return head is not None and token is not None and head.shape[-1] == 2 * token.shape[-1]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what is no field of the config, or has an argument of its own.

    Raises:
        ValueError: with the names that there are.
    """
    if unknown := sorted(set(settings) - CONFIG_FIELDS):
        known = ", ".join(sorted(CONFIG_FIELDS - READABLE | {"num_attention_heads"}))
        raise ValueError(f"{unknown[0]} is no field of the config that can be set; known are {known}")


def _place_positions(state: State, config: FlashKATConfig, table: Mapping[str, str]) -> None:
    """Give the class token a position, zero where it has none, and add those of register tokens to them."""
    name = source_names("flashkat.embeddings.position_embeddings", table)[0]
    positions = state[name]
    prefix, patches = positions.tensor_split([positions.shape[1] - num_patches(config)], dim=1)
    if prefix.shape[1] > 1:
        registers = source_names("flashkat.embeddings.register_tokens", table)[0]
        state[registers] = state[registers] + prefix[:, 1:]
    own = prefix[:, :1] if prefix.shape[1] else torch.zeros_like(patches[:, :1])
    state[name] = torch.cat((own, patches), dim=1)


def _fold_layer_scale(state: State, table: Mapping[str, str]) -> None:
    """Multiply each gamma into the linear map whose output it scales; half precision becomes float32."""
    for match in [match for name in state if (match := re.fullmatch(LAYER_SCALE, name))]:
        name, layer, index = match.group(0, 1, 2)
        gamma = state.pop(name)
        gamma = gamma.to(torch.promote_types(gamma.dtype, torch.float32))
        for part in ("weight", "bias"):
            ours = "attention.proj" if index == "1" else "mlp.fc2"
            target = source_names(f"flashkat.layers.{layer}.{ours}.{part}", table)[0]
            if target not in state:
                continue
            if (shape := state[target].shape)[:1] != gamma.shape:
                raise ValueError(f"{name} {tuple(gamma.shape)} does not fit {target} {tuple(shape)}")
            state[target] = state[target] * (gamma[:, None] if part == "weight" else gamma)


def _read_sizes(state: Mapping[str, Tensor], title: str, stated: Any = None) -> dict[str, Any]:
    """Read the fields of the config that the weights tell.

    They tell how many positions there are, and of what shape only if that is a square: the sides of other
    images are those that are `stated`, if as many patches are in them.
    """
    table = NAMINGS[title]

    def shape(ours: str, ndim: int) -> tuple[int, ...]:
        name = source_names(ours, table)[0]
        if name not in state:
            raise ValueError(f"{name} is missing: not a whole {title}")
        if state[name].ndim != ndim:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}; {ndim} axes are expected")
        return tuple(state[name].shape)

    shape("flashkat.embeddings.cls_token", 3)
    patches = shape("flashkat.embeddings.patch_embeddings.weight", 4)
    hidden_size, num_channels, *patch = patches
    _, tokens, _ = shape("flashkat.embeddings.position_embeddings", 3)
    registers = source_names("flashkat.embeddings.register_tokens", table)
    num_registers = shape("flashkat.embeddings.register_tokens", 3)[1] if set(registers) & state.keys() else 0
    prefixes = [1]  # positions that are no patches'
    if title == "timm ViT":
        prefixes = [0, 1, 1 + num_registers] if num_registers else [0, 1]
    grid = _grid([tokens - prefix for prefix in prefixes], patch, stated)
    if grid is None:
        expected = "square of patches, with or without one for the class token"
        other = "" if stated is None else f", and do not fit images of {stated}"
        raise ValueError(f"{tokens} positions are no {expected}{other}; image_size=[HEIGHT, WIDTH] says more")
    stem = re.escape(source_names("flashkat.layers.0.mlp.fc1.weight", table)[0]).replace("0", r"(\d+)", 1)
    layers = [int(match[1]) for name in state if (match := re.fullmatch(stem, name))]
    head = source_names("classifier.weight", table)[0]
    sizes = {
        "hidden_size": hidden_size,
        "num_hidden_layers": max(layers) + 1,
        "intermediate_size": shape("flashkat.layers.0.mlp.fc1.weight", 2)[0],
        "image_size": _one_or_two(number * side for number, side in zip(grid, patch, strict=True)),
        "patch_size": _one_or_two(patch),
        "num_channels": num_channels,
        "num_register_tokens": num_registers,
        "qkv_bias": source_names("flashkat.layers.0.attention.qkv.bias", table)[0] in state,
        "num_labels": len(state[head]) if head in state else 0,
        "pooling": "mean" if "fc_norm.weight" in state and "norm.weight" not in state else "cls",
    }
    if title in ("KAT", "FlashKAT"):
        rows, _ = shape("flashkat.layers.0.mlp.act1.numerator", 2)
        groups, _ = shape("flashkat.layers.0.mlp.act1.denominator", 2)
        if rows not in (1, groups):
            raise ValueError(f"{rows} numerators for {groups} denominators; a FlashKAT has 1 or {groups}")
        sizes |= {"num_groups": groups, "num_numerator_groups": rows}
    return sizes


def _grid(counts: Sequence[int], patch: Sequence[int], stated: Any) -> tuple[int, int] | None:
    """Return rows and columns of one of so many patches: of the stated image size, else a square's."""
    if isinstance(stated, list | tuple) and len(stated) == 2:
        rows, columns = (edge // side for edge, side in zip(stated, patch, strict=True))
        if rows * columns in counts and [rows * patch[0], columns * patch[1]] == list(stated):
            return rows, columns
    squares = (math.isqrt(max(count, 0)) for count in counts)
    return next(((side, side) for side, count in zip(squares, counts, strict=True) if side**2 == count), None)


def _one_or_two(edges: Iterable[int]) -> int | list[int]:
    """Return height and width as a config has them: one number if they are equal."""
    height, width = edges
    return height if height == width else [height, width]


def _same(stated: Any, size: Any) -> bool:
    """Tell whether a field says what the weights do; of an edge, one number stands for two."""
    if (
        isinstance(stated, list | tuple)
        and len(stated) == 2
        and all(isinstance(edge, int) for edge in stated)
    ):
        stated = _one_or_two(stated)
    return stated == size


def _make_config(sizes: dict[str, Any], title: str, settings: Mapping, hints: Mapping) -> FlashKATConfig:
    """Make the config from the weights' sizes, what was stated, and a default for each kind of source."""
    check_settings(settings)
    if not sizes["num_labels"]:  # a config of transformers or timm counts labels with or without a head
        hints = {name: value for name, value in hints.items() if name not in ("num_labels", "id2label")}
    for origin, stated in (("the settings say", settings), ("the source's config says", hints)):
        for name in sorted(sizes.keys() & stated.keys()):
            if not _same(stated[name], sizes[name]):
                raise ValueError(f"{origin} {name}={stated[name]}, but the weights {name}={sizes[name]}")
    values: dict[str, Any] = {
        "act2_init": "swish" if title in ("KAT", "FlashKAT") else "gelu",
        "layer_norm_eps": 1e-12 if title.endswith("ViT") and title != "timm ViT" else 1e-6,
        **hints,
        **settings,
        **sizes,
    }
    if "num_attention_heads" not in values:
        values["num_attention_heads"], remainder = divmod(sizes["hidden_size"], 64)
        if remainder:
            raise ValueError(
                f"the weights do not tell the number of heads, and {sizes['hidden_size']} channels are no "
                "multiple of 64: set num_attention_heads"
            )
    try:
        return FlashKATConfig(**values)
    except Exception as error:  # huggingface_hub's, over several lines
        raise ValueError(one_line(error, longest=1000)) from error


def _rename(state: State, config: FlashKATConfig, table: Mapping[str, str]) -> State:
    """Make our tensors, each from the source's or its start table; none may be missing or unused."""
    with torch.device("meta"):
        expected = FlashKATForImageClassification(config).state_dict()
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    if "layers.*.mlp.act1.numerator" not in table:
        dtype = torch.promote_types(dtype, torch.float32)  # the start tables need it
    missing, misshapen, unused, ours, storages = [], [], set(state), {}, set()
    for name, meta in expected.items():
        if not (names := source_names(name, table, config.pooling)):
            act = name.split(".")[-2]
            start = start_table(config.act1_init if act == "act1" else config.act2_init)
            row = start.numerator if name.endswith("numerator") else start.denominator
            ours[name] = torch.tensor(row, dtype=dtype).repeat(len(meta), 1)
            continue
        if absent := [theirs for theirs in names if theirs not in state]:
            missing += absent
            continue
        unused -= set(names)
        tensors = [state[theirs] for theirs in names]
        shape = (meta.shape[0] // len(names), *meta.shape[1:])
        misshapen += [
            f"{theirs} {tuple(tensor.shape)} instead of {shape}"
            for theirs, tensor in zip(names, tensors, strict=True)
            if tensor.shape != shape
        ]
        if not misshapen:
            tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            tensor = tensor.detach().to(dtype).contiguous()
            storage = tensor.untyped_storage()
            if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:  # files hold no views
                tensor = tensor.clone()
            storages.add(tensor.untyped_storage().data_ptr())
            ours[name] = tensor
    problems = {"missing": missing, "unexpected": sorted(unused), "misshapen": misshapen}
    if any(problems.values()):
        counts = [f"{len(names)} {kind} ({_listing(names)})" for kind, names in problems.items() if names]
        raise ValueError("the tensors do not fit: " + "; ".join(counts))
    return ours


def _listing(names, limit: int = 20) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
