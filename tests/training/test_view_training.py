"""Training of the view: the differentiable pass is the decoder's own draft, only the view learns, resuming is exact."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainingArguments

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.training import frozen_cache
from orthrus_triton.training.data import AnchorExamples, TextRow, read_rows
from orthrus_triton.training.frozen_cache import FrozenCache
from orthrus_triton.training.objective import linear_kl
from orthrus_triton.training.student import draft_hidden
from orthrus_triton.training.trainer import ViewTrainer
from tests.models.tiny_bases import base_config, build_base

K = 4


def make_model(family: str = "llama", view_rank: int | None = None) -> OrthrusForCausalLM:
    return OrthrusForCausalLM.from_base(
        build_base(base_config(family)), block_size=K, mask_token_id=1, view_rank=view_rank
    )


def own_rows(model: OrthrusForCausalLM, count: int, tokens: int = 24) -> list[TextRow]:
    """Text the frozen model writes itself."""
    prompts = [torch.randint(2, model.vocab_size, (3 + n % 4,)) for n in range(count)]
    output = ConsensusDecoder(model, mode="ar").generate(prompts, max_new_tokens=tokens, eos_token_id=[])
    return [TextRow("all", ids.tolist(), len(prompt)) for ids, prompt in zip(output.sequences, prompts)]


def make_trainer(model, rows, folder, steps: int, learning_rate: float = 1e-2, **options) -> ViewTrainer:
    args = TrainingArguments(
        str(folder / "run"), max_steps=steps, per_device_train_batch_size=2, learning_rate=learning_rate, use_cpu=True,
        weight_decay=0.0, report_to="none", disable_tqdm=True, save_steps=4, logging_steps=10, seed=3, **options,
    )  # fmt: skip
    return ViewTrainer(model, args, rows, cache_dir=folder / "cache", num_anchors=3)


@pytest.mark.parametrize(("family", "view_rank"), [("llama", None), ("qwen2", 2), ("qwen3", None)])
def test_the_trained_pass_is_the_decoders_draft(family, view_rank, tmp_path):
    model = make_model(family, view_rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_diff" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    row = own_rows(model, 1)[0]
    cache = FrozenCache.open_or_build(tmp_path, model, [row], top_k=4, dtype=torch.float32)
    anchors = torch.tensor([[row.prompt_len, 9, 14]])
    anchor_ids = torch.tensor(row.ids)[anchors]
    ours = draft_hidden(model, anchor_ids, anchors, cache.context([0], [14], torch.float32), K)
    for n, anchor in enumerate(anchors[0].tolist()):
        buffers = model.new_cache(1, 64, K)
        ids = torch.tensor([row.ids[:anchor]])
        buffers.prompt_len.fill_(anchor)
        with torch.no_grad():
            model.forward_view(ids, buffers, buffers.view_pass("ar", anchor))
            buffers.context_len.fill_(anchor)
            block = torch.full((1, K), model.mask_token_id)
            block[0, 0] = row.ids[anchor]
            drafted = model.forward_view(block, buffers, buffers.view_pass("diffusion", K))
        assert torch.allclose(ours[0, n], drafted[0], atol=2e-5), (n, (ours[0, n] - drafted[0]).abs().max())


def test_linear_kl_is_the_autograd_loss_and_gradient():
    torch.manual_seed(0)
    rows, width, vocab, top_k = 150, 16, 50, 6  # more rows than a chunk
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width)
    ids = torch.stack([torch.randperm(vocab)[:top_k] for _ in range(rows)])
    probs = torch.softmax(torch.randn(rows, top_k), dim=-1)
    row_weight = torch.rand(rows)
    row_weight[::7] = 0
    loss, choice = linear_kl(hidden, weight, ids, probs, row_weight)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ weight.double().T
    teacher = torch.zeros(rows, vocab, dtype=torch.float64).scatter_(1, ids, probs.double())
    divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), teacher, reduction="none").sum(-1)
    expected = (row_weight * divergence).sum() / row_weight.sum()
    expected.backward()
    assert torch.allclose(loss.double(), expected, rtol=1e-5)
    assert torch.allclose(hidden.grad.double(), exact.grad, atol=1e-6)
    assert torch.equal(choice, logits.argmax(-1))


def test_only_the_view_learns(tmp_path):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model, own_rows(model, 4), tmp_path, steps=2)
    trainer.train()
    for name, tensor in model.state_dict().items():
        assert ("_diff" in name) != torch.equal(tensor, before[name]), name


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path):
    model = make_model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = own_rows(model, 4)
    make_trainer(model, rows, tmp_path, steps=8).train()
    unbroken = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(start)
    make_trainer(model, rows, tmp_path, steps=8).train(str(tmp_path / "run" / "checkpoint-4"))
    resumed = model.state_dict()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    name = "model.layers.0.self_attn.q_proj_diff.weight"
    assert not torch.equal(unbroken[name], start[name])


def test_overfitting_one_text_drafts_nearly_whole_blocks(tmp_path):
    torch.manual_seed(1)
    base = build_base(base_config("llama", num_hidden_layers=3, head_dim=64))
    model = OrthrusForCausalLM.from_base(base, block_size=K, mask_token_id=1)
    rows = own_rows(model, 1, tokens=33)
    decoder = ConsensusDecoder(model)
    prompt = torch.tensor(rows[0].ids[: rows[0].prompt_len])
    options = {"max_new_tokens": 33, "eos_token_id": []}
    assert decoder.generate([prompt], **options).stats.tokens_per_cycle < 0.7 * K
    make_trainer(model, rows, tmp_path, steps=300, learning_rate=5e-3, lr_scheduler_type="cosine").train()
    output = decoder.generate([prompt], **options)
    assert output.sequences[0].tolist() == rows[0].ids  # exact before, during and after training
    assert output.stats.tokens_per_cycle >= 0.9 * K


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = make_model()
    rows = own_rows(model, 2)
    trainer = make_trainer(model, rows, tmp_path, steps=2)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj_diff.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan in step 0"):
        trainer.train()
    assert not (tmp_path / "run" / "checkpoint-4").exists()


def test_a_cache_of_other_rows_or_weights_is_not_reused(tmp_path):
    model = make_model()
    rows = own_rows(model, 2)
    FrozenCache.open_or_build(tmp_path, model, rows, top_k=4)
    manifest = (tmp_path / "manifest.json").read_text()
    FrozenCache.open_or_build(tmp_path, model, rows, top_k=4)
    assert (tmp_path / "manifest.json").read_text() == manifest
    FrozenCache.open_or_build(tmp_path, model, rows[:1], top_k=4)
    assert (tmp_path / "manifest.json").read_text() != manifest


def test_a_cache_that_was_cut_short_is_completed(tmp_path, monkeypatch):
    model = make_model()
    rows = own_rows(model, 5)
    whole = FrozenCache.open_or_build(tmp_path / "whole", model, rows, top_k=4)
    monkeypatch.setattr(frozen_cache, "RECORD_EVERY", 2)
    fill_row, filled = FrozenCache._fill_row, []

    def fill_or_stop(cache, model, row, *arguments):
        if len(filled) == 3:
            raise KeyboardInterrupt
        filled.append(row)
        fill_row(cache, model, row, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FrozenCache, "_fill_row", fill_or_stop)
        FrozenCache.open_or_build(tmp_path / "cut", model, rows, top_k=4)

    def fill_and_note(cache, model, row, *arguments):
        filled.append(row)
        fill_row(cache, model, row, *arguments)

    monkeypatch.setattr(FrozenCache, "_fill_row", fill_and_note)
    cut = FrozenCache.open_or_build(tmp_path / "cut", model, rows, top_k=4)
    assert filled == [*rows[:3], *rows[2:]]  # recorded after two rows, so the third is made again
    assert torch.equal(cut.kv, whole.kv) and torch.equal(cut.teacher_ids, whole.teacher_ids)
    assert torch.equal(cut.teacher_probs, whole.teacher_probs)


def test_examples_are_a_function_of_seed_and_index():
    rows = [TextRow("code", list(range(30)), 4), TextRow("prose", list(range(9)), 7)]
    examples = AnchorExamples(rows, 50, 4, {"code": 1.0, "prose": 1.0}, seed=5)
    again = AnchorExamples(rows, 50, 4, {"code": 1.0, "prose": 1.0}, seed=5)
    for n in (49, 0, 17):
        assert examples[n]["row_id"] == again[n]["row_id"] and (examples[n]["anchors"] == again[n]["anchors"]).all()
    for n in range(50):
        row = rows[examples[n]["row_id"]]
        assert all(row.prompt_len - 1 <= anchor <= len(row.ids) - 2 for anchor in examples[n]["anchors"])
    with pytest.raises(ValueError, match="domain_weights must name domains of .*'code', 'prose'.* got .*'maths'"):
        AnchorExamples(rows, 1, 1, {"maths": 1.0})


def test_rows_are_read_cut_and_counted(tmp_path):
    lines = [
        {"prompt_ids": [5, 6], "answer_ids": [7, 8, 9], "domain": "code"},
        {"prompt_ids": [5, 6], "answer_ids": []},
        {"prompt_ids": [1] * 10, "answer_ids": [2, 3]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    rows, skipped = read_rows(tmp_path, max_len=4)
    assert rows == [TextRow("code", [5, 6, 7, 8], 2)] and skipped == 2
    (tmp_path / "b.jsonl").write_text('{"prompt": "text"}\n')
    with pytest.raises(ValueError, match="b.jsonl, line 1: expected an object with prompt_ids and answer_ids"):
        read_rows(tmp_path, max_len=4)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds none"):
        read_rows(empty, max_len=4)
