"""For tests of this library and of layers built on it: a tiny dual-view model and the error budget."""

from orthrus_triton.testing.tiny_model import TinyDualViewModel
from orthrus_triton.testing.tolerances import assert_within_budget

__all__ = ["TinyDualViewModel", "assert_within_budget"]
