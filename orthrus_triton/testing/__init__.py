"""For tests of this library and of layers built on it: a tiny dual-view model without transformers."""

from orthrus_triton.testing.tiny_model import TinyDualViewModel

__all__ = ["TinyDualViewModel"]
