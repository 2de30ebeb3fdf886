"""Logits of tokens that were generated, computed afterwards: they are the ones that the tokens were chosen from."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.modules import reread as reread_module
from orthrus_triton.modules.batch_prefill import BatchPrefill
from tests.modules.test_consensus_decoder import DEVICE, MODELS, VOCAB, make_model, prompts_of


def spied_logits(decoder: ConsensusDecoder, prompt: torch.Tensor, tokens: int, monkeypatch: pytest.MonkeyPatch):
    """[tokens, V]: what plain AR decoding, one row a pass, computed on its way."""
    seen, compute = [], type(decoder.model).compute_logits

    def spy(self, hidden: torch.Tensor, linear_impl: str = "auto") -> torch.Tensor:
        seen.append(compute(self, hidden, linear_impl))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(type(decoder.model), "compute_logits", spy)
        patch.setattr(
            type(decoder.model), "choose", lambda self, hidden, impl: self.compute_logits(hidden, impl).argmax(-1)
        )
        output = decoder.generate([prompt], max_new_tokens=tokens, eos_token_id=[], block_size=8)
    return output.sequences[0], torch.cat([logits[0, :1] for logits in seen])


@pytest.mark.parametrize(
    ("name", "impl", "tokens"),
    [("bf16", "torch", 90), ("window", "torch", 11), ("frozen_anchor_bf16", "torch", 11), ("small", "triton", 3)],
)
def test_they_are_those_of_decoding_to_the_bit(
    name: str, impl: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if impl == "torch" and DEVICE.type != "cpu":
        pytest.skip("on a GPU the torch implementation promises no bits")
    model = make_model(num_layers=1, num_heads=2, num_kv_heads=1) if name == "small" else MODELS[name]
    if tokens < reread_module.ROWS:
        monkeypatch.setattr(reread_module, "ROWS", 4)
    prompts = prompts_of(5, [9, 3][: 1 + (impl == "torch")])
    decoder = ConsensusDecoder(model, impl=impl)
    sequences = decoder.generate(prompts, max_new_tokens=tokens, eos_token_id=[]).sequences
    for b, prompt in enumerate(prompts):
        ar = ConsensusDecoder(model, mode="ar", impl=impl, cuda_graph=False)
        text, expected = spied_logits(ar, prompt, tokens, monkeypatch)
        assert torch.equal(text, sequences[b])
        held = [buffer[b, :, : len(text) - 1] for layer in decoder.cache.layers for buffer in (layer.k, layer.v)]
        before = [buffer.clone() for buffer in held]
        got = decoder.run.logits(b)
        assert got.dtype == torch.float32 and torch.equal(got, expected[:tokens])
        assert torch.equal(ar.run.logits(0), got)
        assert torch.equal(decoder.run.logits(b, 1, tokens - 2), expected[1 : tokens - 1])
        assert decoder.run.logits(b, tokens).shape == (0, VOCAB)
        assert all(map(torch.equal, held, before))


def test_a_run_goes_on_as_if_nobody_had_asked() -> None:
    decoder, prompts = ConsensusDecoder(MODELS["frozen_anchor"], impl="torch"), prompts_of(8, [9, 4])
    expected = decoder.generate(prompts, max_new_tokens=40, eos_token_id=[]).sequences
    run = decoder.open(2, 64, eos_token_id=[])
    for b, prompt in enumerate(prompts):
        run.admit(b, prompt, 40)
    while not run.done:
        run.advance()
        for b in range(2):
            run.logits(b)
    assert [slot.tokens for slot in run.slots] == [text[len(p) :].tolist() for text, p in zip(expected, prompts)]


def test_sampled_text_has_the_logits_before_temperature_and_penalties() -> None:
    params = [SamplingParams(temperature=0.7, seed=3, repetition_penalty=1.4)]
    decoder, prompt = ConsensusDecoder(MODELS["qk_norm"]), prompts_of(6, [7])
    text = decoder.generate(prompt, max_new_tokens=9, params=params, eos_token_id=[]).sequences[0]
    hidden = decoder.run.logits(0)
    cache = decoder.model.new_cache(1, len(text), 8)
    read = decoder.model.forward_view(text[None].to(DEVICE), cache, cache.view_pass("ar", len(text)))
    torch.testing.assert_close(hidden, decoder.model.compute_logits(read)[0, 6:-1], atol=1e-4, rtol=1e-4)


def test_one_row_of_a_long_prompt_is_kept() -> None:
    """And not the chunk of hidden states that it was cut out of."""
    run = ConsensusDecoder(MODELS["plain"], impl="torch").open(1, 64)
    run.admit(0, prompts_of(9, [40])[0], 3)
    kept = run.slots[0].prompt_hidden
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_what_cannot_be_had_is_named() -> None:
    decoder, prompts = ConsensusDecoder(MODELS["plain"]), prompts_of(7, [4])
    run = decoder.open(2, 64)
    with pytest.raises(RuntimeError, match="slot 0 has nothing to begin with"):
        run.logits(0)
    run.admit(0, prompts[0], 3)
    run.poll(lag=0)
    with pytest.raises(ValueError, match="first and count must lie in 1 tokens, but got 0 and 2"):
        run.logits(0, 0, 2)
    with pytest.raises(ValueError, match=r"a slot must be in 0\.\.1, but got 2"):
        run.logits(2)
    run.admit_together([1], prompts, 3, BatchPrefill(decoder.model, 8, 1))
    run.poll(lag=0)
    with pytest.raises(RuntimeError, match="its prompt was read together with others"):
        run.logits(1)
    with pytest.raises(ValueError, match="first and count must be integers, but got 'a' and None"):
        run.logits(0, "a")
    decoder.open(2, 64)
    with pytest.raises(RuntimeError, match="belong to a newer run"):
        run.logits(0)


def test_what_was_chosen_by_other_products_cannot_be_had_again() -> None:
    decoder = ConsensusDecoder(MODELS["plain"], mode="ar", exact=False, impl="torch")
    decoder.generate(prompts_of(7, [4]), max_new_tokens=3)
    with pytest.raises(RuntimeError, match="chosen with exact=False cannot be had again"):
        decoder.run.logits(0)
    verified = ConsensusDecoder(MODELS["plain"], exact=False, impl="torch")
    text = verified.generate(prompts_of(7, [4]), max_new_tokens=3, eos_token_id=[]).sequences[0]
    assert verified.run.logits(0).argmax(-1).tolist() == text[4:].tolist()
