"""How a reply appears while it is generated: drafted and bonus tokens in two colours with live figures, or plain text.
Both are streamers in the sense of transformers."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

DRAFTED, BONUS, FIGURES = "cyan", "bold yellow", "dim"


class PlainView:
    """Text and nothing else, for pipes.

    Args:
        tokenizer: of transformers.
        drafts: what comes at once is the block of one cycle; else it is that many passes of the AR view.
        stop_ids: tokens that end a reply and are not shown.
    """

    def __init__(self, tokenizer: Any, drafts: bool = True, stop_ids: Collection[int] = ()) -> None:
        from orthrus_triton.serving.text_stream import TextStream

        self.text = ""
        self._stream, self._puts, self._drafts = TextStream(tokenizer, stop_ids=stop_ids), 0, drafts

    def put(self, ids: Any) -> None:
        """The prompt first, then the tokens of the prefill, then those of each cycle."""
        self._puts += 1
        if self._puts > 1:
            self._show(ids.tolist())

    def end(self) -> None:
        """The reply is complete."""
        self._write(self._stream.push([], last=True), BONUS)
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _show(self, tokens: list[int]) -> None:
        for number, token in enumerate(tokens):
            # a cycle commits the drafts it accepted, then the token the verify pass gave for free
            drafted = self._drafts and number < len(tokens) - 1
            self._write(self._stream.push([token]), DRAFTED if drafted else BONUS)

    def _write(self, text: str, style: str) -> None:
        self.text += text
        sys.stdout.write(text)
        sys.stdout.flush()


class ColourView(PlainView):
    """Two colours, and beneath the text tokens per cycle and tokens per second as they stand.

    Finished lines are printed for good; the line being written and the figures are redrawn.
    """

    def __init__(
        self, tokenizer: Any, console: Console, drafts: bool = True, stop_ids: Collection[int] = ()
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, drafts, stop_ids)
        self._line, self._tokens, self._cycles = Text(), 0, 0
        self._began = time.perf_counter()
        self._live = Live(console=console, transient=True, refresh_per_second=12)
        self._live.start()

    def put(self, ids: Any) -> None:
        """See `PlainView.put`."""
        if self._puts == 1:
            self._began = time.perf_counter()  # figures are of the decoding
        if self._puts > 1:
            self._tokens += ids.numel()
            self._cycles += 1 if self._drafts else ids.numel()
        super().put(ids)
        self._live.update(Group(self._line, Text(self.figures(), FIGURES)))

    def figures(self) -> str:
        """One line: what decoding has cost so far."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        return f"{self._tokens / max(self._cycles, 1):.2f} tokens/cycle  {self._tokens / seconds:.1f} tokens/s"

    def end(self) -> None:
        """See `PlainView.end`."""
        self._write(self._stream.push([], last=True), BONUS)
        self.close()
        self._live.console.print(self._line)
        self._live.console.print(self.figures(), style=FIGURES, highlight=False)

    def close(self) -> None:
        """Stop redrawing, also after an error."""
        self._live.stop()

    def _write(self, text: str, style: str) -> None:
        self.text += text
        *lines, rest = text.split("\n")
        for line in lines:
            self._line.append(line, style)
            self._live.console.print(self._line)
            self._line = Text()
        self._line.append(rest, style)
