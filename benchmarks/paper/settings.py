"""The settings of a run of the paper's experiments, checked before anything is timed."""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peers
import torch
from bench_model import refuse

from .published import GROUPS, SHAPE
from .results import FLASHKAT, KAT, OURS, RELAXED

EXPERIMENTS = {
    "table1": "parameters and operations of an MLP, a KAN and a GR-KAN layer",
    "table6": "model configurations",
    "table7": "hyperparameters",
    "table3": "backward pass of the rational: cycles, time, throughputs",
    "table2": "arithmetic repeated 1, 2, 4, 8 times, forward and backward",
    "figure2": "cycles in each warp state, algorithm 1",
    "figure3": "cycles in each warp state, algorithm 2 and ours",
    "memory": "bytes read, written and added atomically",
    "table5": "error of the coefficients' gradients",
    "table8": "the same against the batch",
    "figure1": "forward and backward pass of the models, eager",
    "table4": "training throughput, eager and compiled",
}
COUNTED = ("figure2", "figure3")  # by Nsight Compute alone


@dataclass(frozen=True)
class Settings:
    names: tuple[str, ...]
    output: Path  # the results file
    toy: bool = False
    quick: bool = False
    peer: Path | None = None
    ncu: str | None = None
    commit: str | None = None
    sizes: tuple[str, ...] = ("tiny", "small", "base")
    modes: tuple[str, ...] = ("eager", "compiled")
    contenders: tuple[str, ...] | None = None  # None: all

    @property
    def device(self) -> str:
        return "cpu" if self.toy else "cuda"

    @property
    def shape(self) -> tuple[int, int, int]:
        return (2, 5, 8 * GROUPS) if self.toy else SHAPE

    @property
    def repeats(self) -> tuple[int, ...]:
        """Return how often table 2 does the arithmetic."""
        return (1, 2) if self.toy else (1, 8) if self.quick else (1, 2, 4, 8)

    @property
    def draws(self) -> int:
        return 2 if self.toy else 20 if self.quick else 100

    @property
    def passes(self) -> int:
        """Return the number of timed steps of a model."""
        return 2 if self.toy else 20 if self.quick else 100


def parse(arguments: list[str] | None = None) -> Settings:
    """Return the settings of the command line.

    Raises:
        SystemExit: something cannot be measured; one line says what.
    """
    known = "\n".join(f"  {name:8} {text}" for name, text in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks.paper",
        description="The experiments of the FlashKAT paper, rerun; results are added to DIR/paper.jsonl.",
        epilog=f"all, or some of:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="20 passes and draws in place of 100")
    parser.add_argument("--toy", action="store_true", help="small sizes on the CPU, kernels interpreted")
    parser.add_argument("--peer", type=Path, help="folder with clones of the originals (peers.py)")
    parser.add_argument("--ncu", help="Nsight Compute's program; default: ncu on the PATH")
    parser.add_argument("--commit", help="of the code measured; default: asks git")
    parser.add_argument("--sizes", nargs="+", default=list(Settings.sizes), choices=Settings.sizes)
    parser.add_argument("--modes", nargs="+", default=list(Settings.modes), choices=Settings.modes)
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=(OURS, FLASHKAT, RELAXED, KAT),
        help="of tables 2 and 3, figures 2 and 3 and memory, to measure some again; default: all",
    )
    options = vars(parser.parse_args(arguments))
    return settings(**options)


def settings(
    names: list[str], output: Path, ncu: str | None = None, toy: bool = False, peer: Path | None = None,
    sizes: Sequence[str] = Settings.sizes, modes: Sequence[str] = Settings.modes,
    contenders: Sequence[str] | None = None, **others,
) -> Settings:  # fmt: skip
    unknown = [name for name in names if name not in (*EXPERIMENTS, "all")]
    refuse(unknown, f"{', '.join(unknown)} unknown; known are all, {', '.join(EXPERIMENTS)}")
    everything = "all" in names
    chosen = tuple(name for name in EXPERIMENTS if everything or name in names)
    refuse(not toy and not torch.cuda.is_available(), "there is no GPU; --toy runs small sizes without one")
    program = None if toy else shutil.which(ncu or "ncu")
    refuse(ncu and not toy and program is None, f"--ncu: {ncu} is not a program")
    counted = [name for name in chosen if name in COUNTED and not everything and not toy]
    refuse(counted and program is None, f"{', '.join(counted)}: needs Nsight Compute, and there is no ncu")
    refuse(output.exists() and not output.is_dir(), f"--output: {output} is not a folder")
    if peer is not None:
        refuse(toy, "--peer: the original kernels need a GPU")
        for name in peers.SOURCES:
            peers.load(peer, name)
    return Settings(
        chosen,
        output / "paper.jsonl",
        toy,
        peer=peer,
        ncu=program,
        sizes=tuple(sizes),
        modes=tuple(modes),
        contenders=tuple(contenders) if contenders else None,
        **others,
    )
