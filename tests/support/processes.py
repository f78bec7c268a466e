"""A script that trains in forked processes of one machine, all imported once; see test_distributed.py.

    python tests/support/processes.py < JOBS

JOBS is a JSON list of {"processes": N, "sharded": bool, "settings": {...}, "signal": [after step, number] or
null}. Prints a JSON list with the exit statuses of each job's processes. Beside the output of each,
OUTPUT-seeds-RANK.json has what process RANK seeded its updates with. With "sharded" FSDP2 runs on the CPU,
which accelerate offers for GPUs only, so that its choice of a backend is overruled.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import timm.data.mixup
import timm.optim
import timm.scheduler
import timm.utils  # noqa: F401
import torch
from accelerate import DistributedType
from accelerate.state import PartialState
from small_runs import small_run
from transformers.utils import logging

import flashkat_hf.training.run
import flashkat_hf.training.trainer
from flashkat_hf.training import train
from flashkat_hf.training.trainer import Trainer

SHARDED = {
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "FlashKATLayer",
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def work(job: dict, rank: int, port: int) -> int:
    """Train as process `rank` of a job, and return its exit status."""
    size = str(job["processes"])
    if job["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if job.get("sharded"):
        os.environ |= SHARDED
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
        flashkat_hf.training.run.without_accelerator = lambda: False
    if job.get("signal") and rank == 0:
        step, number = job["signal"]
        update = Trainer._update

        def signalled(trainer, batches) -> None:
            update(trainer, batches)
            if trainer.progress.step == step:
                os.kill(os.getpid(), number)

        Trainer._update = signalled
    values, seeds, seed_update = job["settings"], [], flashkat_hf.training.optimization.seed_update

    def noted(*numbers: int) -> None:
        seed_update(*numbers)
        seeds.append(torch.initial_seed())

    for module in (flashkat_hf.training.run, flashkat_hf.training.trainer):
        module.seed_update = noted
    settings = small_run(Path(values.pop("data")), Path(values.pop("output")), **values)
    try:
        train(settings)
        Path(f"{settings.output}-seeds-{rank}.json").write_text(json.dumps(seeds))
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main(jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    results = []
    for job in jobs:
        port, children = free_port(), []
        for rank in range(job["processes"]):
            child = os.fork()
            if child == 0:
                os._exit(work(job, rank, port))
            children.append(child)
        results.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    print(json.dumps(results))


if __name__ == "__main__":
    main(json.load(sys.stdin))
