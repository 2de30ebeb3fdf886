"""Tiny models, one thread: as in tests/models. The runs in processes of their own have one, too, and equal bits.
Model and tokenizer of distillation; files about something else have their own."""

from __future__ import annotations

import pytest
from tokenizers.pre_tokenizers import WhitespaceSplit

from orthrus_triton.models import OrthrusForCausalLM
from tests.models.conftest import single_thread
from tests.models.tiny_bases import base_config, build_base, tiny_tokenizer

__all__ = ["single_thread"]


@pytest.fixture(scope="module")
def model() -> OrthrusForCausalLM:
    base = build_base(base_config("llama", eos_token_id=list(range(2, 12))))  # one in ten answers ends at any token
    return OrthrusForCausalLM.from_base(base, block_size=4, mask_token_id=1)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer(list(range(2, 90)))
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.chat_template = "{% for m in messages %}w88 {{ m.content }} w89{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def model_folder(model, tokenizer, tmp_path_factory):
    """The model and tokenizer of the test file at hand, saved."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, tokenizer=tokenizer)
    return folder
