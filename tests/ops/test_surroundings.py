"""What surrounds a call changes no bit: autocast, a default device, threads. Tensors without values get shapes."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from orthrus_triton import ops
from orthrus_triton.ops import _cpu_product
from orthrus_triton.ops._dispatch import on_its_device
from orthrus_triton.ops.dual_view_attention import key_tails

HALF = [torch.bfloat16, torch.float16]


def calls(dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """Ops with a torch implementation that multiplies, on random inputs."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)

    x, weight, parameter = randn(2, 5, 64), randn(160, 64), torch.nn.Parameter(randn(160, 64), requires_grad=False)
    q, k, v, k_block, v_block = randn(2, 5, 4, 64), *randn(2, 2, 2, 200, 64), *randn(2, 2, 5, 2, 64)
    limit = torch.arange(100, 105, dtype=torch.int32, device="cpu").repeat(2, 1)
    angles = torch.rand(2, 2, 5, 16, generator=generator, device="cpu", dtype=torch.float32)
    index, ones = torch.tensor([0, 1, 1, 2, 0], device="cpu"), torch.ones(5, device="cpu", dtype=torch.float32)
    teacher = ops.HiddenTeacher(randn(3, 64))

    def rope() -> torch.Tensor:
        cache = torch.zeros(2, 2, 1, 200, 32, dtype=dtype, device="cpu")
        norms = torch.ones(32, dtype=dtype, device="cpu"), torch.ones(32, dtype=dtype, device="cpu")
        return ops.qkv_rope_cache(x, weight, None, *angles, *cache, limit, *norms, impl="torch")

    return {
        "linear": lambda: ops.linear(x, weight, impl="torch"),
        "linear of a parameter": lambda: ops.linear(x, parameter, impl="torch"),
        "library": lambda: ops.linear(x, weight, impl="library"),
        "linear_swiglu": lambda: ops.linear_swiglu(x, weight, impl="torch"),
        "qkv_rope_cache": rope,
        "dual_view_attention": lambda: ops.dual_view_attention(q, k, v, limit, impl="torch"),
        "own block": lambda: ops.dual_view_attention(q, k, v, limit, k_block, v_block, 5, impl="torch"),
        "block_attention": lambda: ops.block_attention(q, k, v, limit, k_block, v_block, block_size=5, impl="torch"),
        "linear_kl": lambda: ops.linear_kl(x[0], weight, teacher, index, ones, impl="torch").loss,
    }


def forget_bit_tests() -> None:
    _cpu_product.has_tile_bits.cache_clear()
    _cpu_product.row_tile.cache_clear()
    key_tails.safe_tails.cache_clear()


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("surrounding", ["bf16", "fp16", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@torch.no_grad()
def test_neither_autocast_nor_a_default_device_changes_a_bit(dtype: torch.dtype, surrounding: str) -> None:
    expected = {name: call() for name, call in calls(dtype).items()}
    contexts = {"bf16": torch.autocast("cpu", torch.bfloat16), "fp16": torch.autocast("cpu", torch.float16)}
    forget_bit_tests()
    with contexts.get(surrounding) or torch.device("meta"):
        results = {name: call() for name, call in calls(dtype).items()}
    for name, result in results.items():
        assert result.dtype == expected[name].dtype and torch.equal(result, expected[name]), name


def test_autocast_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        q, k, v, k_block, v_block = (
            torch.randn(1, *shape, generator=torch.Generator().manual_seed(n)).requires_grad_(n not in (1, 2))
            for n, shape in enumerate([(4, 2, 64), (2, 9, 64), (2, 9, 64), (4, 2, 64), (4, 2, 64)])
        )
        limit = torch.tensor([[3, 3, 9, 9]], dtype=torch.int32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ops.block_attention(q, k, v, limit, k_block, v_block, block_size=2, impl="torch").sum().backward()
        gradients.append((q.grad, k_block.grad, v_block.grad))
    assert all(torch.equal(*pair) for pair in zip(*gradients))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_default_dtype_changes_no_bit_of_the_loss(impl: str, default: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, taught = (torch.randn(n, 16, generator=generator).bfloat16() for n in (5, 40, 3))
    arguments = hidden, weight, ops.HiddenTeacher(taught), torch.tensor([0, 1, 1, 2, 0]), torch.ones(5)
    expected = ops.linear_kl(*arguments, impl=impl)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        result = ops.linear_kl(*arguments, impl=impl)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(result.loss, expected.loss) and torch.equal(result.row_kl, expected.row_kl)


@pytest.mark.parametrize("grad", [False, True])
def test_fake_tensors_get_their_shapes(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        shapes = {name: call().shape for name, call in calls(torch.float32).items()}
        with FakeTensorMode():
            assert {name: call().shape for name, call in calls(torch.float32).items()} == shapes


@torch.no_grad()
def test_meta_tensors_get_their_shapes() -> None:
    q, cache, limit = (torch.zeros(shape, device="meta") for shape in [(1, 3, 2, 64), (1, 1, 8, 64), (1, 3)])
    assert ops.dual_view_attention(q, cache, cache, limit.int()).shape == q.shape
    angles, qkv = torch.zeros(1, 3, 32, device="meta"), torch.zeros(1, 3, 4 * 64, device="meta")
    assert ops.rope_cache(qkv, angles, angles, cache, cache, limit.int()).shape == (1, 3, 2, 64)


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@torch.no_grad()
def test_rows_of_one_key_head_have_their_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    """A single task of the library's attention is multiplied by all threads, several have one each."""
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    q, k, v = (
        torch.randn(3, *shape, generator=generator).to(dtype) for shape in [(9, 2, 80), (1, 700, 80)] + [(1, 700, 80)]
    )
    limit = (torch.tensor([[400], [495], [690]]) + torch.arange(9)).int()
    try:
        for number in (2, 3, 5):
            torch.set_num_threads(number)
            together = ops.dual_view_attention(q, k, v, limit, impl="torch")
            for b in range(3):
                for t in (0, 4, 8):
                    one, row = slice(b, b + 1), slice(t, t + 1)
                    alone = ops.dual_view_attention(q[one, row], k[one], v[one], limit[one, row], impl="torch")
                    assert torch.equal(alone[0, 0], together[b, t]), (number, b, t)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("rows", [8, 24, 128])
@torch.no_grad()
def test_rows_that_lie_apart_have_the_bits_of_others(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=generator).to(dtype) for n in (96, rows))
    expected = torch.cat([ops.linear(row, weight, impl="torch") for row in x.split(1)])
    for apart in (x.t().contiguous().t(), x.repeat_interleave(2, dim=1)[:, ::2], torch.cat((x, x), dim=1)[:, :64]):
        assert torch.equal(ops.linear(apart, weight, impl="torch"), expected)


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@torch.no_grad()
def test_heads_whose_numbers_lie_apart_are_normed_as_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv, angle = torch.randn(1, 9, 5 * 64, generator=generator).to(dtype), torch.randn(1, 9, 32, generator=generator)
    slots, norm = torch.arange(9, dtype=torch.int32)[None], torch.ones(64, dtype=dtype)
    results = []
    for rows in (qkv, qkv.transpose(1, 2).contiguous().transpose(1, 2)):
        cache = torch.zeros(2, 1, 1, 16, 64, dtype=dtype)
        q = ops.rope_cache(rows, angle.cos(), angle.sin(), *cache, slots, norm, norm, impl="torch")
        results.append((q, cache))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("options", [{}, {"block_size": 2}])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_attention_of_no_sequence_is_empty(impl: str, options: dict) -> None:
    q, cache, rows = torch.zeros(0, 4, 2, 64), torch.zeros(0, 1, 8, 64), torch.zeros(0, 4, 1, 64)
    block = {"k_block": rows, "v_block": rows} if options else {}
    limit = torch.zeros(0, 4, dtype=torch.int32)
    assert ops.dual_view_attention(q, cache, cache, limit, **block, **options, impl=impl).shape == q.shape


class Elsewhere:
    """What a tensor on another GPU than the current one says of itself."""

    device = torch.device("cuda:1")


def launching_functions() -> list[tuple[str, list[str]]]:
    """(file and name, decorators) of every function in ops that launches a kernel."""
    found = []
    for path in sorted(Path(ops.__file__).parent.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any(
                isinstance(node, ast.Call) and "_kernel[" in ast.unparse(node.func) for node in ast.walk(function)
            ):
                decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
                found.append((f"{path.name}: {function.name}", decorators))
    return found


def test_kernels_are_launched_where_their_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, as torch does not."""
    entered: list[str] = []

    @contextmanager
    def device(where: torch.device):
        entered.append(f"on {where}")
        yield
        entered.append("back")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    launch = on_its_device(lambda tensor, *, more: entered.append(f"launch {more}"))
    launch(Elsewhere(), more=1)
    assert entered == ["on cuda:1", "launch 1", "back"]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(Elsewhere(), more=2)
    launch(torch.empty(0), more=3)
    assert entered[3:] == ["launch 2", "launch 3"]
    launching = launching_functions()
    assert len(launching) > 20 and [name for name, decorators in launching if "on_its_device" not in decorators] == []
