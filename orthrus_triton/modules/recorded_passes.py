"""Passes through a model's layers on a CPU, recorded when they first come and replayed from then on: in a small model,
the way through modules and checks takes a good part of the time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.nn.modules.module import _has_any_global_hook

from orthrus_triton.ops._dispatch import runs_directly
from orthrus_triton.ops.cpu.kernels import is_watched
from orthrus_triton.ops.cpu.recording import Pool, Recorder, Recording

if TYPE_CHECKING:
    from orthrus_triton.modules.kv_cache import SharedKVCache, ViewPass

MOST = 256  # recordings that are kept: of several block sizes, of a server's batch as it grows and shrinks
MISSING = object()
OWN = "orthrus_triton.modules."  # nothing is recorded of other people's modules, which may do anything

Rope = tuple[torch.Tensor, torch.Tensor]
RunLayers = Callable[[torch.Tensor, Rope, "ViewPass"], torch.Tensor]


class RecordedPasses:
    """The recordings over one cache's buffers. A replay has the bits of the pass that was recorded. Whether anything
    was changed since is looked up once in a run: in small models that takes as long as many a kernel. Where weights and
    buffers lie is looked at each time."""

    def __init__(self) -> None:
        self._passes: dict[Hashable, _RecordedPass] = {}  # those used last are last
        self._pool: Pool = defaultdict(list)
        self._snapshot: _Snapshot | None = None
        self._run = 0

    def __reduce__(self) -> tuple:
        return RecordedPasses, ()  # a copy of the cache has other buffers

    def begin_run(self) -> None:
        """Look at everything again before the next replay."""
        self._run += 1

    def run(
        self, eagerly: RunLayers, modules: Sequence[nn.Module], hidden: torch.Tensor, rope: Rope, cache: SharedKVCache,
        view_pass: ViewPass,
    ) -> torch.Tensor:  # fmt: skip
        """`eagerly(hidden, rope, view_pass)`, which runs the layers in `modules`, or a replay of what it did before."""
        can_record = runs_directly(view_pass.impl, hidden) and hidden.is_cpu and hidden.shape[1] <= cache.block_size
        if not can_record or is_watched() or _has_any_global_hook():
            return eagerly(hidden, rope, view_pass)
        inputs = [hidden, *rope, *_tensors(view_pass)]
        if self._snapshot is None or not self._snapshot.is_of(modules, self._run):
            self._passes.clear()
            self._snapshot = _Snapshot(modules, self._run)
        key = _key(inputs, cache, view_pass)
        known = self._passes.pop(key, None)
        if known is not None and known.is_of(cache):
            result = known.replay(inputs) if known.is_whole else eagerly(hidden, rope, view_pass)
        else:
            known = _RecordedPass(cache)
            if self._snapshot.can_be_recorded:
                result = known.record(eagerly, hidden, rope, view_pass, inputs, self._pool)
            else:
                result = eagerly(hidden, rope, view_pass)
        self._passes[key] = known  # a pass that fails leaves nothing
        if len(self._passes) > MOST:
            del self._passes[next(iter(self._passes))]
        return result


class _Snapshot:
    """Modules, and all that they compute with, as it is now."""

    def __init__(self, modules: Sequence[nn.Module], run: int) -> None:
        self._run = run  # in which all was looked at
        self._modules = list(modules)
        self._everything = [*chain.from_iterable(module.modules() for module in modules)]
        self._attributes = [*zip(*chain.from_iterable(map(_attributes, self._everything)))]
        self._tensors = [value for value in self._attributes[2] if isinstance(value, torch.Tensor)]
        self._addresses = _addresses(self._tensors)
        self._hooks = [hooks for of in self._everything for hooks in (of._forward_hooks, of._forward_pre_hooks)]
        self._outline = self._new_outline()
        self.can_be_recorded = not any(self._hooks) and all(map(_is_ours, self._everything))

    def is_of(self, modules: Sequence[nn.Module], run: int) -> bool:
        """Whether these are the modules, with weights where they were; and in a new run, with all as it was."""
        is_same = len(modules) == len(self._modules) and all(map(is_, modules, self._modules))
        if not is_same or _addresses(self._tensors) != self._addresses:
            return False
        if self._run != run:
            holders, names, values = self._attributes
            if not all(map(is_, map(dict.get, holders, names, repeat(MISSING)), values)):
                return False
            if self._new_outline() != self._outline:
                return False
            self._run = run
        return True

    def _new_outline(self) -> tuple:
        """Which code is the modules' and in how many attributes, for a method may be among these; whether there are
        hooks; and how many numbers the weights have, in which order."""
        return (
            [*map(type, self._everything)], [*map(len, map(vars, self._everything))], any(self._hooks),
            [*map(torch.Tensor.stride, self._tensors)], [tensor.nbytes for tensor in self._tensors],
        )  # fmt: skip


class _RecordedPass:
    """A recording over a cache's buffers, or none where not all of a pass can be recorded."""

    def __init__(self, cache: SharedKVCache) -> None:
        self._buffers = [*chain.from_iterable(cache.layers)]
        self._addresses = _addresses(self._buffers)
        self._recording: Recording | None = None
        self._inputs: list[torch.Tensor | None] = []

    @property
    def is_whole(self) -> bool:
        """Whether there is something to replay."""
        return self._recording is not None

    def is_of(self, cache: SharedKVCache) -> bool:
        """Whether these are the buffers."""
        return _addresses(chain.from_iterable(cache.layers)) == self._addresses

    def record(
        self, eagerly: RunLayers, hidden: torch.Tensor, rope: Rope, view_pass: ViewPass,
        inputs: Sequence[torch.Tensor], pool: Pool,
    ) -> torch.Tensor:  # fmt: skip
        """Run the pass, and keep what it does if that can be done again."""
        clones = {id(tensor): tensor.clone() for tensor in inputs}
        own_rope = (clones[id(rope[0])], clones[id(rope[1])])
        with Recorder() as recorder:
            result = eagerly(clones[id(hidden)], own_rope, _with_tensors(view_pass, clones))
        if recorder.complete:
            recording = recorder.recording(result, pool)
            own = [clones[id(tensor)] for tensor in inputs]
            self._inputs = [tensor if recording.reads(tensor) else None for tensor in own]
            self._recording = recording
        return result

    def replay(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The pass again, with these inputs."""
        for own, given in zip(self._inputs, inputs):
            if own is not None:
                own.copy_(given)
        result = self._recording.replay().clone()
        increment_version(self._buffers)
        return result


def _key(inputs: Sequence[torch.Tensor], cache: SharedKVCache, view_pass: ViewPass) -> Hashable:
    """What decides which kernels run, and with which numbers, besides the modules. A batch's slots begin at the first
    layer's keys."""
    return (
        view_pass.view, view_pass.impl, view_pass.linear_impl, len(view_pass.parts), torch.get_num_threads(),
        torch.is_inference_mode_enabled(), cache.capacity, cache.layers[0].k.data_ptr(),
        *((tensor.shape, tensor.dtype) for tensor in inputs),
    )  # fmt: skip


def _tensors(view_pass: ViewPass) -> Iterator[torch.Tensor]:
    yield from (view_pass.positions, view_pass.slots, view_pass.key_limit)
    for part in view_pass.parts:
        yield from _tensors(part)


def _with_tensors(view_pass: ViewPass, others: dict[int, torch.Tensor]) -> ViewPass:
    names = ("positions", "slots", "key_limit")
    tensors = {name: others[id(getattr(view_pass, name))] for name in names}
    return view_pass._replace(**tensors, parts=tuple(_with_tensors(part, others) for part in view_pass.parts))


def _is_ours(module: nn.Module) -> bool:
    """Whether it is this package's code that runs in it, and no method of it was replaced."""
    return type(module).__module__.startswith(OWN) and not any(map(callable, vars(module).values()))


def _attributes(module: nn.Module) -> Iterator[tuple[dict, str, Any]]:
    """(where it is, its name, what it is) of all that a module computes with."""
    own = vars(module)
    for name, value in own.items():
        # torch's own attributes begin with _
        if name[0] != "_" and name != "training" and isinstance(value, (bool, int, float, type(None), torch.Tensor)):
            yield own, name, value
    for held in (module._parameters, module._buffers, module._modules):
        yield from ((held, name, value) for name, value in held.items())


def _addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    return [*map(torch.Tensor.data_ptr, tensors)]
