"""Prompt files, one prompt a line or jsonl with its domain, and prompts as token ids.
What evaluation reads and what distillation answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

DOMAINS = ("code", "chat", "prose", "docs")


@dataclass(frozen=True)
class Prompt:
    """One prompt. chat: put it through the chat template; None does so where the tokenizer has one. line: where it
    stands in its file, from 1."""

    text: str
    domain: str = "all"
    chat: bool | None = None
    line: int = field(default=0, compare=False)


def read_prompts(path: str | PathLike[str]) -> list[Prompt]:
    """The prompts of a file, blank lines left out.

    A `.jsonl` file holds objects with `prompt` (or `text`), and optionally `domain` and `chat`. Any other file holds
    one prompt a line; its domain is its name where that is code, chat, prose or docs, else "all".

    Raises:
        FileNotFoundError: there is no such file. IsADirectoryError: it is a folder. ValueError: it holds no prompt, is
            not UTF-8, or has a line that is not such an object; the message names file and line.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"prompts must come from a file, but {str(path)!r} is a folder")
    if not path.exists():
        raise FileNotFoundError(f"prompts must come from a file, but there is no {str(path)!r}")
    try:
        # a byte order mark is no text; JSON text may hold other line separators
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts must be UTF-8 text, but in {path} {error}") from error
    if path.suffix == ".jsonl":
        prompts = [_parse(line, path, n) for n, line in enumerate(lines, start=1) if line.strip()]
    else:
        domain = path.stem if path.stem in DOMAINS else "all"
        prompts = [Prompt(line.strip(), domain, None, n) for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ValueError(f"prompts must hold at least one prompt, but {path} holds none")
    return prompts


def write_prompts(prompts: Sequence[Prompt], path: str | PathLike[str]) -> None:
    """As a `.jsonl` file that `read_prompts` reads; under its name when it is complete.

    Raises:
        ValueError: the name does not end in .jsonl, or is a folder's.
    """
    path = Path(path)
    require_jsonl(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".tmp")
    lines = ({"prompt": prompt.text, "domain": prompt.domain, "chat": prompt.chat} for prompt in prompts)
    staged.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    staged.replace(path)


def require_jsonl(path: Path) -> None:
    """Raise a ValueError if `write_prompts` would not write there."""
    if path.suffix != ".jsonl":
        raise ValueError(f"prompts must be written to a .jsonl file, but got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"prompts must be written to a .jsonl file, but {str(path)!r} is a folder")


def encode(tokenizer: Any, prompt: Prompt, system: str | None = None) -> list[int]:
    """A prompt as token ids, in a chat after a `system` message if there is one.

    Raises:
        ValueError: `prompt.chat` asks for a template the tokenizer does not have, the template refuses the messages, or
            nothing is left to encode.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    chat = has_template if prompt.chat is None else prompt.chat
    if chat and not has_template:
        raise ValueError(f"prompt {prompt.text[:40]!r} asks for a chat template, but the tokenizer has none")
    text = prompt.text
    if chat:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text = chat_text(tokenizer, messages)
    # a chat template writes its special tokens itself
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise ValueError(f"prompt {prompt.text[:40]!r} must have at least one token, but encodes to none")
    return list(ids)


def chat_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Messages as the chat template writes them, up to where the reply begins.

    Raises:
        ValueError: the template refuses them, as some do a system message.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        roles = [message["role"] for message in messages]
        raise ValueError(f"the chat template must take messages of the roles {roles}, but: {error}") from error


def _parse(line: str, path: Path, number: int) -> Prompt:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected a JSON object, but {error}") from error
    text = (record.get("prompt") or record.get("text")) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: expected an object with a "prompt" or "text", but got {line[:60]!r}')
    if any("\ud800" <= character <= "\udfff" for character in text):  # a tokenizer would take none of it
        raise ValueError(f"{where}: a prompt must be text, but has half of a surrogate pair")
    domain, chat = record.get("domain", "all"), record.get("chat")
    if not isinstance(domain, str) or not (chat is None or isinstance(chat, bool)):
        raise ValueError(f"{where}: domain must be a string and chat true or false, but got {domain!r} and {chat!r}")
    return Prompt(text, domain, chat, number)
