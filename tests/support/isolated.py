"""Checks a checkpoint where the package is not.

Run by test_remote_code.py, in a process of its own.

python -I -S isolated.py FUNCTION JSON_ARGUMENTS

With -I and -S, `sys.path` is the standard library, and no .pth file brings a package that is installed
editable; JSON's "path" is added, and the top-level modules in its "hidden" cannot be found.
"""

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path

TEST = json.loads(sys.argv[2])


class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        hidden = fullname.partition(".")[0] in TEST["hidden"]
        return None if hidden else super().find_spec(fullname, path, target)


sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
sys.path += TEST["path"]

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402

BATCH = load_file(TEST["batch"])  # pixel_values and the logits that the package computed
TRUST = {"trust_remote_code": True}


def check_logits(model, expected: torch.Tensor = BATCH["logits"]) -> None:
    model.eval()
    assert "flashkat_hf" not in type(model).__module__
    with torch.no_grad():
        torch.testing.assert_close(model(BATCH["pixel_values"]).logits, expected, atol=1e-5, rtol=0)


def operators(model, module: str = "op_rational"):
    """Return a module of operators that a model's code has imported."""
    return sys.modules[type(model).__module__.rpartition(".")[0] + f".{module}"]


def fine_tune(model) -> list[float]:
    labels = torch.arange(len(BATCH["logits"]), device=model.device) % model.config.num_labels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    model.train()
    for _ in range(4):
        loss = model(BATCH["pixel_values"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_dense(folder: str, base) -> None:
    """The code that a checkpoint brings has the backbone and the model for hidden patches, too."""
    config = AutoConfig.from_pretrained(folder, out_indices=[1, 2], **TRUST)
    backbone = AutoBackbone.from_config(config, **TRUST)
    assert type(backbone).__name__ == "FlashKATBackbone"
    assert "flashkat_hf" not in type(backbone).__module__
    backbone = type(backbone).from_pretrained(folder, config=config)
    images = BATCH["pixel_values"]
    features = backbone(images).feature_maps[-1].flatten(2).mT
    torch.testing.assert_close(features, base(images).last_hidden_state[:, 1:], atol=1e-5, rtol=0)
    masked = AutoModelForMaskedImageModeling.from_pretrained(folder, **TRUST)
    mask = torch.zeros(len(images), features.shape[1], dtype=torch.bool)
    mask[:, :5] = True
    assert masked(images, bool_masked_pos=mask).loss.isfinite()
    model = UperNetForSemanticSegmentation(  # the class is registered by now
        UperNetConfig(
            backbone_config=config,
            hidden_size=8,
            auxiliary_in_channels=64,
            num_labels=2,
        )
    )
    assert type(model.backbone) is type(backbone)


def without_triton(folder: str, hub: str, out: str) -> None:
    """Without package and triton, loading needs trust; then come logits, training, and saves of saves."""
    assert not any(importlib.util.find_spec(name) for name in TEST["hidden"])
    for source in (folder, hub):
        for auto_class in (AutoConfig, AutoModelForImageClassification):
            with pytest.raises(ValueError, match="Please pass the argument `trust_remote_code=True`"):
                auto_class.from_pretrained(source)

    # Every file is checked for requirements.
    model = AutoModelForImageClassification.from_pretrained(hub, **TRUST)
    check_logits(model)
    assert operators(model).rational_forward is None
    earlier = AutoModelForImageClassification.from_pretrained(hub, subfolder="step-2", **TRUST)
    check_logits(earlier, BATCH["other"])
    model = AutoModelForImageClassification.from_pretrained(folder, **TRUST)
    check_logits(model)
    base = AutoModel.from_pretrained(folder, **TRUST)
    pooled = base(BATCH["pixel_values"]).pooler_output
    torch.testing.assert_close(model.classifier(pooled), BATCH["logits"], atol=1e-5, rtol=0)

    check_dense(folder, base)

    image = Image.linear_gradient("L").rotate(45)
    processor = AutoImageProcessor.from_pretrained(folder)  # no trust needed
    scores = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    best = pipeline("image-classification", model=folder, **TRUST)(image)[0]
    assert best["label"] == f"digit {scores.argmax()}", best

    losses = fine_tune(model)
    assert losses[-1] < losses[0], losses
    model.eval()
    tuned = model(BATCH["pixel_values"]).logits.detach()
    assert (tuned - BATCH["logits"]).abs().max() > 1e-3
    for generation in ("second", "third", "fourth"):
        path = Path(out, generation)
        model.save_pretrained(path)
        model = AutoModelForImageClassification.from_pretrained(path, **TRUST)
        check_logits(model, tuned)
    model.flashkat.save_pretrained(Path(out, "base"))
    AutoConfig.from_pretrained(folder, **TRUST).save_pretrained(Path(out, "config"))
    print("done")


def with_triton_and_the_package(folder: str, copy: str, package: str) -> None:
    """Two checkpoints' code and then the package share a process; each has operators of its own."""
    first = AutoModelForImageClassification.from_pretrained(folder, **TRUST)
    second = AutoModelForImageClassification.from_pretrained(copy, **TRUST)
    assert operators(first).rational_forward.__module__.endswith(".triton_rational")

    sys.path.append(package)
    import flashkat_hf
    from flashkat_hf.model import operators as ours

    assert (
        len(
            {
                module.NAMESPACE
                for module in (operators(first, "operators"), operators(second, "operators"), ours)
            }
        )
        == 3
    )
    for source in (folder, copy):
        third = AutoModelForImageClassification.from_pretrained(source, **TRUST)
        assert type(third) is flashkat_hf.FlashKATForImageClassification  # the package wins
    fourth = flashkat_hf.FlashKATForImageClassification(third.config)
    losses = [fine_tune(model) for model in (first, second, third, fourth)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(losses[0], losses[2], atol=1e-5, rtol=0)
    tables = [model.flashkat.layers[0].mlp.act1.numerator for model in (first, third)]
    assert torch.equal(*tables)
    print("done")


def on_a_gpu(folder: str, copy: str, package: str) -> None:
    """The copy's Triton kernels give the package's logits, and train in half precision, fused ones too."""
    model = AutoModelForImageClassification.from_pretrained(folder, **TRUST).eval().cuda()
    pixel_values = BATCH["pixel_values"].cuda()
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits.cpu(), BATCH["logits"], atol=1e-3, rtol=0)
    BATCH["pixel_values"] = pixel_values
    kernels = "rational_mlp_backward", "add_norm_rational_backward", "packed_attention_queries"
    with (
        torch.autocast("cuda", torch.bfloat16),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile,
    ):
        losses = fine_tune(model)
    assert losses[-1] < losses[0], losses
    assert {f"{kernel}_kernel" for kernel in kernels} <= {event.key for event in profile.key_averages()}

    sys.path.append(package)
    import flashkat_hf

    ours = flashkat_hf.FlashKATForImageClassification.from_pretrained(copy).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert fine_tune(ours)[-1] < losses[0]
    print("done")


if __name__ == "__main__":
    globals()[sys.argv[1]](**TEST["arguments"])
