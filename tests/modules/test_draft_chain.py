"""Drafts that know of each other: the batched pairs are the chain done by hand, and the text stays AR's own."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.view import load_view, read_view_config, save_view
from orthrus_triton.modules import Choosing, ConsensusDecoder, SamplingParams
from orthrus_triton.modules.draft_chain import CANDIDATES, DraftChain, DraftNoise, _top
from orthrus_triton.ops import VOID, SamplingTensors, sample_choice
from orthrus_triton.ops.gumbel import CHOICE, gumbel_torch, row_key_torch
from tests.models.tiny_bases import base_config, build_base, random_ids, randomise_view
from tests.modules.ledger_model import LedgerModel


def make_chain(hidden_size: int = 24, width: int = 10) -> DraftChain:
    torch.manual_seed(5)
    chain = DraftChain(hidden_size, width)
    chain.out_proj.weight.data.normal_()
    return chain


def test_all_pairs_at_once_are_one_row_after_the_other() -> None:
    chain, (B, T, H, V) = make_chain(), (3, 5, 24, 300)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, H, generator=generator)
    embedding, head = (torch.randn(V, H, generator=generator) for _ in range(2))
    logits, own = hidden @ head.T, torch.tensor([4, 299, 0])
    with torch.no_grad():
        found = chain.choose(hidden, logits, own, embedding, head.__getitem__)
        for b in range(B):
            token = int(own[b])
            for t in range(T):
                corrected = head @ (hidden[b, t] + chain.correction(hidden[b, t], embedding[token]))
                among = logits[b, t].topk(CANDIDATES).indices.tolist()
                token = max(among, key=lambda i, corrected=corrected: float(corrected[i]))
                assert int(found[b, t]) == token, (b, t)
    assert not torch.equal(found, logits.argmax(-1))  # it does change drafts


def test_a_sampled_chain_draws_with_the_positions_noise() -> None:
    chain, (B, T, H, V) = make_chain(), (2, 4, 24, 60)
    generator = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(B, T, H, generator=generator), torch.randn(V, H, generator=generator)
    logits, own = hidden @ head.T, torch.tensor([4, 7])
    how = SamplingTensors(
        torch.tensor([0.0, 1.3]), torch.zeros(2, dtype=torch.int32), torch.ones(2), torch.zeros(2),
        torch.tensor([3, 3]), torch.tensor([0, 1], dtype=torch.int32),
    )  # fmt: skip
    positions = torch.arange(10, 10 + T, dtype=torch.int32).expand(B, T)
    choice = sample_choice(logits, positions, how, impl="torch")
    noise = gumbel_torch(V, *row_key_torch(how.seed[:, None], how.sequence[:, None], positions, CHOICE))
    with torch.no_grad():
        found = chain.choose(hidden, logits, own, head, head.__getitem__, DraftNoise(choice, positions, how))
        for b, temperature in enumerate((0.0, 1.3)):
            token = int(own[b])
            for t in range(T):
                scores = head @ (hidden[b, t] + chain.correction(hidden[b, t], head[token]))
                if temperature:
                    scores = scores / temperature + noise[b, t]
                among = {int(choice[b, t]), *logits[b, t].topk(CANDIDATES - 1).indices.tolist()}
                token = max(among, key=lambda i, scores=scores: float(scores[i]))
                assert int(found[b, t]) == token, (b, t)
    assert not torch.equal(found, choice)


FILTERS = [{"top_k": 1}, {"top_k": 7}, {"top_p": 0.02}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.7}, {}]


def draw(logits: torch.Tensor, temperature: float, **filters: float) -> DraftNoise:
    (B, T), one = logits.shape[:2], {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    how = SamplingTensors(
        torch.full((B,), temperature), torch.full((B,), one["top_k"], dtype=torch.int32),
        torch.full((B,), one["top_p"]), torch.full((B,), one["min_p"]), torch.arange(B),
        torch.zeros(B, dtype=torch.int32),
    )  # fmt: skip
    positions = torch.arange(T, dtype=torch.int32).expand(B, T).contiguous()
    return DraftNoise(sample_choice(logits, positions, how, impl="torch"), positions, how)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_keep_what_they_keep_of_the_ar_view(filters: dict[str, float]) -> None:
    logits = 3 * torch.randn(9, 11, CANDIDATES, generator=torch.Generator().manual_seed(4))
    noise, nothing = draw(logits, 1.3, **filters), torch.full((9, 11), -torch.inf)
    candidates = torch.arange(CANDIDATES).expand(logits.shape)
    assert torch.equal(noise.perturb(logits[:, :, None], candidates, nothing).argmax(-1)[..., 0], noise.choice)
    twice = torch.cat((noise.choice[..., None], candidates), dim=-1)  # one token counts once
    scores = logits.gather(-1, twice)[:, :, None]
    chosen = noise.perturb(scores, twice, nothing).argmax(-1)
    assert torch.equal(twice.gather(-1, chosen)[..., 0], noise.choice)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("spread", "temperature"), [(1.0, 1.0), (4.0, 1.0), (4.0, 2.0)])
def test_a_chain_that_corrects_nothing_draws_as_the_ar_view(
    filters: dict[str, float], spread: float, temperature: float
) -> None:
    """Nearly: what lies beyond the candidates it knows from one logit of eight."""
    chain, generator = make_chain(), torch.Generator().manual_seed(6)
    chain.reset()
    hidden, head = torch.randn(20, 9, 24, generator=generator), torch.randn(3000, 24, generator=generator)
    logits = spread / 24**0.5 * hidden @ head.T
    noise = draw(logits, temperature, **filters)
    found = chain.choose(hidden, logits, torch.zeros(20, dtype=torch.int64), head, head.__getitem__, noise)
    assert (found == noise.choice).float().mean() > 0.95
    least = logits.topk(CANDIDATES).values[..., -1:]
    others = (torch.where(logits < least, logits, -torch.inf) / temperature).logsumexp(-1)
    assert (noise.mass_of_others(logits, least) - others).abs().mean() < 0.25


def test_a_greedy_sequence_among_sampled_ones_drafts_without_noise() -> None:
    chain, generator = make_chain(), torch.Generator().manual_seed(6)
    chain.reset()
    hidden, head = torch.randn(20, 9, 24, generator=generator), torch.randn(300, 24, generator=generator)
    logits = hidden @ head.T / 24**0.5
    found = chain.choose(hidden, logits, torch.zeros(20, dtype=torch.int64), head, head.__getitem__, draw(logits, 0.0))
    assert torch.equal(found, logits.argmax(-1))


def test_a_row_that_would_draw_no_token_drafts_some_token() -> None:
    chain, (T, V), head = make_chain(), (3, 60), torch.randn(60, 24)
    one = {"temperature": torch.ones(1), "top_k": torch.zeros(1, dtype=torch.int32), "top_p": torch.ones(1)}
    one |= {"min_p": torch.zeros(1), "seed": torch.tensor([3]), "sequence": torch.zeros(1, dtype=torch.int32)}
    how, positions = SamplingTensors(**one), torch.arange(T, dtype=torch.int32)[None]
    logits = torch.full((1, T, V), torch.nan)
    noise = DraftNoise(sample_choice(logits, positions, how, impl="torch"), positions, how)
    assert noise.choice.tolist() == [[VOID] * T]
    found = chain.choose(torch.full((1, T, 24), torch.nan), logits, torch.tensor([4]), head, head.__getitem__, noise)
    assert ((found >= 0) & (found < V)).all()


def test_a_correction_is_by_which_token_and_not_by_how_long_its_embedding_is() -> None:
    chain, (hidden, embedded) = make_chain(), torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(3))
    correction = chain.correction(hidden, embedded)
    torch.testing.assert_close(chain.correction(hidden, 5 * embedded), correction)
    assert not torch.allclose(chain.correction(5 * hidden, embedded), correction)


def test_an_untrained_chain_changes_nothing() -> None:
    chain, hidden = make_chain(), torch.randn(2, 4, 24)
    chain.reset()
    head = torch.randn(50, 24)
    found = chain.choose(hidden, hidden @ head.T, torch.tensor([1, 2]), head, head.__getitem__)
    assert torch.equal(found, (hidden @ head.T).argmax(-1))


@pytest.mark.parametrize("vocab", [9, 128, 1000])
def test_the_best_tokens_are_found_by_tiles(vocab: int) -> None:
    logits = torch.randn(2, 3, vocab, generator=torch.Generator().manual_seed(vocab))
    values, ids = _top(logits, CANDIDATES)
    there = min(CANDIDATES, vocab)
    expected = logits.topk(there)
    assert torch.equal(values[..., :there], expected.values) and torch.equal(ids[..., :there], expected.indices)
    assert (values[..., there:] == -torch.inf).all()
    assert (ids < vocab).all() and (_top(torch.full((1, vocab), torch.nan), CANDIDATES)[1] < vocab).all()


@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
@pytest.mark.parametrize("options", [{}, {"compile": "aot_eager"}], ids=["eager", "compiled"])
def test_the_text_is_the_ar_views_own(anchor_view: str, options: dict) -> None:
    base = build_base(base_config("qwen3", eos_token_id=None), torch.bfloat16)
    model = randomise_view(OrthrusForCausalLM.from_base(base, block_size=5, anchor_view=anchor_view, chain_width=16))
    prompts = [random_ids(length, seed=length)[0] for length in (5, 11)]
    for how in ({}, {"temperature": 1.0, "seed": 3}):
        said = ConsensusDecoder(model, mode="ar", impl="torch").generate(prompts, max_new_tokens=20, **how)
        output = ConsensusDecoder(model, impl="torch", **options).generate(prompts, max_new_tokens=20, **how)
        assert [ids.tolist() for ids in output.sequences] == [ids.tolist() for ids in said.sequences]


class Knowing(LedgerModel):
    """Its drafts are drawn from what is nearly the AR view's distribution, with the noise they are given."""

    has_chain = True

    def chain_drafts(self, hidden, logits, own, noise, recalled):
        assert torch.equal(noise.choice, sample_choice(logits, noise.positions, noise.sampling, impl="torch"))
        candidates = torch.arange(self.vocab_size).expand(logits.shape)
        nothing = torch.full(logits.shape[:2], -torch.inf)
        return noise.perturb(logits[:, :, None], candidates, nothing)[:, :, 0].argmax(-1)


@pytest.mark.parametrize("anchor_rows", [0, 1])
def test_a_chain_gets_the_noise_that_its_tokens_will_be_drawn_with(anchor_rows: int) -> None:
    """With that of another position the text is the same, and hardly a draft accepted."""
    model, prompts = Knowing(certainty=1000.0, anchor_rows=anchor_rows), [torch.tensor([1, 2]), torch.tensor([3])]
    stats = ConsensusDecoder(model, impl="torch").generate(prompts, max_new_tokens=60, temperature=1e3, seed=3).stats
    assert stats.tokens_per_cycle > 0.8 * (model.block_size + anchor_rows)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_k": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
def test_functions_on_the_host_leave_slots_their_chain(anchor_view: str, how: dict) -> None:
    """A neighbour's and a slot's own: with one that bans nothing, all is drafted as without."""
    base = build_base(base_config("qwen3", eos_token_id=None))
    model = randomise_view(OrthrusForCausalLM.from_base(base, block_size=5, anchor_view=anchor_view, chain_width=16))
    model.model.draft_chain_diff.out_proj.weight.data.mul_(30)
    prompts = [random_ids(length, seed=length)[0] for length in (5, 11)]
    drafted, chain_drafts = [], model.chain_drafts
    model.chain_drafts = lambda *said: [drafted[-1].append(found := chain_drafts(*said)), found][1]
    for hosted in (False, True):
        drafted.append([])
        functions = (None, (lambda ids, scores: scores) if hosted else None)
        params = [SamplingParams(**how, seed=3, sequence=b, logits_processor=of) for b, of in enumerate(functions)]
        ConsensusDecoder(model, impl="torch").generate(prompts, max_new_tokens=20, params=params)
    assert len(drafted[0]) > 3 and torch.equal(torch.cat(drafted[0]), torch.cat(drafted[1]))


def test_greedy_sequences_alone_keep_the_chain_under_rejection() -> None:
    base = build_base(base_config("qwen3", eos_token_id=None))
    model = randomise_view(OrthrusForCausalLM.from_base(base, block_size=5, chain_width=16))
    prompts, params = [random_ids(length, seed=length)[0] for length in (5, 11)], SamplingParams(temperature=1.0)
    expected = ConsensusDecoder(model, mode="ar", impl="torch").generate(prompts[:1], max_new_tokens=30)
    run = ConsensusDecoder(model, impl="torch").open(2, 64, choosing=Choosing(sampled=True, rejection=True))
    drafts, chain_drafts = [], model.chain_drafts
    model.chain_drafts = lambda *said: drafts.append(said) or chain_drafts(*said)
    run.admit(0, prompts[0], 30)
    run.advance()
    assert len(drafts) == 1
    run.admit(1, prompts[1], 4, params)
    while not run.slots[1].finished:
        run.advance()
    assert len(drafts) == 1
    while not run.done:
        run.advance()
    assert len(drafts) > 1 and run.slots[0].tokens == expected.sequences[0][5:].tolist()


def test_a_view_file_holds_the_chain(tmp_path) -> None:
    base = build_base(base_config("llama"))
    model = randomise_view(OrthrusForCausalLM.from_base(base, block_size=4, chain_width=16))
    save_view(model, tmp_path / "view.safetensors")
    assert read_view_config(tmp_path / "view.safetensors")["chain_width"] == 16
    again = OrthrusForCausalLM.from_base(base, block_size=4, chain_width=16)
    load_view(again, tmp_path / "view.safetensors")
    ours, theirs = (m.model.draft_chain_diff.state_dict() for m in (model, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="chain_width"):
        load_view(OrthrusForCausalLM.from_base(base, block_size=4), tmp_path / "view.safetensors")


@pytest.mark.parametrize("width", [0, 2.5])
def test_a_width_that_is_none_is_named(width) -> None:
    with pytest.raises(ValueError, match="chain_width must be an integer >= 1 or None"):
        OrthrusForCausalLM.from_base(build_base(base_config("llama")), chain_width=width)
