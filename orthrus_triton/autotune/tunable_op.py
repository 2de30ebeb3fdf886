"""What the tuner has to know of an op: how to make its inputs, run it, check it and cut rows out of it.
`@tunable` says that for a kernel of your own; `builtin` says it for the ops of this package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orthrus_triton.autotune.config import DTYPES, KernelConfig, Problem
from orthrus_triton.autotune.source import fingerprint_of_functions
from orthrus_triton.autotune.space import LAUNCH_NAMES, SPACES, Space
from orthrus_triton.autotune.store import lookup
from orthrus_triton.autotune.timing import copies_beyond_cache

Inputs = tuple[Any, ...]
Run = Callable[[Inputs, KernelConfig], torch.Tensor]


@dataclass
class Variant:
    """One way an op is used, to be checked. Results have the rows in dim 0.

    Attributes:
        name: for messages.
        inputs: of all rows.
        run: the op.
        cut: inputs of the rows start..stop-1, as they would be without the others.
        slices: (start, stop) of rows that must have the same bits alone as among all rows.
        exact, plain: the computation in fp64, and in PyTorch in the op's dtype, which gives the error budget. None:
            errors are not checked.
        sample: the part of a result that `exact` and `plain` compute.
        same_as: what the result must equal bit for bit, or None.
    """

    name: str
    inputs: Inputs
    run: Run
    cut: Callable[[Inputs, int, int], Inputs]
    slices: Sequence[tuple[int, int]]
    exact: Callable[[Inputs], torch.Tensor] | None = None
    plain: Callable[[Inputs], torch.Tensor] | None = None
    sample: Callable[[torch.Tensor], torch.Tensor] = lambda result: result
    same_as: Run | None = None


@dataclass
class Load:
    """Something to time: `run` over each of `copies`, together more than the L2 cache; one must move `nbytes`."""

    name: str
    run: Run
    copies: Sequence[Inputs]
    nbytes: int


class TunableOp:
    """An op as the tuner sees it. `home` is what a worker imports to define it: a module, or a .py file."""

    space: Space
    home: str

    def variants(self, problem: Problem, device: torch.device) -> list[Variant]:
        """What to check, on random inputs."""
        raise NotImplementedError

    def loads(self, problem: Problem, device: torch.device) -> list[Load]:
        """What to time."""
        raise NotImplementedError

    def launch_all(self, problem: Problem, config: KernelConfig, device: torch.device, every: bool = True) -> None:
        """Launch each kernel of this configuration, on a device that may be "meta": in every variant that is checked
        or timed, or only in those that need the most registers and shared memory."""
        raise NotImplementedError


OPS: dict[str, TunableOp] = {}

# Row counts around tile edges, from the first row and from an odd one.
ROW_SLICES = [
    (0, 1), (0, 2), (0, 7), (0, 16), (0, 17), (0, 32), (0, 33), (5, 6), (13, 45), (63, 64), (0, 64), (0, 65), (60, 130),
    (0, 260), (0, 520),
]  # fmt: skip
ROWS = 64
TIMED_ROWS = (1, 32)


def row_slices(rows: int) -> list[tuple[int, int]]:
    """Those of `ROW_SLICES` that lie within this many rows."""
    return [(start, stop) for start, stop in ROW_SLICES if stop <= rows]


class Tunable(TunableOp):
    """A kernel of your own; see `tunable`. Calling it looks its configuration up, or takes `config=`."""

    def __init__(
        self, space: OwnSpace, launch: Callable, key: dict[str, Callable], inputs: Callable, reference: Callable,
        rows_of: set[int],
    ) -> None:  # fmt: skip
        self.space, self._launch, self._key, self._inputs = space, launch, key, inputs
        self._reference, self._rows_of = reference, rows_of
        self.home = home_of(launch)
        self.__doc__ = launch.__doc__

    def __call__(self, *tensors: torch.Tensor, config: KernelConfig | None = None) -> torch.Tensor:
        if config is None:
            first = tensors[0]
            shape = {name: read(*tensors) for name, read in self._key.items()}
            config = lookup(self.space.name, first.dtype, first.device, **shape)
        return self._launch(*tensors, config)

    def problem(self, dtype: str = "bf16", **key: int) -> Problem:
        """What `tune` takes."""
        return Problem.of(self.space.name, dtype, **key)

    def variants(self, problem: Problem, device: torch.device) -> list[Variant]:
        """The kernel on `ROWS` rows."""
        return [
            Variant(
                self.space.name, self._make(problem, ROWS, device), self._run, self._cut, row_slices(ROWS),
                exact=lambda inputs: self._reference(*(self._widened(tensor) for tensor in inputs)),
                plain=lambda inputs: self._reference(*inputs),
            )
        ]  # fmt: skip

    def loads(self, problem: Problem, device: torch.device) -> list[Load]:
        """One row and a block of rows, over copies that exceed the cache."""
        loads = []
        for rows in TIMED_ROWS:
            first = self._make(problem, rows, device)
            nbytes = sum(tensor.nbytes for tensor in first if isinstance(tensor, torch.Tensor))
            result = self._run(first, self.space.default(problem.dtype, "", problem.shape))
            copies = [first] + [self._copy(first) for _ in range(copies_beyond_cache(nbytes, device) - 1)]
            loads.append(Load(f"rows={rows}", self._run, copies, nbytes + result.nbytes))
        return loads

    def launch_all(self, problem: Problem, config: KernelConfig, device: torch.device, every: bool = True) -> None:
        """The kernel on a block of rows."""
        self._run(self._make(problem, 32, device), config)

    def _run(self, inputs: Inputs, config: KernelConfig) -> torch.Tensor:
        return self._launch(*inputs, config)

    def _make(self, problem: Problem, rows: int, device: torch.device) -> Inputs:
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=DTYPES[problem.dtype])

        return tuple(self._inputs(problem.shape, rows, randn))

    def _cut(self, inputs: Inputs, start: int, stop: int) -> Inputs:
        return tuple(x[start:stop] if n in self._rows_of else x for n, x in enumerate(inputs))

    @staticmethod
    def _copy(inputs: Inputs) -> Inputs:
        return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs)

    @staticmethod
    def _widened(x: Any) -> Any:
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


class OwnSpace(Space):
    """The space of a kernel of your own: the values it lists, in that order, the default first."""

    def __init__(
        self, name: str, version: int, key: tuple[str, ...], choices: dict, default: KernelConfig, kernels: Sequence
    ) -> None:
        super().__init__(name, version, key, choices)
        self._default, self._source = default, fingerprint_of_functions(kernels)

    def source(self) -> str:
        """Fingerprint of the kernels."""
        return self._source

    def default(self, dtype: str, family: str, key: dict[str, int]) -> KernelConfig:
        """The same for every key."""
        return self._default


def tunable(
    name: str,
    *,
    kernels: Sequence[Any],
    space: dict[str, Sequence[int]],
    default: dict[str, int],
    key: dict[str, Callable[..., int]],
    inputs: Callable[..., Sequence[Any]],
    reference: Callable[..., torch.Tensor],
    rows_of: Sequence[int] = (0,),
    version: int = 1,
) -> Callable[[Callable], Tunable]:
    """Let a kernel of your own join the tuner and the store.

    Decorates a function `launch(*inputs, config)` that returns one tensor with the rows in dim 0; it takes tile sizes
    from `config[...]` and passes `**config.launch`. It must be defined in a Python file, not in a notebook: worker
    processes import it (guard what the file does when run with `if __name__ == "__main__"`).

    Args:
        name: of the op, in files and in `--ops`.
        kernels: the `triton.jit` functions, helpers included. When their source changes, older entries are stale.
        space: values to try of each constant, and of num_warps and num_stages if they are tuned.
        default: what runs until it is tuned; a choice from `space`.
        key: the weight or head shape a configuration belongs to, each field read from the inputs. Never a row count.
        inputs: `inputs(key, rows, randn)` makes random inputs; `randn(*shape)` has dtype and device.
        reference: the computation in plain PyTorch, in the dtype of what it is given (fp64 gives the truth).
        rows_of: which inputs have the rows in dim 0.
        version: raise it when a constant's meaning changes.

    Raises:
        ValueError: the name is taken, or the default is no choice from the space.
    """
    choices = {choice: tuple(values) for choice, values in space.items()}
    launch = {choice: value for choice, value in default.items() if choice in LAUNCH_NAMES}
    constants = {choice: value for choice, value in default.items() if choice not in LAUNCH_NAMES}
    if set(default) != set(choices) or any(default[choice] not in values for choice, values in choices.items()):
        raise ValueError(f"default must choose one value of each of {choices}, but is {default}")
    if not name.isidentifier():
        raise ValueError(f"name must be an identifier, but got {name!r}")

    def decorate(function: Callable) -> Tunable:
        known = OPS.get(name)
        if name in SPACES and (known is None or known.home != home_of(function)):
            raise ValueError(f"name must be new, but an op {name!r} is known already")
        own = OwnSpace(name, version, tuple(key), choices, KernelConfig(constants, launch), kernels)
        op = Tunable(own, function, key, inputs, reference, set(rows_of))
        SPACES[name], OPS[name] = own, op
        return op

    return decorate


def home_of(function: Callable) -> str:
    """What another process imports to define the function again: the module's name, or its file if it is a script."""
    module = sys.modules.get(function.__module__)
    file = function.__code__.co_filename
    if "." in function.__module__ and module is not None:
        return function.__module__
    if not Path(file).is_file():
        raise ValueError(f"{function.__name__} must be defined in a Python file, but is in {file}")
    return str(Path(file).resolve())
