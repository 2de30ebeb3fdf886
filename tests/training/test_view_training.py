"""Training of the view: the differentiable pass is the decoder's own draft, only the view learns, drafts get better."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.training.acceptance import acceptance
from orthrus_triton.training.anchors import AnchorExamples, EvenAnchors
from orthrus_triton.training.batches import BlockCollator, ViewDistillation
from orthrus_triton.training.data import TextRow
from orthrus_triton.training.frozen_cache import FrozenCache
from orthrus_triton.training.frozen_reader import FrozenReader
from orthrus_triton.training.objective import position_weights
from orthrus_triton.training.student import BlockStudent
from orthrus_triton.training.surprise import read_surprise, surprise
from orthrus_triton.training.trainer import ViewTrainer
from tests.models.tiny_bases import base_config, build_base, randomise_view
from tests.training.view_runs import K, make_args, make_model, make_trainer, own_rows


@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
@pytest.mark.parametrize(
    ("case", "view_rank"),
    [
        ("llama biases, wide heads, tied", 3),
        ("llama longrope", None),
        ("mistral window", None),
        ("qwen2", 2),
        ("qwen3 biases, tied, window by layer types", None),
    ],
)
def test_the_trained_pass_is_the_decoders_draft(case, view_rank, anchor_view):
    model = randomise_view(make_model(case, view_rank=view_rank, anchor_view=anchor_view))
    proposing = slice(1, K) if anchor_view == "ar" else slice(0, K - 1)
    ids = torch.randint(2, 100, (2, 30), generator=torch.Generator().manual_seed(0))
    prompt_len, anchors = torch.tensor([5, 9]), torch.tensor([[0, 6, 17], [9, 20, 28]])
    student, cache = BlockStudent(model), model.new_cache(2, 30, K)
    states = student.read(ids, prompt_len, cache)
    ours = student.draft(ids.gather(1, anchors), anchors, prompt_len, cache.layers, K)
    for b in range(2):
        for n, anchor in enumerate(anchors[b].tolist()):
            buffers = model.new_cache(1, 64, K)
            buffers.prompt_len.fill_(prompt_len[b])
            with torch.no_grad():
                if anchor:
                    read = model.forward_view(ids[b : b + 1, :anchor], buffers, buffers.view_pass("ar", anchor))
                    assert torch.allclose(states[b, :anchor], read[0], atol=2e-5)
                buffers.context_len.fill_(anchor)
                block = torch.full((1, K), model.mask_token_id)
                block[0, 0] = ids[b, anchor]
                drafted = model.forward_view(block, buffers, buffers.draft_pass(K, model.anchor_rows))[0, proposing]
            assert torch.allclose(ours[b, n], drafted, atol=2e-5), (n, (ours[b, n] - drafted).abs().max())


@torch.no_grad()
def draft_logits(model: OrthrusForCausalLM, row: TextRow, anchor: int) -> torch.Tensor:
    """Logits [K, V] of the decoder's own draft at an anchor of a text."""
    buffers = model.new_cache(1, 64, K)
    model.forward_view(torch.tensor([row.ids[:anchor]]), buffers, buffers.view_pass("ar", anchor))
    buffers.context_len.fill_(anchor)
    block = torch.tensor([[row.ids[anchor]] + [model.mask_token_id] * (K - 1)])
    hidden = model.forward_view(block, buffers, buffers.draft_pass(K, model.anchor_rows))
    return model.compute_logits(hidden[:, model.anchor_rows :])[0]


@pytest.mark.parametrize(("view_rank", "chain_width"), [(None, None), (2, None), (None, 8)])
def test_only_the_view_learns(view_rank, chain_width, tmp_path):
    model = make_model("qwen3", view_rank=view_rank, chain_width=chain_width)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model, tmp_path, max_steps=4)
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("_diff" in name), name
    trainer.train()
    for name, tensor in model.state_dict().items():
        assert ("_diff" in name) != torch.equal(tensor, before[name]), name


def test_a_captured_pass_of_the_frozen_model_reads_the_same(tmp_path):
    model = make_model("qwen3", anchor_view="ar")
    rows, captured = own_rows(model, 6), []

    def capture(step):
        captured.append(step)
        return step

    eager, replayed = FrozenReader(BlockStudent(model)), FrozenReader(BlockStudent(model), capture)
    for first, count in ((0, 2), (2, 2), (4, 2), (0, 3)):
        some = rows[first : first + count]
        ids = torch.stack([torch.tensor(row.ids[:20]) for row in some])
        prompt_len = torch.tensor([row.prompt_len for row in some])
        layers, states = eager(ids, prompt_len)
        own_layers, own_states = replayed(ids, prompt_len)
        assert torch.equal(states, own_states) and states.shape[1] == 64
        assert all(torch.equal(a, b) for one, own in zip(layers, own_layers) for a, b in zip(one[:2], own[:2]))
    assert len(captured) == 2  # once for each shape
    # an evaluation, of another shape, is not captured, and leaves what is
    with torch.no_grad():
        layers, states = replayed(ids[:1], prompt_len[:1])
    assert torch.equal(states, own_states[:1]) and torch.equal(layers[0][0], own_layers[0][0][:1])
    again = replayed(ids, prompt_len)[0]
    assert len(captured) == 2 and again[0][0] is own_layers[0][0]


def test_compiled_layers_have_the_same_gradients(tmp_path):
    model = randomise_view(make_model("qwen3", anchor_view="ar", chain_width=8))
    gradients = []
    torch._dynamo.reset()
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        trainer = make_trainer(model, tmp_path, 1, cached=False, compile_layers=compiled)
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == int(compiled)  # one for all layers
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-6), name


def test_contexts_of_all_lengths_share_a_compiled_layer(monkeypatch):
    """torch.compile keeps eight graphs, and runs a ninth length without one from then on."""
    torch._dynamo.reset()
    graphs, compile_it = [], torch.compile

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_it(*args, backend=backend, **options))
    model = randomise_view(make_model("qwen3"))
    student = BlockStudent(model)
    student.compile_layers()
    anchors, prompt_len, config = torch.tensor([[0, 6, 17], [1, 5, 9]]), torch.tensor([5, 1]), model.config
    for length in range(20, 40, 2):
        heads = (2, config.num_hidden_layers, 2, config.num_key_value_heads, length, config.head_dim)
        context = [pair.unbind(1) for pair in torch.randn(heads).half().unbind(1)]  # as a FrozenCache gives it
        compiled = student.draft(anchors, anchors, prompt_len, context, K)
        with torch.no_grad():
            plain = student.draft(anchors, anchors, prompt_len, context, K)
        assert torch.allclose(compiled, plain, atol=1e-5)
    assert len(graphs) == 1


def test_the_trained_weights_alone_are_a_state():
    """As DeepSpeed loads it."""
    model = randomise_view(make_model())
    distillation, other = ViewDistillation(model, K), ViewDistillation(make_model(), K)
    state = {name: tensor.clone() for name, tensor in distillation.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    del state["student.mask_embedding_diff"]
    with pytest.raises(ValueError, match="state_dict must name what is trained, .*mask_embedding_diff"):
        other.load_state_dict(state)


@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
def test_without_a_cache_the_frozen_model_teaches_the_same(tmp_path, anchor_view):
    model = randomise_view(make_model("qwen3", anchor_view=anchor_view))
    rows = own_rows(model, 4)
    everything = FrozenCache.open_or_build(tmp_path, model, rows, top_k=model.vocab_size, dtype=torch.float32)
    examples = AnchorExamples(rows, 4, 9, anchor_rows=model.anchor_rows)
    losses, gradients = [], []
    for cache in (everything, None):
        batch = BlockCollator(rows, cache, K, "kl", model.anchor_rows)([examples[n] for n in range(4)])
        assert (batch["targets"] < 0).any()  # some blocks reach beyond their text
        output = ViewDistillation(model, K, "kl", 2.0)(**batch)
        gradient = torch.autograd.grad(output["loss"], model.model.layers[0].self_attn.q_norm_diff.weight)[0]
        losses.append(output["loss"].detach())
        gradients.append(gradient)
    assert torch.allclose(*losses, rtol=1e-5) and torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
def test_the_loss_is_what_the_paper_says(anchor_view):
    """And where the frozen view reads the anchor, the same one token later."""
    model = randomise_view(make_model(anchor_view=anchor_view))
    row, later = own_rows(model, 1)[0], model.anchor_rows
    # the second block has two targets in the text
    anchors = torch.tensor([[row.prompt_len - 1, len(row.ids) - 3 - later]])
    batch = BlockCollator([row], None, K, "kl", later)(
        [{"row_id": 0, "anchors": anchors[0].numpy(), "chained": np.ones(2, bool)}]
    )
    assert batch["targets"].tolist()[0][1] == [row.ids[-2], row.ids[-1], -1]
    decay, total = 1.5, 0.0
    weights = [math.exp(-i / decay) for i in range(K - 1)]
    assert position_weights(K, decay).tolist() == pytest.approx(weights)
    teacher = model(torch.tensor([row.ids])).log_softmax(-1)[0]
    for anchor in anchors[0].tolist():
        student = draft_logits(model, row, anchor).log_softmax(-1)
        for i in range(K - 1):
            if anchor + i + 1 + later < len(row.ids):
                log_p = teacher[anchor + i + later]
                total += weights[i] * float((log_p.exp() * (log_p - student[i])).sum())
    output = ViewDistillation(model, K, "kl", decay)(**batch)
    assert float(output["loss"].detach()) == pytest.approx(total / (2 * sum(weights)), rel=1e-4)
    crossed = ViewDistillation(model, K, "ce")(**batch)
    first = -float(student[0, row.ids[-2]] + student[1, row.ids[-1]])  # of the second block
    assert float(crossed["loss"].detach()) > first / (2 * (K - 1))


@pytest.mark.parametrize(("anchor_view", "chain_width"), [("diffusion", None), ("ar", None), ("ar", 16)])
def test_overfitting_one_text_drafts_nearly_whole_blocks(tmp_path, monkeypatch, anchor_view, chain_width):
    # a random base's logits lie closer together than a bonus, and what is to be seen is what the view has learnt
    monkeypatch.setattr(sys.modules["orthrus_triton.ops.recall"], "BONUS", 0.0)
    base = build_base(base_config("llama", num_hidden_layers=3, head_dim=64))
    options = {"block_size": K, "mask_token_id": 1, "mask_embedding": True}
    model = OrthrusForCausalLM.from_base(base, anchor_view=anchor_view, chain_width=chain_width, **options)
    rows = own_rows(model, 1, tokens=49)
    decoder = ConsensusDecoder(model)
    prompt = torch.tensor(rows[0].ids[: rows[0].prompt_len])
    options = {"max_new_tokens": 49, "eos_token_id": []}
    assert decoder.generate([prompt], **options).stats.tokens_per_cycle < 0.7 * K
    args = make_args(tmp_path, 400, num_anchors=8, teacher_top_k=101, save_strategy="no")
    ViewTrainer(model, args, rows).train()
    output = decoder.generate([prompt], **options)
    assert output.sequences[0].tolist() == rows[0].ids  # exact before, during and after training
    assert output.stats.tokens_per_cycle >= 0.9 * K
    assert output.stats.cycles <= math.ceil(48 / (K + model.anchor_rows)) + 1


def test_evaluation_reports_acceptance_by_domain_and_position(tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path, max_steps=1, eval_rows=5, eval_anchors=2)
    metrics = trainer.evaluate()
    blocks = {}
    for example in trainer.eval_dataset:
        row = trainer.data_collator.rows[example["row_id"]]
        for anchor in example["anchors"].tolist():
            drafted = draft_logits(model, row, anchor)[:-1].argmax(-1).tolist()
            matches = [a == b for a, b in zip(drafted, row.ids[anchor + 1 :])]
            blocks.setdefault(row.domain, []).append((matches + [False]).index(False) + 1)
    for domain, counts in blocks.items():
        assert metrics[f"eval_tokens_per_cycle_{domain}"] == pytest.approx(sum(counts) / len(counts))
    names = ["tokens_per_cycle", "tokens_per_cycle_code", "tokens_per_cycle_prose", "match_1", f"match_{K - 1}"]
    assert all(f"eval_{name}" in metrics for name in names) and f"eval_match_{K}" not in metrics
    assert 1 < metrics["eval_tokens_per_cycle"] <= K


def test_acceptance_counts_leading_matches_and_the_free_token():
    matches = torch.tensor([[[1, 1, 0]], [[0, 1, 1]], [[1, -1, -1]]]).numpy()
    metrics = acceptance(matches, torch.tensor([0, 1, 1]).numpy(), ["code", "prose"])
    assert metrics["tokens_per_cycle_code"] == 3 and metrics["tokens_per_cycle_prose"] == 1.5
    assert metrics["tokens_per_cycle"] == 2
    assert (metrics["match_1"], metrics["match_2"], metrics["match_3"]) == (2 / 3, 1, 0.5)


def test_examples_are_a_function_of_seed_and_number():
    rows = [TextRow("code", list(range(30)), [(4, 30)]), TextRow("prose", list(range(20)), [(3, 6), (15, 20)])]
    weights = {"code": 0.0, "prose": 1.0}
    examples, again = (AnchorExamples(rows, 50, 4, weights, seed=5) for _ in range(2))
    for n in (49, 0, 17):
        assert examples[n]["anchors"].tolist() == again[n]["anchors"].tolist()
    drawn = {anchor for n in range(50) for anchor in examples[n]["anchors"].tolist()}
    assert drawn == {2, 3, 4, 14, 15, 16, 17, 18}  # from the token before an answer to its last but one
    assert {examples[n]["row_id"] for n in range(50)} == {1}
    other = AnchorExamples(rows, 50, 4, weights, seed=6)
    assert any(other[n]["anchors"].tolist() != examples[n]["anchors"].tolist() for n in range(5))
    both = AnchorExamples(rows, 200, 4, {"code": 3.0, "prose": 1.0})
    assert 0.6 < sum(both[n]["row_id"] == 0 for n in range(200)) / 200 < 0.9
    with pytest.raises(ValueError, match="domain_weights must give each domain of the data, .*'code', 'prose'.* share"):
        AnchorExamples(rows, 1, 1, {"maths": 1.0})
    with pytest.raises(ValueError, match=r"domain_weights must .* \['code', 'prose'\], and no other, a share"):
        AnchorExamples(rows, 1, 1, weights | {"docs": 1.0})
    with pytest.raises(ValueError, match="rows must not be empty"):
        AnchorExamples([], 1, 1)
    assert EvenAnchors(rows, 3, K, first_row_id=7)[0]["anchors"].tolist() == [3, 14, 26]
    assert EvenAnchors(rows, 3, K, first_row_id=7)[1]["row_id"] == 8


def test_anchors_of_a_row_differ_while_there_are_enough_and_have_something_to_predict():
    rows = [TextRow("code", list(range(20)), [(3, 6), (15, 20)])]
    for anchor_rows, places in ((0, [2, 3, 4, 14, 15, 16, 17, 18]), (1, [2, 3, 14, 15, 16, 17])):
        all_of_them = AnchorExamples(rows, 3, len(places), anchor_rows=anchor_rows)
        assert [all_of_them[n]["anchors"].tolist() for n in range(3)] == [places] * 3
        assert len(AnchorExamples(rows, 1, 12, anchor_rows=anchor_rows)[0]["anchors"]) == 12
    assert EvenAnchors(rows, 2, 4, anchor_rows=1)[0]["anchors"].tolist() == [14, 15]


def test_anchors_gather_where_the_frozen_model_was_unsure(tmp_path):
    model = make_model()
    rows = own_rows(model, 3)
    cache = FrozenCache.open_or_build(tmp_path, model, rows, top_k=model.vocab_size, dtype=torch.float32)
    unlikely = surprise(cache, rows)
    for row, values in zip(rows, unlikely):
        probs = model(torch.tensor([row.ids])).softmax(-1)[0]
        for n in range(row.prompt_len, len(row.ids)):
            assert values[n] == pytest.approx(1 - float(probs[n - 1, row.ids[n]].detach()), abs=1e-4)
        assert values[row.prompt_len - 1] == 1 and not values[: row.prompt_len - 1].any()
    for found, expected in zip(read_surprise(model, rows), unlikely):
        assert found == pytest.approx(expected, abs=1e-4)
    sharp = [np.eye(len(row.ids))[row.prompt_len + 2] for row in rows]
    at_sharp = []
    for focus in (0.0, 0.8):
        examples = AnchorExamples(rows, 400, 1, surprise=sharp, focus=focus)
        drawn = [examples[n] for n in range(400)]
        at_sharp.append(sum(one["anchors"][0] == rows[one["row_id"]].prompt_len + 2 for one in drawn))
    assert at_sharp[0] < 100 and 280 < at_sharp[1] < 400
    with pytest.raises(ValueError, match="focus must be in"):
        AnchorExamples(rows, 1, 1, focus=0.5)
