"""The gate: a configuration may be timed only if its results are within the fp64 error budget and every row has the
bits it would have alone. What does not pass is never written anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orthrus_triton.autotune.config import KernelConfig, Problem
from orthrus_triton.autotune.tunable_op import TunableOp, Variant
from orthrus_triton.testing.tolerances import assert_within_budget


@dataclass
class Gate:
    """The checks of one problem. Inputs, reference and PyTorch's result are made once for all configurations."""

    problem: Problem
    variants: list[Variant]
    expected: list[tuple[torch.Tensor, torch.Tensor] | None]

    @classmethod
    def of(cls, op: TunableOp, problem: Problem, device: torch.device) -> Gate:
        """On random inputs on `device`."""
        variants = op.variants(problem, device)
        expected = [
            (variant.plain(variant.inputs), variant.exact(variant.inputs)) if variant.exact else None
            for variant in variants
        ]
        return cls(problem, variants, expected)

    def problems(self, config: KernelConfig) -> list[str]:
        """Why this configuration must not be used; empty if it passes."""
        return [
            problem
            for variant, expected in zip(self.variants, self.expected)
            for problem in _problems(variant, expected, config)
        ]


def _problems(variant: Variant, expected: tuple[torch.Tensor, torch.Tensor] | None, config: KernelConfig) -> list[str]:
    whole = variant.run(variant.inputs, config)
    found = []
    if expected is not None:
        try:
            assert_within_budget(variant.sample(whole), *expected, what=variant.name)
        except AssertionError as error:
            found.append(str(error))
    if variant.same_as is not None and not torch.equal(whole, variant.same_as(variant.inputs, config)):
        found.append(f"{variant.name}: other bits than the ops it stands for")
    if not torch.equal(whole, variant.run(variant.inputs, config)):
        found.append(f"{variant.name}: other bits when it runs again")
        return found
    for start, stop in variant.slices:
        alone = variant.run(variant.cut(variant.inputs, start, stop), config)
        if not torch.equal(alone, whole[start:stop]):
            found.append(f"{variant.name}: rows {start}..{stop - 1} alone have other bits than among {len(whole)} rows")
            break
    return found
