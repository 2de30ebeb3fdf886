"""Products of few rows with a model's weights: ours, whose row bits ignore the row count, beside the library's.
python -m benchmarks.linear --shape qwen3-8b --rows 1,32"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from benchmarks.bare_read import bare_read
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
from orthrus_triton.ops.int8_product import dequantize_rows
from orthrus_triton.testing import assert_within_budget

CHECKED_COLUMNS = 1024  # of a wide weight, for the fp64 reference
SHOWN = "shape weight N K rows provider p50_us p80_us gb_s of_copy".split()


class Weight(NamedTuple):
    """A weight [N, K] and what is computed with it; `width` is the number of results per row."""

    name: str
    N: int
    K: int
    width: int
    ours: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    library: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def weights_of(shape: Shape) -> Iterator[Weight]:
    """The products of one layer and of the head, plain and with what is fused behind them."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    heads = shape.num_attention_heads * shape.head_dim
    qkv = heads + 2 * shape.num_key_value_heads * shape.head_dim
    library = torch.nn.functional.linear
    for name, N, K in (
        ("qkv", qkv, hidden), ("o", hidden, heads), ("gate_up", 2 * intermediate, hidden),
        ("down", hidden, intermediate), ("lm_head", shape.vocab_size, hidden),
    ):  # fmt: skip
        yield Weight(name, N, K, N, ops.linear, library)
    yield Weight(
        "gate_up+swiglu", 2 * intermediate, hidden, intermediate, ops.linear_swiglu,
        lambda x, weight: _swiglu(library(x, weight)),
    )  # fmt: skip
    yield Weight(
        "lm_head+choice", shape.vocab_size, hidden, 1, ops.lm_head_choice,
        lambda x, weight: library(x, weight).argmax(dim=-1),
    )  # fmt: skip


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def problems(weight: Weight, x: torch.Tensor, matrix: torch.Tensor, rows: list[int]) -> Iterator[str]:
    """What is wrong with our result: too far from fp64, or a row that depends on the number of rows."""
    where = f"{weight.name} [{weight.N}, {weight.K}] {str(x.dtype).removeprefix('torch.')}"
    whole = weight.ours(x, matrix)
    for count in rows:
        if not torch.equal(weight.ours(x[:count], matrix), whole[:count]):
            yield f"{where}: {count} rows have other bits than the same rows among {len(x)}"
    if int8 := _int8_copies(weight, matrix):
        values, scale = int8[0]
        stood_for = dequantize_rows(values, scale, x.dtype)
        alike = torch.cosine_similarity(
            weight.ours(x, values, weight_scale=scale).float(), weight.ours(x, stood_for).float(), dim=-1
        )  # fmt: skip
        if alike.min() < 0.999:
            yield f"{where}: the product in int8 is another one, cosine {alike.min():.4f}"
    if weight.width == weight.N:
        columns = slice(None, None, max(weight.N // CHECKED_COLUMNS, 1))
        try:
            assert_within_budget(
                whole[:, columns], weight.library(x, matrix)[:, columns], x.double() @ matrix[columns].double().T
            )
        except AssertionError as error:
            yield f"{where}: {error}"
    else:
        unfused = ops.linear(x, matrix, out_dtype=torch.float32 if weight.width == 1 else None)
        if not torch.equal(whole, ops.greedy_choice(unfused) if weight.width == 1 else ops.swiglu(unfused)):
            yield f"{where}: other bits than the two ops it stands for"


def _int8_copies(weight: Weight, matrix: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Values and scales, more of them than the cache holds; none for the head, which drafts read as it is."""
    if weight.name.startswith("lm_head"):
        return []
    values, scale = ops.quantize_rows(matrix)
    return [(values.clone(), scale) for _ in range(copies_beyond_cache(values.nbytes, matrix.device))]


def bytes_moved(provider: str, matrix: torch.Tensor, int8: list[tuple[torch.Tensor, torch.Tensor]], around: int) -> int:
    """What a provider has to read and write: its form of the weight, and but for the bare read x and the result."""
    if provider == "bare read":
        return matrix.nbytes
    return around + (sum(part.nbytes for part in int8[0]) if provider == "ours, int8" else matrix.nbytes)


def main(
    shape: Annotated[str, typer.Option(help=f"One or several of {', '.join(SHAPES)}.")] = (
        "qwen3-0.6b,qwen3-1.7b,qwen3-8b"
    ),
    rows: Annotated[str, typer.Option(help="Rows of x, one or several.")] = "1,8,32,128,256",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    samples: Annotated[int, typer.Option(min=1, help="Samples of each cell.")] = 50,
    out: Annotated[
        Path | None, typer.Option(help="Folder for CSV and chart; on a GPU benchmarks/data by default.")
    ] = None,
) -> None:
    """Time, GB/s and share of copy bandwidth of every weight of a shape, ours against the library (cuBLAS on a GPU).

    A product of few rows is as fast as its weight can be read, so the yardstick is a large copy on the same device:
    of_copy is (weight + x + result) / time over that. On a GPU "bare read" is a kernel that only reads the weight, and
    counts no more: a small one is never read at copy bandwidth. "ours, int8" reads the copies that drafts may read.
    Time is CUDA-graph replay with cold L2. Each weight's results are checked first (fp64, and equal row bits for all
    row counts); if one is wrong, nothing is timed and the exit code is 1.

    \b
    python -m benchmarks.linear                              # on a GPU
    python -m benchmarks.linear --shape qwen3-8b --rows 1,32 --dtype fp16
    python -m benchmarks.linear --shape tiny --device cpu    # does it run? the torch implementation, in seconds
    """
    with one_line_errors():
        require_known("--dtype", dtype, DTYPES)
        names = require_known("--shape", shape, SHAPES)
        counts = whole_numbers("--rows", rows)
        where = resolve_device(device)
    cells = [(name, weight) for name in names for weight in weights_of(SHAPES[name])]
    generator = torch.Generator(where).manual_seed(0)

    def randn(count: int, depth: int) -> torch.Tensor:
        return torch.randn(count, depth, generator=generator, device=where, dtype=DTYPES[dtype])

    def new_weight(weight: Weight) -> torch.Tensor:
        return randn(weight.N, weight.K) * weight.K**-0.5

    with torch.no_grad():
        require_green([
            problem for _, weight in cells
            for problem in problems(weight, randn(max(*counts, 33), weight.K), new_weight(weight), counts)
        ])  # fmt: skip
        bandwidth = copy_bandwidth(where)
        report = Report(f"linear_{dtype}", where, out)
        for name, weight in cells:
            first = new_weight(weight)
            matrices = [first, *(first.clone() for _ in range(copies_beyond_cache(first.nbytes, where) - 1))]
            int8 = _int8_copies(weight, first)
            for count in counts:
                x = randn(count, weight.K)
                providers = {
                    provider: [partial(run, x, matrix) for matrix in matrices]
                    for provider, run in (("ours", weight.ours), ("library", weight.library))
                }
                if int8:
                    providers["ours, int8"] = [
                        partial(weight.ours, x, values, weight_scale=scale) for values, scale in int8
                    ]  # fmt: skip
                if where.type == "cuda" and count == counts[0]:  # the same for any number of rows
                    providers["bare read"] = [partial(bare_read, matrix) for matrix in matrices]
                timings = measure(providers, where, samples=samples)
                around = x.nbytes + count * weight.width * (8 if weight.width == 1 else x.itemsize)
                for provider, timing in timings.items():
                    nbytes = bytes_moved(provider, first, int8, around)
                    report.add(
                        shape=name, weight=weight.name, N=weight.N, K=weight.K, rows=count, dtype=dtype,
                        provider=provider, **timing.columns(), gb_s=round(nbytes / timing.p50 / 1e9, 1),
                        of_copy=round(nbytes / timing.p50 / bandwidth, 3), copy_gb_s=round(bandwidth / 1e9, 1),
                        samples=timing.samples,
                    )  # fmt: skip
    report.publish(report.markdown(SHOWN))
    report.write_chart(
        "rows", "of_copy", lambda row: f"{row['shape']} {row['weight']}, {row['provider']}",
        x_label="rows", y_label="share of copy bandwidth",
        rows=[row for row in report.rows if row["shape"] == cells[-1][0] and "+" not in row["weight"]],
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
