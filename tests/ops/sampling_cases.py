"""Logits and per-sequence parameters for tests of the sampling ops."""

from __future__ import annotations

import torch

from orthrus_triton.ops import SamplingTensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sampling_of(batch: int, **values: object) -> SamplingTensors:
    """Parameters of `batch` sequences: each a number or a list with one per sequence; the defaults sample freely."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "sequence": list(range(batch))}
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int32)
    tensors = []
    for (name, default), dtype in zip(defaults.items(), dtypes):
        value = values.get(name, default)
        tensors.append(torch.tensor(value if isinstance(value, list) else [value] * batch, dtype=dtype, device=DEVICE))
    return SamplingTensors(*tensors)


def mixed_sampling(seed: int = 0) -> SamplingTensors:
    """Eight sequences that sample in eight ways, greedy among them."""
    return sampling_of(
        8,
        temperature=[0.0, 1.0, 0.7, 1.5, 1.0, 0.8, 2.0, 1.0],
        top_k=[0, 0, 5, 1, 400, 20, 50, 3],
        top_p=[1.0, 0.9, 1.0, 0.5, 0.05, 0.7, 0.95, 1e-6],
        min_p=[0.0, 0.0, 0.1, 0.0, 0.0, 0.05, 0.3, 1.0],
        seed=[seed, 2**40 + 5, 2**63 - 1, 1, 4, -7, 6, 7],
        sequence=[0, 1, 2, 300, 70_000, 2**31 - 1, 6, 7],
    )


def make_logits(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    """Random logits whose rows have ties, -inf and both zeros."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator) * scale
    logits[..., ::7] = logits[..., ::7].round()
    logits[..., 3] = -torch.inf
    logits[..., 4], logits[..., 5] = 0.0, -0.0
    return logits.to(DEVICE)


def positions_of(batch: int, rows: int, start: int = 65_533) -> torch.Tensor:
    return (torch.arange(rows, dtype=torch.int32, device=DEVICE) + start).expand(batch, rows).contiguous()
