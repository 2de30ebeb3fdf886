"""Who waits for whose prompt: a running client while a long prompt is read, and clients whose prompts begin alike.
python -m benchmarks.serving_waits --out DIR; the scheduler alone, without HTTP."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks.common import Report, require_known, whole_numbers
from benchmarks.shapes import SHAPES, build
from orthrus_triton.cli.common import DtypeName, fast_block, one_line_errors, resolve_device, resolve_dtype
from orthrus_triton.cli.load import load_apart
from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.modules.dual_view_model import DualViewModel
from orthrus_triton.serving import Request, Scheduler
from orthrus_triton.serving.apart import run_apart

OWN_TOKENS = 20  # of a prompt, behind what it shares
ANSWER_TOKENS = 8
SHOWN = "chunk prompt_tokens shared_tokens clients first_text_s other_median_s other_longest_s".split()


class Client:
    """One greedy request and the times at which its texts came, seconds from when it was sent."""

    def __init__(self, scheduler: Scheduler, prompt: torch.Tensor, tokens: int) -> None:
        self.times, self.ended, self.error, self._sent = [], threading.Event(), "", time.perf_counter()
        # no stop token ends it early, whatever the model says to random prompts
        scheduler.submit(Request(prompt, tokens, SamplingParams(min_new_tokens=tokens), self._hear))

    def _hear(self, tokens: list[int], reason: str | None, error: str) -> None:
        self.times.append(time.perf_counter() - self._sent)
        self.error = error
        if reason is not None:
            self.ended.set()

    def wait_for(self, texts: int) -> None:
        """Until there are so many, or it has ended."""
        while len(self.times) < texts and not self.ended.is_set():
            time.sleep(0.001)

    def first(self) -> float:
        """Seconds to its first text, once it has ended.

        Raises:
            RuntimeError: it ended with an error.
        """
        self.ended.wait()
        if self.error:
            raise RuntimeError(f"every request must end well, but one said: {self.error}")
        return self.times[0]


class Prompts:
    """Random ones, none of which begins like another unless it is told to."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size, self._generator = vocab_size, torch.Generator().manual_seed(0)

    def draw(self, length: int, beginning: torch.Tensor | None = None) -> torch.Tensor:
        """`beginning`, where there is one, and `length` tokens."""
        own = torch.randint(self._vocab_size, (length,), generator=self._generator)
        return own if beginning is None else torch.cat((beginning, own))


def behind_a_long_prompt(scheduler: Scheduler, prompts: Prompts, length: int) -> dict[str, float]:
    """One client gets text, and a prompt of `length` tokens comes."""
    # more than it can get in the time, so that it is there to the end; it leaves with the scheduler
    running = Client(scheduler, prompts.draw(OWN_TOKENS), scheduler.max_len - OWN_TOKENS)
    running.wait_for(8)
    begun = len(running.times)
    long = Client(scheduler, prompts.draw(length), 1).first()
    running.wait_for(len(running.times) + 1)  # what it waits for meanwhile may come after the other's text
    if running.ended.is_set():
        raise RuntimeError(f"the running client must go on until the long prompt is read, but ended: {running.error}")
    waits = [later - earlier for earlier, later in zip(running.times[begun - 1 :], running.times[begun:])]
    return {"first_text_s": long, "other_median_s": median(waits), "other_longest_s": max(waits)}


def alike(scheduler: Scheduler, prompts: Prompts, shared: int, length: int, clients: int) -> float:
    """Median seconds to the first text of `clients` at once, `shared` of whose `length` tokens were read before."""
    beginning = prompts.draw(shared)
    Client(scheduler, prompts.draw(length - shared, beginning), ANSWER_TOKENS).first()
    asking = [
        Client(scheduler, prompts.draw(length - shared, beginning), ANSWER_TOKENS) for _ in range(clients)
    ]  # fmt: skip
    return median(client.first() for client in asking)


def main(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id of an Orthrus model; by default the demo model.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help=f"Random weights instead, one of {', '.join(SHAPES)}.")] = None,
    long_tokens: Annotated[int, typer.Option(min=1, help="Of the prompt that a running client waits for.")] = 3000,
    chunks: Annotated[str, typer.Option(help="Tokens of it that are read between two cycles.")] = "256,4096",
    shared_tokens: Annotated[int, typer.Option(min=1, help="That prompts of several clients begin with.")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="Who ask at once.")] = 4,
    dtype: Annotated[DtypeName, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for CSV; on a GPU benchmarks/data by default.")] = None,
) -> None:
    """Seconds to a first text, and between texts of a client that runs, by what others ask.

    A row per chunk size for one long prompt; then one for prompts that share nothing, and one for prompts that share
    their beginning with one that was answered. Prompts are read as `serve` reads them, with the decoder's own products.

    \b
    python -m benchmarks.serving_waits                                                            # the demo model
    python -m benchmarks.serving_waits --shape tiny --long-tokens 300 --chunks 64 --shared-tokens 100 --device cpu
    """
    with one_line_errors():
        sizes = whole_numbers("--chunks", chunks)
        if shape is not None:
            require_known("--shape", shape, SHAPES)
        where = resolve_device(device)
        of = resolve_dtype(dtype, where)
        if shape is None:
            network, _, name = load_apart(model, of, where)
        else:
            network, name = run_apart(lambda: build(SHAPES[shape], of, where)), f"{shape}, random weights"
    report = Report(f"serving_waits_{shape or 'model'}", where, out)
    fixed = {"model": name, "dtype": str(of).removeprefix("torch.")}
    length, prompts = shared_tokens + OWN_TOKENS, Prompts(network.vocab_size)
    try:
        for chunk in sizes:
            with warm_scheduler(network, where, chunk, max(2 * long_tokens, 4096), slots=2) as scheduler:
                figures = behind_a_long_prompt(scheduler, prompts, long_tokens)
            report.add(**fixed, chunk=chunk, prompt_tokens=long_tokens, shared_tokens=0, clients=1, **rounded(figures))
            print(f"chunks of {chunk}: {figures['other_longest_s']:.2f} s at most", file=sys.stderr, flush=True)
        for shared in (0, shared_tokens):
            with warm_scheduler(network, where, sizes[0], length + ANSWER_TOKENS, slots=clients + 1) as scheduler:
                figures = {"first_text_s": alike(scheduler, prompts, shared, length, clients)}
            report.add(
                **fixed, chunk=sizes[0], prompt_tokens=length, shared_tokens=shared, clients=clients,
                **rounded(figures | {"other_median_s": "", "other_longest_s": ""}),
            )  # fmt: skip
            print(f"{shared} tokens shared: {figures['first_text_s']:.2f} s", file=sys.stderr, flush=True)
    finally:
        if report.rows:
            report.publish(f"{name}, {fixed['dtype']}\n\n{report.markdown(SHOWN)}")


@contextmanager
def warm_scheduler(
    network: DualViewModel, where: torch.device, chunk: int, max_len: int, slots: int
) -> Iterator[Scheduler]:  # fmt: skip
    """As `serve` makes it, after a first request; its thread ends however the block does."""
    decoder = ConsensusDecoder(
        network, block_size=fast_block(None, where), batch_invariant_prefill=True, prefill_chunk=chunk
    )
    scheduler = Scheduler(decoder, slots=slots, max_len=max_len)
    try:
        Client(scheduler, torch.zeros(OWN_TOKENS, dtype=torch.int64), ANSWER_TOKENS).first()
        yield scheduler
    finally:
        scheduler.close()


def rounded(figures: dict[str, float | str]) -> dict[str, float | str]:
    """To milliseconds."""
    return {name: value if value == "" else round(value, 3) for name, value in figures.items()}


if __name__ == "__main__":
    typer.run(main)
