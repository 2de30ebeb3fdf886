"""Tiny models, one thread: as in tests/models. The runs in processes of their own have one, too, and equal bits."""

import pytest

from tests.models.conftest import single_thread

__all__ = ["single_thread"]


@pytest.fixture(scope="module")
def model_folder(model, tokenizer, tmp_path_factory):
    """The model and tokenizer of the test file at hand, saved."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, tokenizer=tokenizer)
    return folder
