"""The composable parts on their own: a custom model out of them, fused names, the cache, rotary rules."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from orthrus_triton.modules import (
    ConsensusDecoder,
    DualViewAttention,
    OrthrusDecoderLayer,
    RMSNorm,
    RotaryEmbedding,
    RotarySets,
    SharedKVCache,
)
from orthrus_triton.modules.decoder_layer import GatedMLP
from orthrus_triton.testing import TinyDualViewModel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class PostNormModel(nn.Module):
    """A user's own architecture: learned positions beside rotary ones, one shared layer applied twice, no MLP."""

    block_size, mask_token_id, vocab_size = 4, 0, 37
    eos_token_ids: list[int] = []

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(37, 32), nn.Embedding(64, 32)
        self.attention = DualViewAttention(32, 4, 1, 16)
        self.norm, self.rotary = RMSNorm(32), RotaryEmbedding.from_theta(16)

    def new_cache(self, batch_size: int, max_len: int, block_size: int) -> SharedKVCache:
        return SharedKVCache(
            2, 1, 16, batch_size=batch_size, max_len=max_len, block_size=block_size, dtype=torch.float32
        )

    def forward_view(self, input_ids, cache, view_pass):
        hidden = self.embed(input_ids) + self.place(view_pass.positions.clamp(max=63))
        rope = self.rotary(view_pass.positions, view_pass.prompt_len)
        for cache_layer in cache.layers:
            hidden = self.norm(hidden + self.attention(hidden, rope, cache_layer, view_pass))
        return hidden

    def compute_logits(self, hidden, linear_impl="auto"):
        return hidden @ self.embed.weight.T


def test_a_custom_model_generates() -> None:
    torch.manual_seed(0)
    model = PostNormModel()
    prompts = [torch.tensor([3, 1, 4]), torch.tensor([1])]
    consensus = ConsensusDecoder(model).generate(prompts, max_new_tokens=12)
    ar = ConsensusDecoder(model, mode="ar").generate(prompts, max_new_tokens=12)
    assert [s.tolist() for s in consensus.sequences] == [s.tolist() for s in ar.sequences]
    assert all(len(s) == len(p) + 12 for s, p in zip(consensus.sequences, prompts))


def test_modules_need_no_transformers() -> None:
    program = "import sys, orthrus_triton.modules, orthrus_triton.testing; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_state_dict_has_the_published_names() -> None:
    layer = OrthrusDecoderLayer(32, 4, 2, 8, 48, qk_norm=True, qkv_bias=True, o_bias=True)
    names = set(layer.state_dict())
    attention = {f"self_attn.{p}_proj{s}.{w}" for p in "qkvo" for s in ("", "_diff") for w in ("weight", "bias")}
    norms = {f"self_attn.{p}_norm{s}.weight" for p in "qk" for s in ("", "_diff")}
    mlp = {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert names == attention | norms | mlp | {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert layer.state_dict()["self_attn.k_proj.weight"].shape == (16, 32)


@pytest.mark.parametrize(
    ("norms", "names"),
    [
        ("before", {"input_layernorm", "post_attention_layernorm"}),
        ("behind", {"post_self_attn_layernorm", "post_mlp_layernorm"}),
        (
            "both",
            {"input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"},
        ),
    ],
)
def test_a_layer_has_its_norms_before_behind_or_on_both_sides(norms: str, names: set[str]) -> None:
    state = OrthrusDecoderLayer(32, 4, 2, 8, 48, norms=norms).state_dict()
    assert {name for name in state if "norm" in name} == {f"{name}.weight" for name in names}


def test_norms_of_q_and_k_are_of_a_head_or_of_all() -> None:
    for qk_norm, widths in ((True, (8, 8)), ("whole", (32, 16))):
        state = DualViewAttention(32, 4, 2, 8, qk_norm=qk_norm).state_dict()
        norms = [len(state[f"{name}.weight"]) for name in ("q_norm", "k_norm", "q_norm_diff", "k_norm_diff")]
        assert norms == [*widths, *widths]


@pytest.mark.parametrize("transform", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double()])
def test_fused_weights_survive(transform) -> None:
    """Copies, pickles and casts keep one product under three names, and loading reaches it."""
    layer = transform(OrthrusDecoderLayer(32, 4, 2, 8, 48))
    state = {name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)
    parts = [state[f"self_attn.{p}_proj.weight"] for p in "qkv"]
    assert torch.equal(layer.self_attn.qkv_proj.weight, torch.cat(parts))
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


def test_incomplete_parts_are_missing_not_ignored() -> None:
    layer = OrthrusDecoderLayer(32, 4, 2, 8, 48)
    state = layer.state_dict()
    del state["self_attn.k_proj.weight"]
    with pytest.raises(RuntimeError, match="qkv_proj.weight"):
        layer.load_state_dict(state)


def test_a_part_of_another_shape_is_named_and_not_loaded() -> None:
    """Of four query and two KV heads, and of six and one: as many rows in all."""
    layer, other = OrthrusDecoderLayer(32, 4, 2, 8, 48), OrthrusDecoderLayer(32, 6, 1, 8, 48)
    before = layer.self_attn.qkv_proj.weight.clone()
    state = layer.state_dict() | {
        name: t for name, t in other.state_dict().items() if "k_proj" in name or "q_proj" in name
    }
    state["self_attn.v_proj.weight"] = other.state_dict()["self_attn.v_proj.weight"]
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"for self_attn.k_proj.weight: it must have shape \(16, 32\)"):
            layer.load_state_dict(state, strict=strict)
    assert torch.equal(layer.self_attn.qkv_proj.weight, before)


def test_low_rank_view_starts_as_the_ar_view() -> None:
    torch.manual_seed(0)
    model = TinyDualViewModel(view_rank=3, qk_norm=True)
    full = TinyDualViewModel(qk_norm=True)
    full.load_state_dict({k: v for k, v in model.state_dict().items() if "_diff" not in k}, strict=False)
    for layer in full.layers:
        layer.self_attn.copy_ar_to_diffusion()
    hidden = []
    for each in (model, full):
        cache = each.new_cache(1, 16, 8)
        cache.context_len.fill_(0)
        hidden.append(each.forward_view(torch.arange(8)[None], cache, cache.view_pass("diffusion", 8)))
    torch.testing.assert_close(hidden[0], hidden[1], atol=1e-5, rtol=1e-5)


def test_the_draft_leaves_the_cache_alone() -> None:
    model = TinyDualViewModel()
    cache = model.new_cache(2, 16, 8)
    for layer in cache.layers:
        layer.k.normal_(), layer.v.normal_()
    before = [(layer.k.clone(), layer.v.clone()) for layer in cache.layers]
    cache.context_len.fill_(5)
    model.forward_view(torch.arange(16).view(2, 8), cache, cache.view_pass("diffusion", 8))
    for layer, (k, v) in zip(cache.layers, before):
        assert torch.equal(layer.k, k) and torch.equal(layer.v, v)


def test_a_drafted_row_sees_the_whole_block() -> None:
    """Changing the last token of the block changes the first row of the draft, and never that of the verify pass."""
    torch.manual_seed(0)
    model = TinyDualViewModel()
    changed = {}
    for view in ("diffusion", "ar"):
        first = []
        for last in (1, 2):
            cache = model.new_cache(1, 16, 8)
            block = torch.tensor([[5, 60, 60, 60, 60, 60, 60, last]])
            first.append(model.forward_view(block, cache, cache.view_pass(view, 8))[:, 0])
        changed[view] = not torch.equal(*first)
    assert changed == {"diffusion": True, "ar": False}


def test_cache_says_what_is_wrong() -> None:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "batch_size": 1, "max_len": 5, "block_size": 2}
    for name in sizes:
        for wrong in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, but got {wrong}"):
                SharedKVCache(**(sizes | {name: wrong}), dtype=torch.float32)
    cache = SharedKVCache(1, 1, 8, batch_size=1, max_len=5, block_size=2, dtype=torch.float32)
    assert cache.capacity == 512 and "capacity=512" in repr(cache)
    with pytest.raises(ValueError, match="at most block_size=2 to draft, but got 3"):
        cache.view_pass("diffusion", 3)
    with pytest.raises(ValueError, match="at most the cache's capacity=512, but got 513"):
        cache.view_pass("ar", 513)
    with pytest.raises(ValueError, match="view must be"):
        cache.view_pass("causal", 1)
    for start in (0, torch.zeros(1), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="start must"):
            cache.view_pass("ar", 1, start)
    with pytest.raises(ValueError, match="block_size must be an integer >= 1, but got 0"):
        cache.draft_pass(0)
    with pytest.raises(ValueError, match="block_size must be at least 2 with anchor_rows=1, but got 1"):
        cache.draft_pass(1, 1)
    with pytest.raises(ValueError, match="anchor_rows must be 0 or 1, but got 2"):
        cache.draft_pass(2, 2)
    long = SharedKVCache(1, 1, 8, batch_size=1, max_len=1025, block_size=2, dtype=torch.float32)
    for rows, capacity in ((1, 512), (512, 512), (513, 1024), (1025, 1536), (9999, 1536)):
        assert (part := long.prefix(rows)).capacity == part.layers[0].v.shape[2] == capacity
    # scratch is one block in all, whatever the number of layers
    many = SharedKVCache(7, 1, 8, batch_size=1, max_len=5, block_size=2, dtype=torch.float32)
    assert many.nbytes() - 7 * 2 * 512 * 8 * 4 == cache.nbytes() - 2 * 512 * 8 * 4 == 2 * 2 * 8 * 4


def test_a_model_whose_cache_or_logits_do_not_fit_is_told_so() -> None:
    model = TinyDualViewModel()
    new_cache, compute_logits = model.new_cache, model.compute_logits
    model.new_cache = lambda *sizes: TinyDualViewModel(num_layers=1).new_cache(*sizes)
    with pytest.raises(ValueError, match="cache must hold 2 layers, as the model does, but holds 1"):
        ConsensusDecoder(model, impl="torch").generate(torch.tensor([1, 2]), max_new_tokens=3)
    model.new_cache, model.compute_logits = new_cache, lambda *hidden: compute_logits(*hidden)[:, -1]
    with pytest.raises(ValueError, match=r"compute_logits must return logits \[B, T, 61\] .* but returned \(1, 61\)"):
        ConsensusDecoder(model, impl="torch").generate(torch.tensor([1, 2]), max_new_tokens=3, temperature=1.0)


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 0}, {"num_heads": 0}, {"num_kv_heads": 0}, {"head_dim": 15}, {"head_dim": 16.0},
        {"intermediate_size": 0}, {"window": 0}, {"window": True},
        {"norms": "after"}, {"qk_norm": "all"},
    ],
    ids=str,
)  # fmt: skip
def test_layers_say_which_size_cannot_be(shape: dict) -> None:
    (name,) = shape
    sizes = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 48}
    with pytest.raises(ValueError, match=f"{name} must be"):
        OrthrusDecoderLayer(**(sizes | shape))
    if name == "head_dim":
        with pytest.raises(ValueError, match="head_dim must be"):
            RotaryEmbedding.from_theta(**shape)


@pytest.mark.parametrize("options", [{}, {"view_rank": 2}, {"window": 3}], ids=str)
@pytest.mark.parametrize("anchor_rows", [None, 0, 1])
@torch.no_grad()
def test_a_residual_is_added_with_and_without_a_norm(options: dict, anchor_rows: int | None) -> None:
    torch.manual_seed(0)
    attention, norm, rotary = DualViewAttention(32, 4, 2, 16, **options), RMSNorm(32), RotaryEmbedding.from_theta(16)
    cache = SharedKVCache(1, 2, 16, batch_size=1, max_len=9, block_size=4, dtype=torch.float32)
    view_pass = cache.view_pass("diffusion", 4) if anchor_rows is None else cache.draft_pass(4, anchor_rows)
    hidden, residual = torch.randn(2, 1, 4, 32)
    where = (rotary(view_pass.positions, view_pass.prompt_len), cache.layers[0], view_pass)
    expected = attention(hidden, *where) + residual
    torch.testing.assert_close(attention(hidden, *where, residual), expected)
    torch.testing.assert_close(attention(hidden, *where, residual, norm)[1], expected)
    with pytest.raises(ValueError, match="residual must be given with next_norm"):
        attention(hidden, *where, None, norm)
    with pytest.raises(ValueError, match=rf"hidden must be \[B, T, 32\], but got shape \({hidden.shape[1]}, 32\)"):
        attention(hidden[0], *where)
    with pytest.raises(ValueError, match="residual must be given with next_norm"):
        GatedMLP(32, 48)(hidden, None, norm)
    with pytest.raises(TypeError, match="cache_layer must be one of cache.layers, but got a SharedKVCache"):
        attention(hidden, where[0], cache, view_pass)
    for heads, size, dtype in ((1, 16, torch.float32), (2, 32, torch.float32), (2, 16, torch.bfloat16)):
        other = SharedKVCache(1, heads, size, batch_size=1, max_len=9, block_size=4, dtype=dtype)
        complaint = f"must hold 2 KV heads of size 16 in torch.float32, but holds {heads} of {size} in {dtype}"
        with pytest.raises(ValueError, match=complaint):
            attention(hidden, where[0], other.layers[0], view_pass)


@pytest.mark.parametrize("view", ["ar", "diffusion"])
@pytest.mark.parametrize("qk_norm", [True, "whole"])
@torch.no_grad()
def test_an_offset_of_norms_is_added_to_their_weights(qk_norm: bool | str, view: str) -> None:
    torch.manual_seed(0)
    offset, plain = (DualViewAttention(32, 4, 2, 16, qk_norm=qk_norm, norm_offset=by) for by in (1.0, 0.0))
    state = {name: torch.randn_like(tensor) for name, tensor in offset.state_dict().items()}
    offset.load_state_dict(state)
    plain.load_state_dict({name: tensor + ("norm" in name) for name, tensor in state.items()})
    cache = SharedKVCache(1, 2, 16, batch_size=1, max_len=9, block_size=4, dtype=torch.float32)
    view_pass = cache.view_pass(view, 4)
    rope = RotaryEmbedding.from_theta(16)(view_pass.positions, view_pass.prompt_len)
    hidden = torch.randn(1, 4, 32)
    said = [attention(hidden, rope, cache.layers[0], view_pass) for attention in (offset, plain)]
    torch.testing.assert_close(*said)


@torch.no_grad()
def test_an_anchor_that_the_frozen_view_reads_is_read_with_its_own_weights() -> None:
    """What it says is said: int8 copies are for passes of which nothing is."""
    torch.manual_seed(0)
    layer, rotary = OrthrusDecoderLayer(32, 4, 2, 16, 48), RotaryEmbedding.from_theta(16)
    cache = SharedKVCache(1, 2, 16, batch_size=1, max_len=9, block_size=4, dtype=torch.float32)
    hidden, said = torch.randn(1, 4, 32), []
    for anchor_rows in (0, 1):
        view_pass = cache.draft_pass(4, anchor_rows)
        for quantize in (False, True):
            if quantize:
                layer.mlp.quantize_for_drafts()
            rope = rotary(view_pass.positions, view_pass.prompt_len)
            said.append(layer(hidden, rope, cache.layers[0], view_pass))
        layer.mlp.gate_up_proj.drop_draft_copy()
        layer.mlp.down_proj.drop_draft_copy()
    assert not torch.equal(said[0], said[1]) and torch.equal(said[2], said[3])


@pytest.mark.parametrize(
    ("options", "anchor_rows"),
    [
        ({}, 1),
        ({"qk_norm": True}, 1),
        ({"window": 3}, 1),
        ({"view_rank": 2}, 0),
        ({"use_rope": False}, 1),
        ({"norms": "both", "norm_offset": 1.0, "activation": "gelu_pytorch_tanh", "scale": 0.5}, 1),
        ({"norms": "behind", "qk_norm": "whole"}, 1),
    ],
    ids=str,
)
@torch.no_grad()
def test_kernels_draft_what_torch_drafts(options: dict, anchor_rows: int) -> None:
    """What goes wrong in a draft costs time, and no text would tell. Where the frozen view reads the anchor, this row
    knows nothing of int8 copies."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32}
    model = TinyDualViewModel(**sizes, **options).to(DEVICE)
    for name, parameter in model.named_parameters():
        if ".up." in name:  # or a view of low rank would be the frozen one
            parameter.normal_(std=0.3)

    def draft(impl: str) -> torch.Tensor:
        cache = model.new_cache(1, 16, 3)
        prompt, block = (torch.tensor([ids], device=DEVICE) for ids in ([1, 2, 3, 4, 9], [5, 60, 60]))
        model.forward_view(prompt, cache, cache.view_pass("ar", 5, impl="torch"))
        cache.context_len.fill_(4)
        return model.forward_view(block, cache, cache.draft_pass(3, anchor_rows, impl=impl))

    drafted = draft("torch")
    torch.testing.assert_close(draft("triton"), drafted, rtol=1e-3, atol=1e-4)
    model.layers[0].self_attn.quantize_for_drafts()
    model.layers[0].mlp.quantize_for_drafts()
    quantized = draft("torch")
    assert torch.equal(quantized[:, :anchor_rows], drafted[:, :anchor_rows])
    assert not torch.equal(quantized[:, anchor_rows:], drafted[:, anchor_rows:])


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_is_not_rotated_is_not_scaled(default: torch.dtype) -> None:
    rotary = RotaryEmbedding(torch.tensor([1.0, 0.25, 0.0]), 1.19)
    positions, prompt_len = torch.tensor([[0, 3, 9]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        cos, sin = rotary(positions, prompt_len)
    finally:
        torch.set_default_dtype(before)
    angles = positions[..., None] * rotary.inv_freq
    assert torch.equal(cos, torch.cat((angles.cos()[..., :2] * 1.19, torch.ones(1, 3, 1)), dim=-1))
    assert torch.equal(sin, torch.cat((angles.sin()[..., :2] * 1.19, torch.zeros(1, 3, 1)), dim=-1))
    assert cos.dtype == sin.dtype == torch.float32


def test_rotary_stays_fp32_and_follows_the_length() -> None:
    rotary = RotaryEmbedding.from_theta(16).bfloat16()
    assert rotary.inv_freq.dtype == torch.float32
    positions, prompt_len = torch.tensor([[0, 7, 8]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    short, long = torch.full((8,), 0.5), torch.full((8,), 0.25)
    rotary = RotaryEmbedding(short.double(), long_inv_freq=long.double(), original_max_len=8)
    cos, _ = rotary(positions, prompt_len)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, :, 0], torch.tensor([0.0, 3.5, 2.0]).cos())
    # a prompt that is already long uses the long frequencies from its first token
    cos, _ = rotary(positions, torch.tensor([9], dtype=torch.int32))
    torch.testing.assert_close(cos[0, :, 0], torch.tensor([0.0, 1.75, 2.0]).cos())
    with pytest.raises(ValueError, match="original_max_len is needed"):
        RotaryEmbedding(short, long_inv_freq=long)


@pytest.mark.parametrize("anchor_rows", [None, 0, 1])
@torch.no_grad()
def test_a_layer_takes_its_own_set_of_angles(anchor_rows: int | None) -> None:
    sets = RotarySets([RotaryEmbedding.from_theta(16), RotaryEmbedding.from_theta(16, 50.0)])
    for number, own in enumerate(sets.sets):
        torch.manual_seed(0)
        layer = OrthrusDecoderLayer(32, 4, 2, 16, 48, qk_norm=True, rope_set=number)
        outs = []
        for rotary in (sets, own):
            cache = SharedKVCache(1, 2, 16, batch_size=1, max_len=9, block_size=4, dtype=torch.float32)
            cache.context_len.fill_(3)
            view_pass = cache.view_pass("ar", 4) if anchor_rows is None else cache.draft_pass(4, anchor_rows)
            rope = rotary(view_pass.positions, view_pass.prompt_len)
            outs.append(layer(torch.ones(1, 4, 32), rope, cache.layers[0], view_pass))
            outs.append(cache.layers[0].k.clone())
        assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
    with pytest.raises(ValueError, match=r"sets must be of one original_max_len, but got \[8, 9\]"):
        RotarySets([RotaryEmbedding(torch.ones(8), dynamic_ntk=(1e4, 2.0), original_max_len=n) for n in (9, 8)])
    rules = {"dynamic_ntk": (1e4, 2.0), "original_max_len": 9}
    assert RotarySets([RotaryEmbedding(torch.ones(8)), RotaryEmbedding(torch.ones(8), **rules)]).original_max_len == 9


def test_logits_of_a_padded_head_are_refused() -> None:
    """Ids that do not exist would be said."""
    model = TinyDualViewModel()
    model.vocab_size = 50
    with pytest.raises(ValueError, match=r"must return logits \[B, T, 50\] .* but returned \(1, 1, 61\)"):
        ConsensusDecoder(model, impl="torch").generate(torch.tensor([1, 2]), max_new_tokens=3, temperature=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DualViewAttention(32, 4, 2, 8, view_rank=2.0),
            "view_rank must be an integer >= 1 or None, but got 2.0",
        ),
        (lambda: OrthrusDecoderLayer(32, 4, 2, 8, 48, norm_eps=None), "eps must be a number >= 0, but got None"),
        (lambda: OrthrusDecoderLayer(32, 4, 2, 8, 48, norm_offset="a"), "offset must be a number >= 0, but got 'a'"),
        (lambda: OrthrusDecoderLayer(32, 4, 2, 8, 48, rope_set=-1), "rope_set must be an integer >= 0, but got -1"),
        (lambda: GatedMLP(32, 48, activation="relu"), "activation must be one of .* but got 'relu'"),
        (
            lambda: RotarySets([RotaryEmbedding.from_theta(8)]),
            r"sets must be two or more of one head size, but .* \[8\]",
        ),
        (
            lambda: RotarySets([RotaryEmbedding.from_theta(8), RotaryEmbedding.from_theta(6)]),
            r"sets must be two or more of one head size, but got sizes \[8, 6\]",
        ),
        (lambda: RotaryEmbedding.from_theta(8, 0.0), "theta must be positive, but got 0.0"),
        (lambda: RMSNorm(8, offset=1.0).add_to(torch.ones(8), torch.ones(8), RMSNorm(8)), "must have offset 1.0, as"),
    ],
)
def test_what_cannot_be_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_layer_of_a_rotary_set_that_the_model_has_not_is_named() -> None:
    rotary = RotarySets([RotaryEmbedding.from_theta(8), RotaryEmbedding.from_theta(8, 500.0)])
    layer, cache = (
        OrthrusDecoderLayer(32, 4, 2, 8, 48, rope_set=2),
        SharedKVCache(1, 2, 8, batch_size=1, max_len=8, block_size=2, dtype=torch.float32),
    )
    view_pass = cache.view_pass("ar", 3)
    with pytest.raises(ValueError, match=r"rope_set must be in 0\.\.1, for the model has 2 sets, but got 2"):
        layer(torch.randn(1, 3, 32), rotary(view_pass.positions, view_pass.prompt_len), cache.layers[0], view_pass)
