"""Plans: what follows from settings and devices."""

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

from flashkat_hf.training.plan import micro_batches, resolve, worker_processes
from flashkat_hf.training.recipe import Settings


def accelerator(device: str = "cpu", kind=DistributedType.NO, processes: int = 1):
    """What a plan asks accelerate's."""
    return SimpleNamespace(
        device=torch.device(device), distributed_type=kind, num_processes=processes, mixed_precision="no"
    )


def test_a_plan_is_frozen_and_leaves_the_settings_alone():
    settings = Settings(data="photos", batch_size=24, micro_batch=4, workers=3, trackers=["wandb"])
    before = settings.to_dict()
    plan = resolve(settings, accelerator("cuda", processes=2))
    assert settings.to_dict() == before
    assert settings.augmentation.on_device == "auto"
    assert plan.settings.augmentation.on_device != "auto"
    assert (plan.micro_batch, plan.accumulate, plan.workers) == (4, 3, 3)
    assert (plan.compiled, plan.compile_mode, plan.sharded, plan.graphed) == (False, None, False, True)
    settings.trackers.append("trackio")
    assert plan.settings.trackers == ["wandb"]
    with pytest.raises(FrozenInstanceError):
        plan.micro_batch = 2


@pytest.mark.parametrize(
    ("device", "kind", "settings", "compiled", "graphed"),
    [
        ("cpu", DistributedType.NO, {}, False, False),
        ("cpu", DistributedType.NO, {"compile": True}, True, False),
        ("cuda", DistributedType.NO, {}, False, True),
        ("cuda", DistributedType.NO, {"compile": True}, True, True),
        ("cuda", DistributedType.NO, {"micro_batch": 16}, False, True),
        ("cuda", DistributedType.NO, {"cuda_graphs": False}, False, False),
        ("cuda", DistributedType.MULTI_GPU, {}, False, True),
        ("cuda", DistributedType.NO, {"gradient_checkpointing": True}, True, False),
        ("cuda", DistributedType.FSDP, {}, True, False),
        ("cuda", DistributedType.FSDP, {"compile": False}, False, False),
    ],
)
def test_where_updates_are_compiled_and_replayed(device, kind, settings, compiled, graphed):
    """On a GPU CUDA graphs save what the host takes; where they do not serve, torch.compile does."""
    plan = resolve(Settings(fit_defaults=False, **settings), accelerator(device, kind))
    assert (plan.compiled, plan.graphed, plan.compile_mode) == (compiled, graphed, None)
    assert plan.sharded == (kind == DistributedType.FSDP)


def test_batches_are_shared_out():
    settings = Settings(batch_size=96, micro_batch=8)
    assert [micro_batches(settings, n) for n in (1, 2, 3, 4, 12)] == [(8, 12), (8, 6), (8, 4), (8, 3), (8, 1)]
    assert micro_batches(Settings(batch_size=96), 3) == (32, 1)
    with pytest.raises(
        ValueError, match="--batch_size: 96 cannot be shared out to 5 processes with --micro_batch 8"
    ):
        micro_batches(settings, 5)
    with pytest.raises(ValueError, match=r"--batch_size: 10 cannot be shared out to 4 processes$"):
        micro_batches(Settings(batch_size=10), 4)
    with pytest.raises(ValueError, match="--micro_batch: mixing pairs images, so 5 of a device"):
        micro_batches(Settings(batch_size=10, mixup=0.8), 2)


def test_worker_processes_follow_the_cores(monkeypatch):
    """Shared by the processes of a machine; the digits are in memory."""
    monkeypatch.setattr("flashkat_hf.training.plan.cores", lambda: 12)
    assert (worker_processes(Settings(data="photos")), worker_processes(Settings())) == (12, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (worker_processes(Settings(data="photos")), worker_processes(Settings())) == (1, 0)
    assert worker_processes(Settings(data="photos", workers=5)) == 5
    monkeypatch.setattr("flashkat_hf.training.plan.cores", lambda: 512)
    assert worker_processes(Settings(data="photos")) == 16
