"""A server over a real socket, for tests that talk to it as clients do.
Skips whoever asks for it without the packages it takes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.serving import Scheduler
from tests.modules.ledger_model import LedgerModel, oracle

openai = pytest.importorskip("openai", reason="needs the extra [serve] and the package openai")
pytest.importorskip("fastapi", reason="needs the extra [serve]")

VOCAB, KEY = 17, "secret"

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


class SlowModel(LedgerModel):
    """Takes some time per pass, so that requests overlap."""

    def forward_view(self, input_ids, cache, view_pass):
        time.sleep(0.002)
        return super().forward_view(input_ids, cache, view_pass)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Running:
    """A server on a free port, in a thread."""

    def __init__(self, eos: Sequence[int] = (), model: Any = None, tokenizer: Any = None, **options) -> None:
        from orthrus_triton.serving.app import create_app
        from orthrus_triton.serving.server import Server

        self.model, self.tokenizer = model or SlowModel(VOCAB), tokenizer or make_tokenizer()
        self.model.eos_token_ids = list(eos)
        self.scheduler = Scheduler(
            ConsensusDecoder(self.model, impl="torch"), **{"slots": 3, "max_len": 3000} | options
        )
        app = create_app(self.scheduler, self.tokenizer, "tiny", api_key=KEY, max_body_bytes=20_000)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = Server(app, self.scheduler)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, **options) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": KEY, "max_retries": 0} | options)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def expected(self, prompt: str, tokens: int, **params) -> str:
        """What follows a prompt, joined on to it."""
        ids = self.tokenizer(prompt)["input_ids"]
        return self.behind(ids, oracle(self.model, ids, tokens, SamplingParams(**params)))

    def behind(self, prompt: list[int], tokens: list[int]) -> str:
        return self.tokenizer.decode([*prompt, *tokens])[len(self.tokenizer.decode(prompt)) :]

    def wait_until(self, condition, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"running {self.scheduler.running}, waiting {self.scheduler.waiting}"
            time.sleep(0.005)
