"""Which problems of a compiled kernel count. Configurations are chosen with one version of Triton; the compilers of
others may spill a few registers where it does not, in kernels that are rare (fp32, or heads of 256)."""

from __future__ import annotations

import re

import triton

CHOSEN_WITH = "3.7."
A_FEW = 32  # bytes


def that_count(problems: list[str]) -> list[str]:
    if triton.__version__.startswith(CHOSEN_WITH):
        return problems
    spills = {problem: re.search(r"spills (\d+) bytes", problem) for problem in problems}
    return [problem for problem, spill in spills.items() if not spill or int(spill[1]) > A_FEW]
