"""linear_kl against autograd through every logit in fp64, for each kind of teacher; and what it must never allocate."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from orthrus_triton.ops import HiddenTeacher, LabelTeacher, LinearKL, TopKTeacher, linear_kl
from orthrus_triton.ops.linear_kl.chunks import linear_kl_chunked
from orthrus_triton.ops.linear_kl.launch import launch_rows, launch_teacher
from orthrus_triton.ops.linear_kl.torch_impl import rows_torch, teacher_torch
from orthrus_triton.testing import assert_within_budget
from tests.ops.attention_cases import DTYPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = ("hidden", "top-k", "labels")
PASSES = {"torch": (teacher_torch, rows_torch), "triton": (launch_teacher, launch_rows)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows of a small vocabulary cross every edge: chunks of positions and rows, tiles of rows and tokens."""
    chunks = importlib.import_module("orthrus_triton.ops.linear_kl.chunks")
    monkeypatch.setattr(chunks, "CHUNK_ROWS", {"cpu": 4, "cuda": 4})
    monkeypatch.setattr(importlib.import_module("orthrus_triton.ops.linear_kl.torch_impl"), "ROW_TILE", 3)
    monkeypatch.setattr(importlib.import_module("orthrus_triton.ops.linear_kl.launch"), "BLOCK_V", 32)


def make_problem(
    seed: int, kind: str, dtype: torch.dtype, *, rows: int = 11, width: int = 16, vocab: int = 70, positions: int = 6,
    top: int = 5,
) -> tuple:  # fmt: skip
    """hidden, weight, teacher, index and row_weight; rows refer to positions in any order, some to none."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    hidden, weight = randn(rows, width).requires_grad_(), randn(vocab, width)
    index = torch.randint(0, positions, (rows,), generator=generator).to(DEVICE)
    row_weight = torch.rand(rows, generator=generator).to(DEVICE)
    if kind == "hidden":
        teacher = HiddenTeacher(randn(positions, width))
    elif kind == "top-k":
        found = (randn(positions, vocab).float() * 3).topk(min(top, vocab))
        teacher = TopKTeacher(found.indices, torch.softmax(found.values, dim=-1))
    else:
        teacher = LabelTeacher(torch.randint(0, vocab, (positions,), generator=generator).to(DEVICE))
    return hidden, weight, teacher, index, row_weight


def run(problem: tuple, impl: str) -> tuple[LinearKL, torch.Tensor]:
    result = linear_kl(*problem, impl=impl)
    return result, torch.autograd.grad(result.loss, problem[0])[0]


def in_double(problem: tuple) -> tuple:
    hidden, weight, teacher, index, row_weight = problem
    wide = [x.double() if x.is_floating_point() else x for x in teacher]
    return hidden.detach().double().requires_grad_(), weight.double(), type(teacher)(*wide), index, row_weight


def plain(problem: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """row_kl and gradient as written without this op, in the dtype of the problem."""
    hidden, weight, teacher, index, row_weight = problem
    if isinstance(teacher, HiddenTeacher):
        target = torch.softmax((teacher.hidden @ weight.T).float(), dim=-1)
    else:
        ids = teacher.ids.view(len(teacher.ids), -1)
        probs = teacher.probs if isinstance(teacher, TopKTeacher) else torch.ones_like(ids, dtype=torch.float32)
        target = torch.zeros(len(ids), len(weight), device=DEVICE).scatter(1, ids, probs)
    scores = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    row_kl = torch.nn.functional.kl_div(scores, target[index], reduction="none").sum(dim=-1)
    loss = (row_kl * row_weight).sum() / row_weight.sum()
    return row_kl.detach(), torch.autograd.grad(loss, hidden)[0]


@given(
    seed=st.integers(0, 999), kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES), rows=st.integers(5, 12),
    width=st.integers(8, 40), vocab=st.integers(20, 80), positions=st.integers(1, 9), top=st.integers(1, 8),
)  # fmt: skip
def test_fuzz(seed, kind, dtype, rows, width, vocab, positions, top) -> None:
    problem = make_problem(
        seed, kind, dtype, rows=rows, width=width, vocab=vocab, positions=positions, top=top
    )  # fmt: skip
    reference, exact_grad = run(in_double(problem), "reference")
    row_kl, grad = plain(problem)
    for impl in ("triton", "torch"):
        actual, actual_grad = run(problem, impl)
        # in fp32 the order of sums is all the error, and plain PyTorch may be nearly exact on a few rows
        factor = 10 if dtype == torch.float32 else 2
        assert_within_budget(actual.row_kl, row_kl, reference.row_kl, factor=factor, what=f"{impl}, row_kl")
        assert_within_budget(actual_grad, grad, exact_grad, factor=factor, what=f"{impl}, gradient")
        torch.testing.assert_close(actual.loss, (actual.row_kl * problem[4]).sum() / problem[4].sum())
        assert actual.loss.dtype == actual.row_kl.dtype == torch.float32 and actual_grad.dtype == dtype


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_choice_and_agreement(kind: str, impl: str) -> None:
    hidden, weight, teacher, index, row_weight = make_problem(1, kind, torch.float32, rows=40, positions=30)
    if kind == "hidden":
        wanted = (teacher.hidden @ weight.T).argmax(dim=-1)
        hidden = torch.where((index % 2 == 0)[:, None], teacher.hidden[index], hidden)
    else:
        wanted = teacher.ids.view(30, -1)[:, 0]
        hidden = torch.where((index % 2 == 0)[:, None], 9 * weight[wanted[index]], hidden)
    result = linear_kl(hidden, weight, teacher, index, row_weight, impl=impl)
    assert torch.equal(result.choice, (hidden @ weight.T).argmax(dim=-1))
    assert torch.equal(result.agrees, result.choice == wanted[index])
    assert result.agrees.any() and not result.agrees.all()
    assert not result.agrees.requires_grad and not result.row_kl.requires_grad


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_of_equally_probable_tokens_the_first_is_chosen(impl: str) -> None:
    """As in decoding; in one tile of tokens and over several."""
    _, weight, _, index, row_weight = make_problem(1, "hidden", torch.float32)
    weight = (4 * weight).round()  # so that products of equal rows are equal
    weight[[12, 40, 68]] = weight[10].clone()
    hidden = 9 * weight[10].expand(len(index), -1)
    result = linear_kl(hidden, weight, HiddenTeacher(hidden[:6]), index, row_weight, impl=impl)
    assert result.choice.eq(10).all() and result.agrees.all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_bit(kind: str, impl: str) -> None:
    """As in a Trainer with bf16: true; the loss is of what the frozen head says in its own dtype."""
    problem = make_problem(2, kind, torch.float32)
    result, grad = run(problem, impl)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        same, same_grad = run(problem, impl)
    assert torch.equal(result.row_kl, same.row_kl) and torch.equal(grad, same_grad)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_a_teachers_list_may_have_any_order_and_zeros(impl: str) -> None:
    """As where it is so sure that the others' probabilities underflow; then it is a label."""
    hidden, weight, label, index, row_weight = make_problem(6, "labels", torch.float32)
    others = (label.ids[:, None] + torch.arange(1, 4, device=DEVICE)) % len(weight)
    listed = TopKTeacher(torch.cat((others, label.ids[:, None]), dim=1), torch.eye(4, device=DEVICE)[[3] * len(others)])
    hidden = torch.where((index % 2 == 0)[:, None], 9 * weight[label.ids[index]], hidden).detach().requires_grad_()
    (one, one_grad), (other, other_grad) = (run((hidden, weight, x, index, row_weight), impl) for x in (label, listed))
    assert torch.equal(one.agrees, other.agrees) and one.agrees.any()
    torch.testing.assert_close(one.row_kl, other.row_kl)
    torch.testing.assert_close(one_grad, other_grad)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(impl: str) -> None:
    hidden, weight, _, index, row_weight = make_problem(2, "hidden", torch.float32, rows=6)
    index = torch.arange(6, device=DEVICE).flip(0)
    result = linear_kl(hidden, weight, HiddenTeacher(hidden.detach().flip(0)), index, row_weight, impl=impl)
    result.loss.backward()
    assert result.agrees.all() and result.row_kl.abs().max() < 1e-5 and hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_torch_gradcheck(kind: str) -> None:
    hidden, *rest = in_double(make_problem(3, kind, torch.float32, rows=5, width=3, vocab=7, positions=4))
    if kind == "top-k":  # a gradient of fp32 probabilities that do not quite sum to 1 is wrong by as much
        rest[1] = TopKTeacher(rest[1].ids, rest[1].probs / rest[1].probs.sum(dim=-1, keepdim=True))
    assert torch.autograd.gradcheck(lambda x: linear_kl(x, *rest, impl="torch").loss, (hidden,))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_rows_without_weight_teach_nothing(impl: str) -> None:
    hidden, weight, teacher, index, row_weight = make_problem(4, "hidden", torch.float32)
    row_weight[3] = 0
    _, grad = run((hidden, weight, teacher, index, row_weight), impl)
    assert not grad[3].any() and grad[4].any()
    result, grad = run((hidden, weight, teacher, index, torch.zeros_like(row_weight)), impl)
    assert result.loss == 0 and not grad.any() and result.row_kl.any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_small_fp16_gradients_survive_until_the_loss_is_scaled(impl: str) -> None:
    problem = make_problem(5, "hidden", torch.float16)
    problem[4][0] = 1e-6  # its share of the gradient is far below fp16's smallest number
    scaled = linear_kl(*problem, impl=impl).loss * 2.0**20
    grad = torch.autograd.grad(scaled, problem[0])[0]
    exact = run(in_double(problem), "reference")[1] * 2.0**20
    torch.testing.assert_close(grad[0].double(), exact[0], rtol=2e-2, atol=2e-2 * float(exact[0].abs().max()))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_repeat_and_frozen_parts_get_no_gradient(kind: str, impl: str) -> None:
    hidden, weight, teacher, index, row_weight = make_problem(6, kind, torch.float32)
    problem = (hidden, weight.requires_grad_(), teacher, index, row_weight)
    if kind == "hidden":
        teacher.hidden.requires_grad_()
    (first, first_grad), (second, second_grad) = run(problem, impl), run(problem, impl)
    assert torch.equal(first_grad, second_grad) and all(torch.equal(*pair) for pair in zip(first, second))
    linear_kl(*problem, impl=impl).loss.backward()
    assert torch.equal(hidden.grad, first_grad) and weight.grad is None
    assert kind != "hidden" or teacher.hidden.grad is None


class Recorder(TorchDispatchMode):
    """Notes the widest tensors and the rows of every product with the LM head."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.most_rows, self.projected, self.products = vocab, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == self.vocab and x.data_ptr() != self.head:
                self.most_rows = max(self.most_rows, x.shape[:-1].numel())
        if func.overloadpacket is torch.ops.aten.mm:
            self.products += 1
            self.projected += args[0].shape[0] if result.shape[-1] == self.vocab else 0
        return result


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("with_grad", [True, False])
def test_logits_are_never_there_in_full(impl: str, with_grad: bool) -> None:
    """Chunks of 4 rows of 64; each of the 10 positions in use is projected once; no gradient work where none is due."""
    hidden, weight, teacher, _, row_weight = make_problem(7, "hidden", torch.float32, rows=64, vocab=71, positions=50)
    index = torch.randint(0, 10, (64,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) * 3
    recorder = Recorder(71)
    recorder.head = weight.data_ptr()  # the LM head itself, seen from the other side
    with torch.no_grad(), recorder:
        linear_kl_chunked(
            hidden, weight, index, row_weight, teacher.hidden, None, None, with_grad, *PASSES[impl]
        )  # fmt: skip
    assert recorder.most_rows == 4
    assert recorder.projected == 64 + len(index.unique())
    assert len(index.unique()) == 10
    student_chunks = recorder.products - 3  # three chunks of teacher positions
    assert 64 / 4 <= student_chunks / (1 + with_grad) <= 64 / 4 + 3


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, impl: str) -> None:
    hidden, weight, teacher, index, row_weight = make_problem(8, kind, torch.float32, rows=5)
    tensors = {
        "hidden": lambda: (teacher.hidden, None, None),
        "top-k": lambda: (None, teacher.ids, teacher.probs),
        "labels": lambda: (None, teacher.ids[:, None], torch.ones(len(teacher.ids), 1, device=DEVICE)),
    }[kind]()
    arguments = (hidden, weight, index, row_weight, *tensors, True, impl)
    torch.library.opcheck(torch.ops.orthrus_triton.linear_kl.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(11, 15)}, ValueError, "hidden must be .R, H. and weight .V, H."),
        ({1: torch.zeros(70, 16).half()}, TypeError, "weight must be torch.float32"),
        ({2: torch.zeros(6, 16)}, TypeError, "teacher must be a HiddenTeacher, TopKTeacher or LabelTeacher"),
        ({2: HiddenTeacher(torch.zeros(6, 17))}, ValueError, "teacher.hidden must have shape"),
        ({2: TopKTeacher(torch.zeros(6, 2).long(), torch.ones(6, 1))}, ValueError, "teacher.probs must have shape"),
        ({2: LabelTeacher(torch.zeros(6, 1).long())}, ValueError, "teacher.ids must be .P."),
        ({2: LabelTeacher(torch.zeros(6).int())}, TypeError, "teacher.ids must be torch.int64"),
        ({3: torch.zeros(10).long()}, ValueError, "index must have shape"),
        ({4: torch.zeros(11, 1)}, ValueError, "row_weight must have shape"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type, message: str) -> None:
    problem = [x.cpu() if isinstance(x, torch.Tensor) else x for x in make_problem(9, "hidden", torch.float32)]
    for place, value in change.items():
        problem[place] = value
    with pytest.raises(error, match=message):
        linear_kl(*problem, impl="torch")
