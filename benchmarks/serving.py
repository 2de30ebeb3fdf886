"""The endpoint under load: requests and tokens per second and time to first token, by how many clients ask at once.
python -m benchmarks.serving --out DIR; server and clients are one process, over a real socket on loopback."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import torch
import typer

from benchmarks.common import Report, require_green, require_known, whole_numbers
from benchmarks.shapes import SHAPES, build
from orthrus_triton.cli.common import (
    DtypeName,
    FastBlockOption,
    fast_block,
    one_line_errors,
    resolve_device,
    resolve_dtype,
)
from orthrus_triton.cli.load import load_apart
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.modules.decode_options import BlockSize
from orthrus_triton.modules.dual_view_model import DualViewModel
from orthrus_triton.serving.apart import run_apart
from orthrus_triton.training.prompts import encode, read_prompts

PROMPTS = Path(__file__).parents[1] / "examples" / "prompts" / "code.txt"
START_SECONDS, REQUEST_SECONDS = 30.0, 600.0
GATE_TOKENS = 16  # of each answer that is compared with AR decoding before anything is timed
WARM_TOKENS = 4
SHOWN = "clients slots requests output_tokens seconds requests_s tokens_s ttft_p50_ms ttft_p95_ms".split()


class Answer(NamedTuple):
    """What one client got: text, tokens by the server's count, and seconds until its first text (None: no text)."""

    text: str
    tokens: int
    first_seconds: float | None


class NumberTokenizer:
    """For weights without a tokenizer: token 7 is the text " 7"."""

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(f" {int(token)}" for token in tokens)


def make_prompts(tokenizer: Any, path: Path | None, count: int, length: int, vocab_size: int) -> list[list[int]]:
    """`count` prompts as ids: lines of `path`, or random ones where there is no text.

    Raises:
        ValueError: the file has fewer lines; a prompt asked twice would be found in the cache.
    """
    if path is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (count, length), generator=generator).tolist()
    lines = read_prompts(path)
    if len(lines) < count:
        raise ValueError(
            f"--requests and --clients must be at most {len(lines)}, the prompts of {path}, but ask {count}"
        )
    return [encode(tokenizer, prompt) for prompt in lines[:count]]


@contextmanager
def running_server(decoder: ConsensusDecoder, tokenizer: Any, slots: int, max_len: int, waiting: int) -> Iterator[str]:
    """The application on a free port of loopback, in a thread; gives its address.

    Raises:
        RuntimeError: it does not start.
    """
    from orthrus_triton.serving import Scheduler
    from orthrus_triton.serving.app import create_app
    from orthrus_triton.serving.server import Server

    scheduler = Scheduler(decoder, slots=slots, max_len=max_len, max_waiting=waiting)
    server = Server(create_app(scheduler, tokenizer, "benchmark"), scheduler)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + START_SECONDS
            while not server.started:
                if not thread.is_alive() or time.monotonic() > deadline:
                    raise RuntimeError(f"the server must start within {START_SECONDS:g} s, but did not")
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        finally:
            server.should_exit = True
            thread.join()
            scheduler.close()


async def ask(client: httpx.AsyncClient, url: str, prompt: list[int], tokens: int) -> Answer:
    """One greedy completion, streamed.

    Raises:
        RuntimeError: the server answers with an error, or its answer does not end.
    """
    body = {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    text, count, first, done, started = "", 0, None, False, time.perf_counter()
    async with client.stream("POST", url, json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"the server must answer with status 200, but got {reply.status_code}: "
                               f"{(await reply.aread()).decode()}")  # fmt: skip
        async for line in reply.aiter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                done = done or data == "[DONE]"
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(f"the server must finish every request, but said: {event['error']['message']}")
            part = "".join(choice["text"] for choice in event["choices"])
            if part and first is None:
                first = time.perf_counter() - started
            text += part
            count = (event.get("usage") or {}).get("completion_tokens", count)
    if not done:
        raise RuntimeError("the server must end its answer with [DONE], but it ended without")
    return Answer(text, count, first)


async def load(url: str, prompts: Sequence[list[int]], tokens: int, clients: int) -> tuple[list[Answer], float]:
    """`clients` of them ask one prompt after the other until none is left -> answers in order, seconds in all."""
    waiting, answers = iter(enumerate(prompts)), [None] * len(prompts)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=REQUEST_SECONDS, limits=limits, trust_env=False) as client:

        async def work() -> None:
            for n, prompt in waiting:
                answers[n] = await ask(client, url, prompt, tokens)

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        return answers, time.perf_counter() - started


def timed_load(
    decoder: ConsensusDecoder, tokenizer: Any, prompts: Sequence[list[int]], tokens: int, clients: int, slots: int
) -> tuple[list[Answer], float]:
    """`load` on a server of its own, after a first load that made and warmed up what a run needs.

    The decoder must be new: one that has seen a prompt keeps its K/V, and a prompt that is kept needs no prefill.
    """
    longest = max(map(len, prompts)) + tokens
    with running_server(decoder, tokenizer, slots, longest, max(len(prompts), slots)) as url:
        # as long as theirs, and no beginning of any of them
        asyncio.run(load(url, [prompt[::-1] for prompt in prompts[:slots]], min(tokens, WARM_TOKENS), slots))
        return asyncio.run(load(url, prompts, tokens, clients))


def problems(
    network: DualViewModel, tokenizer: Any, prompts: Sequence[list[int]], clients: int, slots: int,
    block_size: BlockSize | None,
) -> Iterator[str]:  # fmt: skip
    """Where an answer under the heaviest load is not the text of AR decoding of that prompt alone."""
    shared = ConsensusDecoder(network, block_size=block_size, batch_invariant_prefill=True)
    alone = ConsensusDecoder(network, mode="ar", batch_invariant_prefill=True)
    answers, _ = timed_load(shared, tokenizer, prompts, GATE_TOKENS, clients, slots)
    for n, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids = alone.generate([torch.tensor(prompt)], max_new_tokens=GATE_TOKENS).sequences[0][len(prompt) :]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        if answer.text != expected:
            yield f"prompt {n}: {clients} clients get {answer.text!r}, AR decoding says {expected!r}"


def nearest_rank(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all do not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def figures(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """The columns of one level of load."""
    first = [answer.first_seconds for answer in answers if answer.first_seconds is not None]
    tokens = sum(answer.tokens for answer in answers)
    times = {
        name: round(1e3 * nearest_rank(first, share), 1) if first else ""
        for name, share in (("ttft_p50_ms", 0.5), ("ttft_p95_ms", 0.95))
    }
    return {
        "requests": len(answers), "output_tokens": tokens, "seconds": round(seconds, 3),
        "requests_s": round(len(answers) / seconds, 3), "tokens_s": round(tokens / seconds, 2), **times,
    }  # fmt: skip


def main(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id of an Orthrus model; by default the demo model.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help=f"Random weights instead, one of {', '.join(SHAPES)}: drafts are never right.")
    ] = None,
    clients: Annotated[str, typer.Option(help="How many ask at once; several levels with commas.")] = "1,2,4,8",
    requests: Annotated[int, typer.Option(min=1, help="Of each level, in all; at least one per client is sent.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    slots: Annotated[int | None, typer.Option(min=1, help="Of the server; by default the most clients.")] = None,
    block_size: FastBlockOption = None,
    prompts: Annotated[Path, typer.Option(help="One prompt a line; ignored with --shape.")] = PROMPTS,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of random prompts, with --shape.")] = 64,
    dtype: Annotated[DtypeName, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for CSV; on a GPU benchmarks/data by default.")] = None,
) -> None:
    """Requests/s, tokens/s and time to first text (median, 95th percentile) of greedy streamed completions.

    Clients share cores with the server. Answers under the heaviest load are first compared with AR decoding; if one
    differs, nothing is timed and the exit code is 1. Ctrl-C leaves a table of the levels that were measured.

    \b
    python -m benchmarks.serving                                                          # the demo model
    python -m benchmarks.serving --shape tiny --requests 4 --tokens 8 --device cpu        # does it run?
    """
    with one_line_errors():
        levels = whole_numbers("--clients", clients)
        if model is not None and shape is not None:
            raise ValueError(f"--shape must not be given with a MODEL, but got {shape!r} and {model!r}")
        if shape is not None:
            require_known("--shape", shape, SHAPES)
        where = resolve_device(device)
        block_size = fast_block(block_size, where)
        of = resolve_dtype(dtype, where)
        if shape is None:
            network, tokenizer, name = load_apart(model, of, where)
        else:
            network = run_apart(lambda: build(SHAPES[shape], of, where))
            tokenizer, name = NumberTokenizer(), f"{shape}, random weights"
        most = max(levels)
        questions = make_prompts(
            tokenizer, None if shape else prompts, max(requests, most), prompt_tokens, network.vocab_size
        )
    slots = slots or most
    report = Report(f"serving_{shape or 'model'}", where, out)
    require_green(run_apart(lambda: list(problems(network, tokenizer, questions[:most], most, slots, block_size))))
    fixed = {"model": name, "dtype": str(of).removeprefix("torch."), "block_size": block_size or network.block_size}
    try:
        for level in levels:
            asked = questions[: max(requests, level)]
            decoder = ConsensusDecoder(network, block_size=block_size, batch_invariant_prefill=True)
            answers, seconds = timed_load(decoder, tokenizer, asked, tokens, level, slots)
            report.add(**fixed, clients=level, slots=slots, max_tokens=tokens, **figures(answers, seconds))
            print(f"{level} clients: {report.rows[-1]['tokens_s']} tokens/s", file=sys.stderr, flush=True)
    finally:
        if report.rows:
            report.publish(f"{name}, {fixed['dtype']}\n\n{report.markdown(SHOWN)}")


if __name__ == "__main__":
    typer.run(main)
