"""Load the original FlashKAT and KAT from clones that `--peer` names; this repository holds nothing of them.

The folder holds the repositories under the names that `git clone` gives them: `FlashKAT`
(OSU-STARLAB/FlashKAT), `kat` (Adamdad/kat) and `rational_kat_cu` (Adamdad/rational_kat_cu). Their kernels
need a GPU and compute in float32.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

FLASHKAT, KAT = "FlashKAT, original", "KAT, original"
SOURCES = {FLASHKAT: ("FlashKAT", "FlashKAT"), KAT: ("kat", "rational_kat_cu")}  # model, package of kernels


@cache
def load(folder: Path, peer: str) -> ModuleType:
    """Return the module with a peer's models, under a name of its own.

    Both repositories call the module `katransformer`. Importing it replaces nothing of ours: the search path
    is as before, and so is whatever they patch of `torch.nn.init`.
    """
    model, kernels = (folder / name for name in SOURCES[peer])
    source = model / "katransformer.py"
    for path in (source, kernels):
        if not path.exists():
            clones = ", ".join(names())
            raise SystemExit(f"--peer: {path} is missing; {folder} must hold clones called {clones}")
    name = f"peer_{model.name.lower()}"
    spec = importlib.util.spec_from_file_location(name, source)
    module = importlib.util.module_from_spec(spec)
    before, initialisers = list(sys.path), dict(vars(torch.nn.init))
    sys.modules[name] = module  # where timm and torch.compile look it up
    sys.path.insert(0, str(kernels.resolve()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names that PyTorch and timm have moved since
            spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[name]
        raise SystemExit(f"--peer: {source} needs a package that is not there: {error}") from error
    finally:
        sys.path[:] = before
        vars(torch.nn.init).update(initialisers)
    return module


def names() -> list[str]:
    return sorted({name for pair in SOURCES.values() for name in pair})


def make(folder: Path, peer: str, size: str, image_size: int, num_labels: int) -> torch.nn.Module:
    """Build a peer's model in the configuration that was released: eight groups, one numerator for all.

    The weights keep PyTorch's start: the original's takes a minute of factorisations at base, and the speed
    does not depend on it.
    """
    module, prefix = load(folder, peer), "flash_" if peer == FLASHKAT else ""
    groups = {"m": 6, "n": 4, "num_groups": 1, "den_groups": 8} if peer == FLASHKAT else {}
    model = getattr(module, f"{prefix}kat_{size}_patch16_224")
    return model(img_size=image_size, num_classes=num_labels, weight_init="skip", **groups)


def rational(folder: Path, peer: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a peer's operator: float32 `(images, tokens, channels)`, tables `(1 or 8, 6)` and `(8, 4)`."""
    module = load(folder, peer)
    if peer == FLASHKAT:
        package, tail = sys.modules[module.FlashKAT_Group.__module__], ()
        apply = package.FlashRationalTriton1DGroup.apply
    else:
        package, tail = sys.modules[module.KAT_Group.__module__], (8,)
        apply = package.RationalTriton1DGroup.apply

    def run(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        return apply(x, numerator.repeat(8 // numerator.shape[0], 1), denominator, *tail)

    return run
