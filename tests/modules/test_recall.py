"""A chain follows what is recalled as long as it does; a decoder recalls from its own text, prompt and output."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton import ops
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.modules.batch_prefill import BatchPrefill
from orthrus_triton.modules.draft_chain import DraftChain, Recalled
from tests.models.tiny_bases import base_config, build_base, random_ids, randomise_view


def test_the_chain_follows_what_it_recalls_as_long_as_it_does() -> None:
    torch.manual_seed(3)
    chain, (T, H, V) = DraftChain(24, 10), (5, 24, 300)
    hidden, head, own = torch.randn(1, T, H), torch.randn(V, H), torch.tensor([7])
    logits = hidden @ head.T
    plain = chain.choose(hidden, logits, own, head, head.__getitem__)[0].tolist()
    said = logits.argsort(-1)[0, :, 100].tolist()  # not among the candidates by themselves
    sure = torch.full((1, T), 1e4)
    recalled = Recalled(torch.tensor([said]), sure)
    with torch.no_grad():
        assert chain.choose(hidden, logits, own, head, head.__getitem__, None, recalled)[0].tolist() == said
        # the first is outbid, so nothing behind it was ever said after what stands there
        sure[0, 0] = 0
        assert chain.choose(hidden, logits, own, head, head.__getitem__, None, recalled)[0].tolist() == plain


def test_a_recalled_token_has_its_own_logit_and_the_bonus() -> None:
    chain, (T, V) = DraftChain(24, 10), (3, 100)
    chain.reset()
    logits = torch.arange(V) / -1000 - 10.0 * (torch.arange(V) >= 40)  # the last sixty are ten behind the others
    hidden, weight, said = torch.zeros(1, T, 24), torch.zeros(V, 24), torch.tensor([[70, 80, 90]])
    for bonus, drafted in ((5.0, [0, 0, 0]), (11.0, [70, 80, 90])):
        recalled = Recalled(said, torch.full((1, T), bonus))
        found = chain.choose(
            hidden, logits.expand(1, T, V), torch.tensor([7]), weight, weight.__getitem__, None, recalled
        )
        assert found[0].tolist() == drafted


@pytest.mark.parametrize("together", [False, True], ids=["one_by_one", "together"])
@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
def test_a_decoder_looks_back_at_prompt_and_output(
    anchor_view: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build_base(base_config("llama", eos_token_id=None))
    model = randomise_view(OrthrusForCausalLM.from_base(base, block_size=5, anchor_view=anchor_view, chain_width=16))
    seen: list[tuple[list[int], int]] = []

    def watched(prompt_ids, output_ids, prompt_len, newest, last, count: int, impl: str) -> tuple:
        assert count == 4
        for b, (length, end) in enumerate(zip(prompt_len.tolist(), last.tolist())):
            text = prompt_ids[b, :length].tolist() + output_ids[b].tolist()
            seen.append((text[:end] + [int(newest[b])], b))
        return recall(prompt_ids, output_ids, prompt_len, newest, last, count, impl=impl)

    recall = ops.recall
    monkeypatch.setattr(ops, "recall", watched)
    prompts = [random_ids(length, seed=length)[0] for length in (5, 11)]
    decoder = ConsensusDecoder(model, impl="torch")
    run = decoder.open(2, 64, eos_token_id=[])
    if together:
        run.admit_together([0, 1], prompts, 20, BatchPrefill(model, 16, 2))
    else:
        for b in range(2):
            run.admit(b, prompts[b], 20)
    while not run.done:
        run.advance()
    said = [prompt.tolist() + slot.tokens for prompt, slot in zip(prompts, run.slots)]
    assert len(seen) >= 2 * 20 // 6
    # a sequence that has ended drafts on until its neighbour has, and nobody looks
    assert all(ids == said[b][: len(ids)] for ids, b in seen if len(ids) <= len(said[b]))
    known = 5 + (anchor_view == "ar") + (not together)
    assert min(len(ids) for ids, b in seen if b == 0) == known
