"""Attention of one decode pass over a long cache: ours beside SDPA, FlexAttention and, where installed, flash-attn.
python -m benchmarks.attention --shape qwen3-8b --contexts 1024,32768 --rows 1,32"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from benchmarks.common import (
    DTYPES,
    Report,
    copies_beyond_cache,
    copy_bandwidth,
    measure,
    require_green,
    require_known,
    whole_numbers,
)
from benchmarks.shapes import SHAPES, Shape
from orthrus_triton import ops
from orthrus_triton.cli.common import one_line_errors, resolve_device
from orthrus_triton.modules.kv_cache import CAPACITY_QUANTUM
from orthrus_triton.testing import assert_within_budget

CONTEXTS = "1024,2048,8192,32768,131072"
REFERENCE_KEYS = 8192  # longest context compared with fp64, whose scores and keys take memory
SHOWN = "shape context rows provider p50_us p80_us floor_us of_floor gb_s of_copy note".split()
SLOW_TO_COMPILE = "flex"  # measured last, when all others have their rows


class Pass(NamedTuple):
    """q [1, T, HQ, D], the cache [1, HKV, S, D] and the context: row t sees the first context + t + 1 of its rows."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    context: int

    @property
    def seen(self) -> int:
        """Cache rows that the last query row sees."""
        return self.context + self.q.shape[1]

    def nbytes(self) -> int:
        """K and V that must be read, q, and the result."""
        keys = self.k.shape[1] * self.seen * self.k.shape[3] * self.k.itemsize
        return 2 * keys + 2 * self.q.nbytes


Attention = Callable[[], torch.Tensor]


def ours(load: Pass) -> Attention:
    """The verify pass (or, for one row, AR decode), lengths on the device."""
    rows = torch.arange(1, load.q.shape[1] + 1, dtype=torch.int32, device=load.q.device)[None]
    key_limit = load.context + rows
    return lambda: ops.dual_view_attention(load.q, load.k, load.v, key_limit)


def sdpa(load: Pass) -> Attention:
    """torch's scaled_dot_product_attention over exactly the rows that count; it chooses its kernel."""
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = load.q.transpose(1, 2), load.k[:, :, : load.seen], load.v[:, :, : load.seen]
    mask = causal_lower_right(q.shape[2], load.seen) if q.shape[2] > 1 else None
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def flex(load: Pass) -> Attention:
    """FlexAttention, compiled once per number of rows and for any context, as decoding needs it: one compiled for a
    single length would be compiled anew for every token."""
    from torch._dynamo import mark_static

    q, k, v = load.q.transpose(1, 2).contiguous(), load.k[:, :, : load.seen], load.v[:, :, : load.seen]
    # few fixed rows of fixed heads have a kernel of their own
    for tensor, fixed in ((q, (0, 1, 2, 3)), (k, (0, 1, 3)), (v, (0, 1, 3))):
        for dim in fixed:
            mark_static(tensor, dim)
    attend, mask = _compiled_flex(q.shape[2]), _flex_mask(load.context, q.shape[2], q.device)
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


@cache
def _compiled_flex(rows: int) -> Callable:
    import torch._dynamo
    import torch._inductor.config
    from torch.nn.attention.flex_attention import flex_attention

    torch._inductor.config.compile_threads = 1  # for one kernel, starting a pool of compilers takes longer
    torch._dynamo.config.recompile_limit = 64
    ways = [torch.compile(flex_attention, dynamic=dynamic) for dynamic in (True, False)]

    def attend(*arguments: object, **options: object) -> torch.Tensor:
        try:
            return ways[0](*arguments, **options)
        except Exception as error:  # not every version of torch can, for any length
            if len(ways) == 1:
                raise
            print(f"flex, {rows} rows: compiled for each length, since {error}"[:500], file=sys.stderr)
            del ways[0]
            return ways[0](*arguments, **options)

    return attend


@lru_cache(maxsize=1)
def _flex_mask(context: int, rows: int, device: torch.device) -> object:
    """One for all copies of a cell's data."""
    from torch.nn.attention.flex_attention import create_block_mask

    last = torch.tensor(context, device=device)  # a number would be compiled in

    def visible(_b, _h, row, key):
        return key <= last + row

    return create_block_mask(visible, None, None, rows, context + rows, device=device)


def flash_attn(load: Pass) -> Attention:
    """flash-attn's decode kernel over a cache in its own layout."""
    from flash_attn import flash_attn_with_kvcache

    k, v = load.k.transpose(1, 2).contiguous(), load.v.transpose(1, 2).contiguous()
    lengths = torch.full((1,), load.seen, dtype=torch.int32, device=load.q.device)
    return lambda: flash_attn_with_kvcache(load.q, k, v, cache_seqlens=lengths, causal=True)


def providers(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[Pass], Attention]]:
    """Those that can run here."""
    found = {"ours": ours, "sdpa": sdpa}
    if device.type == "cuda":
        found["flex"] = flex
        if importlib.util.find_spec("flash_attn") and dtype != torch.float32:
            found["flash_attn"] = flash_attn
    return found


def make_pass(shape: Shape, context: int, rows: int, dtype: torch.dtype, device: torch.device) -> Pass:
    """Random q, K and V; cache rows beyond the last one seen are NaN."""
    generator = torch.Generator(device).manual_seed(context)
    seen, heads, head_dim = context + rows, shape.num_key_value_heads, shape.head_dim
    capacity = -(-seen // CAPACITY_QUANTUM) * CAPACITY_QUANTUM

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    q = randn(1, rows, shape.num_attention_heads, head_dim)
    k, v = randn(1, heads, capacity, head_dim), randn(1, heads, capacity, head_dim)
    k[:, :, seen:], v[:, :, seen:] = torch.nan, torch.nan
    return Pass(q, k, v, context)


def problems(load: Pass) -> Iterator[str]:
    """What is wrong with our result: too far from fp64, or a row that depends on the rows beside it."""
    where = f"context {load.context}, {load.q.shape[1]} rows"
    whole = ours(load)()
    for row in {0, load.q.shape[1] // 2, load.q.shape[1] - 1}:
        alone = Pass(load.q[:, row : row + 1], load.k, load.v, load.context + row)
        if not torch.equal(ours(alone)()[:, 0], whole[:, row]):
            yield f"{where}: row {row} alone has other bits"
    if load.context <= REFERENCE_KEYS:
        limits = torch.arange(load.context + 1, load.seen + 1, dtype=torch.int32, device=load.q.device)[None]
        exact = ops.dual_view_attention(
            load.q.double(), load.k.double(), load.v.double(), limits, impl="reference"
        )  # fmt: skip
        try:
            assert_within_budget(whole, sdpa(load)(), exact)
        except AssertionError as error:
            yield f"{where}: {error}"


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}: its heads.")] = "qwen3-8b",
    contexts: Annotated[str | None, typer.Option(help=f"Tokens in the cache; by default {CONTEXTS}.")] = None,
    rows: Annotated[str, typer.Option(help="Query rows: 1 is AR decode, the block size is verify.")] = "1,32",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    samples: Annotated[int, typer.Option(min=1, help="Samples of each cell.")] = 50,
    out: Annotated[
        Path | None, typer.Option(help="Folder for CSV and chart; on a GPU benchmarks/data by default.")
    ] = None,
) -> None:
    """Time, GB/s and share of copy bandwidth of one layer's attention over a long cache, ours against others.

    Decode attention is as fast as K and V can be read, so the yardstick is a large copy on the same device: of_copy is
    (K + V + q + result) / time over that, floor_us what they would take at that speed, of_floor the time in floors.
    Time is CUDA-graph replay with cold L2. Our results are checked first (fp64 up to 8k, and equal row bits at every
    length); if one is wrong, nothing is timed and the exit code is 1. Others get the cache cut to the rows that count;
    ours gets it whole, with NaN behind them. A row is written when it is measured: Ctrl-C leaves a table of those.

    \b
    python -m benchmarks.attention                              # on a GPU
    python -m benchmarks.attention --contexts 4096,131072 --rows 1,8,32
    python -m benchmarks.attention --shape tiny --device cpu    # does it run? the torch implementation, in seconds
    """
    with one_line_errors():
        require_known("--dtype", dtype, DTYPES)
        require_known("--shape", shape, SHAPES)
        lengths = whole_numbers("--contexts", contexts or ("100,600" if shape == "tiny" else CONTEXTS))
        counts = whole_numbers("--rows", rows)
        where = resolve_device(device)
    cells = [(length, count) for length in lengths for count in counts]

    def new_pass(length: int, count: int) -> Pass:
        return make_pass(SHAPES[shape], length, count, DTYPES[dtype], where)

    with torch.no_grad():
        require_green([problem for cell in cells for problem in problems(new_pass(*cell))])
        bandwidth = copy_bandwidth(where)
        report = Report(f"attention_{dtype}", where, out)
        offered = providers(where, DTYPES[dtype])
        slow = {name: make for name, make in offered.items() if name == SLOW_TO_COMPILE}
        quick = {name: make for name, make in offered.items() if name not in slow}
        try:
            for makers, (length, count) in product((quick, slow) if slow else (quick,), cells):
                first = new_pass(length, count)
                copies = copies_beyond_cache(first.nbytes(), where)
                loads = [first, *(Pass(first.q, first.k.clone(), first.v.clone(), length) for _ in range(copies - 1))]
                row = {"shape": shape, "context": length, "rows": count, "dtype": dtype}
                for provider, make in makers.items():
                    row |= {"provider": provider, "copy_gb_s": round(bandwidth / 1e9, 1)}
                    report.add(**row, **_timed(make, loads, where, samples, bandwidth))
                    said = report.rows[-1]["p50_us"] or report.rows[-1]["note"]
                    print(f"{provider}, context {length}, {count} rows: {said}", file=sys.stderr, flush=True)
        finally:
            _publish(report)


def _publish(report: Report) -> None:
    """Table, files and chart of the rows there are."""
    if not report.rows:
        return
    report.rows.sort(key=lambda row: (row["context"], row["rows"]))
    report.write_csv()
    report.publish(report.markdown(SHOWN))
    report.write_chart(
        "context", "of_copy", lambda row: f"{row['provider']}, {row['rows']} rows",
        x_label="tokens in the cache", y_label="share of copy bandwidth",
        rows=[row for row in report.rows if row["of_copy"] != ""],
    )  # fmt: skip


def _timed(
    make: Callable[[Pass], Attention], loads: list[Pass], device: torch.device, samples: int, bandwidth: float
) -> dict[str, object]:
    """The columns of one provider in one cell; a note instead of figures where it cannot run or computes otherwise."""
    measured = ("p20_us", "p50_us", "p80_us", "floor_us", "of_floor", "gb_s", "of_copy", "samples")
    columns = dict.fromkeys(measured, "") | {"note": ""}
    try:
        steps = [make(load) for load in loads]
        _require_near(steps[0](), ours(loads[0])())
        timing = measure({"": steps}, device, samples=samples, seconds=0.5)[""]
    except Exception as error:  # somebody else's kernel: whatever it raises is a result of this cell
        if make is ours:
            raise
        print(f"{make.__name__} at context {loads[0].context}: {error}", file=sys.stderr)
        return columns | {"note": type(error).__name__}
    nbytes = loads[0].nbytes()
    return columns | timing.columns() | {
        "floor_us": round(1e6 * nbytes / bandwidth, 2), "of_floor": round(timing.p50 * bandwidth / nbytes, 3),
        "gb_s": round(nbytes / timing.p50 / 1e9, 1), "of_copy": round(nbytes / timing.p50 / bandwidth, 3),
        "samples": timing.samples,
    }  # fmt: skip


def _require_near(theirs: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((theirs.float() - expected.float()).norm() / expected.float().norm())
    if not error < 0.05:  # far above rounding, far below a wrong mask
        raise ValueError(f"another result: relative error {error:.3g}")


if __name__ == "__main__":
    typer.run(main)
