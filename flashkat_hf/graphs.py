"""Training steps and forward passes as CUDA graphs: one replay instead of hundreds of launches.

A graph holds kernels and the addresses that they work on, and no Python. So what it rests on (addresses,
modes, hooks, numbers of the modules, autocast) is compared at each call. Where something has changed, the
kernels are launched one by one, which is slower and right. No `torch.compile` is needed, since our kernels
fuse already.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from .messages import warn

Batch = dict[str, Any]
Gradients = list[Tensor | None]
WARM_UPS = 2  # passes before a capture, in which Triton and cuBLAS get ready
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def graphed_step(model: nn.Module, batch: Batch) -> "GraphedStep":
    """Return the forward and backward pass of a model as CUDA graphs.

        step = graphed_step(model, batch)
        for batch in batches:
            loss = step(**batch)                # instead of loss = model(**batch).loss; loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Gradients add up until they are set to None, as `zero_grad` does. To train in bfloat16, call it inside
    `torch.autocast`, and the step likewise.

    Args:
        model: in training mode, on a GPU; `model(**batch)` returns an object with a scalar `loss`.
        batch: an example, whose shapes and dtypes are captured; batches of others are launched.

    Raises:
        ValueError: a graph cannot hold the step: it is not on one GPU, has hooks or gradient checkpointing,
            or waits for the device.
    """

    def step(batch: Batch) -> Tensor:
        loss = model(**batch).loss
        with torch.autocast("cuda", enabled=False):
            loss.backward()
        return loss.detach()

    return GraphedStep(model, batch, step)


def graphed_forward(model: nn.Module, batch: Batch) -> "GraphedForward":
    """Return the forward pass of a model, without gradients, as a CUDA graph.

    Args:
        model: in evaluation mode, on a GPU.
        batch: an example of `model(**batch)`, whose shapes and dtypes are captured; others are launched.

    Raises:
        ValueError: as `graphed_step`.
    """
    return GraphedForward(model, batch)


class _Graphed:
    """The base of the graphs of a module: it holds the batch they read and the state they rest on."""

    def __init__(self, module: nn.Module, batch: Batch):
        self.module = module
        self.device = _device(module, batch)
        self.inputs = {name: _held(value) for name, value in batch.items()}
        self.state = _State(module)
        self.pool = torch.cuda.graph_pool_handle()
        self.warned = False

    def _serves(self, batch: Batch) -> bool:
        """Return True if a replay computes what launches would; warn once if the model has changed."""
        if batch.keys() != self.inputs.keys() or not all(map(_alike, batch.values(), self._in_order(batch))):
            return False
        if self.state.holds():
            return True
        if not self.warned:
            name = type(self.module).__name__
            warn(f"{name} has changed since its CUDA graph was captured: launching kernels")
            self.warned = True
        return False

    def _in_order(self, batch: Batch) -> Iterator[Any]:
        return (self.inputs[name] for name in batch)

    def _take(self, batch: Batch) -> None:
        for name, value in batch.items():
            if isinstance(value, Tensor):
                self.inputs[name].copy_(value)

    def _capture(
        self, call: Callable[[], Any], reset: Callable[[], None]
    ) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Return the graph of a call and what it returned; the random states stay as they are."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            with _launched_aside(torch.cuda.Stream(self.device)):
                for _ in range(WARM_UPS):
                    reset()
                    call()
            reset()
            torch.clear_autocast_cache()  # the graph casts weights itself, at each replay
            torch._C._cuda_clearCublasWorkspaces()  # of the warm-ups: the graph has one of its own
            try:
                # Threads that make batches may go on meanwhile.
                stream = torch.cuda.Stream(self.device)
                with torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):
                    result = call()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                problem = str(error).strip().partition("\n")[0]
                name = type(self.module).__name__
                raise ValueError(f"a CUDA graph cannot hold this step of {name}: {problem}") from error
            finally:
                torch.clear_autocast_cache()
        self.state = _State(self.module)  # as the passes have left it
        return graph, result


class GraphedStep(_Graphed):
    """Forward and backward passes, replayed; gradients are in `.grad` afterwards.

    One graph writes the gradients, where there are none, and another one adds to them. Their memory stays the
    graph's: a gradient that must outlive the next step is to be cloned.
    """

    def __init__(self, module: nn.Module, batch: Batch, step: Callable[[Batch], Tensor]):
        """Capture a step.

        Args:
            module: its parameters' gradients are written.
            batch: tensors on the device, and constants, that `step` takes; an example.
            step: computes the gradients and returns the loss, a scalar without a graph of autograd.

        Raises:
            ValueError: as `graphed_step`.
        """
        super().__init__(module, batch)
        self.step = step
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.gradients: Gradients = []
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        before = self._held_gradients()
        try:
            self._capture_step(adding=False)
        finally:
            self._hold(before)

    def __call__(self, **batch: Any) -> Tensor:
        """Compute the gradients of a batch; return the loss, a scalar on the device."""
        empty = all(parameter.grad is None for parameter in self.parameters)
        if not (empty or self.holds_gradients()) or not self._serves(batch):
            return self.step(batch)
        self._take(batch)
        if not empty and True not in self.graphs:
            self._capture_step(adding=True)
        graph, loss = self.graphs[not empty]
        graph.replay()
        if empty:
            self._hold(self.gradients)
        return loss.clone()

    def holds_gradients(self) -> bool:
        """Return True if the parameters' gradients are the tensors that the graphs write."""
        return all(
            parameter.grad is gradient
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True)
        )

    def _capture_step(self, adding: bool) -> None:
        copies = [None if gradient is None else gradient.clone() for gradient in self.gradients]
        nothing: Gradients = [None] * len(self.parameters)
        starts = [copies] * WARM_UPS + [self.gradients] if adding else [nothing] * (WARM_UPS + 1)
        reset = partial(next, map(self._hold, starts))
        self.graphs[adding] = self._capture(partial(self.step, self.inputs), reset)
        self.gradients = self._held_gradients()

    def _held_gradients(self) -> Gradients:
        return [parameter.grad for parameter in self.parameters]

    def _hold(self, gradients: Gradients) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


class GraphedForward(_Graphed):
    """A forward pass without gradients, replayed; what it returns is the caller's."""

    def __init__(self, module: nn.Module, batch: Batch):
        super().__init__(module, batch)
        with torch.no_grad():
            self.graph, self.outputs = self._capture(lambda: module(**self.inputs), lambda: None)

    @torch.no_grad()
    def __call__(self, **batch: Any) -> Any:
        """Return what `module(**batch)` returns."""
        if not self._serves(batch):
            return self.module(**batch)
        self._take(batch)
        self.graph.replay()
        return tree_map_only(Tensor, torch.clone, self.outputs)


class GraphedCall:
    """A call without arguments that is launched at first and replayed from then on, while `serves` says so.

    The first call makes what later ones change in place, such as an optimiser's state.
    """

    def __init__(self, call: Callable[[], None], serves: Callable[[], bool]):
        self.call = call
        self.serves = serves
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def __call__(self) -> None:
        if not self.serves() or not self.warm:
            self.call()
            self.warm = True
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.call()
        self.graph.replay()


@contextmanager
def _launched_aside(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run on a stream of its own, with the random states put back afterwards."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.random.fork_rng([stream.device]), torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _device(module: nn.Module, batch: Batch) -> torch.device:
    """Return the GPU of a module and a batch.

    Raises:
        ValueError: there are several devices, or it is no GPU; or what a graph cannot hold.
    """
    name = type(module).__name__
    for key, value in batch.items():
        if not isinstance(value, Tensor) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            raise ValueError(
                f"a CUDA graph reads tensors, but {key} of the batch is a {type(value).__name__} of them"
            )
    tensors = [*module.parameters(), *(value for value in batch.values() if isinstance(value, Tensor))]
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise ValueError(f"a CUDA graph needs {name} and its batch on one GPU, not on {_joined(devices)}")
    hooked = [
        path or name for path, each in module.named_modules() if any(each.__dict__[kind] for kind in HOOKS)
    ]
    if _has_any_global_hook():
        raise ValueError("a CUDA graph runs no Python, but there are hooks on all modules")
    if hooked:
        raise ValueError(f"a CUDA graph runs no Python, but {hooked[0]} has hooks")
    if getattr(module, "is_gradient_checkpointing", False) and module.training:
        raise ValueError(f"a CUDA graph cannot hold the gradient checkpointing of {name}")
    return devices.pop()


def _joined(devices: set[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices))) or "no device"


def _held(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _alike(value: Any, held: Any) -> bool:
    """Return True if a value of a batch can take a held one's place."""
    if isinstance(value, Tensor) and isinstance(held, Tensor):
        same = value.shape == held.shape and value.dtype == held.dtype and value.device == held.device
        return same and not value.requires_grad
    return type(value) is type(held) and value == held


class _State:
    """The state of a module and of PyTorch that a graph rests on; `holds` tells whether it is unchanged."""

    def __init__(self, module: nn.Module):
        parts = [each.__dict__ for each in module.modules()]
        self.parts = parts
        self.owners = [part[kind] for part in parts for kind in ("_modules", "_parameters", "_buffers")]
        self.hooks = [part[kind] for part in parts for kind in HOOKS]
        self.scalars = [  # training or not, rates of dropping, epsilons
            (part, name)
            for part in parts
            for name, value in part.items()
            if type(value) in (bool, int, float)
        ]
        self.tensors = [*module.parameters(), *module.buffers()]
        self.members = list(self._members())
        self.values = self._values()

    def holds(self) -> bool:
        """Return True if the module and the modes of PyTorch are as they were."""
        return (
            not (any(self.hooks) or _has_any_global_hook())
            and all(map(operator.is_, self._members(), self.members))
            and self._values() == self.values
        )

    def _members(self) -> Iterator[Any]:
        return chain(chain.from_iterable(owner.values() for owner in self.owners), (self,))

    def _values(self) -> list[Any]:
        values = [part.get(name) for part, name in self.scalars]
        values += [tensor.data_ptr() for tensor in self.tensors]
        values += [tensor.requires_grad for tensor in self.tensors]
        values += ["forward" in part for part in self.parts]
        values += (
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.is_grad_enabled(),
        )
        # get_float32_matmul_precision() raises where both of PyTorch's ways to set it were used
        precision = str(torch.backends.cuda.matmul.fp32_precision)
        return [*values, "ieee" if precision == "none" else precision]
