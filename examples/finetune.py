"""Fine-tune a FlashKAT on images; without arguments, train a micro model from scratch on scikit-learn's digits.

    python examples/finetune.py                                  # a minute and a half on a CPU
    accelerate launch examples/finetune.py --data photos --size tiny
    accelerate launch --mixed_precision bf16 examples/finetune.py --data photos --model CHECKPOINT
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/finetune.py  # two CPU processes

The data folder holds train/ and val/ with a sub-folder for each class. The output appears when training has succeeded.
"""

import json
import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, make_image_processor
from flashkat_hf.checkpoints import load_checkpoint
from flashkat_hf.data import (
    DataError,
    ImageDataset,
    evaluation_transform,
    load_digits,
    load_image_folder,
    training_transform,
)
from flashkat_hf.remote_code import CODE_FILES

try:
    from timm.optim import param_groups_weight_decay
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"finetune.py needs more packages: pip install 'flashkat_hf[train]' ({error})") from error

MICRO = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 16,
    "patch_size": 4,
}
RANGES = (  # at least, below
    (("epochs", "max_steps", "batch_size"), 1, math.inf),
    (("learning_rate",), 1e-12, math.inf),
    (("weight_decay", "workers"), 0, math.inf),
    (("warmup", "drop_path"), 0, 1),
    (("seed",), 0, 2**31),
)
SAVED = {
    *("config.json", "metrics.jsonl", "model.safetensors", "preprocessor_config.json", "samples", "settings.json"),
    *CODE_FILES,
}


@dataclass
class Settings:
    data: Path | None = HfArg(default=None, help="folder with train/ and val/; default: the digits")  # noqa: RUF009
    model: str | None = HfArg(default=None, help="FlashKAT folder or Hub id; default: a fresh model")
    size: Literal["micro", "tiny", "small", "base"] | None = HfArg(
        default=None, help="of a fresh model; default: micro for the digits, tiny for a folder"
    )
    output: Path | None = HfArg(  # noqa: RUF009
        default=None, help="folder for the model, made at the end; default: runs/digits, or runs/ and the data's name"
    )
    epochs: int = HfArg(default=50, help="passes over the training images")
    max_steps: int | None = HfArg(default=None, help="train for so many updates at most")
    batch_size: int = HfArg(default=64, help="images for each device")
    learning_rate: float | None = HfArg(
        default=None, help="the highest; default: 3e-3 for a micro model, 5e-4 for others, 1e-4 for --model"
    )
    weight_decay: float = HfArg(default=0.05, help="of matrices and rational coefficients")
    warmup: float = HfArg(default=0.1, help="part of the updates in which the learning rate rises")
    drop_path: float = HfArg(default=0.0, help="stochastic depth of the last block")
    workers: int | None = HfArg(
        default=None, help="processes for each device that read images; default: 0 for the digits, else up to 4"
    )
    seed: int = HfArg(default=0, help="of weights, order and augmentation")

    def __post_init__(self):
        for names, low, high in RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not low <= value < high:
                    raise SystemExit(f"--{name}: {value} must be at least {low} and below {high}")
        if self.data is not None and not self.data.is_dir():
            raise SystemExit(f"--data: {self.data} is not a folder")
        if self.model is not None and self.size is not None:
            raise SystemExit(
                f"--size: {self.size} is for a fresh model, but --model {self.model} has a size of its own"
            )
        if self.output is None:
            self.output = Path("runs", "digits" if self.data is None else self.data.resolve().name)
        if os.path.lexists(self.output):
            check_replaceable(self.output)
        if self.model is None and self.size is None:
            self.size = "micro" if self.data is None else "tiny"
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if self.model else 3e-3 if self.size == "micro" else 5e-4
        if self.workers is None:
            self.workers = 0 if self.data is None else min(4, os.cpu_count() or 1)


def check_replaceable(output: Path) -> None:
    """Refuse to replace what this script has not written."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if not names >= SAVED:
        raise SystemExit(f"--output: {output} exists and holds no model saved by this script; move it or name another")
    if names > SAVED:
        raise SystemExit(f"--output: {output} also holds what others wrote: {', '.join(sorted(names - SAVED))}")


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its place at the end; after an error, the old one stands as it was."""
    output = output.resolve()
    new, old = (output.with_name(f".{output.name}.{uuid4().hex[:8]}.{suffix}") for suffix in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if output.exists():
            output.rename(old)
        new.rename(output)
    finally:
        if old.exists() and not output.exists():  # interrupted between the two
            old.rename(output)
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)


def build(settings: Settings, class_names: list[str]):
    """The model, with a head for these classes, and its image processor."""
    overrides = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
        "drop_path_rate": settings.drop_path,
    }
    if settings.model is None:
        micro = settings.size == "micro"
        config = FlashKATConfig(**MICRO, **overrides) if micro else FlashKATConfig.from_size(settings.size, **overrides)
        crop = 1.0 if settings.data is None else 0.875  # a digit fills its image
        return FlashKATForImageClassification(config), make_image_processor(config.image_size, crop)
    try:
        return load_checkpoint(settings.model, **overrides)
    except ValueError as error:
        raise SystemExit(f"--model: {error}") from error


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices and rational coefficients, as the released weights; none for biases, norms, positions, cls."""
    names = [name for name, _ in model.named_parameters() if name.endswith(("cls_token", "position_embeddings"))]
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=names)


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """Top-1 accuracy; no image counts twice, however many processes there are."""
    model = accelerator.unwrap_model(model).eval()
    correct = []
    for batch in loader:
        # the class's own forward: accelerate wraps the object's in mixed precision, and `pipeline` has none
        predictions = type(model).forward(model, batch["pixel_values"]).logits.argmax(-1)
        correct.append(accelerator.gather_for_metrics(predictions == batch["labels"]))
    correct = torch.cat(correct)
    return correct.sum().item() / len(correct)


def train(settings: Settings, model, train_set: ImageDataset, test_set: ImageDataset, accelerator: Accelerator):
    """Train `model`; yields a line of metrics for each epoch."""
    workers = {"num_workers": settings.workers, "persistent_workers": settings.workers > 0}
    train_loader = DataLoader(train_set, settings.batch_size, shuffle=True, **workers)
    test_loader = DataLoader(test_set, settings.batch_size, **workers)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=settings.learning_rate)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, train_loader, test_loader)
    num_steps = min(settings.epochs * len(train_loader), settings.max_steps or math.inf)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(settings.warmup * num_steps), num_steps)
    cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    images_per_step = settings.batch_size * accelerator.num_processes
    step = 0
    with tqdm(total=num_steps, unit="step", disable=not accelerator.is_main_process) as bar:
        while step < num_steps:
            model.train()
            total_loss, first, start = 0.0, step, time.perf_counter()
            for batch in train_loader:
                loss = cross_entropy(model(batch["pixel_values"]).logits.float(), batch["labels"])
                accelerator.backward(loss)
                optimizer.step()
                rate = schedule.get_last_lr()[0]
                schedule.step()
                optimizer.zero_grad()
                total_loss += loss.detach()
                step += 1
                bar.update()
                speed = (step - first) * images_per_step / (time.perf_counter() - start)
                if step % 10 == 0:  # reading the loss waits for the device
                    bar.set_postfix_str(f"loss {loss.item():.3f}, lr {rate:.1e}, {speed:.0f} images/s")
                if step == num_steps:
                    break
            mean_loss = accelerator.reduce(total_loss / (step - first), "mean").item()
            if not math.isfinite(mean_loss):
                raise SystemExit(f"the loss became {mean_loss}; try a --learning_rate below {settings.learning_rate}")
            accuracy = evaluate(model, test_loader, accelerator)
            if accelerator.is_main_process:
                bar.write(f"step {step}: loss {mean_loss:.3f}, test accuracy {accuracy:.2%}")
            yield {"step": step, "loss": mean_loss, "images_per_second": round(speed), "test_accuracy": accuracy}


def run(settings: Settings, accelerator: Accelerator) -> None:
    if settings.data is None:
        data = load_digits()
    else:
        data = load_image_folder(settings.data, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()  # until every process has checked its share of the images
    if accelerator.device.type == "cpu" and settings.size == "micro":
        torch.set_num_threads(1)  # two cores gain little on such small products, and lose much when others use them
    set_seed(settings.seed)
    model, processor = build(settings, data.class_names)
    train_set = ImageDataset(data.train, training_transform(processor, flip=settings.data is not None))
    test_set = ImageDataset(data.test, evaluation_transform(processor))
    set_seed(settings.seed, device_specific=True)  # each process augments in its own way
    lines = train(settings, model, train_set, test_set, accelerator)
    if not accelerator.is_main_process:
        for _ in lines:
            pass
        return
    with replacing(settings.output) as folder:
        (folder / "settings.json").write_text(json.dumps(asdict(settings), default=str, indent=2) + "\n")
        with (folder / "metrics.jsonl").open("w", buffering=1) as metrics:
            for line in lines:
                metrics.write(json.dumps(line) + "\n")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "samples").mkdir()
        for label, name in enumerate(data.class_names[:10]):
            index = data.test.labels.index(label)
            sample = Path("samples", f"{name}_{index}.png")
            test_set.image(index).save(folder / sample)
    print(f"test accuracy {line['test_accuracy']:.2%} on {len(test_set)} images; saved in {settings.output}")
    script = os.path.relpath(Path(__file__).with_name("classify.py"))
    command = ["python", script, str(settings.output), str(settings.output / sample)]
    print(f"now ask it about an image:\n{shlex.join(command)}")


def main(settings: Settings) -> None:
    try:
        accelerator = Accelerator()
    except ValueError as error:  # such as a precision that the device does not have
        raise SystemExit(f"accelerate: {error}") from error
    if not accelerator.is_main_process:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        run(settings, accelerator)
    except DataError as error:  # a worker's error carries its traceback in front of the message
        raise SystemExit(f"--data: {str(error).strip().rpartition('DataError: ')[2]}") from error
    except (ImportError, OSError) as error:  # a missing package, a full disk
        raise SystemExit(f"finetune.py: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; nothing was saved") from None
    accelerator.end_training()


def parse(arguments: list[str] | None = None) -> Settings:
    parser = HfArgumentParser(Settings, description=__doc__.partition("\n")[0])
    settings, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise SystemExit(f"unknown arguments: {' '.join(unknown)}")
    return settings


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill tidies up as Ctrl-C does
    main(parse())
