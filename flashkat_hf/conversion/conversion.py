"""A KAT or ViT checkpoint as a folder that `from_pretrained` loads, proved before it appears, and the way back."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.loading import load_checkpoint
from ..model.configuration_flashkat import FlashKATConfig
from ..model.modeling_flashkat import FlashKATEmbeddings, FlashKATForImageClassification
from .calibration import LayerFit, find_images, image_batches
from .calibration import calibrate as fit_act2
from .proof import Proof, verify
from .source import Source, gelu_form, image_processor, load_state, read_source
from .tensor_names import NAMINGS, check_settings, source_names, strip_prefix, to_flashkat, to_original


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: what was converted.
        title: its kind, a key of `naming.NAMINGS`.
        config: of the result.
        parameters: their number.
        proof: how the result compares with the source; None where it was not verified.
        notes: what was assumed, chosen or left out.
        calibration: what each layer's fit reached; empty where there was none.
    """

    source: str
    title: str
    config: FlashKATConfig
    parameters: int
    proof: Proof | None
    notes: tuple[str, ...]
    calibration: tuple[LayerFit, ...] = ()

    def __str__(self) -> str:
        config = self.config
        lines = [
            f"{self.source}: {self.title}, {self.parameters:,} parameters, {config.num_hidden_layers} layers of "
            f"{config.hidden_size} channels, {config.num_attention_heads} heads, patches of {config.patch_size} in "
            f"{config.image_size} pixels, {config.pooling} pooling, {config.num_labels} labels",
            *(f"note: {note}" for note in self.notes),
        ]
        if self.calibration:
            worst = max(self.calibration, key=lambda fit: fit.after)
            lines.append(
                f"act2 calibrated; root mean square error to GELU on the images' activations at most {worst.after:.2g} "
                f"in a layer, {max(fit.before for fit in self.calibration):.2g} before"
            )
        if self.proof is None:
            return "\n".join([*lines, "NOT VERIFIED against the source"])
        proof = self.proof
        lines.append(
            f"verified against the source in float64: largest difference of the {proof.outputs} {proof.difference:.2g} "
            f"(their standard deviation is {proof.spread:.2g}), top-1 agreement {proof.agreement:.0%}"
        )
        if "KAT" not in self.title:
            tables = f"the start tables {config.act1_init} and {config.act2_init}"
            lines.append(
                f"that is the cost of {'the calibrated act2' if self.calibration else tables} for GELU; with these "
                f"in the source the largest relative difference is {proof.rounding:.2g}"
            )
        return "\n".join(lines)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    image_size: int | None = None,
    num_labels: int | None = None,
    settings: Mapping[str, Any] | None = None,
    transform: str | None = None,
    ema: bool = True,
    revision: str | None = None,
    token: str | None = None,
    verify: bool = True,
    calibrate: str | Path | Iterable[Tensor] | None = None,
) -> ConversionReport:
    """Turn a KAT, a plain ViT or DeiT into a FlashKAT folder, proved against the source before it appears.

    Args:
        source: a file or folder, a name in `published.PUBLISHED`, or a Hub id.
        output: the folder to make.
        overwrite: replace an earlier FlashKAT folder.
        image_size: another height and width in pixels; positions are resized, bicubic.
        num_labels: a fresh head for so many labels.
        settings: fields of the config that the weights cannot tell, such as `num_attention_heads`.
        transform: "imagenet" or "augreg", where the source's own image transform is unknown or wrong.
        ema: take the averaged weights of a training checkpoint that has both.
        revision: branch, tag or commit on the Hub.
        token: for private repositories on the Hub; by default HF_TOKEN's or the one you logged in with.
        verify: compare the written weights with an independent evaluation of the source; needs timm (extra
            `train`) unless the source is a transformers ViT.
        calibrate: fit each act2 of a ViT to its GELU on the activations of these images: a folder or
            "digits", which the result's own image processor prepares, or batches of pixel values (see
            `calibration`).

    Raises:
        ValueError: in one line, for everything that can be wrong with the arguments, the source, the network
            or the disk; nothing is written then.
    """
    output = Path(output).expanduser()
    _check_output(output, overwrite, Path(source).expanduser())
    check_settings(settings or {})
    for name, value in (("image_size", image_size), ("num_labels", num_labels)):
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    images = find_images(calibrate) if isinstance(calibrate, str | Path) else None
    read = read_source(source, ema=ema, revision=revision, token=token)
    try:
        config, state = to_flashkat(read.state, settings, read.hints)
        if image_size is not None and image_size != config.image_size:
            config, state, read = _resize(config, state, read, image_size)
        notes = list(read.notes)
        if "num_attention_heads" not in {**read.hints, **(settings or {})} and not read.published:
            notes.append("heads of 64 channels assumed; --set num_attention_heads=N says otherwise")
        if read.title.startswith("transformers") and "layer_norm_eps" not in {
            **read.hints,
            **(settings or {}),
        }:
            notes.append(f"eps {config.layer_norm_eps:g} assumed; --set layer_norm_eps=X says otherwise")
        if not num_labels and not config.num_labels:
            notes.append("the source has no head; --num-labels N makes a fresh one")
        if num_labels:
            config, state = _with_fresh_head(config, state, num_labels)
            notes.append(f"fresh head of {num_labels} labels: random, to be trained")
        elif config.num_labels == 1000 and not _readable_labels(config):
            notes.append(_name_imagenet_labels(config))
        if "pooler.dense.weight" in {name.removeprefix("vit.").removeprefix("deit.") for name in read.state}:
            notes.append("pooler left out: no classifier uses it")
        processor, note = image_processor(read, config.image_size, transform)
        fits: list[LayerFit] = []
        if calibrate is not None:
            batches = calibrate if images is None else image_batches(images, processor)
            state, fits = _calibrate(read, config, state, batches)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ValueError(f"cannot convert {source}: {error}") from error
    notes += [note] if note else []
    with _whole(output) as folder:
        _write(config, state, processor, folder)
        parameters = sum(tensor.numel() for tensor in state.values())
        del state
        proof = _verify(read, config, folder, bool(num_labels)) if verify else None
    return ConversionReport(str(source), read.title, config, parameters, proof, tuple(notes), tuple(fits))


_verify = verify  # the argument of `convert` has its name


def export_original(
    source: str | Path, output: str | Path, *, naming: str | None = None, overwrite: bool = False
) -> str:
    """Write a FlashKAT folder's weights in KAT's or FlashKAT's naming, as a `.safetensors` or `.pth` state dict.

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
    config = model.config
    naming = naming or ("kat" if config.num_numerator_groups == 1 else "flashkat")
    state = model.state_dict()
    original = to_original(state, naming, config.pooling)
    with _whole(output) as path:
        if output.suffix == ".pth":
            try:
                torch.save(original, path)
            except RuntimeError as error:  # PyTorch's way to say that the disk is full
                raise OSError(f"PyTorch cannot write the file, perhaps the disk is full ({error})") from error
        else:
            save_file(
                {name: tensor.contiguous() for name, tensor in original.items()}, path, {"format": "pt"}
            )
        settings = {"num_attention_heads": config.num_attention_heads}
        _, back = to_flashkat(load_state(path)[0], settings)
        if back.keys() != state.keys() or not all(
            torch.equal(back[name], tensor) for name, tensor in state.items()
        ):
            raise ValueError(f"{output} read back differs from {source}; nothing is written")
    arguments = {
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
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    if config.layer_norm_eps != 1e-6:
        text += f"; mind that it normalises with eps {config.layer_norm_eps:g}, the original code with 1e-06"
    return f"{naming} naming, {text}"


def _check_output(output: Path, overwrite: bool, source: Path) -> None:
    if not os.path.lexists(output):
        if blocking := next(
            (parent for parent in output.absolute().parents if os.path.lexists(parent)), None
        ):
            if not blocking.is_dir():
                raise ValueError(f"{output} cannot be made: {blocking} is no folder")
            if not os.access(blocking, os.W_OK):
                raise ValueError(f"{output} cannot be made: {blocking} is not writable")
        return
    if not overwrite:
        raise ValueError(f"{output} exists; --overwrite replaces it")
    if output.is_symlink() or not output.is_dir():
        raise ValueError(f"{output} is no folder, so --overwrite does not replace it")
    content = {path.name for path in output.iterdir()}
    if content and not _is_flashkat(output / "config.json"):
        raise ValueError(f"{output} holds something else than a FlashKAT, so --overwrite does not replace it")
    if source.exists() and (
        source.resolve().is_relative_to(output.resolve()) or output.resolve().is_relative_to(source.resolve())
    ):
        raise ValueError(f"{output} cannot replace {source}, from which it is made")


def _is_flashkat(path: Path) -> bool:
    try:
        return '"flashkat"' in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A path to write to, a folder unless the name has a suffix, which takes the place of `output` at the end or goes.

    Raises:
        ValueError: the disk is full or another error of the system.
    """
    is_file = output.suffix in (".safetensors", ".pth")
    target = output.absolute()
    home = next(
        parent for parent in target.parents if parent.exists()
    )  # the same file system, so renaming is one step
    try:
        workspace = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=home))
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror or error}") from error
    try:
        new = workspace / output.name
        if not is_file:
            new.mkdir()
        yield new
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_file:
            new.replace(target)
        else:
            if target.exists():
                target.rename(workspace / "replaced")
            new.rename(target)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise ValueError(f"cannot write {output}: {reason}; nothing is written") from error
    finally:
        if (
            workspace / "replaced"
        ).exists() and not target.exists():  # an error or interrupt between the two renamings
            (workspace / "replaced").rename(target)
        shutil.rmtree(workspace, ignore_errors=True)


def _write(config: FlashKATConfig, state: Mapping[str, Tensor], processor, folder: Path) -> None:
    with torch.device("meta"):
        model = FlashKATForImageClassification(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _calibrate(
    source: Source, config: FlashKATConfig, state: dict[str, Tensor], batches: Iterable[Tensor]
) -> tuple[dict[str, Tensor], list[LayerFit]]:
    if "KAT" in source.title:
        raise ValueError(
            "calibration fits act2 to a ViT's GELU, and this is a KAT, which has functions of its own"
        )
    with torch.device("meta"):
        model = FlashKATForImageClassification(config)
    act2 = [name for name in state if ".act2." in name]
    model.load_state_dict(state | {name: state[name].clone() for name in act2}, strict=True, assign=True)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
    fits = fit_act2(model, batches, gelu_form(source))
    fitted = model.state_dict()
    return state | {name: fitted[name].cpu() for name in act2}, fits


def _resize(
    config: FlashKATConfig, state: dict[str, Tensor], source: Source, image_size: int
) -> tuple[FlashKATConfig, dict[str, Tensor], Source]:
    """Another image size.

    Positions interpolated by the model's own function, in the result and in the source.
    """
    if image_size % config.patch_size:
        raise ValueError(f"image_size ({image_size}) must be a multiple of patch_size ({config.patch_size})")
    name = "flashkat.embeddings.position_embeddings"
    with torch.device("meta"):
        embeddings = FlashKATEmbeddings(config)
    embeddings.position_embeddings = nn.Parameter(state[name].float(), requires_grad=False)
    grid = image_size // config.patch_size
    positions = embeddings.interpolate_pos_encoding(grid, grid).to(state[name].dtype).contiguous()
    theirs = source_names(name, NAMINGS[source.title])[0]
    original = strip_prefix(source.state)
    with_class = original[theirs].shape[1] == state[name].shape[1]
    original[theirs] = positions if with_class else positions[:, 1:]
    config = FlashKATConfig(**{**config.to_dict(), "image_size": image_size})
    return config, {**state, name: positions}, replace(source, state=original)


def _with_fresh_head(
    config: FlashKATConfig, state: dict[str, Tensor], num_labels: int
) -> tuple[FlashKATConfig, dict[str, Tensor]]:
    dtype = state["flashkat.embeddings.cls_token"].dtype
    weight = nn.init.trunc_normal_(torch.empty(num_labels, config.hidden_size), std=config.initializer_range)
    head = {"classifier.weight": weight.to(dtype), "classifier.bias": torch.zeros(num_labels, dtype=dtype)}
    values = {name: value for name, value in config.to_dict().items() if name not in ("id2label", "label2id")}
    return FlashKATConfig(**{**values, "num_labels": num_labels}), {**state, **head}


def _readable_labels(config: FlashKATConfig) -> bool:
    return any(label != f"LABEL_{index}" for index, label in (config.id2label or {}).items())


def _name_imagenet_labels(config: FlashKATConfig) -> str:
    """Give a head of 1,000 outputs ImageNet-1k's names, WordNet's lemmas in timm; returns the note on it."""
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError:
        return "labels have no names: they are timm's, pip install 'flashkat_hf[train]'"
    info = ImageNetInfo("imagenet-1k")
    labels = info.label_descriptions()
    times = Counter(labels)  # two labels are called crane, the bird and the machine
    names = [
        f"{label} ({synset})" if times[label] > 1 else label
        for label, synset in zip(labels, info.label_names(), strict=True)
    ]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    return "labels of ImageNet-1k, as it has 1,000"
