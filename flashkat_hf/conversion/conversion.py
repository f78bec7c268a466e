"""A KAT or ViT checkpoint as a folder that `from_pretrained` loads, proved before it appears."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checkpoints.description import pixels
from ..checkpoints.remote_code import read_config
from ..files import replacing
from ..messages import one_line
from ..model.configuration_flashkat import FlashKATConfig, pair
from ..model.modeling_flashkat import FlashKATEmbeddings, FlashKATForImageClassification
from .calibration import LayerFit, find_images, image_batches
from .calibration import calibrate as fit_act2
from .proof import Proof, prove
from .source import Source, gelu_form, image_processor, read_source
from .tensor_names import NAMINGS, check_settings, has_double_head, source_names, strip_prefix, to_flashkat


@dataclass(frozen=True)
class ConversionReport:
    """A report says what a conversion did; its text is what the command prints."""

    source: str  # what was converted
    title: str  # its kind, a key of `tensor_names.NAMINGS`
    config: FlashKATConfig  # of the result
    parameters: int  # their number
    proof: Proof | None  # how the result compares with the source; None where it was not verified
    notes: tuple[str, ...]  # what was assumed, chosen or left out
    calibration: tuple[LayerFit, ...] = ()  # what each layer's fit reached; empty where there was none

    def __str__(self) -> str:
        config, proof, fits = self.config, self.proof, self.calibration
        lines = [
            f"{self.source}: {self.title}, {self.parameters:,} parameters, "
            f"{config.num_hidden_layers} layers of {config.hidden_size} channels, "
            f"{config.num_attention_heads} heads, patches of {pixels(config.patch_size)} in "
            f"{pixels(config.image_size)} pixels, {config.pooling} pooling, {config.num_labels} labels",
            *(f"note: {note}" for note in self.notes),
        ]
        if fits:
            after, before = max(fit.after for fit in fits), max(fit.before for fit in fits)
            lines.append(
                "act2 calibrated; root mean square error to GELU on the images' activations at most "
                f"{after:.2g} in a layer, {before:.2g} before"
            )
        if proof is None:
            return "\n".join([*lines, "NOT VERIFIED against the source"])
        lines.append(
            f"verified against the source in float64: largest difference of the {proof.outputs} "
            f"{proof.difference:.2g} (their standard deviation is {proof.spread:.2g}), "
            f"top-1 agreement {proof.agreement:.0%}"
        )
        if "KAT" not in self.title:
            tables = f"the start tables {config.act1_init} and {config.act2_init}"
            lines.append(
                f"that is the cost of {'the calibrated act2' if fits else tables} for GELU; "
                f"with these in the source the largest relative difference is {proof.rounding:.2g}"
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
    """Turn a KAT, plain ViT, DeiT or DINOv2 into a FlashKAT folder, proved against it before it appears.

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
    checkpoint = read_source(source, ema=ema, revision=revision, token=token)
    try:
        conversion = Conversion.of(checkpoint, settings or {})
        conversion.resize(image_size)
        conversion.note_assumptions()
        conversion.set_head(num_labels)
        conversion.set_processor(transform)
        if calibrate is not None:
            batches = image_batches(images, conversion.processor) if images else calibrate
            conversion.calibrate(batches)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ValueError(f"cannot convert {source}: {error}") from error
    with written_whole(output) as folder:
        parameters = conversion.write(folder)
        proof = prove(conversion.source, conversion.config, folder, bool(num_labels)) if verify else None
    notes, fits = tuple(conversion.notes), tuple(conversion.fits)
    return ConversionReport(str(source), checkpoint.title, conversion.config, parameters, proof, notes, fits)


@dataclass
class Conversion:
    """A checkpoint that is being converted; each step of `convert` changes it."""

    source: Source  # the checkpoint, with resized positions if the result has them
    config: FlashKATConfig  # of the result
    state: dict[str, Tensor]  # of the result, in our names
    stated: set[str]  # fields of the config that the source's config or the caller stated
    notes: list[str]  # what was assumed, chosen or left out
    processor: Any = None  # the image processor
    fits: list[LayerFit] = field(default_factory=list)  # what the calibration reached

    @classmethod
    def of(cls, source: Source, settings: Mapping[str, Any]) -> "Conversion":
        """Start a conversion: the source's tensors in our names, and the config that fits them."""
        config, state = to_flashkat(source.state, settings, source.hints)
        return cls(source, config, state, {*source.hints, *settings}, list(source.notes))

    def resize(self, image_size: int | None) -> None:
        """Interpolate the positions of result and source for another image size, as the model itself does."""
        if image_size in (None, self.config.image_size):
            return
        sides = pair(self.config.patch_size)
        if any(image_size % side for side in sides):
            patch_size = pixels(self.config.patch_size)
            raise ValueError(f"image_size ({image_size}) must be a multiple of patch_size ({patch_size})")
        name = "flashkat.embeddings.position_embeddings"
        old = self.state[name]
        with torch.device("meta"):
            embeddings = FlashKATEmbeddings(self.config)
        embeddings.position_embeddings = nn.Parameter(old.float(), requires_grad=False)
        new = (
            embeddings.interpolate_pos_encoding(*(image_size // side for side in sides))
            .to(old.dtype)
            .contiguous()
        )
        original = strip_prefix(self.source.state)
        original_name = source_names(name, NAMINGS[self.source.title])[0]
        prefix = original[original_name].shape[1] - (old.shape[1] - 1)  # positions of cls and registers
        original[original_name] = torch.cat((original[original_name][:, :prefix], new[:, 1:]), dim=1)
        self.source = replace(self.source, state=original)
        self.config = FlashKATConfig(**{**self.config.to_dict(), "image_size": image_size})
        self.state[name] = new

    def note_assumptions(self) -> None:
        """Note which fields of the config nobody stated."""
        if "num_attention_heads" not in self.stated and not self.source.published:
            self.notes.append("heads of 64 channels assumed; --set num_attention_heads=N says otherwise")
        if "layer_norm_eps" not in self.stated and self.source.title.startswith("transformers"):
            eps = self.config.layer_norm_eps
            self.notes.append(f"eps {eps:g} assumed; --set layer_norm_eps=X says otherwise")

    def set_head(self, num_labels: int | None) -> None:
        """Make a fresh head, or keep the source's and name its labels where they are ImageNet's."""
        config = self.config
        if num_labels:
            dtype = self.state["flashkat.embeddings.cls_token"].dtype
            weight = torch.empty(num_labels, config.hidden_size)
            nn.init.trunc_normal_(weight, std=config.initializer_range)
            self.state["classifier.weight"] = weight.to(dtype)
            self.state["classifier.bias"] = torch.zeros(num_labels, dtype=dtype)
            values = config.to_dict()
            del values["id2label"], values["label2id"]
            self.config = FlashKATConfig(**{**values, "num_labels": num_labels})
            self.notes.append(f"fresh head of {num_labels} labels: random, to be trained")
        elif not config.num_labels and not has_double_head(strip_prefix(self.source.state)):
            self.notes.append("the source has no head; --num-labels N makes a fresh one")
        elif config.num_labels == 1000 and config.id2label == {i: f"LABEL_{i}" for i in range(1000)}:
            self.notes.append(_name_imagenet_labels(config))
        state = strip_prefix(self.source.state)
        if has_double_head(state):
            head = "its head reads the class token beside the patches' mean, which no FlashKAT's does"
            self.notes.append(f"{head}: left out")
        if "embeddings.mask_token" in state:
            self.notes.append("mask token left out: no classifier uses it")
        if any(re.fullmatch(r"(vit\.|deit\.)?pooler\.dense\.weight", name) for name in self.source.state):
            self.notes.append("pooler left out: no classifier uses it")

    def set_processor(self, transform: str | None) -> None:
        """Choose the image processor, with a note where it had to be assumed."""
        channels = self.config.num_channels
        size = self.config.image_size
        self.processor, note = image_processor(self.source, size, transform, channels)
        self.notes += [note] if note else []
        if channels == 1:
            self.notes.append("images become grey, by flashkat_hf's GreyViTImageProcessor")
        elif channels != 3:
            self.notes.append(f"no image file has {channels} channels: give the model tensors")

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Fit each act2 to the ViT's GELU on these images, on a GPU where there is one."""
        if self.source.is_kat:
            raise ValueError(
                "calibration fits act2 to a ViT's GELU, and this is a KAT, which has functions of its own"
            )
        act2 = {name: tensor.clone() for name, tensor in self.state.items() if ".act2." in name}
        model = _model(self.config, self.state | act2)
        model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
        self.fits = fit_act2(model, batches, gelu_form(self.source))
        fitted = model.state_dict()
        self.state |= {name: fitted[name].cpu() for name in act2}

    def write(self, folder: Path) -> int:
        """Write model and image processor, let go of the weights, and return their number."""
        _model(self.config, self.state).save_pretrained(folder)
        self.processor.save_pretrained(folder)
        parameters = sum(tensor.numel() for tensor in self.state.values())
        self.state.clear()
        return parameters


def _model(config: FlashKATConfig, state: Mapping[str, Tensor]) -> FlashKATForImageClassification:
    """Return a model that has these tensors, not copies of them, as its weights."""
    with torch.device("meta"):
        model = FlashKATForImageClassification(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def _name_imagenet_labels(config: FlashKATConfig) -> str:
    """Give a head of 1,000 outputs ImageNet-1k's names, WordNet's lemmas in timm; return the note on it."""
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


def _check_output(output: Path, overwrite: bool, source: Path) -> None:
    """Refuse an output that cannot be made or must not be replaced."""
    if not os.path.lexists(output):
        parent = next(parent for parent in output.absolute().parents if os.path.lexists(parent))
        if not parent.is_dir():
            raise ValueError(f"{output} cannot be made: {parent} is no folder")
        if not os.access(parent, os.W_OK):
            raise ValueError(f"{output} cannot be made: {parent} is not writable")
        return
    if not overwrite:
        raise ValueError(f"{output} exists; --overwrite replaces it")
    if output.is_symlink() or not output.is_dir():
        raise ValueError(f"{output} is no folder, so --overwrite does not replace it")
    if any(output.iterdir()):
        try:
            read_config(output)
        except ValueError as error:
            raise ValueError(
                f"{output} holds something else than a FlashKAT, so --overwrite does not replace it"
            ) from error
    old, origin = output.resolve(), source.resolve()
    if source.exists() and (origin.is_relative_to(old) or old.is_relative_to(origin)):
        raise ValueError(f"{output} cannot replace {source}, from which it is made")


@contextmanager
def written_whole(output: Path, folder: bool = True) -> Iterator[Path]:
    """Give a new folder, or the name of a new file, that takes the place of `output` at the end or goes.

    Raises:
        ValueError: the disk is full or another error of the system, in one line.
    """
    try:
        with replacing(output.absolute(), folder) as new:
            yield new
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {output}: {one_line(error)}; nothing is written") from error
