"""Tables 5 and 8: error of the coefficients' gradients against float64, over random draws."""

from collections import defaultdict
from collections.abc import Callable
from statistics import mean

import torch
from bench_model import refuse

from .contenders import ALGORITHM1, ALGORITHM2, OURS, contenders, draw, exact
from .kernels import Write, interval
from .settings import Settings

COMPARED = 10  # draws that are computed twice, to see whether the bits agree


def batches(settings: Settings) -> list[int]:
    """Return the numbers of images: that of table 5, and fewer for table 8."""
    most = settings.shape[0]
    fewer = [1] if settings.toy else [1, 16, 256]
    return (fewer if "table8" in settings.names else []) + ([most] if "table5" in settings.names else [])


def measure(settings: Settings, write: Write, attempt: Callable) -> None:
    known = contenders(settings.peer, compiled=False)
    originals = [name for name in known if "original" in name]
    methods = [(name, torch.float32) for name in (OURS, ALGORITHM2, ALGORITHM1, *originals)]
    methods.append((OURS, torch.bfloat16))
    for images in batches(settings):
        with attempt(f"errors, {images} images"):
            for result in errors(settings, known, methods, (images, *settings.shape[1:])):
                write(result)


def errors(settings: Settings, known: dict, methods: list, shape: tuple[int, ...]) -> list[dict]:
    """Return a result for each method and table of coefficients, dA and dB."""
    torch.manual_seed(0)
    absolute, variance, same = defaultdict(list), defaultdict(list), defaultdict(int)
    sizes = defaultdict(list)
    compared = min(settings.draws, COMPARED)
    for index in range(settings.draws):
        inputs = draw(shape, torch.float32, settings.device)
        true: dict = {}
        for name, dtype in methods:
            rounded = (*(tensor.to(dtype) for tensor in inputs[:2]), *inputs[2:])
            if dtype not in true:
                true[dtype] = [tensor.clone() for tensor in exact(rounded)[1:]]
            call = known[name].backward_call(rounded)
            first = call()[1:]
            second = call()[1:] if index < compared else first
            for table, got, repeated, expected in zip(("dA", "dB"), first, second, true[dtype], strict=True):
                error = got.double() - expected
                refuse(not error.isfinite().all(), f"{name}: a gradient is not finite")
                key = name, dtype, table
                absolute[key].append(error.abs().mean().item())
                variance[key].append(error.var(correction=0).item())
                same[key] += int(index < compared and torch.equal(got, repeated))
                sizes[key].append(expected.abs().mean().item())
    return [
        {
            "what": "error",
            "contender": key[0],
            "dtype": str(key[1]).removeprefix("torch."),
            "gradient": key[2],
            "shape": list(shape),
            "draws": settings.draws,
            "error": mean(means),
            "error_interval": interval(means),
            "variance": mean(variance[key]),
            "variance_interval": interval(variance[key]),
            "gradient_size": mean(sizes[key]),
            "compared": compared,
            "agree": same[key],
        }
        for key, means in absolute.items()
    ]
