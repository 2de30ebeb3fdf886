"""Training of the view: the differentiable pass is the decoder's own draft, only the view learns, drafts get better."""

from __future__ import annotations

import math
import shutil
import sys

import numpy as np
import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.testing import TinyDualViewModel
from orthrus_triton.training.anchors import UNCHAINED, AnchorExamples, EvenAnchors
from orthrus_triton.training.batches import BlockCollator, ViewDistillation
from orthrus_triton.training.data import TextRow
from orthrus_triton.training.frozen_cache import FrozenCache
from orthrus_triton.training.frozen_reader import LENGTH_QUANTUM, FrozenReader
from orthrus_triton.training.objective import position_weights
from orthrus_triton.training.student import BlockStudent
from orthrus_triton.training.surprise import read_surprise, surprise
from orthrus_triton.training.trainer import ViewTrainer
from tests.models.tiny_bases import ORIGINAL_LEN, base_config, build_base, random_ids, randomise_view
from tests.training.view_runs import K, draft_logits, make_args, make_model, make_trainer, own_rows


@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
@pytest.mark.parametrize(
    ("case", "view_rank"),
    [
        ("llama biases, wide heads, tied", 3),
        ("llama longrope", None),
        ("mistral window", None),
        ("qwen2", 2),
        ("qwen3 biases, tied, window by layer types", None),
        ("phi3 partial longrope", None),
        ("smollm3", None),
        ("gemma", 2),
        ("gemma3", None),
        ("granite", None),
        ("exaone4", 2),
        ("glm4", None),
        ("olmo2", None),
        ("olmo3 yarn", None),
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


def test_a_model_of_ones_own_is_sent_to_the_docs(tmp_path):
    rows = [TextRow("all", [1, 2, 3, 4], [(1, 4)])]
    with pytest.raises(TypeError, match="OrthrusForCausalLM, but got a TinyDualViewModel; .* docs/training.md"):
        ViewTrainer(TinyDualViewModel(), make_args(tmp_path, 1), rows)


def test_a_captured_pass_of_the_frozen_model_reads_the_same(tmp_path):
    model = make_model("qwen3", anchor_view="ar")
    rows, captured = own_rows(model, 6), []

    def capture(step):
        captured.append(step)
        return step

    eager, replayed = FrozenReader(BlockStudent(model)), FrozenReader(BlockStudent(model), capture)
    # a batch that is wider or longer than any before it has other buffers, and what was captured of the old ones goes
    for first, count, times in ((0, 2, 1), (2, 2, 1), (4, 2, 1), (0, 3, 1), (2, 2, 1), (0, 2, 26), (0, 3, 1)):
        some = rows[first : first + count]
        ids = torch.stack([torch.tensor(row.ids[:20] * times) for row in some])
        prompt_len = torch.tensor([row.prompt_len for row in some])
        with torch.no_grad():
            layers, states = eager(ids, prompt_len)  # in buffers of its own
        assert states.shape[1] == (64 if times == 1 else 576)
        for reader in (eager, replayed):
            own_layers, own_states = reader(ids, prompt_len)
            assert torch.equal(states, own_states)
            for one, own in zip(layers, own_layers):
                assert all(torch.equal(*(x[:, :, : ids.shape[1]] for x in pair)) for pair in zip(one[:2], own[:2]))
    assert len(captured) == 5
    # an evaluation, of another shape, is not captured, and leaves what is
    with torch.no_grad():
        layers, states = replayed(ids[:1], prompt_len[:1])
    assert torch.equal(states, own_states[:1]) and torch.equal(layers[0][0], own_layers[0][0][:1])
    again = replayed(ids, prompt_len)[0]
    assert len(captured) == 5 and again[0][0] is own_layers[0][0]


def test_every_reader_of_a_text_minds_the_length_of_its_prompt(tmp_path):
    """Where rotary angles depend on it: all of them find most likely what the frozen model wrote."""
    model = make_model("llama longrope")
    prompts = [random_ids(length)[0] for length in (5, ORIGINAL_LEN + 8, 7)]
    output = ConsensusDecoder(model, mode="ar").generate(prompts, max_new_tokens=24, eos_token_id=[])
    rows = [TextRow("all", ids.tolist(), [(len(prompt), len(ids))]) for ids, prompt in zip(output.sequences, prompts)]
    cache = FrozenCache.open_or_build(tmp_path, model, rows, top_k=model.vocab_size, dtype=torch.float32)
    eager, replayed = FrozenReader(BlockStudent(model)), FrozenReader(BlockStudent(model), lambda step: step)
    for row, start in zip(rows, cache.starts):
        written, before = row.ids[row.prompt_len :], slice(row.prompt_len - 1, len(row.ids) - 1)
        assert cache.teacher_ids[start:][before, 0].tolist() == written
        for read in (eager, replayed):
            states = read(torch.tensor([row.ids]), torch.tensor([row.prompt_len]))[1]
            assert model.choose(states[:, before])[0].tolist() == written
    for found, expected in zip(read_surprise(model, rows), surprise(cache, rows)):
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.skipif(not shutil.which("c++"), reason="Inductor needs a C++ compiler")
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
    # rows as long as a graph's, so that nothing lies behind the last one's last token
    rows = [
        row._replace(ids=row.ids[:LENGTH_QUANTUM], answers=[(row.prompt_len, LENGTH_QUANTUM)])
        for row in own_rows(model, 4, tokens=LENGTH_QUANTUM)
    ]
    everything = FrozenCache.open_or_build(tmp_path, model, rows, top_k=model.vocab_size, dtype=torch.float32)
    examples = AnchorExamples(rows, 4, 50, anchor_rows=model.anchor_rows)
    losses, gradients = [], []
    for cache in (everything, None):
        batch = BlockCollator(rows, cache, K, "kl", model.anchor_rows)([examples[n] for n in range(4)])
        assert (batch["targets"][-1] < 0).any()  # some blocks reach beyond their text
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
    decay, total, crossed = 1.5, 0.0, 0.0
    weights = [math.exp(-i / decay) for i in range(K - 1)]
    assert position_weights(K, decay).tolist() == pytest.approx(weights)
    teacher = model(torch.tensor([row.ids])).logits.log_softmax(-1)[0]
    for anchor in anchors[0].tolist():
        student = draft_logits(model, row, anchor).log_softmax(-1)
        for i in range(K - 1):
            if anchor + i + 1 + later < len(row.ids):
                log_p = teacher[anchor + i + later]
                total += weights[i] * float((log_p.exp() * (log_p - student[i])).sum())
                crossed -= weights[i] * float(student[i, row.ids[anchor + i + 1 + later]])
    for loss, expected in (("kl", total), ("ce", crossed)):
        found = ViewDistillation(model, K, loss, decay)(**batch)["loss"]
        assert float(found.detach()) == pytest.approx(expected / (2 * sum(weights)), rel=1e-4)


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
    args = make_args(tmp_path, 250, num_anchors=8, teacher_top_k=101, save_strategy="no")
    ViewTrainer(model, args, rows).train()
    output = decoder.generate([prompt], **options)
    assert output.sequences[0].tolist() == rows[0].ids  # exact before, during and after training
    assert output.stats.tokens_per_cycle >= 0.9 * K
    assert output.stats.cycles <= math.ceil(48 / (K + model.anchor_rows)) + 1


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
    for later in (0, 1):  # nor are they the same ones, one step later
        assert any(other[n]["anchors"].tolist() != examples[n + later]["anchors"].tolist() for n in range(5))
    # shares are of the domains, however many rows each has; without them, all rows are alike
    uneven = [rows[0], *rows, rows[0], rows[0]]
    for shares, of_prose in (({"code": 3.0, "prose": 1.0}, 1 / 4), ({"code": 1.0, "prose": 3.0}, 3 / 4), (None, 1 / 5)):
        some = AnchorExamples(uneven, 400, 4, shares)
        assert sum(some[n]["row_id"] == 2 for n in range(400)) / 400 == pytest.approx(of_prose, abs=0.06)
    chained = np.concatenate([some[n]["chained"] for n in range(400)])
    assert 1 - chained.mean() == pytest.approx(UNCHAINED, abs=0.05)
    with pytest.raises(ValueError, match="domain_weights must give each domain of the data, .*'code', 'prose'.* share"):
        AnchorExamples(rows, 1, 1, {"maths": 1.0})
    with pytest.raises(ValueError, match=r"domain_weights must .* \['code', 'prose'\], and no other, a share"):
        AnchorExamples(rows, 1, 1, weights | {"docs": 1.0})
    with pytest.raises(ValueError, match="domain_weights must give .* a share >= 0"):
        AnchorExamples(rows, 1, 1, {"code": -1.0, "prose": 2.0})
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


@pytest.mark.parametrize("later", [0, 1])
def test_a_batch_says_what_stands_at_and_behind_each_place_of_a_block(later):
    """Of a row of two texts: a block learns nothing beyond the end of its answer."""
    row = TextRow("code", list(range(50, 70)), [(3, 6), (15, 20)])
    example = {"row_id": 0, "anchors": np.array([2, 4 - later, 14, 17 - later]), "chained": np.arange(4) != 2}
    batch = BlockCollator([row], None, K, "kl", later)([example])
    assert batch["anchor_ids"].tolist() == [[52, 54 - later, 64, 67 - later]] and batch["prompt_len"].tolist() == [3]
    first, third = ([53, 54, 55], [65, 66, 67]) if later == 0 else ([54, 55, -1], [66, 67, 68])
    assert batch["targets"].tolist() == [[first, [55, -1, -1], third, [68, 69, -1]]]
    own = batch["own_ids"].tolist()[0]
    assert own[0] == list(range(52 + later, 55 + later)) and own[3] == [67, 68, 69]  # a chain knows no target
    assert own[1][0] == 54 and own[2] == [-1, -1, -1]


def test_a_chain_is_trained_for_what_decoding_asks_of_it():
    model = randomise_view(make_model("qwen3", anchor_view="ar", chain_width=8), scale=1.0)
    generator = torch.Generator().manual_seed(0)
    hidden, own = torch.randn(5, K - 1, model.config.hidden_size, generator=generator), torch.arange(20, 25)
    logits = model.compute_logits(hidden)
    drafted = model.chain_drafts(hidden, logits, own)
    before = torch.cat((own[:, None], drafted[:, :-1]), dim=1)
    student = BlockStudent(model)
    with torch.no_grad():
        assert torch.equal(model.compute_logits(student.chain(hidden, before)).argmax(-1), drafted)
        assert not torch.equal(logits.argmax(-1), drafted)
        assert torch.equal(student.chain(hidden, torch.full_like(before, -1)), hidden)


def test_anchors_gather_where_the_frozen_model_was_unsure(tmp_path, monkeypatch):
    for name, size in (("TOKENS_PER_PASS", 60), ("LOGIT_ROWS", 7)):  # of three rows
        monkeypatch.setattr(f"orthrus_triton.training.surprise.{name}", size)
    model = make_model()
    rows = own_rows(model, 3)
    cache = FrozenCache.open_or_build(tmp_path, model, rows, top_k=model.vocab_size, dtype=torch.float32)
    unlikely = surprise(cache, rows)
    for row, values in zip(rows, unlikely):
        probs = model(torch.tensor([row.ids])).logits.softmax(-1)[0]
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
    assert AnchorExamples(rows, 1, 3, surprise=[0 * one for one in sharp], focus=0.8)[0]  # nothing stands out
    with pytest.raises(ValueError, match="focus must be in"):
        AnchorExamples(rows, 1, 1, focus=0.5)
