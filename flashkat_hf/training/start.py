"""The start of a training command: the GPU's driver starts in a thread while Python imports PyTorch."""

import ctypes
import os
import threading
from collections.abc import Callable
from ctypes import byref, c_int, c_void_p
from typing import Any

from ..lazy import import_uncollected
from .launch import local_gpu

DRIVER = "libcuda.so.1"


def import_train() -> Callable[..., dict[str, Any] | None]:
    """Return `train`; the settings of the run are checked by now, as far as that needs no PyTorch."""
    index = local_gpu()
    if index is not None:
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as PyTorch does before the driver starts
        threading.Thread(target=start_driver, args=(index,), name="driver").start()
    return import_uncollected(".run", __package__ or "").train


def start_driver(index: int) -> None:
    """Start CUDA's driver and make the context of one GPU, which PyTorch then finds there.

    It is called by ctypes, which lets other threads run meanwhile. Where something fails nothing is said:
    PyTorch meets the same when it looks for a GPU, and says so. The thread that does this must not be a
    daemon: Python waits for it when the command ends early, since ending within the driver may crash.

    Args:
        index: of this process among those of its machine; accelerate chooses the GPU by it, too.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return
    count, device, context = c_int(), c_int(), c_void_p()
    if driver.cuInit(0) or driver.cuDeviceGetCount(byref(count)) or not count.value:
        return
    if not driver.cuDeviceGet(byref(device), index % count.value):
        driver.cuDevicePrimaryCtxRetain(byref(context), device)
