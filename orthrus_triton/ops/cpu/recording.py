"""A pass as the list of what it did: calls of C kernels, and copies, over memory that stays. Replaying that list takes
no module, no check and no allocation: what a CUDA graph is on a GPU."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

aten = torch.ops.aten
ALLOCATIONS = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default}
MOST_BYTES = 128 << 20  # of a recorder's tensors, all of which it holds: longer passes hardly wait for Python
Pool = defaultdict[int, list[torch.Tensor]]  # blocks of memory by their bytes
_thread = threading.local()


class Step(NamedTuple):
    """A call: of torch, or of a C kernel, which takes the addresses of tensors."""

    call: Callable
    operands: Sequence[Any]
    of_kernel: bool = False


def _cat_steps(out: torch.Tensor, tensors: Sequence[torch.Tensor], dim: int = 0) -> list[Step]:
    pieces = out.split([tensor.shape[dim] for tensor in tensors], dim)
    return [Step(torch.Tensor.copy_, pair) for pair in zip(pieces, tensors)]


def _clone_steps(
    out: torch.Tensor, source: torch.Tensor, memory_format: torch.memory_format | None = None
) -> list[Step]:
    return [Step(torch.Tensor.copy_, (out, source))]


def _add_steps(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1) -> list[Step]:
    return [Step(partial(_write_sum, alpha=alpha), (out, a, b))]


def _write_sum(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float) -> None:
    torch.add(a, b, alpha=alpha, out=out)


COPIES = {aten.cat.default: _cat_steps, aten.clone.default: _clone_steps, aten.add.Tensor: _add_steps}


class Recorder(TorchDispatchMode):
    """A context that takes down the calls of C kernels on tensors that are still there when it is replayed.

    Attributes:
        complete: whether nothing else was computed, so that `recording` gives all that was done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.complete = True
        self._steps: list[Step] = []
        self._made: dict[int, torch.Tensor] = {}  # by the address of what was allocated meanwhile
        self._bytes = 0

    # not by way of the base class, which notes in a global that some thread is in such a mode: torch.compile then
    # refuses to run, and for good where two threads leave their modes in the order in which they entered
    def __enter__(self) -> Recorder:
        _thread.recorder = self
        _push_mode(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _thread.recorder = None
        _pop_mode()

    def __torch_dispatch__(self, op: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        _thread.recorder = None  # nor is torch in this mode meanwhile, and an op may call kernels of its own
        try:
            result = op(*args, **(kwargs or {}))
        finally:
            _thread.recorder = self
        if not self.complete:
            return result
        if op in ALLOCATIONS or op in COPIES:
            self._note(result)
            for step in COPIES[op](result, *args, **(kwargs or {})) if op in COPIES else ():
                self._add(step)
        elif not op.is_view:
            self.complete = False
        return result

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that is allocated meanwhile."""
        _pop_mode()
        try:
            made = torch.empty(shape, dtype=dtype, device="cpu")
        finally:
            _push_mode(self)
        if self.complete:
            self._note(made)
        return made

    def kernel(self, kernel: Callable, tensors: Sequence[torch.Tensor | None], numbers: Sequence[int | float]) -> None:
        """Take down a call that is made as well."""
        self._add(Step(kernel, (*tensors, *numbers), of_kernel=True))

    def _note(self, made: torch.Tensor) -> None:
        self._made[_memory(made)] = made
        self._bytes += made.untyped_storage().nbytes()

    def _add(self, step: Step) -> None:
        self.complete &= self._bytes <= MOST_BYTES
        if self.complete:
            self._steps.append(step)
        else:
            self._steps.clear()
            self._made.clear()

    def recording(self, result: torch.Tensor, pool: Pool) -> Recording:
        """What was done, to be done again; `result` is the tensor that a replay returns."""
        return Recording(self._steps, self._made, result, pool)


class Recording:
    """Steps over memory of their own, as little as holds at any time what later steps still read.

    Args:
        steps: calls in order.
        made: tensors allocated meanwhile, by address. All others stay where they are, and are held; but whoever
            replays sees to it that parameters have not been given other memory, and theirs can be freed.
        result: what the last step wrote.
        pool: memory of recordings that never run at once, which this one takes and adds to.
    """

    def __init__(
        self, steps: Sequence[Step], made: dict[int, torch.Tensor], result: torch.Tensor, pool: Pool
    ) -> None:  # fmt: skip
        memories = [dict.fromkeys(map(_memory, _tensors(step))) for step in steps]
        last_step = {memory: number for number, of_step in enumerate(memories) for memory in of_step}
        last_step[_memory(result)] = len(steps)
        free = defaultdict(list, {nbytes: [*blocks] for nbytes, blocks in pool.items()})
        self._blocks: dict[int, torch.Tensor] = {}
        self._held: dict[int, torch.Tensor] = {}
        self._calls: list[tuple[Callable, tuple]] = []
        for number, (step, of_step) in enumerate(zip(steps, memories)):
            ending = []
            for memory in of_step:
                if memory not in made:
                    continue
                nbytes = made[memory].untyped_storage().nbytes()
                if memory not in self._blocks:
                    if not free[nbytes]:
                        free[nbytes].append(_block(nbytes))
                        pool[nbytes].append(free[nbytes][-1])
                    self._blocks[memory] = free[nbytes].pop()
                if last_step[memory] == number:
                    ending.append((nbytes, self._blocks[memory]))
            for nbytes, block in ending:
                free[nbytes].append(block)
            self._calls.append(self._moved_step(step))
        self._result = self._moved(result)

    def replay(self) -> torch.Tensor:
        """Do it again. The result is overwritten by the next replay."""
        for call, arguments in self._calls:
            call(*arguments)
        return self._result

    def reads(self, tensor: torch.Tensor) -> bool:
        """Whether a step takes numbers from this tensor's memory."""
        return _memory(tensor) in self._held

    def _moved_step(self, step: Step) -> tuple[Callable, tuple]:
        moved = self._address if step.of_kernel else self._moved
        return step.call, tuple(moved(o) if isinstance(o, torch.Tensor) else o for o in step.operands)

    def _address(self, tensor: torch.Tensor) -> int:
        """Where replays have a tensor's numbers."""
        memory = _memory(tensor)
        block = self._blocks.get(memory)
        if block is None:
            self._hold(memory, tensor)
            return tensor.data_ptr()
        return block.data_ptr() + tensor.data_ptr() - memory

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor where replays have it."""
        memory = _memory(tensor)
        block = self._blocks.get(memory)
        if block is None:
            return self._hold(memory, tensor)
        return block.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _hold(self, memory: int, tensor: torch.Tensor) -> torch.Tensor:
        held = tensor if isinstance(tensor, torch.nn.Parameter) else tensor.detach()
        self._held[memory] = held
        return held


def active_recorder() -> Recorder | None:
    """The one this thread is inside of."""
    return getattr(_thread, "recorder", None)


def _block(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")  # whatever torch.set_default_device says


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(step: Step) -> list[torch.Tensor]:
    return [operand for operand in step.operands if isinstance(operand, torch.Tensor)]
