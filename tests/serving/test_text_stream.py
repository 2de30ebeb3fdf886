"""Tokens as text: whole characters, and nothing of a stop string; every token costs the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from orthrus_triton.models.stop_strings import StopStrings
from orthrus_triton.serving.text_stream import TextStream

SPECIAL = 256


class ByteTokenizer:
    """Token i is byte i; one more is special."""

    def __init__(self) -> None:
        self.most = 0  # tokens in one call

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        self.most = max(self.most, len(tokens))
        special = b"" if skip_special_tokens else b"<s>"
        return b"".join(special if i == SPECIAL else bytes([i]) for i in tokens).decode("utf-8", errors="replace")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As of Llama 2: one invalid byte spoils the characters beside it, and a text's first blank is left out."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"<s>": SPECIAL, "▁a": 257, "b": 258, "▁": 259}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False)


def streamed(tokenizer: object, tokens: list[int], size: int = 1) -> str:
    stream = TextStream(tokenizer)
    return "".join(stream.push(tokens[at : at + size], at + size >= len(tokens)) for at in range(0, len(tokens), size))


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


@pytest.mark.parametrize("tail", [[], list("é🙂 end".encode())])
@pytest.mark.parametrize("noise", [[0x80], [0xF0, 0x9F, 0x99], [SPECIAL], [0xE2, 0x82, SPECIAL, 0xFF]])
def test_tokens_that_never_become_text_cost_no_more_than_others(noise: list[int], tail: list[int]) -> None:
    tokenizer, tokens = ByteTokenizer(), list("né".encode()) + noise * 500 + tail
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens, skip_special_tokens=True)
    tokenizer.most = 0
    streamed(tokenizer, tokens)
    assert tokenizer.most < 50


def test_any_bytes_come_as_the_text_of_all_of_them() -> None:
    chance, tokenizer = random.Random(0), ByteTokenizer()
    alphabet = [0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0x82, 0xFF, SPECIAL]
    for _ in range(100):
        letters = chance.sample(alphabet, chance.randint(1, 5))
        tokens = chance.choices(letters, k=90) + chance.choices(alphabet, k=30) + list("🙂€".encode())
        assert streamed(tokenizer, tokens, chance.randint(1, 4)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_character_with_special_tokens_inside_is_kept_behind_many_that_were_none() -> None:
    tokenizer = ByteTokenizer()
    for before, inside in (([SPECIAL] * 13, [SPECIAL] * 2), ([0x80] * 17, [SPECIAL] * 9)):
        tokens = [*before, 0xE2, 0x82, *inside, 0xAC, 0x41]
        for size in (1, 2, 3, 17):
            assert streamed(tokenizer, tokens, size).endswith("€A")


def test_characters_that_a_later_byte_would_spoil_stay() -> None:
    """All tokens at once give no "é" here: byte fallback writes no byte of a run that is not valid as a whole."""
    tokenizer = byte_fallback_tokenizer()
    for late in ([0x80], [0xE2]):
        assert streamed(tokenizer, [257, *"é".encode(), *late]).startswith("aé\ufffd")
        assert streamed(tokenizer, [257, *"é".encode(), *late, 257, 258]).endswith(" ab")


def test_bytes_among_words_keep_their_blanks() -> None:
    tokenizer = byte_fallback_tokenizer()
    for middle in ([0x80] * 200, [SPECIAL] * 200, list("🙂é".encode()) * 50, [0x80, *"🙂".encode()] * 40):
        tokens = [257, 258, *middle, 257, 259, 258]
        assert streamed(tokenizer, tokens) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("length", [1, 3, 1000])
def test_a_long_stop_string_costs_a_token_no_more_than_a_short_one(length: int) -> None:
    said = ("né🙂" * length)[:length]
    tokenizer = ByteTokenizer()
    tokens = [*(b"zz" * 50), SPECIAL, *said.encode()[: len(said.encode())]]
    stop = StopStrings(tokenizer, [said, "never"])
    found = [stop(tokens[: count + 1]) for count in range(len(tokens))]
    assert found == [False] * (len(tokens) - 1) + [True]
    assert tokenizer.most < 50


def test_stop_strings_end_where_the_text_of_all_tokens_first_has_them() -> None:
    chance = random.Random(0)
    for tokenizer, alphabet in (
        (ByteTokenizer(), [0x41, 0x42, 0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82, 0x80, SPECIAL]),
        (byte_fallback_tokenizer(), [0x41, 257, 258, 259, SPECIAL]),
    ):
        for _ in range(100):
            tokens = chance.choices(alphabet, k=60)
            text = tokenizer.decode(tokens)
            begin = chance.randrange(len(text) - 12)
            strings = [text[begin : begin + chance.randint(1, 12)], "🙂é", "<s>A"]
            # what stands for bytes that are no character yet is none
            texts = [tokenizer.decode(tokens[: count + 1]).rstrip("\ufffd") for count in range(len(tokens))]
            expected = next((n for n, text in enumerate(texts) if any(string in text for string in strings)), None)
            stop = StopStrings(tokenizer, strings)
            found = next((n for n in range(len(tokens)) if stop(tokens[: n + 1])), None)
            assert found == expected
            assert StopStrings(tokenizer, strings)(tokens) == any(string in texts[-1] for string in strings)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    chance, tokenizer = random.Random(0), ByteTokenizer()
    for _ in range(200):
        strings = ["".join(chance.choices("ab", k=chance.randint(1, 7))) for _ in range(3)]
        stop, text = StopStrings(tokenizer, strings), "".join(chance.choices("ab", k=chance.randint(0, 12)))
        begins = [at for at in range(len(text)) for s in strings if len(s) > len(text) - at and s.startswith(text[at:])]
        assert stop.safe_length(text) == min(begins, default=len(text))


def test_as_many_stop_strings_as_may_be_of_any_length() -> None:
    strings = [*"abcdefgh" * 7, *"bcdefgh", "b" + "c" * 999]
    stop, tokens = StopStrings(ByteTokenizer(), strings[-2:]), list(b"b" + b"c" * 999)
    assert len(strings) == 64 and StopStrings(ByteTokenizer(), strings)([0x61])
    assert [stop(tokens[: n + 1]) for n in (0, 500, 999)] == [False, False, True]
    for wrong in ([], ["a"] * 65, [""], ["c" * 1001]):
        with pytest.raises(ValueError, match="stop_strings must"):
            StopStrings(ByteTokenizer(), wrong)


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    stream = TextStream(ByteTokenizer(), StopStrings(ByteTokenizer(), ["cd", "ab", "e"]))
    assert stream.push(list(b"xyabcde")) == "xy" and stream.stopped


def test_unfinished_bytes_are_no_stop_string() -> None:
    for strings, text, at in (
        (["\ufffd"], "a🙂b", None),
        (["a\ufffd"], "a🙂b", None),
        (["\ufffd"], "a\ufffdb", 4),
        (["\ufffd", "🙂"], "a🙂b", 4),
    ):
        stop, tokens = StopStrings(ByteTokenizer(), strings), list(text.encode())
        assert next((n for n in range(len(tokens)) if stop(tokens[: n + 1])), None) == at


def test_a_stop_string_may_begin_in_the_prompt_but_not_end_there() -> None:
    def stops(strings: list[str], prompt: str, new: str) -> list[bool]:
        stop, tokens = StopStrings(ByteTokenizer(), strings, list(prompt.encode())), list(new.encode())
        return [stop(tokens[: count + 1]) for count in range(len(tokens))]

    assert stops(["abc"], "xxab", "cd") == [True, False]
    assert stops(["ab", "abcdef"], "xxab", "cab") == [False, False, True]  # the first is whole in the prompt
    # so it is where the prompt's text is not final, for it ends within a character or with the sign for one
    half = "\u00e9".encode()[:1]
    for prompt in (b"xxab" + half, "xxab\ufffd".encode(), b"ab" + half * 2):
        stop, new = StopStrings(ByteTokenizer(), ["ab", "bc"], list(prompt)), list(b"dbab")
        assert [stop(new[: n + 1]) for n in range(4)] == [False, False, False, True], prompt
    # and one that ends behind it is found
    stop = StopStrings(ByteTokenizer(), ["b\u00e9c"], list(b"ab" + half))
    new = [*"\u00e9".encode()[1:], *b"cd"]
    assert [stop(new[: n + 1]) for n in range(2)] == [False, True]
    assert stops(["🙂!"], "a" * 50 + "🙂", "!") == [True]
    assert stops(["é!"], "🙂" * 9 + "é", "?!") == [False, False]
    blanks = byte_fallback_tokenizer()  # the first blank of new text is not the first of the whole text
    assert StopStrings(blanks, [" a"], [258])([257]) and not StopStrings(blanks, [" a"])([257])
