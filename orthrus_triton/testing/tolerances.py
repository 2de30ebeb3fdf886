"""The error budget: twice what plain PyTorch errs in the same dtype against fp64. No hand-picked tolerances."""

from __future__ import annotations

import torch


def assert_within_budget(
    actual: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor, *, factor: float = 2.0, what: str = "result"
) -> None:
    """Fail if `actual` is further from `reference` (fp64) than `factor` times the error of `plain`.

    Args:
        actual: the result under test.
        plain: the same computation in plain PyTorch, in the dtype of `actual`.
        reference: the same computation in fp64.
        factor: the budget, in errors of `plain`. One unit in the last place is always granted, in fp32 four.
        what: names the result in the failure message.
    """
    reference = reference.double()
    if not torch.equal(actual.isnan(), reference.isnan()):
        raise AssertionError(
            f"{what}: NaN at {int(actual.isnan().sum())} places, expected {int(reference.isnan().sum())}"
        )
    # of the largest value: on a few elements plain PyTorch may be exact by luck, in fp32 on sums of many terms, too
    units = 4 if actual.dtype == torch.float32 else 1
    rounding = units * float(reference.abs().max()) * torch.finfo(actual.dtype).eps
    budget = factor * float((plain.double() - reference).abs().max()) + rounding
    error = (actual.double() - reference).abs()
    if float(error.max()) > budget:
        where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{what}: error {float(error.max()):.3e} at {where} exceeds the budget {budget:.3e}: "
            f"got {float(actual[where])!r}, reference {float(reference[where])!r}"
        )
