"""`streak_focus`: value and gradient of the loss are those of plain autograd in fp64 with every draft's weight written
out, and where it is 0 nothing changes."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton import ops
from orthrus_triton.training import batches
from orthrus_triton.training.anchors import AnchorExamples
from orthrus_triton.training.batches import BlockCollator, ViewDistillation
from orthrus_triton.training.config import read_config
from orthrus_triton.training.objective import block_loss, position_weights
from tests.models.tiny_bases import randomise_view
from tests.training.view_runs import K, make_args, make_model, own_rows

B, A, ROWS, H, V = 2, 4, 5, 8, 11


def draft_weights(matches, targets, weights, focus, in_streaks) -> torch.Tensor:
    """[B, A, K-1] fp64, draft by draft: its weight, and what is left of it behind a wrong one."""
    found = torch.zeros(targets.shape, dtype=torch.float64)
    for b, a in torch.cartesian_prod(*map(torch.arange, targets.shape[:2])).tolist():
        focused = in_streaks is None or in_streaks[b, a]
        for i in range(targets.shape[2]):
            if targets[b, a, i] >= 0:
                found[b, a, i] = weights[i].double()
                if focused and not matches[b, a, :i].all():
                    found[b, a, i] *= 1 - focus
    return found


def plain_loss(hidden, head, teacher_probs, matches, targets, weights, focus, in_streaks) -> torch.Tensor:
    """The mean divergence of the drafts in fp64, for autograd; teacher_probs [B, A, K-1, V]."""
    log_q = (hidden.double() @ head.detach().double().T).log_softmax(-1)
    divergence = torch.nn.functional.kl_div(log_q, teacher_probs.double(), reduction="none").sum(-1)
    of_drafts = draft_weights(matches, targets, weights, focus, in_streaks)
    return (of_drafts * divergence).sum() / (weights.double().sum() * targets[..., 0].numel())


def random_case(kind: str):
    """hidden, head, teacher, index, its probabilities at each row, targets: some drafts right, some beyond the end."""
    generator = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(B, A, ROWS, H, generator=generator), torch.randn(V, H, generator=generator)
    choice = (hidden @ head.T).argmax(-1)
    right = torch.rand(choice.shape, generator=generator) < 0.6
    targets = torch.where(right, choice, (choice + 1) % V)
    targets[0, 1, 3:], targets[1, 2, 1:], targets[1, 3] = -1, -1, -1
    index = torch.randint(0, 7, targets.shape, generator=generator)
    if kind == "hidden":
        states = torch.randn(7, H, generator=generator)
        teacher, probs = ops.HiddenTeacher(states), (states @ head.T).softmax(-1)
    elif kind == "top-k":
        probs = torch.rand(7, V, generator=generator).softmax(-1)
        teacher = ops.TopKTeacher(torch.arange(V).repeat(7, 1), probs)
    else:
        labels = torch.randint(0, V, (7,), generator=generator)
        teacher, probs = ops.LabelTeacher(labels), torch.nn.functional.one_hot(labels, V).float()
    return hidden, head, teacher, index, probs[index], targets


@pytest.mark.parametrize("kind", ["hidden", "top-k", "label"])
@pytest.mark.parametrize("focus", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("some", [False, True])
def test_value_and_gradient_are_plain_autograds(kind, focus, some):
    hidden, head, teacher, index, probs, targets = random_case(kind)
    in_streaks = torch.tensor([[True, True, False, True], [False, True, True, False]]) if some else None
    weights = position_weights(ROWS + 1, 2.5)
    ours, plain = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss, matches = block_loss(ours, head, teacher, index, targets, weights, focus, in_streaks)
    assert torch.equal(matches, (hidden @ head.T).argmax(-1) == targets)
    expected = plain_loss(plain, head, probs, matches, targets, weights, focus, in_streaks)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (3 * loss).backward()  # as gradient accumulation scales it
    (3 * expected).backward()
    assert torch.allclose(ours.grad.double(), plain.grad, rtol=1e-4, atol=1e-7)
    behind = matches.int().cumprod(-1)[..., :-1] == 0
    assert behind.any() and not behind.all()
    if focus == 1:  # what stands behind a wrong draft learns nothing at all
        focused = behind if in_streaks is None else behind & in_streaks[..., None]
        assert not ours.grad[..., 1:, :][focused].any()
    with torch.no_grad():  # as an evaluation asks
        assert torch.equal(block_loss(hidden, head, teacher, index, targets, weights, focus, in_streaks)[0], loss)


def test_without_focus_no_bit_changes():
    hidden, head, teacher, index, _, targets = random_case("hidden")
    weights = position_weights(ROWS + 1, 2.5)
    results = []
    for options in ((), (0.0,), (0.0, torch.ones(B, A, dtype=torch.bool)), (0.5, torch.zeros(B, A, dtype=torch.bool))):
        states = hidden.clone().requires_grad_()
        loss, matches = block_loss(states, head, teacher, index, targets, weights, *options)
        loss.backward()
        results.append((loss.detach(), states.grad, matches))
    for loss, gradient, matches in results[1:3]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
        assert torch.equal(matches, results[0][2])
    # where it is for no block, the gradient has the same bits, too
    assert torch.equal(results[3][1], results[0][1]) and torch.allclose(results[3][0], results[0][0])


def test_a_block_of_one_draft_has_none_behind_another():
    hidden, head, teacher, index, _, targets = random_case("hidden")
    case = hidden[:, :, :1], head, teacher, index[..., :1], targets[..., :1], position_weights(2, None)
    (plain, right), (focused, same) = block_loss(*case), block_loss(*case, 0.5)
    assert torch.allclose(plain, focused) and torch.equal(right, same)


@pytest.mark.parametrize("chain_width", [None, 8])
@pytest.mark.parametrize("focus", [0.0, 0.7, 1.0])
def test_of_a_view(chain_width, focus, monkeypatch):
    """Blocks that learn without a chain keep their full weights where there is one."""
    model = randomise_view(make_model("qwen3", anchor_view="ar", chain_width=chain_width))
    rows = own_rows(model, 4)
    examples = AnchorExamples(rows, 4, 9, anchor_rows=model.anchor_rows)
    batch = BlockCollator(rows, None, K, "kl", model.anchor_rows)([examples[n] for n in range(4)])
    batch["own_ids"][::2, ::2] = -1
    targets, seen = batch["targets"], []
    assert (targets < 0).any()
    distillation = ViewDistillation(model, K, "kl", 2.0, focus)
    monkeypatch.setattr(batches, "block_loss", lambda *given: seen.append(given) or block_loss(*given))
    distillation(**batch)
    # let one draft in two be right
    choice = (seen[0][0] @ seen[0][1].T).argmax(-1)
    lucky = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    batch["targets"] = torch.where(lucky & (targets >= 0), choice, targets)

    output = distillation(**batch)
    assert output["matches"].any() and not output["matches"].all()
    trained = {name: one for name, one in model.named_parameters() if "_diff" in name}
    ours = torch.autograd.grad(output["loss"], list(trained.values()), retain_graph=True)

    hidden, head, teacher, index = seen[1][:4]
    probs = (teacher.hidden @ head.T).softmax(-1)[index]
    corrected = None if chain_width is None else batch["own_ids"][..., 0] >= 0
    expected = plain_loss(
        hidden, head, probs, output["matches"], batch["targets"], position_weights(K, 2.0), focus, corrected
    )
    assert float(output["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, one, plain in zip(trained, ours, torch.autograd.grad(expected, list(trained.values()))):
        assert torch.allclose(one, plain, rtol=1e-3, atol=1e-6), name


def test_out_of_range_is_refused(tmp_path):
    for focus in (0.0, 0.25, 1.0):
        assert make_args(tmp_path, 1, streak_focus=focus).streak_focus == focus
    for wrong in (-0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"streak_focus must be in \[0, 1\], but got"):
            make_args(tmp_path, 1, streak_focus=wrong)
    config = tmp_path / "view.yaml"
    config.write_text("max_steps: 3\nuse_cpu: true\nstreak_focus: much")
    with pytest.raises(ValueError, match="streak_focus must be a number, but got the text 'much'"):
        read_config(config)
