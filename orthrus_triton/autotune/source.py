"""A fingerprint of kernels' source: a configuration that was measured on other code than this is stale.
Comments, docstrings and line breaks do not count; the kernels are read as text, not imported."""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}


@cache
def fingerprint_of_files(*paths: str, without: tuple[str, ...] = ()) -> str:
    """Of every function under `triton.jit` in these files of the package, but for those named in `without`."""
    return _digest(text for path in paths for text in _kernels(PACKAGE / path, without))


def fingerprint_of_functions(kernels: Iterable[Callable | Any]) -> str:
    """Of these kernels, jitted or not.

    Raises:
        ValueError: one has no source file.
    """
    try:
        return _digest(textwrap.dedent(inspect.getsource(getattr(kernel, "fn", kernel))) for kernel in kernels)
    except (OSError, TypeError) as error:
        raise ValueError(f"kernels must be functions in a Python file: {error}") from error


def _kernels(path: Path, without: tuple[str, ...]) -> list[str]:
    text = path.read_text(encoding="utf-8")
    found = [
        ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
        and node.name not in without
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    if not found:
        raise ValueError(f"{path} must hold kernels under triton.jit, but has none")
    return found


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n\n".join(_normalised(text) for text in texts).encode()).hexdigest()[:16]


def _normalised(text: str) -> str:
    """The tokens that mean something: the same on every version of Python, which an ast's text is not."""
    words: list[str] = []
    at_line_start = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in SILENT or (token.type == tokenize.STRING and at_line_start):
            continue
        blank = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        at_line_start = blank
        word = tokenize.tok_name[token.type] if blank else token.string
        if not (word == "NEWLINE" and words and words[-1] in ("NEWLINE", "INDENT")):  # what a docstring leaves
            words.append(word)
    return " ".join(words)
