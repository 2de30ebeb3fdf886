"""Tokens as text: whole characters, and nothing of a stop string."""

from __future__ import annotations

import pytest

from orthrus_triton.models.stop_strings import StopStrings
from orthrus_triton.serving.text_stream import TextStream


class ByteTokenizer:
    """Token i is byte i."""

    def decode(self, tokens, **_: object) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_text_comes_in_whole_characters_without_the_stop_string(size: int) -> None:
    said = "naïve 🙂 café END tail"
    tokens = list(said.encode())
    for stop, expected in ((None, said), (["END"], "naïve 🙂 café "), (["🙂 c", "zzz"], "naïve ")):
        stream = TextStream(ByteTokenizer(), StopStrings(ByteTokenizer(), stop) if stop else None)
        parts = [
            stream.push(tokens[at : at + size], last=at + size >= len(tokens)) for at in range(0, len(tokens), size)
        ]
        assert "".join(parts) == expected
        assert all("\ufffd" not in part for part in parts) and sum(map(bool, parts)) > 1
