"""The group rational on a processor in one pass over memory, by C that the machine's own compiler translates.

PyTorch computes the formula of `reference.py` in twelve passes. The first large tensor has `SOURCE` compiled,
in a quarter of a second, into the user's cache, where later processes find it. Where there is no gcc, where
it fails, and for other dtypes than float32, `reference.py` itself is the way.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from .reference import coefficient_gradients, rational_gradients, rational_value

MIN_ELEMENTS = 2**15  # below, there is not much to win, and a compiler not worth its time
TIME_LIMIT = 20  # seconds for the compiler, which needs a quarter of one
OPTIONS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-std=gnu11", "-w")
BLOCK_ROWS = 16  # whose sums are one partial sum, whatever the number of threads
SOURCE = r"""
#include <string.h>

#define LANES 8    /* a row's neighbours that are computed together; vectors of any processor */
#define STEPS 256  /* of them whose sums are float32 */
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int bits __attribute__((vector_size(4 * LANES)));

static inline vector load(const float *p, long n) {  /* zeros behind the first n */
    vector v = {0};
    if (n >= LANES) memcpy(&v, p, sizeof v); else memcpy(&v, p, 4 * n);
    return v;
}
static inline void store(float *p, vector v, long n) {
    if (n >= LANES) memcpy(p, &v, sizeof v); else memcpy(p, &v, 4 * n);
}
static inline vector absolute(vector v) { return (vector)((bits)v & 0x7fffffff); }

/* y = P(x) / Q(|x|): tables (groups, 6) and (groups, 4), the latter not negative */
void rational_forward(const float *restrict x, const float *restrict a, const float *restrict b,
                      float *restrict y, long rows, long groups, long width, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long segment = 0; segment < rows * groups; segment++) {
        const float *a_ = a + segment % groups * 6, *b_ = b + segment % groups * 4;
        for (long i = 0; i < width; i += LANES) {
            const long place = segment * width + i;
            const vector v = load(x + place, width - i), u = absolute(v);
            const vector p = a_[0] + v * (a_[1] + v * (a_[2] + v * (a_[3] + v * (a_[4] + v * a_[5]))));
            const vector q = 1 + u * (b_[0] + u * (b_[1] + u * (b_[2] + u * b_[3])));
            store(y + place, p / q, width - i);
        }
    }
}

static inline void flush(double *total, vector *sums) {
    for (int k = 0; k < 10; k++) {
        for (int lane = 0; lane < LANES; lane++) total[k] += sums[k][lane];
        sums[k] = (vector){0};
    }
}

/* grad_x, and for each ROWS rows and each group the sums of u x^k (6) and -u f |x|^k (4) */
void rational_backward(const float *restrict grad_y, const float *restrict x, const float *restrict a,
                       const float *restrict b, float *restrict grad_x, double *restrict partial,
                       long rows, long groups, long width, int threads) {
    #pragma omp parallel for collapse(2) num_threads(threads)
    for (long block = 0; block < (rows + ROWS - 1) / ROWS; block++)
        for (long group = 0; group < groups; group++) {
            const float *a_ = a + group * 6, *b_ = b + group * 4;
            const long end = (block + 1) * ROWS < rows ? (block + 1) * ROWS : rows;
            double *total = partial + (block * groups + group) * 10;
            vector sums[10] = {0};
            for (int k = 0; k < 10; k++) total[k] = 0;
            for (long row = block * ROWS; row < end; row++)
                for (long i = 0; i < width; i += LANES) {
                    const long place = (row * groups + group) * width + i;
                    const vector v = load(x + place, width - i), u = absolute(v);
                    vector p = a_[4] + v * a_[5], p_slope = a_[5] + 0 * v;
                    vector q = b_[2] + u * b_[3], q_slope = b_[3] + 0 * u;
                    for (int k = 3; k >= 0; k--) { p_slope = p + v * p_slope; p = a_[k] + v * p; }
                    for (int k = 1; k >= 0; k--) { q_slope = q + u * q_slope; q = b_[k] + u * q; }
                    q_slope = q + u * q_slope;
                    q = 1 + u * q;
                    const vector f = p / q, grad = load(grad_y + place, width - i) / q;
                    /* the slope of |x| at 0 is +1, for -0.0, too */
                    const vector slope = (vector)((bits)(q_slope * f) ^ ((v < 0) & (int)0x80000000));
                    store(grad_x + place, grad * (p_slope - slope), width - i);
                    vector term = grad;
                    for (int k = 0; k < 6; k++) { sums[k] += term; term *= v; }
                    term = grad * f;
                    for (int k = 6; k < 10; k++) { term *= u; sums[k] -= term; }
                    if (i % (LANES * STEPS) == LANES * (STEPS - 1)) flush(total, sums);
                }
            flush(total, sums);
        }
}
"""


def value(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Compute `rational_value`; arguments are contiguous."""
    functions = library(x)
    if functions is None:
        return rational_value(x, numerator, denominator)
    a, b, sizes = _arguments(x, numerator, denominator)
    y = torch.empty_like(x)
    functions.rational_forward(*map(Tensor.data_ptr, (x, a, b, y)), *sizes)
    return y


def gradients(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `rational_gradients`; arguments are contiguous."""
    functions = library(x)
    if functions is None or grad_y.dtype != x.dtype:
        return rational_gradients(grad_y, x, numerator, denominator)
    a, b, sizes = _arguments(x, numerator, denominator)
    grad_x = torch.empty_like(x)
    partial = x.new_empty(-(-sizes[0] // BLOCK_ROWS), len(a), 10, dtype=torch.float64)
    functions.rational_backward(*map(Tensor.data_ptr, (grad_y, x, a, b, grad_x, partial)), *sizes)
    sums = partial.sum(0).to(x.dtype)
    return grad_x, *coefficient_gradients(sums[:, :6], sums[:, 6:], numerator, denominator)


def library(x: Tensor) -> ctypes.CDLL | None:
    """Return the compiled functions where they serve x; the first large tensor waits for the compiler."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or type(x) not in (Tensor, nn.Parameter):
        return None
    return load() if x.numel() >= MIN_ELEMENTS else None


def serves(dtype: torch.dtype) -> bool:
    """Tell whether compiled C serves large tensors of that dtype; `torch.compile` asks as it traces."""
    return dtype == torch.float32 and is_loaded()


@torch.compiler.assume_constant_result
def is_loaded() -> bool:
    """Tell whether there are compiled functions, after waiting for the compiler."""
    return load() is not None


def _arguments(x: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return P's and Q's coefficients of each group, and the functions' numbers."""
    groups = max(numerator.shape[0], denominator.shape[0])
    a = numerator.detach().to(x.dtype).expand(groups, 6).contiguous()
    b = denominator.detach().to(x.dtype).abs().expand(groups, 4).contiguous()
    return a, b, (x.numel() // x.shape[-1], groups, x.shape[-1] // groups, torch.get_num_threads())


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """Load the compiled functions, from the user's cache or the compiler; None where that fails."""
    compiler = shutil.which("gcc") if os.name == "posix" else None
    if compiler is None:
        return None
    key = "\n".join((SOURCE, str(BLOCK_ROWS), *OPTIONS, compiler, platform.machine(), _processor()))
    name = f"rational-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        with _folder() as folder:
            path = folder / name
            if not path.is_file():
                _compile(compiler, path)
            functions = ctypes.CDLL(str(path))
        pointer, number, threads = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        functions.rational_forward.argtypes = [pointer] * 4 + [number] * 3 + [threads]
        functions.rational_backward.argtypes = [pointer] * 6 + [number] * 3 + [threads]
    except (OSError, subprocess.SubprocessError):
        return None
    return functions


def _compile(compiler: str, path: Path) -> None:
    """Compile the source into a file, which is there as a whole or not at all.

    OpenMP's functions are left to be found in PyTorch's own library: a second one would bring threads of its
    own.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, compiled, linked = (Path(folder) / f"rational.{end}" for end in ("c", "o", "so"))
        source.write_text(f"#define ROWS {BLOCK_ROWS}\n{SOURCE}")
        for command in ([*OPTIONS, "-c", source, "-o", compiled], ["-shared", compiled, "-o", linked]):
            subprocess.run([compiler, *command], check=True, capture_output=True, timeout=TIME_LIMIT)
        linked.replace(path)


@contextmanager
def _folder() -> Iterator[Path]:
    """Give the cache's folder, if this user alone may write there, else one that goes away again."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashkat_hf"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache.stat()
        is_ours = status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(cache, os.W_OK)
    except OSError:
        is_ours = False
    if is_ours:
        yield cache
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _processor() -> str:
    """Return what this processor can do, since compiled code asks for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
