"""torch.library: schemas, fakes and mutations of every op, and torch.compile of whole layers in both views."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton import ops
from orthrus_triton.autotune import lookup
from orthrus_triton.modules import OrthrusDecoderLayer, RotaryEmbedding, SharedKVCache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = torch.ops.orthrus_triton


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def arguments() -> dict[str, tuple]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    cache = torch.zeros(2, 1, 2, 8, 64, device=DEVICE)
    return {
        "rms_norm": (randn(2, 3, 32), randn(32), 1e-6, 0.0),
        "add_rms_norm": (randn(2, 3, 32), randn(2, 3, 32), randn(32), 1e-6, 1.0),
        "add_normed": (randn(2, 3, 32), randn(2, 3, 32), randn(32), 1e-6, randn(32), 1e-5, 0.0),
        "norm_spans": (randn(2, 3, 32), randn(18), randn(6), 1e-6, 0.0),
        "swiglu": (randn(2, 3, 32),),
        "geglu": (randn(2, 3, 32),),
        "linear": (randn(2, 3, 32), randn(20, 32), randn(20), randn(2, 3, 20), torch.float32),
        "linear_swiglu": (randn(2, 3, 32), randn(20, 32), randn(20)),
        "linear_norm": (randn(2, 3, 32), randn(20, 32), randn(20), randn(2, 3, 20), randn(20), 1e-6, 0.0),
        "qkv_rope_cache": (
            randn(1, 2, 48), randn(5 * 64, 48), randn(5 * 64), randn(1, 2, 32), randn(1, 2, 32), cache[0], cache[1],
            ints(0, 1)[None], randn(64), randn(64), 1e-6, 0.0,
        ),
        "lm_head_choice": (randn(2, 3, 32), randn(50, 32)),
        "greedy_choice": (randn(2, 3, 50),),
        "rope_cache": (
            randn(1, 2, 5 * 64), randn(1, 2, 32), randn(1, 2, 32), cache[0], cache[1], ints(0, 1)[None], randn(64),
            randn(64), 1e-6, 1.0,
        ),
        "dual_view_attention": (
            randn(1, 2, 4, 64), randn(1, 2, 8, 64), randn(1, 2, 8, 64), ints(3, 3)[None], randn(1, 2, 2, 64),
            randn(1, 2, 2, 64), 2, 5, 0.125,
        ),
        "consensus_": (
            ints(1, 2, dtype=torch.int64)[None], ints(2, 3, dtype=torch.int64)[None], ints(9, dtype=torch.int64),
            ints(5), 7, ints(4), torch.zeros(1, 5, dtype=torch.int64, device=DEVICE), ints(0),
            ints(0).bool(), torch.zeros(1, 2, dtype=torch.int64, device=DEVICE),
            torch.zeros(1, 2, dtype=torch.int32, device=DEVICE),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("name", sorted(arguments()))
def test_opcheck(name: str, impl: str) -> None:
    torch.library.opcheck(getattr(OPS, name).default, (*arguments()[name], impl))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_opcheck_without_a_next_norm(impl: str) -> None:
    torch.library.opcheck(OPS.add_normed.default, (*arguments()["add_normed"][:-3], None, 0.0, 0.0, impl))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("name", ["add_normed", "norm_spans"])
def test_opcheck_of_rows_that_lie_apart(name: str, impl: str) -> None:
    inputs = [
        one.transpose(0, 2).contiguous().transpose(0, 2) if isinstance(one, torch.Tensor) and one.dim() == 3 else one
        for one in arguments()[name]
    ]
    torch.library.opcheck(getattr(OPS, name).default, (*inputs, impl))


def test_a_gradient_does_not_get_lost_in_a_norm_of_spans() -> None:
    rows, *norms = arguments()["norm_spans"]
    out = ops.norm_spans(rows.requires_grad_(), *norms[:-1])
    with pytest.raises(RuntimeError, match="does not require grad|autograd"):
        out.sum().backward()
    assert out.requires_grad and rows.grad is None


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("name", ["rope_cache", "qkv_rope_cache"])
def test_opcheck_without_angles(name: str, impl: str) -> None:
    """Of one row, whose queries are all that a tensor of their own would hold: they must be one."""
    inputs = [None if tuple(one.shape) == (1, 2, 32) else one for one in arguments()[name][:-4]]
    row = [one[:, :1] if isinstance(one, torch.Tensor) and one.shape[:2] == (1, 2) else one for one in inputs]
    for args in (inputs, row):
        assert args.count(None) == 2
        torch.library.opcheck(getattr(OPS, name).default, (*args, None, None, 1e-6, 0.0, impl))


@pytest.mark.parametrize("name", ["linear", "linear_swiglu", "linear_norm", "qkv_rope_cache", "dual_view_attention"])
def test_a_configuration_does_not_let_gradients_get_lost(name: str) -> None:
    """The registered op refuses `backward`; what is launched beside it would be taken for a constant."""
    positional = {"linear": 4, "linear_norm": 6, "qkv_rope_cache": 11}
    inputs = arguments()[name][: positional.get(name)]
    op, of_heads = getattr(ops, name), name == "dual_view_attention"
    key = {"head_dim": 64, "group": 2} if of_heads else dict(zip("NK", inputs[1].shape))
    config = lookup(name if of_heads else "linear", torch.float32, DEVICE, **key)
    op(*inputs, impl="triton", config=config)
    inputs[1].requires_grad_()
    with pytest.raises(ValueError, match="config must be None where an input requires a gradient"):
        op(*inputs, impl="triton", config=config)
    with torch.no_grad():
        op(*inputs, impl="triton", config=config)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("view", "options"),
    [
        ("ar", {"qk_norm": True}),
        ("diffusion", {"qk_norm": True}),
        ("diffusion", {"norms": "behind", "qk_norm": "whole", "scale": 0.2, "norm_offset": 1.0}),
        ("diffusion", {"norms": "both", "activation": "gelu_pytorch_tanh"}),
    ],
    ids=str,
)
def test_layer_compiles_whole_and_keeps_its_bits(view: str, options: dict, impl: str) -> None:
    torch.manual_seed(0)
    layer = OrthrusDecoderLayer(32, 2, 1, 64, 48, **options).to(DEVICE)
    rotary = RotaryEmbedding.from_theta(64).to(DEVICE)
    hidden = torch.randn(1, 4, 32, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    caches = []
    for run in (layer, compiled):
        torch.manual_seed(1)
        cache = SharedKVCache(1, 1, 64, batch_size=1, max_len=8, block_size=4, dtype=torch.float32, device=DEVICE)
        for buffer in cache.layers[0]:
            buffer.normal_()
        caches.append(cache)
        outs = []
        for length in (3, 5):  # lengths live in tensors: the second needs no new graph
            cache.context_len.fill_(length)
            view_pass = cache.view_pass(view, 4, impl=impl)
            rope = rotary(view_pass.positions, view_pass.prompt_len)
            with torch.no_grad():
                outs.append(run(hidden, rope, cache.layers[0], view_pass))
        cache.result = torch.cat(outs)
    assert torch.equal(caches[0].result, caches[1].result)
    for eager, compiled_buffer in zip(caches[0].layers[0], caches[1].layers[0]):
        assert torch.equal(eager, compiled_buffer)
