"""What a run's log and its evaluations count, recomputed from the decoder's own drafts; and its options reach it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.training.acceptance import acceptance
from orthrus_triton.training.data import TextRow
from orthrus_triton.training.trainer import ViewTrainer
from tests.training.view_runs import K, draft_logits, make_args, make_model, make_trainer, own_rows, view_of


def matches_of(model: OrthrusForCausalLM, row: TextRow, anchor: int) -> list[bool]:
    """Which of the decoder's drafts at an anchor are the text's tokens, as far as that goes."""
    drafted = draft_logits(model, row, anchor)[: K - 1].argmax(-1).tolist()
    return [a == b for a, b in zip(drafted, row.ids[anchor + 1 + model.anchor_rows :])]


def tokens_of(model: OrthrusForCausalLM, matches: list[bool]) -> int:
    """What a cycle with these drafts commits."""
    return (matches + [False]).index(False) + 1 + model.anchor_rows


@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
def test_evaluation_reports_acceptance_by_domain_and_position(tmp_path, anchor_view):
    model = make_model(anchor_view=anchor_view)
    rows = own_rows(model, 9)
    last = rows[-1]
    rows[-1] = last._replace(ids=last.ids[: last.prompt_len + 2], answers=[(last.prompt_len, last.prompt_len + 2)])
    ViewTrainer(model, make_args(tmp_path, 20, save_strategy="no"), rows[4:]).train()  # else no draft is right
    trainer = ViewTrainer(model, make_args(tmp_path, 1, eval_anchors=2), rows[:4], rows[4:])
    metrics = trainer.evaluate()
    by_domain, by_position = {}, [[] for _ in range(K - 1)]
    for example in trainer.eval_dataset:
        row = trainer.data_collator.rows[example["row_id"]]
        assert len(example["anchors"]) == 2
        for anchor in example["anchors"].tolist():
            matches = matches_of(model, row, anchor)
            assert len(matches) == K - 1 or row is rows[-1]  # a block is whole where there is room
            by_domain.setdefault(row.domain, []).append(tokens_of(model, matches))
            for position, match in zip(by_position, matches):
                position.append(match)
    assert by_domain.keys() == {"code", "prose"} and len(by_position[-1]) < len(by_position[0])  # some end in a block
    for domain, counts in by_domain.items():
        assert metrics[f"eval_tokens_per_cycle_{domain}"] == pytest.approx(np.mean(counts))
    assert metrics["eval_tokens_per_cycle"] == pytest.approx(np.mean(sum(by_domain.values(), [])))
    for n, matches in enumerate(by_position, start=1):
        assert metrics[f"eval_match_{n}"] == pytest.approx(np.mean(matches))
    assert f"eval_match_{K}" not in metrics
    assert 1 < metrics["eval_tokens_per_cycle"] - model.anchor_rows <= K


def test_acceptance_counts_leading_matches_and_the_free_token():
    matches = torch.tensor([[[1, 1, 0]], [[0, 1, 1]], [[1, -1, -1]]]).numpy()
    metrics = acceptance(matches, torch.tensor([0, 1, 1]).numpy(), ["code", "prose"])
    assert metrics["tokens_per_cycle_code"] == 3 and metrics["tokens_per_cycle_prose"] == 1.5
    assert metrics["tokens_per_cycle"] == 2
    assert (metrics["match_1"], metrics["match_2"], metrics["match_3"]) == (2 / 3, 1, 0.5)
    assert acceptance(matches[2:], np.array([1]), ["code", "prose"]) == {
        "tokens_per_cycle": 2, "tokens_per_cycle_prose": 2, "match_1": 1, "match_2": 0, "match_3": 0,
    }  # fmt: skip


@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
def test_the_log_counts_the_training_blocks_since_the_last_one(tmp_path, anchor_view):
    model = make_model(anchor_view=anchor_view)
    often = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(model, tmp_path, 4, eval_rows=2, num_anchors=9, learning_rate=0.0, **often)
    trainer.train()
    logged = [entry["tokens_per_cycle"] for entry in trainer.state.log_history if "loss" in entry]
    expected = []
    for first in (0, 4):  # two steps of two rows
        blocks = []
        for example in (trainer.train_dataset[n] for n in range(first, first + 4)):
            row = trainer.train_dataset.rows[example["row_id"]]
            blocks += [matches_of(model, row, anchor) for anchor in example["anchors"].tolist()]
        assert all(blocks)  # there is something to predict in each
        expected.append(np.mean([tokens_of(model, matches) for matches in blocks]))
    assert logged == pytest.approx(expected, abs=1e-4) and logged[0] != logged[1]


@pytest.fixture(scope="module")
def plain_view(tmp_path_factory):
    model = make_model()
    make_trainer(model, tmp_path_factory.mktemp("plain"), 2).train()
    return view_of(model)


@pytest.mark.parametrize(
    "option",
    [
        {}, {"seed": 4}, {"num_anchors": 2}, {"domain_weights": {"code": 1.0, "prose": 0.0}}, {"anchor_focus": 0.9},
        {"loss": "ce"}, {"teacher_top_k": 1}, {"position_decay": 1.0}, {"streak_focus": 1.0}, {"block_size": K - 1},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_what_is_learnt(tmp_path, plain_view, option):
    model = make_model()
    make_trainer(model, tmp_path, 2, **option).train()
    name = "model.layers.0.self_attn.q_proj_diff.weight"
    assert torch.equal(view_of(model)[name], plain_view[name]) == (not option)
