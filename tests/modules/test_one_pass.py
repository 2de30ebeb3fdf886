"""The cycle of one pass: the tokens of AR decoding, and the drafts that a pass of their own would make."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder, SamplingParams, SharedKVCache
from orthrus_triton.modules.choose import choose_drafts
from orthrus_triton.testing import TinyDualViewModel
from tests.modules.ledger_model import LedgerModel, oracle

FORMS = [{"anchor_rows": 0}, {"anchor_rows": 1}]


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> TinyDualViewModel:
    """A model whose text does not settle into a loop, and whose masks say what the AR view says now and then."""
    torch.manual_seed(seed)
    model = TinyDualViewModel(vocab_size=13, **options).to(dtype)
    for layer in model.layers:
        layer.self_attn.o_proj.weight.data *= 4
        layer.self_attn.copy_ar_to_diffusion()
    return model


def prompts_of(model: TinyDualViewModel, *lengths: int) -> list[torch.Tensor]:
    return [torch.randint(0, model.vocab_size, (length,)) for length in lengths]


def bits(decoder: ConsensusDecoder) -> list[torch.Tensor]:
    """K and V of every token in the cache."""
    lengths = decoder.cache.context_len.tolist()
    return [buffer[b, :, :n] for layer in decoder.cache.layers for buffer in layer[:2] for b, n in enumerate(lengths)]


def test_the_plan_of_the_pass() -> None:
    cache = SharedKVCache(1, 1, 8, batch_size=2, max_len=64, block_size=9, dtype=torch.float32)
    cache.context_len.copy_(torch.tensor([5, 20]))
    for anchor_rows, rows in ((0, 3), (1, 2)):
        verify, drafts = cache.verify_and_draft_pass(3, anchor_rows).parts
        assert verify.positions.tolist() == [[5, 6, 7], [20, 21, 22]]
        assert verify.key_limit.tolist() == [[6, 7, 8], [21, 22, 23]]
        assert drafts.block_rows == rows and drafts.slots.tolist() == [list(range(3 * rows))] * 2
        # block g stands where row g does, its masks behind it, and sees what is cached before it
        before = torch.tensor([[5, 6, 7], [20, 21, 22]])[..., None] + anchor_rows
        assert torch.equal(drafts.key_limit.view(2, 3, rows), before.expand(-1, -1, rows).int())
        assert torch.equal(drafts.positions.view(2, 3, rows), (before + torch.arange(rows)).int())
    with pytest.raises(ValueError, match=r"block_size \* 4 must be at most 9, the cache's scratch rows"):
        cache.verify_and_draft_pass(4)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32), ({}, torch.bfloat16), ({"qk_norm": True}, torch.bfloat16), ({"window": 9}, torch.float32),
        ({"window": 3, "qkv_bias": True}, torch.bfloat16), ({"view_rank": 4}, torch.float32),
        ({"num_kv_heads": 4}, torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_tokens_and_cache_are_those_of_ar_decoding(form: dict, options: dict, dtype: torch.dtype) -> None:
    model = make_model(dtype, **form, **options)
    prompts = prompts_of(model, 3, 40, 11)
    ar = ConsensusDecoder(model, mode="ar", impl="torch", batch_invariant_prefill=True)
    expected = ar.generate(prompts, max_new_tokens=50).sequences
    accepted = 0
    for block_size in (2, 5, 8):
        decoder = ConsensusDecoder(
            model, one_pass=True, block_size=block_size, impl="torch", batch_invariant_prefill=True
        )
        output = decoder.generate(prompts, max_new_tokens=50)
        assert [ids.tolist() for ids in output.sequences] == [ids.tolist() for ids in expected]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(bits(decoder), bits(ar), strict=True))
        accepted += sum(output.stats.accepted_histogram[1:])
        assert output.stats.forward_passes == 1 + output.stats.cycles
    assert accepted > 0


@pytest.mark.parametrize(("dtype", "anchor_rows"), [(torch.float32, 0), (torch.bfloat16, 1)], ids=str)
def test_triton_gives_the_tokens_of_ar_decoding(dtype: torch.dtype, anchor_rows: int) -> None:
    shape = {"num_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    model = make_model(dtype, anchor_rows=anchor_rows, **shape)
    prompts = prompts_of(model, 3)
    ar = ConsensusDecoder(model, mode="ar", impl="triton").generate(prompts, max_new_tokens=5)
    decoder = ConsensusDecoder(model, one_pass=True, block_size=3, impl="triton")
    output = decoder.generate(prompts, max_new_tokens=5)
    assert [ids.tolist() for ids in output.sequences] == [ids.tolist() for ids in ar.sequences]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"qk_norm": True}], ids=str)
def test_drafts_are_those_of_a_pass_of_their_own(form: dict, options: dict) -> None:
    """After each cycle: what a draft pass from the last kept row proposes behind the bonus token."""
    model, K = make_model(**form, **options), 5
    decoder = ConsensusDecoder(model, one_pass=True, block_size=K, impl="torch")
    run = decoder.open(2, 100)
    for b, prompt in enumerate(prompts_of(model, 12, 30)):
        run.admit(b, prompt, 40)
    run.poll(lag=0)
    first, compared = model.anchor_rows, 0
    while not run.done:
        run.advance()
        live = [b for b, slot in enumerate(run.slots) if not slot.finished]
        cache, state = decoder.cache, decoder._state
        drafted = state.block[:, 1:K].clone()
        lengths, block, kv = cache.context_len.clone(), state.block.clone(), [layer.k.clone() for layer in cache.layers]
        cache.context_len -= 1  # the last row kept is the anchor again
        state.block.fill_(model.mask_token_id)
        text = [torch.tensor([*slot.prompt.tolist(), *slot.tokens]) for slot in run.slots]
        state.block[:, 0] = torch.stack([ids[-2] for ids in text])
        rows, hidden, view_pass = decoder._draft_pass(cache, state, K, "torch")
        alone = choose_drafts(decoder, hidden, rows[:, 0], state, view_pass, first)[:, 1:]
        # a block of K rows has one prediction less behind the bonus token where the diffusion view reads the anchor
        width = alone.shape[1]
        for b in live:
            assert drafted[b, :width].tolist() == alone[b].clamp(min=0).tolist()
            compared += 1
        cache.context_len.copy_(lengths)
        state.block.copy_(block)
        for layer, k in zip(cache.layers, kv):
            layer.k.copy_(k)
    assert compared > 10


def test_a_finished_slot_keeps_its_block() -> None:
    model = make_model()
    decoder = ConsensusDecoder(model, one_pass=True, impl="torch")
    run = decoder.open(2, 100)
    for b, prompt in enumerate(prompts_of(model, 5, 6)):
        run.admit(b, prompt, 2 if b == 0 else 30)
    while not run.slots[0].finished:
        run.advance()
    before = decoder._state.block[0].clone()
    run.advance()
    assert torch.equal(decoder._state.block[0], before) and not torch.equal(decoder._state.block[1], before)


@pytest.mark.parametrize("anchor_rows", [0, 1])
def test_a_function_of_a_grammar_never_sees_a_text_that_breaks_it(anchor_rows: int) -> None:
    """The masks that a prefill leaves in the block to verify, and drafts like them, are no text of any grammar."""
    model, prompt = LedgerModel(17, anchor_rows=anchor_rows), torch.tensor([1, 2])

    def even_then_odd(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = ids[0, 2:]
        assert torch.equal(new % 2, torch.arange(len(new)) % 2), f"a text that breaks the grammar: {new.tolist()}"
        return scores.masked_fill(torch.arange(17) % 2 != len(new) % 2, -torch.inf)

    params = SamplingParams(logits_processor=even_then_odd)
    decoder = ConsensusDecoder(model, one_pass=True, impl="torch")
    output = decoder.generate([prompt], max_new_tokens=20, params=[params])
    assert output.sequences[0].tolist() == [1, 2, *oracle(model, [1, 2], 20, params)]
    assert sum(output.stats.accepted_histogram[1:]) > 0


@pytest.mark.parametrize("anchor_rows", [0, 1])
def test_a_rule_hears_of_the_drafts_that_were_accepted(anchor_rows: int) -> None:
    model, heard = LedgerModel(17, anchor_rows=anchor_rows), []
    decoder = ConsensusDecoder(model, one_pass=True, impl="torch")
    run = decoder.open(1, 64)
    run._rule(1).observe = lambda size, seconds, accepted: heard.extend(accepted)
    run.admit(0, torch.tensor([3]), 40)
    while not run.done:
        run.advance()
    counts = decoder._state.accepted_histogram[0].tolist()
    # the last cycle's sequence did not go on
    assert len(heard) == sum(counts) - 1 and all(0 <= counts[n] - heard.count(n) <= 1 for n in range(len(counts)))


def test_options_that_do_not_go_together_are_named() -> None:
    model, prompt = make_model(block_size=16), [torch.tensor([1, 2])]
    assert ConsensusDecoder(model, one_pass=True).block_size == 8
    assert ConsensusDecoder(make_model(block_size=4), one_pass=True).block_size == 4
    with pytest.raises(ValueError, match="block_size must be a number of rows with one_pass=True, but got 'auto'"):
        ConsensusDecoder(model, one_pass=True, block_size="auto")
    with pytest.raises(ValueError, match=r"in 2..16, the size the view was made for, but got 17"):
        ConsensusDecoder(model, one_pass=True, block_size=17)
    decoder = ConsensusDecoder(model, one_pass=True)
    with pytest.raises(ValueError, match="sampling must be 'coupled' with one_pass=True, but got 'rejection'"):
        decoder.generate(prompt, max_new_tokens=3, temperature=1.0, sampling="rejection")
    with pytest.raises(ValueError, match="block_size must be a number of rows"):
        decoder.generate(prompt, max_new_tokens=3, block_size="auto")
    assert len(decoder.generate(prompt, max_new_tokens=3, block_size=16).sequences[0]) == 5
