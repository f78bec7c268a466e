"""Compare a FlashKAT's held-out accuracy on scikit-learn's digits with that of a plain ViT of the same size.

    python benchmarks/bench_digits.py --output benchmarks/results/digits.jsonl  # micro, on a CPU
    python benchmarks/bench_digits.py --size tiny --output benchmarks/results/digits_224.jsonl  # on a GPU

The size tiny takes images of 224 pixels. Runs share nothing, so on a GPU that one of them does not fill,
seeds can go side by side, each into a file:

    for seed in 0 1 2; do
        python benchmarks/bench_digits.py --size tiny --seeds $seed --output runs/$seed.jsonl \
            --settings epochs=30 workers=4 compile=no &
    done; wait; cat runs/?.jsonl > benchmarks/results/digits_224.jsonl

Both are trained by `flashkat_hf.training.train` with the recipe `finetune-digits`; the ViT is timm's, with
the same patches, width, depth, heads and MLP. A line for each run, and at the end mean and spread over the
seeds.
"""

import json
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import HfArgumentParser
from transformers.modeling_outputs import ImageClassifierOutput

from flashkat_hf import FlashKATConfig
from flashkat_hf.model.modeling_flashkat import image_classification_loss
from flashkat_hf.training import train
from flashkat_hf.training.initial_model import build_model
from flashkat_hf.training.recipe import Settings, parse


@dataclass(frozen=True)
class Arguments:
    output: Path = field(metadata={"help": "JSON lines are written here"})
    size: Literal["micro", "tiny"] = field(
        default="micro", metadata={"help": "tiny: at 224 pixels, for a GPU"}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "of the runs of each model"}
    )
    models: list[str] = field(default_factory=lambda: ["flashkat", "vit"], metadata={"help": "flashkat, vit"})
    settings: list[str] = field(
        default_factory=list,
        metadata={"help": "of the recipe for both models, as epochs=30 learning_rate=1e-3"},
    )
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})

    def __post_init__(self):
        if unknown := set(self.models) - {"flashkat", "vit"}:
            raise SystemExit(f"--models: {', '.join(sorted(unknown))} unknown; known are flashkat, vit")
        if wrong := [setting for setting in self.settings if "=" not in setting]:
            raise SystemExit(f"--settings: {', '.join(wrong)} must be NAME=VALUE")


class ViT(VisionTransformer):
    """A ViT of timm that the trainer can call as it calls a FlashKAT."""

    def __init__(self, config: FlashKATConfig):
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            num_classes=config.num_labels,
            drop_path_rate=config.drop_path_rate,
            global_pool="avg" if config.pooling == "mean" else "token",  # avg: of the patches, as ours
        )
        self.config = config

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> ImageClassifierOutput:
        logits = super().forward(pixel_values)
        loss = None if labels is None else image_classification_loss(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder) / "model.safetensors")


def build_vit(settings: Settings, class_names: list[str]):
    """Return the ViT of the shape that a FlashKAT of these settings has, and its image processor."""
    model, processor = build_model(settings, class_names)
    return ViT(model.config), processor


def measure(model: str, seed: int, arguments: Arguments) -> dict:
    """Train one model and return the results in its run's summary."""
    flags = ["--recipe", "finetune-digits", "--size", arguments.size, "--seed", str(seed)]
    flags += [part for setting in arguments.settings for part in f"--{setting}".split("=", 1)]
    with tempfile.TemporaryDirectory() as folder:
        settings = parse([*flags, "--output", f"{folder}/run"])
        summary = train(settings, build=build_vit if model == "vit" else None)
        last = json.loads(Path(folder, "run", "last", "summary.json").read_text())["top1"]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    names = "top1 best_epoch epochs steps batch_size image_size precision compiled seed seconds"
    names += " images_per_second device versions commit"
    about = {name: summary[name] for name in names.split()}
    about |= {"commit": arguments.commit} if arguments.commit else {}
    model_about = {"model": model, "size": arguments.size, "learning_rate": settings.learning_rate}
    return {**model_about, "last_top1": last, **about}


def main(arguments: Arguments) -> None:
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict]] = {model: [] for model in arguments.models}
    with arguments.output.open("w") as lines:
        for seed in arguments.seeds:
            for model, runs in results.items():
                runs.append(measure(model, seed, arguments))
                lines.write(json.dumps(runs[-1]) + "\n")
                lines.flush()
    print(f"\n{arguments.size}, {len(arguments.seeds)} seeds: held-out top-1 after the last epoch")
    for model, runs in results.items():
        last, best = ([100 * result[name] for result in runs] for name in ("last_top1", "top1"))
        spread = f" ± {statistics.stdev(last):.2f}" if len(last) > 1 else ""
        seconds = statistics.mean(result["seconds"] for result in runs)
        text = f"{statistics.mean(last):.2f}%{spread}   best epoch {statistics.mean(best):.2f}%"
        print(f"{model:9} {text}   {seconds:.0f} s a run")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses())
