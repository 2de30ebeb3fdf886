"""Steps over static buffers as CUDA graphs: captured once, replayed with no host work in between.
A graph is thrown away when the memory it was captured over is replaced, never because a context grew."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from orthrus_triton._capture import capture

Step = Callable[[], None]
WARM_UP_RUNS = 2  # the first compiles kernels and loads them, which a capture must not do


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Kernels are launched on the current device, wherever their tensors lie: inside, that is `device`. There the
    caller's autocast casts nothing: tokens would depend on it, and a replay on what it was when it was captured."""
    kind = device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with (
        torch.cuda.device(device) if kind == "cuda" else nullcontext(),
        torch.autocast(kind, enabled=False) if casts else nullcontext(),
    ):
        yield


class CudaGraphCapture:
    """Turns a step into the replay of its graph. All graphs share one memory pool: they never run at once.

    Args:
        device: the GPU whose work is captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # one stream for all: memory is shared within a pool and a stream
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, step: Step) -> Step:
        """Run `step` to warm up, then capture it. Everything it changes must bear to be run two times more."""
        with on_device(self.device):
            current, side = torch.cuda.current_stream(), self._stream
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_RUNS):
                    step()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # other threads may go on allocating
            with capture(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                step()
        return graph.replay


class StepRunner:
    """Runs steps by key: as they are, or captured when first seen and replayed from then on.

    Args:
        capture: makes a replay of a step (`CudaGraphCapture`), or None to run steps eagerly.
        idle: a context in which running a step changes nothing anyone reads; captures are made inside it.

    Attributes:
        captures: how many captures were made.
    """

    def __init__(self, capture: Callable[[Step], Step] | None, idle: Callable[[], AbstractContextManager]) -> None:
        self.captures = 0
        self._capture, self._idle = capture, idle
        self._replays: dict[Hashable, Step] = {}

    @property
    def captures_steps(self) -> bool:
        """Steps are captured, not run eagerly."""
        return self._capture is not None

    def prepare(self, key: Hashable, step: Step) -> None:
        """Make the capture of `step` now, if one is needed."""
        if self._capture is not None and key not in self._replays:
            with self._idle():
                self._replays[key] = self._capture(step)
            self.captures += 1

    def run(self, key: Hashable, step: Step) -> None:
        """Run `step`, or replay what was captured of it under `key`."""
        self.prepare(key, step)
        self._replays.get(key, step)()


def weight_addresses(model: Any) -> tuple:
    """Where a model's parameters and buffers lie. A replay reads that memory as it is: weights changed in place are
    followed, weights replaced by other tensors (another checkpoint, a cast, a move) need a new capture and cache."""
    if not isinstance(model, torch.nn.Module):
        return ()
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)


SETTING = frozenset((bool, int, float, str, type(None)))


def settings_of(model: Any) -> tuple:
    """What K/V and captures depend on besides tensors: numbers that this package's modules compute with (windows,
    factors, epsilons), anybody's hooks, and methods put in the place of a module's own."""
    if not isinstance(model, torch.nn.Module):
        return ()
    found = []
    for module in model.modules():  # in every call: some thousand values, in a few milliseconds
        own = vars(module)
        found += [*own["_forward_hooks"], *own["_forward_pre_hooks"], own.get("forward")]
        if _is_of_ours(type(module)):
            # torch's own attributes begin with _
            found += [
                (name, value) for name, value in own.items()
                if (type(value) in SETTING or type(value) is tuple and SETTING.issuperset(map(type, value)))
                and name[0] != "_" and name != "training"
            ]  # fmt: skip
    return tuple(found)


@cache
def _is_of_ours(kind: type) -> bool:
    return any(base.__module__.startswith("orthrus_triton.") for base in kind.__mro__)


def weight_versions(model: Any) -> tuple:
    """How often each of these tensors was written in place. Those made in inference mode do not tell."""
    if not isinstance(model, torch.nn.Module):
        return ()
    tensors = [*model.parameters(), *model.buffers()]
    return tuple(None if tensor.is_inference() else tensor._version for tensor in tensors)
