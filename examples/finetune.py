"""Fine-tune a FlashKAT on images; without arguments, a micro model from scratch on scikit-learn's digits.

    python examples/finetune.py                                  # two CPU cores are enough
    accelerate launch examples/finetune.py --data photos --size tiny
    accelerate launch --mixed_precision bf16 examples/finetune.py --data photos --model CHECKPOINT

The data folder holds train/ and val/ with a sub-folder for each class. The output appears when training has ended.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import param_groups_weight_decay
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, HfArgumentParser, get_cosine_schedule_with_warmup
from transformers.utils import logging

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, make_image_processor
from flashkat_hf.configuration_flashkat import SIZES
from flashkat_hf.data import (
    Examples,
    ImageData,
    ImageDataset,
    evaluation_transform,
    load_digits,
    load_image_folder,
    open_image,
    training_transform,
)

MICRO = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Settings:
    data: Path | None = field(default=None, metadata={"help": "folder with train/ and val/; default: the digits"})
    model: str | None = field(default=None, metadata={"help": "FlashKAT folder or Hub id; default: a fresh model"})
    size: str = field(default="micro", metadata={"help": "of a fresh model: micro, tiny, small or base"})
    output: Path = field(default=Path("runs/digits"), metadata={"help": "the model is saved here"})
    epochs: int = field(default=40, metadata={"help": "passes over the training images"})
    max_steps: int | None = field(default=None, metadata={"help": "stop after so many updates"})
    batch_size: int = field(default=64, metadata={"help": "images per device"})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "peak of the cosine schedule; default: 3e-3 for a fresh model, 1e-4 for --model"},
    )
    weight_decay: float = field(default=0.3, metadata={"help": "of matrices and rational coefficients"})
    warmup: float = field(default=0.1, metadata={"help": "part of the updates in which the learning rate grows"})
    label_smoothing: float = field(default=0.1, metadata={"help": "probability moved to the other classes"})
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    seed: int = field(default=0, metadata={"help": "of weights, order and augmentation"})

    def __post_init__(self):
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 3e-3 if self.model is None else 1e-4)
        if self.size != "micro" and self.size not in SIZES:
            raise SystemExit(f"--size: {self.size!r} is none of micro, {', '.join(SIZES)}")
        for name in ("epochs", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise SystemExit(f"--{name}: {getattr(self, name)} must be positive")
        if self.max_steps is not None and self.max_steps <= 0:
            raise SystemExit(f"--max_steps: {self.max_steps} must be positive")
        if self.output.exists() and any(self.output.iterdir()) and not (self.output / "settings.json").is_file():
            raise SystemExit(f"--output: {self.output} exists and was not written by this script")


def build(settings: Settings, class_names: list[str]):
    """The model, with a head for these classes, and its image processor."""
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
    }
    if settings.model is None:
        if settings.size == "micro":
            config = FlashKATConfig(**MICRO, **labels)
        else:
            config = FlashKATConfig.from_size(settings.size, **labels)
        crop = 1.0 if settings.data is None else 0.875  # the digits fill their image
        return FlashKATForImageClassification(config), make_image_processor(config.image_size, crop)
    config = AutoConfig.from_pretrained(settings.model)
    if not isinstance(config, FlashKATConfig):
        raise ValueError(f"{settings.model} is a {config.model_type} model, not a FlashKAT")
    processor = AutoImageProcessor.from_pretrained(settings.model)
    return (
        FlashKATForImageClassification.from_pretrained(
            settings.model, num_labels=len(class_names), **labels, ignore_mismatched_sizes=True
        ),
        processor,
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices and rational coefficients, as the released weights; none for biases, norms, positions, cls."""
    names = [name for name, _ in model.named_parameters() if name.endswith(("cls_token", "position_embeddings"))]
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=names)


@torch.no_grad()
def evaluate(model, loader: DataLoader, accelerator: Accelerator) -> float:
    """Top-1 accuracy; no image counts twice, however many processes there are."""
    model.eval()
    correct = total = 0
    for batch in loader:
        predictions = model(batch["pixel_values"]).logits.argmax(-1)
        predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
        correct += (predictions == labels).sum().item()
        total += len(labels)
    return correct / total


def train(settings: Settings, data: ImageData, accelerator: Accelerator) -> None:
    set_seed(settings.seed)
    with accelerator.main_process_first():
        model, processor = build(settings, data.class_names)
    transform = training_transform(processor, flip=settings.data is not None)
    set_seed(settings.seed, device_specific=True)  # each process augments in its own way
    train_loader = DataLoader(
        ImageDataset(data.train, transform), settings.batch_size, shuffle=True, num_workers=settings.num_workers
    )
    test_loader = DataLoader(
        ImageDataset(data.test, evaluation_transform(processor)), settings.batch_size, num_workers=settings.num_workers
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=settings.learning_rate)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, train_loader, test_loader)
    num_steps = min(settings.epochs * len(train_loader), settings.max_steps or 2**62)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(settings.warmup * num_steps), num_steps)
    cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    history, step, start = [], 0, time.perf_counter()
    bar = tqdm(total=num_steps, unit="step", disable=not accelerator.is_main_process)
    while step < num_steps:
        model.train()
        for batch in train_loader:
            loss = cross_entropy(model(batch["pixel_values"]).logits.float(), batch["labels"])
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            rate = step * settings.batch_size * accelerator.num_processes / (time.perf_counter() - start)
            bar.update()
            bar.set_postfix(
                loss=f"{loss.item():.3f}", lr=f"{schedule.get_last_lr()[0]:.1e}", images_per_s=f"{rate:.0f}"
            )
            if step == num_steps:
                break
        history.append({"step": step, "loss": loss.item(), "test_accuracy": evaluate(model, test_loader, accelerator)})
        bar.write(f"step {step}: test accuracy {history[-1]['test_accuracy']:.2%}") if len(history) % 10 == 0 else None
    bar.close()
    if accelerator.is_main_process:
        save(settings, accelerator.unwrap_model(model), processor, data.test, history)
        print(f"test accuracy {history[-1]['test_accuracy']:.2%} on {len(data.test.labels)} images")
        print(f"saved in {settings.output}; now ask it about an image:")
        print(
            f"python examples/classify.py {settings.output} {settings.output / 'samples' / sample_name(data.test, 0)}"
        )
    accelerator.end_training()


def sample_name(examples: Examples, index: int) -> str:
    return f"{index}_label_{examples.labels[index]}.png"


def save(settings: Settings, model, processor, test: Examples, history: list[dict]) -> None:
    """Everything into a new folder, which then takes the place of the old one: a failed run leaves the old."""
    new, old = (settings.output.with_name(f".{settings.output.name}.{suffix}") for suffix in ("new", "old"))
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    (new / "samples").mkdir(parents=True)
    model.save_pretrained(new)
    processor.save_pretrained(new)
    (new / "settings.json").write_text(json.dumps(asdict(settings), default=str, indent=2) + "\n")
    (new / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    for index, image in enumerate(test.images[:10]):
        image = open_image(image) if isinstance(image, Path) else image
        image.save(new / "samples" / sample_name(test, index))
    if settings.output.exists():
        settings.output.rename(old)
    new.rename(settings.output)
    shutil.rmtree(old, ignore_errors=True)


def main(settings: Settings) -> None:
    try:
        data = load_digits() if settings.data is None else load_image_folder(settings.data)
        accelerator = Accelerator()
        if not accelerator.is_main_process:
            logging.set_verbosity_error()
        train(settings, data, accelerator)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"finetune.py: {error}") from error


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
