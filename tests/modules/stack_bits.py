"""Comparisons of bits over whole models: K/V caches of two runs, and rows of a verify pass against decode passes."""

from __future__ import annotations

import torch

from orthrus_triton.modules import SharedKVCache
from orthrus_triton.testing import TinyDualViewModel


def differing_caches(ours: SharedKVCache, theirs: SharedKVCache) -> list[str]:
    """Where the committed K/V of two caches differ in a bit; empty if nowhere."""
    lengths = ours.context_len.tolist()
    assert lengths == theirs.context_len.tolist()
    found = []
    for n, (our_layer, their_layer) in enumerate(zip(ours.layers, theirs.layers)):
        for name in ("k", "v"):
            ours_kv, theirs_kv = getattr(our_layer, name), getattr(their_layer, name)
            for b, length in enumerate(lengths):
                same = (ours_kv[b, :, :length] == theirs_kv[b, :, :length]).all(dim=-1).all(dim=0)
                if not same.all():
                    found.append(f"layer {n} {name} of sequence {b} from position {int((~same).nonzero()[0])} on")
    return found


@torch.no_grad()
def assert_verify_rows_are_decode_rows(
    model: TinyDualViewModel, contexts: list[int], rows: int, impl: str, linear_impl: str | None = None
) -> None:
    """Tier A of the whole stack: hidden states, choices and K/V of a verify pass of `rows` rows at ragged contexts are,
    bit for bit, those of one-row passes, and those of a sequence without its neighbours.

    linear_impl is that of the one-row passes alone.
    """
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(1)
    cache = model.new_cache(len(contexts), max(contexts) + rows, rows)
    cache.context_len.copy_(torch.tensor(contexts))
    for layer in cache.layers:
        for b, context in enumerate(contexts):
            for buffer in (layer.k, layer.v):
                buffer[b].fill_(torch.nan)
                buffer[b, :, :context].normal_(generator=generator)
    device = cache.context_len.device
    ids = torch.randint(0, model.vocab_size, (len(contexts), rows), generator=generator, device=device)

    def written() -> list[torch.Tensor]:
        return [
            buffer[b, :, context : context + rows].clone()
            for layer in cache.layers for buffer in (layer.k, layer.v) for b, context in enumerate(contexts)
        ]  # fmt: skip

    single = []
    for row in range(rows):
        view_pass = cache.view_pass("ar", 1, cache.context_len + row, impl=impl, linear_impl=linear_impl)
        single.append(model.forward_view(ids[:, row : row + 1], cache, view_pass))
    hidden_single, written_single = torch.cat(single, dim=1), written()
    hidden = model.forward_view(ids, cache, cache.view_pass("ar", rows, impl=impl))
    assert torch.equal(hidden, hidden_single), "hidden states"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(written(), written_single)), "K/V"
    choices = torch.cat([model.choose(hidden[:, row : row + 1], impl) for row in range(rows)], dim=1)
    assert torch.equal(model.choose(hidden, impl), choices), "choices"
    last = cache.sequences(len(contexts) - 1, 1)
    alone = model.forward_view(ids[-1:], last, last.view_pass("ar", rows, impl=impl))
    assert torch.equal(alone, hidden[-1:]), "without neighbours"
