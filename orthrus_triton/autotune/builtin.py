"""The package's own ops as the tuner sees them. It stands above `ops`, which know only `store`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthrus_triton.autotune.config import DTYPES, KernelConfig, Problem
from orthrus_triton.autotune.space import SPACES, TIMED_CONTEXTS, TIMED_KV_HEADS
from orthrus_triton.autotune.timing import copies_beyond_cache
from orthrus_triton.autotune.tunable_op import OPS, ROWS, TIMED_ROWS, Inputs, Load, TunableOp, Variant, row_slices
from orthrus_triton.ops.dual_view_attention.launch import launch as launch_attention
from orthrus_triton.ops.dual_view_attention.reference import attention_reference
from orthrus_triton.ops.dual_view_attention.torch_impl import attention_torch
from orthrus_triton.ops.linear import launch_linear
from orthrus_triton.ops.linear_norm import launch_linear_norm
from orthrus_triton.ops.linear_swiglu import launch_linear_swiglu
from orthrus_triton.ops.lm_head import launch_lm_head_choice
from orthrus_triton.ops.sample import launch_greedy_choice
from orthrus_triton.ops.swiglu import launch_gated

MANY_ROWS = 1100  # the largest tiles serve a weight of 576 rows from 1,089 on
CHECKED_COLUMNS = 1024  # of a wide weight, for the fp64 reference
WINDOW = 2048  # of the draft that is checked
VERIFY = (None, None, None, None)  # no block keys, no window


def _randn(seed: int, device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if device.type == "meta":
        return torch.empty(*shape, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device, dtype=dtype)


def _product(inputs: Inputs, config: KernelConfig) -> torch.Tensor:
    x, weight = inputs
    return launch_linear(x, weight, None, None, x.dtype, config)


def _normed(inputs: Inputs, config: KernelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual, weight, norm = inputs
    return launch_linear_norm(x, weight, None, residual, norm, 1e-6, 0.0, config)


def _logits(inputs: Inputs, config: KernelConfig) -> torch.Tensor:
    x, weight = inputs
    return launch_linear(x, weight, None, None, torch.float32, config)


class Linear(TunableOp):
    """x @ weight.T, and what a model fuses behind it: SwiGLU behind gate/up, the choice behind the LM head, and behind
    all others a kernel that takes the product's splits: the norm stands for it, and for the rotation behind qkv."""

    space, home = SPACES["linear"], __name__

    def variants(self, problem: Problem, device: torch.device) -> list[Variant]:
        """The product against fp64; what is fused against the two ops it stands for."""
        N = problem.shape["N"]
        # many rows run in larger tiles
        rows = MANY_ROWS if device.type == "cuda" else ROWS
        inputs, some = self._inputs(problem, rows, device), slice(None, None, max(N // CHECKED_COLUMNS, 1))
        cut, slices = _cut_rows, row_slices(rows)
        found = [
            Variant(
                "linear", inputs, _product, cut, slices, exact=lambda i: i[0].double() @ i[1][some].double().T,
                plain=lambda i: torch.nn.functional.linear(i[0], i[1])[:, some], sample=lambda out: out[:, some],
            )
        ]  # fmt: skip
        if "gate_up" in problem.uses:
            found.append(
                Variant(
                    "linear_swiglu", inputs, lambda i, c: launch_linear_swiglu(*i, None, c), cut, slices,
                    same_as=lambda i, c: launch_gated(_product(i, c), gelu=False),
                )
            )  # fmt: skip
        if "followed" in problem.uses:
            found.append(
                Variant(
                    "linear_norm", self._with_norm(problem, inputs), lambda i, c: torch.cat(_normed(i, c), dim=-1),
                    lambda i, start, stop: (*(rows[start:stop] for rows in i[:2]), *i[2:]), slices,
                )
            )  # fmt: skip
        if "head" in problem.uses:
            found.append(
                Variant(
                    "lm_head_choice", inputs, lambda i, c: launch_lm_head_choice(*i, c), cut, slices,
                    same_as=lambda i, c: launch_greedy_choice(_logits(i, c)),
                )
            )  # fmt: skip
        return found

    def loads(self, problem: Problem, device: torch.device) -> list[Load]:
        """One row and a draft block, as the model runs them: with what is fused behind."""
        run = _product
        if "gate_up" in problem.uses:
            run = lambda i, c: launch_linear_swiglu(*i, None, c)  # noqa: E731
        elif "head" in problem.uses:
            run = lambda i, c: launch_lm_head_choice(*i, c)  # noqa: E731
        elif "followed" in problem.uses:
            run = lambda i, c: _normed(i, c)[1]  # noqa: E731
        _, weight = self._inputs(problem, 1, device)
        weights = [weight, *(weight.clone() for _ in range(copies_beyond_cache(weight.nbytes, device) - 1))]
        loads = []
        for rows in TIMED_ROWS:
            x, _ = self._inputs(problem, rows, device, with_weight=False)
            result = 8 * rows if "head" in problem.uses else rows * weight.shape[0] * x.itemsize
            copies = [(x, w) for w in weights]
            if "followed" in problem.uses:
                copies, result = [self._with_norm(problem, inputs) for inputs in copies], 3 * result
            loads.append(Load(f"rows={rows}", run, copies, weight.nbytes + x.nbytes + result))
        return loads

    def launch_all(self, problem: Problem, config: KernelConfig, device: torch.device, every: bool = True) -> None:
        """The plain product always, as it is checked and timed, and with all that can be asked of it."""
        x, weight = self._inputs(problem, 32, device)
        bias, residual = weight[:, 0].contiguous(), x.new_empty(32, problem.shape["N"])
        launch_linear(x, weight, bias, residual, x.dtype, config)
        if every:
            _product((x, weight), config)
        if "gate_up" in problem.uses:
            launch_linear_swiglu(x, weight, None, config)
        if "followed" in problem.uses:
            _normed(self._with_norm(problem, (x, weight)), config)
        if "head" in problem.uses:
            if every:
                _logits((x, weight), config)
            launch_lm_head_choice(x, weight, config)

    def _inputs(self, problem: Problem, rows: int, device: torch.device, with_weight: bool = True) -> Inputs:
        N, K, dtype = problem.shape["N"], problem.shape["K"], DTYPES[problem.dtype]
        x = _randn(1, device, dtype, rows, K)
        return x, (_randn(2, device, dtype, N, K) * K**-0.5 if with_weight else None)

    def _with_norm(self, problem: Problem, inputs: Inputs) -> Inputs:
        x, weight = inputs
        residual, norm = (
            _randn(seed, x.device, x.dtype, *rows, problem.shape["N"]) for seed, rows in ((3, (len(x),)), (4, ()))
        )
        return x, residual, weight, norm


class Attention(TunableOp):
    """Both views' attention. Sizes follow the device: the interpreter's are small."""

    space, home = SPACES["dual_view_attention"], __name__

    def variants(self, problem: Problem, device: torch.device) -> list[Variant]:
        """A verify pass, each row against itself alone in a shorter cache with NaN behind what it sees; and a draft of
        two blocks under a sliding window, each against itself alone."""
        rows, context, kv_heads = (32, 3000, TIMED_KV_HEADS) if device.type == "cuda" else (18, 60, 1)
        q, k, v = self._tensors(problem, rows, context + rows + 40, kv_heads, device)
        limit = context + torch.arange(1, rows + 1, dtype=torch.int32, device=device)[None]
        block = rows // 2
        blocks = [_randn(7 + n, device, q.dtype, 1, rows, kv_heads, q.shape[3]) for n in range(2)]
        anchors = limit[:, :1].expand(1, rows).contiguous()
        return [
            Variant("verify", (q, k, v, limit, *VERIFY), self._run, _cut_verify,
                    row_slices(rows), self._exact, self._plain),
            Variant("draft", (q, k, v, anchors, *blocks, block, WINDOW if device.type == "cuda" else 40), self._run,
                    _cut_draft,
                    [(0, block), (block, rows)], self._exact, self._plain),
        ]  # fmt: skip

    def loads(self, problem: Problem, device: torch.device) -> list[Load]:
        """One row and a draft block's worth of rows, over a short and a long context."""
        loads = []
        for context in TIMED_CONTEXTS:
            for rows in TIMED_ROWS:
                q, k, v = self._tensors(problem, rows, context + rows, TIMED_KV_HEADS, device)
                limit = context + torch.arange(1, rows + 1, dtype=torch.int32, device=device)[None]
                copies = [(k, v)]
                for _ in range(copies_beyond_cache(2 * k.nbytes, device) - 1):
                    copies.append((k.clone(), v.clone()))
                inputs = [(q, k, v, limit, *VERIFY) for k, v in copies]
                loads.append(
                    Load(f"rows={rows} context={context}", self._run, inputs, 2 * k.nbytes + 2 * q.nbytes)
                )  # fmt: skip
        return loads

    def launch_all(self, problem: Problem, config: KernelConfig, device: torch.device, every: bool = True) -> None:
        """What is checked and timed: with window and block keys, which is the union of the branches, and without."""
        q, k, v = self._tensors(problem, 32, 4096, TIMED_KV_HEADS, device)
        limit = torch.empty(1, 32, dtype=torch.int32, device=device)
        block = torch.empty(1, 32, TIMED_KV_HEADS, q.shape[3], dtype=q.dtype, device=device)
        self._run((q, k, v, limit, block, block, 16, WINDOW), config)
        if every:
            self._run((q, k, v, limit, *VERIFY), config)

    def _tensors(self, problem: Problem, rows: int, capacity: int, kv_heads: int, device: torch.device) -> Inputs:
        head_dim, group, dtype = problem.shape["head_dim"], problem.shape["group"], DTYPES[problem.dtype]
        q = _randn(3, device, dtype, 1, rows, kv_heads * group, head_dim)
        return q, *(_randn(4 + n, device, dtype, 1, kv_heads, capacity, head_dim) for n in range(2))

    @staticmethod
    def _run(inputs: Inputs, config: KernelConfig) -> torch.Tensor:
        return launch_attention(*inputs, inputs[0].shape[3] ** -0.5, config)[0]

    @staticmethod
    def _exact(inputs: Inputs) -> torch.Tensor:
        q, *rest = (x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
        return attention_reference(q, *rest, q.shape[3] ** -0.5)[0]

    @staticmethod
    def _plain(inputs: Inputs) -> torch.Tensor:
        return attention_torch(*inputs, inputs[0].shape[3] ** -0.5)[0]


def _cut_rows(inputs: Inputs, start: int, stop: int) -> Inputs:
    x, *rest = inputs
    return x[start:stop], *rest


def _cut_verify(inputs: Inputs, start: int, stop: int) -> Inputs:
    q, k, v, limit, *rest = inputs
    k, v = _shortened(k, v, int(limit[0, stop - 1]))
    return q[:, start:stop], k, v, limit[:, start:stop], *rest


def _cut_draft(inputs: Inputs, start: int, stop: int) -> Inputs:
    q, k, v, limit, k_block, v_block, *rest = inputs
    k, v = _shortened(k, v, int(limit[0, stop - 1]))
    part = (slice(None), slice(start, stop))
    return q[part], k, v, limit[part], k_block[part], v_block[part], *rest


def _shortened(k: torch.Tensor, v: torch.Tensor, limit: int) -> Sequence[torch.Tensor]:
    """The cache as it was when this many rows counted: a little longer than that, and NaN behind them."""
    cut = [x[:, :, : limit + 3].clone() for x in (k, v)]
    for x in cut:
        x[:, :, limit:] = torch.nan
    return cut


for _op in (Linear(), Attention()):
    OPS[_op.space.name] = _op
