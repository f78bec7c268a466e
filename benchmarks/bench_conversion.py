"""Measure what a ViT loses as a FlashKAT: by the original's swish start, by ours, and by ours calibrated.

timm ViTs are trained on scikit-learn's digits (kept in --weights, which later runs read), converted with
`flashkat_hf.convert`, and compared with themselves. The images: the 360 held-out digits; each of them ten
times shifted, turned and scaled as in training; each ten times with Gaussian noise of standard deviation 0.1
of the pixels' range: 7,560 in all, none from the training split. Calibration sees training images alone. A
result is one JSON line; errors are relative to the standard deviation of the source's logits over the 7,560
images.

    python benchmarks/bench_conversion.py --output benchmarks/results/conversion.jsonl  # half an hour
"""

import json
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup

from flashkat_hf import FlashKATForImageClassification, convert, make_image_processor
from flashkat_hf.conversion.calibration import NUM_IMAGES
from flashkat_hf.data.augmentation import SIGNS, evaluation_transform, training_transform
from flashkat_hf.data.batches import TrainBatches
from flashkat_hf.data.digits import load_digits
from flashkat_hf.data.samples import ImageData

MODELS: dict[str, dict[str, Any]] = {
    "64x6": {"embed_dim": 64, "depth": 6, "num_heads": 4},
    "192x12": {"embed_dim": 192, "depth": 12, "num_heads": 3},
}
LEARNING_RATES = {"64x6": 3e-3, "192x12": 1e-3}
SEPARATE = {"num_numerator_groups": 8}
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {  # settings of the conversion, calibrated
    "swish start, as the original": ({"act2_init": "swish"}, False),
    "gelu start": ({}, False),
    "gelu calibrated": ({}, True),
    "gelu calibrated, separate numerators": (SEPARATE, True),
}
SMOOTHING, NOISE, COPIES = 0.1, 0.1, 10


@dataclass(frozen=True)
class Settings:
    output: Path = field(metadata={"help": "JSON lines are written here"})
    weights: Path = field(default=Path("runs/vits"), metadata={"help": "folder of the trained ViTs"})
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": "channels x layers"})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "of weights, order, augmentation"}
    )
    epochs: int = field(default=50, metadata={"help": "of the ViTs' training"})
    images: int = field(default=NUM_IMAGES, metadata={"help": "training images to calibrate with"})
    plot: Path | None = field(default=None, metadata={"help": "folder for a figure of each calibrated model"})
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})

    def __post_init__(self):
        if unknown := set(self.models) - MODELS.keys():
            raise SystemExit(f"--models: {', '.join(sorted(unknown))} unknown; known are {', '.join(MODELS)}")
        for name in ("epochs", "images"):
            if getattr(self, name) < 1:
                raise SystemExit(f"--{name}: {getattr(self, name)} must be at least 1")


def train(name: str, seed: int, epochs: int, data: ImageData, processor) -> VisionTransformer:
    """Train a ViT as `examples/finetune.py` trains a FlashKAT on the digits."""
    torch.manual_seed(seed)
    vit = VisionTransformer(img_size=16, patch_size=4, num_classes=10, **MODELS[name])
    batches = TrainBatches(data.train, training_transform(processor, SIGNS), batch_size=64, seed=seed)
    groups = param_groups_weight_decay(vit, 0.05, no_weight_decay_list=vit.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATES[name])
    steps = epochs * len(batches)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    for epoch in range(epochs):
        for batch in batches.epoch(epoch):
            loss = cross_entropy(vit(batch["pixel_values"]), batch["labels"])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        print(f"ViT {name}, seed {seed}: epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}", flush=True)
    return vit.eval()


def evaluation_images(data: ImageData, processor) -> dict[str, Tensor]:
    """Make the three sets of the module's docstring from the held-out digits with a fixed seed."""
    torch.manual_seed(0)
    clean = torch.stack([evaluation_transform(processor)(image) for image in data.test.images])
    moved = training_transform(processor, SIGNS)
    noise = NOISE / torch.tensor(processor.image_std)[:, None, None]
    noisy = clean.repeat(COPIES, 1, 1, 1)
    return {
        "held_out": clean,
        "moved": torch.stack([moved(image) for _ in range(COPIES) for image in data.test.images]),
        "noisy": noisy + noise * torch.randn(len(noisy), 1, *noisy.shape[2:]),  # gray, as the digits are
    }


@torch.no_grad()
def logits_of(model, images: dict[str, Tensor]) -> dict[str, Tensor]:
    def logits(batch: Tensor) -> Tensor:
        output = model(batch)
        return getattr(output, "logits", output)

    return {name: torch.cat([logits(batch) for batch in part.split(512)]) for name, part in images.items()}


def compare(logits: dict[str, Tensor], source: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Errors, top-1 agreement with the source, overall and by set, and accuracy on the held-out digits."""
    both = [torch.cat(list(part.values())) for part in (logits, source)]
    error = (both[0] - both[1]) / both[1].std()
    differ = {name: (logits[name].argmax(-1) != source[name].argmax(-1)).sum().item() for name in logits}
    return {
        "logit_rms_error": error.square().mean().sqrt().item(),
        "logit_max_error": error.abs().max().item(),
        "images": len(error),
        "differ": sum(differ.values()),
        "agreement": 1 - sum(differ.values()) / len(error),
        **{f"agreement_{name}": 1 - differ[name] / len(logits[name]) for name in logits},
        "accuracy_held_out": (logits["held_out"].argmax(-1) == labels).double().mean().item(),
    }


def measure(name: str, vit_file: Path, variant: str, batches: list[Tensor]) -> tuple[Any, dict[str, float]]:
    """Convert a ViT; return the model and the largest act2 error of a layer before and after calibration."""
    settings, calibrated = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        report = convert(
            vit_file,
            Path(folder, "flashkat"),
            settings={"num_attention_heads": MODELS[name]["num_heads"], **settings},
            transform="imagenet",
            calibrate=batches if calibrated else None,
        )
        model = FlashKATForImageClassification.from_pretrained(Path(folder, "flashkat"))
    fits = report.calibration
    worst = {
        f"act2_rms_{when}": max(getattr(fit, when) for fit in fits) for when in ("before", "after") if fits
    }
    return model.eval(), worst


def plot(model, batches: list[Tensor], path: Path) -> None:
    """Draw for each layer the histogram of act2's inputs and the error of each group against GELU."""
    from matplotlib.figure import Figure

    inputs: list[Tensor] = []
    acts = [layer.mlp.act2 for layer in model.flashkat.layers]
    handles = [
        act.register_forward_hook(lambda act, args, output: inputs.append(args[0].flatten())) for act in acts
    ]
    with torch.no_grad():
        model(torch.cat(batches)[:64])
        for handle in handles:
            handle.remove()
        figure = Figure(figsize=(4 * len(acts) / 2, 5), layout="constrained")
        for axes, act, values in zip(figure.subplots(2, len(acts) // 2).flat, acts, inputs, strict=True):
            x = torch.linspace(values.min().item(), values.max().item(), 401)
            error = act(x[:, None].expand(-1, act.hidden_size)) - torch.nn.functional.gelu(x)[:, None]
            axes.plot(x, error[:, :: act.hidden_size // len(act.denominator)], linewidth=0.8)
            axes.twinx().hist(values.numpy(), 200, log=True, histtype="step", color="gray")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def main(settings: Settings) -> None:
    torch.set_num_threads(1)  # two cores gain little on such small products, and lose much if others use them
    transformers.logging.disable_progress_bar()
    data, processor = load_digits(), make_image_processor(16, crop=1.0)
    images, labels = evaluation_images(data, processor), torch.tensor(data.test.labels)
    count = min(settings.images, len(data.train.images))
    chosen = [data.train.images[index * len(data.train.images) // count] for index in range(count)]
    calibration = [evaluation_transform(processor)(image) for image in chosen]
    batches = list(torch.stack(calibration).split(64))
    about = {
        "calibration_images": len(calibration),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "transformers": transformers.__version__,
        "commit": settings.commit or subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
    }
    lines = []
    print(
        f"{'ViT':10}{'seed':5} {'variant':38}{'rms error':>10}{'max error':>10}{'differ':>8}{'agreement':>11}"
    )
    for name in settings.models:
        for seed in settings.seeds:
            file = settings.weights / f"vit_{name}_{settings.epochs}epochs_seed{seed}.safetensors"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                save_file(train(name, seed, settings.epochs, data, processor).state_dict(), file)
            vit = VisionTransformer(img_size=16, patch_size=4, num_classes=10, **MODELS[name]).eval()
            vit.load_state_dict(load_file(file))
            source = logits_of(vit, images)
            accuracy = compare(source, source, labels)["accuracy_held_out"]
            for variant in VARIANTS:
                model, worst = measure(name, file, variant, batches)
                result = compare(logits_of(model, images), source, labels)
                lines.append(
                    {
                        "vit": name,
                        "seed": seed,
                        "variant": variant,
                        "accuracy_source": accuracy,
                        **result,
                        **worst,
                        **about,
                    }
                )
                print(
                    f"{name:10}{seed:<5} {variant:38}"
                    f"{result['logit_rms_error']:10.2e}{result['logit_max_error']:10.2e}"
                    f"{result['differ']:8}{result['agreement']:11.3%}",
                    flush=True,
                )
                if settings.plot and VARIANTS[variant][1]:
                    plot(model, batches, settings.plot / f"{name}_{seed}_{len(lines)}.png")
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
