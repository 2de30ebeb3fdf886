"""A kernel that reads a tensor and does nothing with it: what is left of copy bandwidth when so few bytes are moved at
once that a launch's beginning and end show. No product of few rows can be faster."""

from __future__ import annotations

import torch

from orthrus_triton._triton import cdiv, tl, triton

BLOCK, NUM_STAGES, PROGRAMS_PER_SM = 2048, 4, 8  # the fastest of 24 ways on an H200, for 33, 100 and 200 MB


@triton.jit
def read_kernel(x_ptr, out_ptr, numel, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, NUM_STAGES: tl.constexpr):
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in tl.range(tl.program_id(0) * BLOCK, numel, PROGRAMS * BLOCK, num_stages=NUM_STAGES):
        offsets = start + tl.arange(0, BLOCK)
        # [BLOCK]
        x = tl.load(x_ptr + offsets, mask=offsets < numel, other=float("-inf"))
        largest = tl.maximum(largest, x.to(tl.float32))
    tl.store(out_ptr + tl.program_id(0), tl.max(largest, axis=0))


def bare_read(x: torch.Tensor) -> torch.Tensor:
    """The largest element of a contiguous x on a GPU, as each program saw it, [programs] fp32; below 2**31 elements."""
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(PROGRAMS_PER_SM * sms, cdiv(x.numel(), BLOCK))
    out = torch.empty(programs, dtype=torch.float32, device=x.device)
    read_kernel[(programs,)](x, out, x.numel(), BLOCK=BLOCK, PROGRAMS=programs, NUM_STAGES=NUM_STAGES, num_warps=4)
    return out
