"""What a run starts from, and that what it leaves is loaded by `from_pretrained`."""

import pytest
import torch
from helpers import micro_config
from transformers import AutoImageProcessor, AutoModelForImageClassification

from flashkat_hf import FlashKATForImageClassification, make_image_processor
from flashkat_hf.data.augmentation import SIGNS
from flashkat_hf.training.initial_model import build_model, save_model
from flashkat_hf.training.recipe import Settings

NAMES = ["cat", "dog", "cow"]


@pytest.fixture
def checkpoint(tmp_path):
    """A micro model for ten labels and 32 pixels, every parameter random."""
    model = FlashKATForImageClassification(micro_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path / "model")
    make_image_processor(32, crop=0.8).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_fresh_model():
    model, processor = build_model(Settings(data="photos", size="micro", drop_path=0.2), NAMES)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {"cat": 0, "dog": 1, "cow": 2}
    assert model.config.drop_path_rate == 0.2
    assert model.flashkat.layers[-1].drop_path.rate == pytest.approx(0.2)
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (16, 18)  # 16 / 0.875
    settings = Settings(size="micro", image_size=24)
    settings.augmentation = SIGNS
    model, processor = build_model(settings, NAMES)
    assert (model.config.image_size, processor.size["shortest_edge"]) == (24, 24)
    assert model(torch.zeros(1, 3, 24, 24)).logits.shape == (1, 3)
    model, _ = build_model(Settings(size="micro", image_size=24, patch_size=8), NAMES)
    assert (model.config.patch_size, model.flashkat.embeddings.position_embeddings.shape[1]) == (8, 9 + 1)
    model, _ = build_model(Settings(size="micro", initializer="variance_preserving"), NAMES)
    assert model.flashkat.layers[0].mlp.fc1.weight.std() > 5 * model.config.initializer_range
    with pytest.raises(ValueError, match=r"^--patch_size: image_size must be a multiple of patch_size; got"):
        build_model(Settings(size="tiny", patch_size=15), NAMES)


def test_other_labels_get_a_fresh_head_and_nothing_else(checkpoint):
    before = state(FlashKATForImageClassification.from_pretrained(checkpoint))
    model, _ = build_model(Settings(model=checkpoint, drop_path=0.1), NAMES)
    after = state(model)
    assert after["classifier.weight"].shape == (3, 64)
    assert 0.01 < after["classifier.weight"].std() < 0.03
    assert not after["classifier.bias"].any()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("classifier"))
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.drop_path_rate == 0.1
    ten = [f"class {i}" for i in range(10)]  # as many, but others
    model, _ = build_model(Settings(model=checkpoint), ten)
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])


def test_a_head_may_be_kept(checkpoint):
    before = state(FlashKATForImageClassification.from_pretrained(checkpoint))
    own = [f"LABEL_{i}" for i in range(10)]
    other = [f"class {i}" for i in range(10)]
    for names, head, kept in ((own, "auto", True), (own, "fresh", False), (other, "keep", True)):
        model, _ = build_model(Settings(model=checkpoint, head=head), names)
        assert torch.equal(model.classifier.weight, before["classifier.weight"]) is kept
        assert model.config.id2label == dict(enumerate(names))
    with pytest.raises(ValueError, match=r"--head: keep, but .* has 10 labels, not 3"):
        build_model(Settings(model=checkpoint, head="keep"), NAMES)


def test_a_checkpoint_for_another_problem(checkpoint, tmp_path):
    """A fresh head learns classes; one that is kept would be trained by a loss that is not theirs."""
    model = FlashKATForImageClassification.from_pretrained(checkpoint)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(checkpoint)
    model, _ = build_model(Settings(model=checkpoint), NAMES)
    labels = torch.eye(3)
    output = model(torch.randn(3, 3, 32, 32), labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    with pytest.raises(ValueError, match=r"--head: .* was made for multi_label_classification, which is not"):
        build_model(Settings(model=checkpoint, head="keep"), [f"class {i}" for i in range(10)])
    FlashKATForImageClassification(micro_config(num_labels=1)).save_pretrained(checkpoint)  # regression
    assert build_model(Settings(model=checkpoint), NAMES)[0].classifier.out_features == 3
    with pytest.raises(ValueError, match=r"--head: keep, but .* has 1 labels, not 3"):
        build_model(Settings(model=checkpoint, head="keep"), NAMES)


def test_another_image_size(checkpoint, tmp_path):
    """The function for the new size is the old model's own, with its positions interpolated."""
    old = FlashKATForImageClassification.from_pretrained(checkpoint).eval()
    own = [f"LABEL_{i}" for i in range(10)]
    model, processor = build_model(Settings(model=checkpoint, image_size=48), own)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = old(images, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(model.eval()(images).logits, expected, rtol=0, atol=0)
    save_model(model, processor, tmp_path / "new")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "new")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "new")
    assert (loaded.config.image_size, processor.crop_size["height"], processor.size["shortest_edge"]) == (
        48,
        48,
        60,
    )
    pixels = processor(torch.randint(256, (3, 70, 90), dtype=torch.uint8), return_tensors="pt")
    assert loaded(**pixels).logits.shape == (1, 10)
    with pytest.raises(ValueError, match="--image_size: 50 must be a multiple of the patches' 8"):
        build_model(Settings(model=checkpoint, image_size=50), own)
    with pytest.raises(ValueError, match=r"--image_size: .*image_size must be a multiple of patch_size"):
        build_model(Settings(size="micro", image_size=50), own)


def test_a_frozen_backbone():
    model, _ = build_model(Settings(size="micro", freeze_backbone=True), NAMES)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}


def test_gradient_checkpointing_changes_the_memory_and_not_the_gradients():
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, _ = build_model(
            Settings(size="micro", drop_path=0.3, gradient_checkpointing=checkpointing), NAMES
        )
        model.train()
        count = []
        model.flashkat.layers[1].mlp.fc1.register_forward_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(1)
        model(torch.randn(4, 3, 16, 16), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        calls.append(len(count))
    assert calls == [1, 2]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft 0.21 asks for it
def test_lora_trains_low_ranks_and_the_rationals_in_full(checkpoint, tmp_path):
    """The saved folder has the updates merged; the adapter beside it gives the same on the checkpoint."""
    peft = pytest.importorskip("peft")
    settings = Settings(model=checkpoint, lora_rank=2)
    model, processor = build_model(settings, NAMES)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = {name.partition(".layers.")[2].partition(".")[2] or name for name in trained}
    assert sum("lora_" in name for name in trained) == 2 * 4 * 2
    assert {
        "mlp.act1.modules_to_save.default.numerator",
        "mlp.act2.modules_to_save.default.denominator",
    } <= kinds
    assert len(trained) == 16 + 2 * 4 + 2  # low ranks; tables of two activations in two layers; the head
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_model(model, processor, tmp_path / "tuned")
    images = torch.randn(2, 3, 32, 32)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").eval()
    assert type(loaded) is FlashKATForImageClassification
    with torch.no_grad():
        expected = model.eval()(pixel_values=images).logits
        torch.testing.assert_close(loaded(images).logits, expected)
        start, _ = build_model(Settings(model=checkpoint), NAMES)
        assert (start.eval()(images).logits - expected).abs().max() > 0.1
        adapted = peft.PeftModel.from_pretrained(start, tmp_path / "tuned" / "adapter").eval()
        torch.testing.assert_close(adapted(pixel_values=images).logits, expected)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["qkv", "query"], r"--lora_modules: query is no map of the model; qkv and patch_embeddings are"),
        (["norm1"], r"--lora_modules: Target module LayerNorm.* is not supported"),
    ],
)
def test_modules_that_have_no_low_ranks(modules, message):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=message):
        build_model(Settings(size="micro", lora_rank=2, lora_modules=modules), NAMES)


def test_labels_are_the_same_however_unicode_composes_them(tmp_path):
    labels = {0: "cafe\u0301", 1: "dog"}  # as another program may have written them
    FlashKATForImageClassification(micro_config(num_labels=2, id2label=labels)).save_pretrained(tmp_path)
    make_image_processor(32).save_pretrained(tmp_path)
    before = FlashKATForImageClassification.from_pretrained(tmp_path).classifier.weight
    model, _ = build_model(Settings(model=str(tmp_path)), ["caf\u00e9", "dog"])
    assert torch.equal(model.classifier.weight, before)
    assert model.config.id2label[0] == "caf\u00e9"


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=f"--model: {tmp_path / 'none'} is not a folder"):
        build_model(Settings(model=str(tmp_path / "none")), NAMES)
