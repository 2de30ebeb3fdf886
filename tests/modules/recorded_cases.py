"""A small model, prompts, and what a decoder has recorded: for the tests of recorded passes."""

from __future__ import annotations

import torch

from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.testing import TinyDualViewModel

PROMPTS = [torch.arange(1, 12), torch.tensor([7]), torch.arange(30, 50)]


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> TinyDualViewModel:
    torch.manual_seed(seed)
    model = TinyDualViewModel(**options).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 2:
            parameter.normal_(std=0.15)
    return model


def replays(decoder: ConsensusDecoder) -> list:
    return [recorded for recorded in decoder.cache.recorded._passes.values() if recorded.is_whole]
