"""Parameter groups, schedule, mixing and averages: each against what the recipe says, by hand."""

import random

import numpy
import pytest
import torch
from helpers import micro_config

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification
from flashkat_hf.training.optimization import (
    AveragedWeights,
    Mixing,
    Schedule,
    make_optimizer,
    parameter_groups,
    seed_update,
    whole_weights,
)
from flashkat_hf.training.recipe import Settings

PAPER = {"epochs": 300, "learning_rate": 1e-3, "warmup_epochs": 5, "schedule": "epoch"}


def by_decay(model: torch.nn.Module, groups: list[dict]) -> dict[float, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[float, set[str]] = {}
    for group in groups:
        found.setdefault(group["weight_decay"], set()).update(names[id(p)] for p in group["params"])
    return found


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_what_decays_is_the_originals(size, layer_decay):
    """98 tensors do, matrices and coefficients; 102 do not. By the names that a block has."""
    with torch.device("meta"):
        model = FlashKATForImageClassification(FlashKATConfig.from_size(size, num_labels=1000))
    found = by_decay(model, parameter_groups(model, 0.05, layer_decay=layer_decay))
    assert {decay: len(names) for decay, names in found.items()} == {0.05: 98, 0.0: 102}
    act = {f"mlp.{act}.{table}" for act in ("act1", "act2") for table in ("numerator", "denominator")}
    linear = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    block = act | {f"{name}.weight" for name in linear}
    decayed = {f"flashkat.layers.{i}.{name}" for i in range(12) for name in block}
    assert found[0.05] == decayed | {"classifier.weight", "flashkat.embeddings.patch_embeddings.weight"}
    assert not hasattr(model, "group_matcher")


def test_a_flag_takes_the_coefficients_out():
    model = FlashKATForImageClassification(micro_config())
    found = by_decay(model, parameter_groups(model, 0.05, decay_coefficients=False))
    assert {name.rpartition(".")[2] for name in found[0.05]} == {"weight"}
    everything = by_decay(model, parameter_groups(model, 0.05))
    moved = everything[0.05] - found[0.05]
    assert moved == {
        name for name, _ in model.named_parameters() if name.endswith(("numerator", "denominator"))
    }


def test_what_is_frozen_is_in_no_group():
    model = FlashKATForImageClassification(micro_config())
    model.flashkat.requires_grad_(False)
    assert by_decay(model, parameter_groups(model, 0.05)) == {
        0.05: {"classifier.weight"},
        0.0: {"classifier.bias"},
    }


def test_the_learning_rate_falls_with_depth():
    """The head learns at the full rate, the last block and norm at half of it, and so on downwards."""
    model = FlashKATForImageClassification(micro_config())
    settings = Settings(layer_decay=0.5, learning_rate=1e-2, warmup_epochs=0)
    optimizer = make_optimizer(model, settings, torch.device("cpu"))
    assert Schedule(optimizer, settings, 10).set(0, 0) == pytest.approx(1e-2)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        depth = {"classifier": 0, "norm": 1, "layers.1": 1, "layers.0": 2, "embeddings": 3}
        (power,) = [d for key, d in depth.items() if name.removeprefix("flashkat.").startswith(key)]
        assert rates[id(parameter)] == pytest.approx(1e-2 * 0.5**power), name


def test_the_schedule_is_the_papers():
    """By epoch; the original's values, to the digits in which they are known."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = Schedule(torch.optim.AdamW([parameter], lr=1e-3), Settings(**PAPER), 1251)
    rates = {epoch: schedule.set(epoch, 0) for epoch in (0, 1, 2, 3, 4, 5, 299)}
    expected = {0: 1e-5, 1: 2.08e-4, 2: 4.06e-4, 3: 6.04e-4, 4: 8.02e-4, 5: 9.993e-4, 299: 2.74e-8}
    assert rates == {epoch: pytest.approx(rate, rel=1e-3) for epoch, rate in expected.items()}
    assert schedule.set(2, 1250) == rates[2]
    assert schedule.optimizer.param_groups[0]["lr"] == rates[2]


def test_the_schedule_by_update_passes_through_the_same_values():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    by_epoch = Schedule(optimizer, Settings(**PAPER), 10)
    by_update = Schedule(optimizer, Settings(**{**PAPER, "schedule": "update"}), 10)
    for epoch in (0, 3, 5, 100, 299):
        assert by_update.set(epoch, 0) == pytest.approx(by_epoch.set(epoch, 0), rel=1e-12)
    assert by_update.set(2, 5) == pytest.approx((by_epoch.set(2, 0) + by_epoch.set(3, 0)) / 2)
    assert by_update.set(299, 9) < by_update.set(299, 0)


def test_the_optimiser_is_the_papers():
    model = FlashKATForImageClassification(micro_config())
    optimizer = make_optimizer(model, Settings(fit_defaults=False), torch.device("cpu"))
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.9, 0.999), 1e-8, True)
    assert type(optimizer) is torch.optim.AdamW


@pytest.mark.parametrize("seed", range(6))
def test_mixing_mixes_images_and_labels_alike(seed):
    """The label says whose the pixels are, for mixup (all pixels mixed) and for cutmix (a box)."""
    seed_update(seed, 0, 0)
    mixing = Mixing(Settings(mixup=0.8, cutmix=1.0, label_smoothing=0.0), num_labels=4)
    images = torch.eye(4)[:, :, None, None].expand(4, 4, 16, 16).clone()  # channel i is on in image i
    mixed, labels = mixing(images, torch.arange(4))
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    torch.testing.assert_close(mixed.mean((2, 3)), labels, rtol=0, atol=1e-6)
    own = labels.diagonal()
    assert (own < 1).all()  # something was mixed, probability 1
    assert torch.equal(labels, labels.flip(0).flip(1))  # with the image at the other end


def test_both_kinds_of_mixing_come_about_as_often():
    boxes = 0
    for seed in range(200):
        seed_update(seed, 0, 0)
        images = torch.eye(2)[:, :, None, None].expand(2, 2, 8, 8).clone()
        mixed, _ = Mixing(Settings(mixup=0.8, cutmix=1.0), num_labels=2)(images, torch.arange(2))
        boxes += mixed.unique().tolist() in ([0, 1], [0], [1])
    assert abs(boxes - 100) < 4 * 200**0.5 / 2  # four standard deviations


def test_smoothed_labels_without_mixing():
    images = torch.rand(3, 3, 4, 4)
    same, labels = Mixing(Settings(label_smoothing=0.1), num_labels=5)(
        images.clone(), torch.tensor([0, 3, 3])
    )
    assert torch.equal(same, images)
    expected = torch.full((3, 5), 0.02)
    expected[[0, 1, 2], [0, 3, 3]] = 0.92
    torch.testing.assert_close(labels, expected)


def test_averaged_weights_follow_by_their_decay():
    """No warm-up, every parameter, and the average itself is left alone by training."""
    model = torch.nn.Linear(2, 2)
    average = AveragedWeights(model, 0.75)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(model)
        expected = {name: 0.75 * old + 0.25 * model.state_dict()[name] for name, old in expected.items()}
    torch.testing.assert_close(dict(average.module.state_dict()), expected)
    assert not average.module.training
    other = AveragedWeights(torch.nn.Linear(2, 2), 0.75)
    other.load_state_dict(average.state_dict())
    torch.testing.assert_close(other.state_dict(), whole_weights(average.module), rtol=0, atol=0)


def test_an_updates_random_numbers_follow_from_seed_rank_and_step():
    def draws(*numbers: int) -> tuple:
        seed_update(*numbers)
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    first = draws(0, 0, 0)
    assert draws(0, 0, 0) == first
    others = [draws(*numbers) for numbers in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for generator in range(3):
        assert len({draw[generator] for draw in [first, *others]}) == 4
