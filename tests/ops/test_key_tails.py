"""A last KV tile that is cut short must not move a bit of any row."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton import ops
from orthrus_triton.ops.dual_view_attention import key_tails
from orthrus_triton.ops.dual_view_attention.key_tails import KV_TILE, safe_tails, tiles_end

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cut_tiles_have_the_bits_of_whole_ones(dtype, head_dim, without_c, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(1, 3, 1536, head_dim, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn(1, 8, 9, head_dim, generator=generator).to(dtype)
    for context_len in (1, 60, 130, 200, 310, 400, 505, 580, 1100):
        limit = (context_len + 1 + torch.arange(8, dtype=torch.int32))[None]
        cut = ops.dual_view_attention(q, k, v, limit, impl="torch")
        with monkeypatch.context() as patch:
            patch.setattr(key_tails, "safe_tails", lambda *_: (KV_TILE,))
            whole = ops.dual_view_attention(q, k, v, limit.clone(), impl="torch")
        assert torch.equal(cut, whole), context_len


def test_only_as_many_keys_as_needed_are_walked(monkeypatch):
    asked = []
    monkeypatch.setattr(key_tails, "safe_tails", lambda *of: asked.append(of) or (128, 384, KV_TILE))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    of = (torch.float32, 64, CPU)
    ends = {longest: tiles_end(longest, *of) for longest in (0, 1, 128, 129, 385, 512, 513, 1024, 1300)}
    assert ends == {0: 0, 1: 128, 128: 128, 129: 384, 385: 512, 512: 512, 513: 640, 1024: 1024, 1300: 1408}
    assert set(asked) == {(torch.float32, 64, 3)}  # each number of threads is tested by itself
    assert tiles_end(5, torch.float32, 64, torch.device("cuda")) == KV_TILE  # what a GPU's library does is not tested


def test_a_whole_tile_is_always_safe():
    tails = safe_tails(torch.float32, 64, torch.get_num_threads())
    assert tails[-1] == KV_TILE and list(tails) == sorted(set(tails)) and all(tail % 64 == 0 for tail in tails)


@pytest.mark.parametrize("of_first", [True, False], ids=["the only tile", "a tile behind another"])
def test_a_tail_that_moves_a_bit_is_not_taken(of_first, monkeypatch):
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def uneven(q, k, *rest, **options):
        out, lse = attend(q, k, *rest, **options)
        is_cut = k.shape[2] % KV_TILE != 0 and (k.shape[2] < KV_TILE) == of_first
        return (out * (1 + 2**-20) if is_cut else out, lse)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", uneven)
    assert not any(key_tails._has_whole_bits(tail, torch.float32, 16) for tail in range(64, KV_TILE, 64))
