"""Attention and loss of one training step, ours against the routes others take: time and peak memory in one run.
python -m benchmarks.training --shape qwen3-0.6b --anchors 256 --block-size 32 --length 2048"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer

from benchmarks.common import DTYPES, Report, measure, require_green, require_known
from benchmarks.shapes import SHAPES, Shape
from orthrus_triton import ops
from orthrus_triton.cli.common import one_line_errors, resolve_device
from orthrus_triton.testing import assert_within_budget

SHOWN = "part route p20_ms p50_ms p80_ms peak_mib note".split()


class Batch(NamedTuple):
    """One row of text of L tokens with A anchors: the frozen context, the block rows' q, k and v, and for the loss
    the student's hidden states of the R = A * (K - 1) rows that predict, beside the teacher's of all L positions."""

    q: torch.Tensor
    k_context: torch.Tensor
    v_context: torch.Tensor
    key_limit: torch.Tensor
    k_block: torch.Tensor
    v_block: torch.Tensor
    block_size: int
    hidden: torch.Tensor
    teacher: torch.Tensor
    index: torch.Tensor
    lm_head: torch.Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        """The same numbers in another dtype, as leaves of their own."""
        floating = {
            name: value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)
            for name, value in self._asdict().items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        return self._replace(**floating)


def make_batch(
    shape: Shape, anchors: int, block_size: int, length: int, dtype: torch.dtype, device: torch.device
) -> Batch:
    """Random numbers; anchors at different positions, in order."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(std).to(dtype)

    kv_heads, head_dim, hidden_size = shape.num_key_value_heads, shape.head_dim, shape.hidden_size
    rows, predicting = anchors * block_size, anchors * (block_size - 1)
    first = torch.randperm(length - block_size, generator=generator, device=device)[:anchors].sort()[0] + 1
    index = first[:, None] + torch.arange(block_size - 1, device=device)
    context = randn(2, 1, kv_heads, length, head_dim)
    block = randn(2, 1, rows, kv_heads, head_dim)
    return Batch(
        randn(1, rows, shape.num_attention_heads, head_dim).requires_grad_(), context[0], context[1],
        first.to(torch.int32).repeat_interleave(block_size)[None], block[0].clone().requires_grad_(),
        block[1].clone().requires_grad_(), block_size, randn(predicting, hidden_size).requires_grad_(),
        randn(length, hidden_size), index.flatten(), randn(shape.vocab_size, hidden_size, std=hidden_size**-0.5),
    )  # fmt: skip


def our_attention(batch: Batch, q: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    return ops.block_attention(
        q, batch.k_context, batch.v_context, batch.key_limit, batch.k_block, batch.v_block,
        block_size=batch.block_size, impl=impl,
    )  # fmt: skip


def flex_attention(batch: Batch) -> Callable[[Batch, torch.Tensor], torch.Tensor]:
    """FlexAttention over context and block keys in one sequence, compiled for this shape."""
    from torch.nn.attention import flex_attention as flex

    length, rows = batch.k_context.shape[2], batch.q.shape[1]
    limit, block_size = batch.key_limit[0], batch.block_size

    def visible(_b, _h, row, key):
        own = (key - length) // block_size == row // block_size
        return torch.where(key < length, key < limit[row], own)

    torch._dynamo.reset()
    mask = flex.create_block_mask(visible, None, None, rows, length + rows, device=batch.q.device)
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def attend(batch: Batch, q: torch.Tensor) -> torch.Tensor:
        keys, values = _all_keys(batch)
        return compiled(q.transpose(1, 2), keys, values, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


def sdpa_attention(batch: Batch) -> Callable[[Batch, torch.Tensor], torch.Tensor]:
    """torch's scaled_dot_product_attention with the same mask in full."""
    rows, device = batch.q.shape[1], batch.q.device
    cached = torch.arange(batch.k_context.shape[2], device=device) < batch.key_limit[0, :, None]
    block = torch.arange(rows, device=device) // batch.block_size
    mask = torch.cat((cached, block[:, None] == block), dim=1)

    def attend(batch: Batch, q: torch.Tensor) -> torch.Tensor:
        keys, values = _all_keys(batch)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def _all_keys(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.cat((batch.k_context, batch.k_block.transpose(1, 2)), dim=2)
    return keys, torch.cat((batch.v_context, batch.v_block.transpose(1, 2)), dim=2)


def our_loss(batch: Batch, impl: str = "auto") -> torch.Tensor:
    weight = torch.ones(len(batch.index), device=batch.index.device)
    teacher = ops.HiddenTeacher(batch.teacher)
    return ops.linear_kl(batch.hidden, batch.lm_head, teacher, batch.index, weight, impl=impl).loss


def whole_loss(batch: Batch) -> torch.Tensor:
    """All logits in memory: the teacher's once for each position in use, softmax and divergence in fp32."""
    used, line = batch.index.unique(return_inverse=True)
    with torch.no_grad():
        target = F.log_softmax((batch.teacher[used] @ batch.lm_head.T).float(), dim=-1)
    student = F.log_softmax((batch.hidden @ batch.lm_head.T).float(), dim=-1)
    return F.kl_div(student, target[line], reduction="batchmean", log_target=True)


Attend = Callable[[Batch, torch.Tensor], torch.Tensor]
Loss = Callable[[Batch], torch.Tensor]


def run_step(batch: Batch, layers: int, attend: Attend | None, loss: Loss | None) -> list[torch.Tensor]:
    """Gradients of q, k_block, v_block after `layers` attentions, each fed by the one before, and of hidden after the
    loss. None leaves a part out."""
    total, leaves = torch.zeros((), device=batch.q.device), []
    if attend is not None:
        x = batch.q
        for _ in range(layers):
            x = attend(batch, x)
        total = total + x.float().square().mean()
        leaves += [batch.q, batch.k_block, batch.v_block]
    if loss is not None:
        total = total + loss(batch)
        leaves.append(batch.hidden)
    return list(torch.autograd.grad(total, leaves))


def problems(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """What is wrong with our gradients on a small batch: too far from fp64, measured in errors of plain PyTorch."""
    batch = make_batch(replace(shape, vocab_size=500), 6, 8, 100, dtype, device)
    exact = run_step(
        batch.to(torch.float64), 1, partial(our_attention, impl="reference"), partial(our_loss, impl="reference")
    )  # fmt: skip
    actual = run_step(batch, 1, our_attention, our_loss)
    plain = run_step(batch, 1, sdpa_attention(batch), whole_loss)
    for name, *results in zip(("q", "k_block", "v_block", "hidden"), actual, plain, exact):
        try:
            assert_within_budget(*results, factor=10 if dtype == torch.float32 else 2, what=f"gradient of {name}")
        except AssertionError as error:
            yield str(error)


ATTENTIONS = {"ours": lambda _: our_attention, "flex": flex_attention, "sdpa": sdpa_attention}
LOSSES = {"ours": our_loss, "all logits": whole_loss}
# part -> routes: the attention and the loss of each
ROUTES = {
    "attention": [(name, None) for name in ATTENTIONS],
    "loss": [(None, name) for name in LOSSES],
    "step": [("ours", "ours"), ("flex", "ours"), ("flex", "all logits")],
}


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}: heads, width, vocabulary.")] = "qwen3-0.6b",
    anchors: Annotated[int, typer.Option(help="Blocks in the row of text.")] = 256,
    block_size: Annotated[int, typer.Option(min=2, help="K, rows of a block.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of the row of text.")] = 2048,
    layers: Annotated[int | None, typer.Option(min=1, help="Attentions in a step; by default the shape's.")] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    samples: Annotated[int, typer.Option(min=1, help="Samples of each route.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Folder for CSV; on a GPU benchmarks/data by default.")] = None,
) -> None:
    """Time and peak memory, forward and backward, of what a training step does beside plain matrix products.

    Parts: "attention", one layer; "loss", LM head and divergence; "step", the attention of all layers and one loss.
    Routes: ours; FlexAttention and SDPA over one sequence of context and block keys; a loss over all logits at once.
    Peak memory is what a step needs beside its inputs, on a GPU. Our gradients are checked against fp64 first; if one
    is wrong, nothing is timed and the exit code is 1. Ctrl-C leaves a table of what was measured.

    \b
    python -m benchmarks.training                                                         # on a GPU
    python -m benchmarks.training --shape tiny --anchors 8 --length 64 --device cpu       # does it run?
    """
    with one_line_errors():
        require_known("--shape", shape, SHAPES)
        require_known("--dtype", dtype, DTYPES)
        if not 1 <= anchors <= length - block_size:
            raise ValueError(f"--anchors must be in 1..length - block_size = {length - block_size}, but got {anchors}")
        where = resolve_device(device)
    require_green(list(problems(SHAPES[shape], DTYPES[dtype], where)))
    batch = make_batch(SHAPES[shape], anchors, block_size, length, DTYPES[dtype], where)
    depth = layers or SHAPES[shape].num_hidden_layers
    report = Report(f"training_{shape}_{dtype}", where, out)
    row = {"shape": shape, "anchors": anchors, "block_size": block_size, "length": length, "layers": depth}
    try:
        for part, choices in ROUTES.items():
            for attention, loss in choices:
                name = ", ".join(choice for choice in (attention, loss) if choice)
                columns = _timed(batch, depth if part == "step" else 1, attention, loss, where, samples)
                report.add(**row, part=part, route=name, **columns)
    finally:
        if report.rows:
            report.publish(report.markdown(SHOWN))


def _timed(
    batch: Batch, layers: int, attention: str | None, loss: str | None, device: torch.device, samples: int
) -> dict[str, object]:
    """The columns of one route; a note instead of figures where it cannot run here."""
    columns = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "peak_mib", "samples"), "") | {"note": ""}
    try:
        attend = ATTENTIONS[attention](batch) if attention else None
        step = partial(run_step, batch, layers, attend, LOSSES[loss] if loss else None)
        peak = _peak_mib(step, device)
        # not captured: the loss asks the host once how many rows share a chunk of teacher positions
        timing = measure({"": [step]}, device, samples=samples, seconds=10.0, graph=False)[""]
    except Exception as error:  # out of memory, no backward on this device: a result of this route
        if (attention or "ours", loss or "ours") == ("ours", "ours"):
            raise
        print(f"{attention}, {loss}: {error}", file=sys.stderr)
        return columns | {"note": type(error).__name__}
    times = {name: round(getattr(timing, name[:3]) * 1e3, 3) for name in ("p20_ms", "p50_ms", "p80_ms")}
    return columns | times | {"peak_mib": peak, "samples": timing.samples}


def _peak_mib(step: Callable[[], object], device: torch.device) -> float | str:
    """Memory of one step beside what was there before it, after a first one that compiled; "" on a CPU."""
    step()
    if device.type != "cuda":
        return ""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


if __name__ == "__main__":
    typer.run(main)
