"""Launches of the sampling kernels for the compile-only check, as a vocabulary of 152 thousand makes them."""

from __future__ import annotations

import torch

from orthrus_triton.ops.gumbel import CHOICE
from orthrus_triton.ops.logits_filter import SamplingTensors
from orthrus_triton.ops.process_logits import ProcessorTensors, launch_process_logits
from orthrus_triton.ops.recall import launch_recall
from orthrus_triton.ops.rejection import launch_rejection_choice
from orthrus_triton.ops.sampling import launch_sample_choice
from orthrus_triton.ops.void_rows import launch_void_rows

B, K, V = 2, 8, 151_936
FLOAT, INT, LONG = torch.float32, torch.int32, torch.int64


def meta(*shape: int, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def sampling() -> None:
    """Each kernel once; call inside `record_launches`."""
    how = SamplingTensors(meta(B), meta(B, dtype=INT), meta(B), meta(B), meta(B, dtype=LONG), meta(B, dtype=INT))
    processors = ProcessorTensors(meta(B), meta(B), meta(B), meta(B, dtype=INT), meta(B, V), meta(B, V + 1, dtype=INT))
    logits, ids, positions = meta(B, K, V), meta(B, K, dtype=LONG), meta(B, K, dtype=INT)
    launch_sample_choice(logits, positions, *how, CHOICE)
    launch_rejection_choice(logits, meta(B, K - 1, V), ids, positions, *how)
    launch_process_logits(logits, positions, ids, meta(8, dtype=LONG), *processors)
    launch_recall(
        meta(B, 512, dtype=LONG), meta(B, 512, dtype=LONG), meta(B, dtype=INT), ids[:, 0], meta(B, dtype=INT), K
    )
    launch_void_rows(ids, meta(B, K, 4096, dtype=torch.bfloat16))
