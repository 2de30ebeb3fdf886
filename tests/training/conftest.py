"""Tiny models, one thread: as in tests/models. The runs in processes of their own have one, too, and equal bits."""

from tests.models.conftest import single_thread

__all__ = ["single_thread"]
