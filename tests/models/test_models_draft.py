"""The draft pass against its definition, written out naively here: row i of the block stands at position c + i, sees
the c cached AR keys and the whole block, and goes through the diffusion view's own projections and norms."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from tests.models.tiny_bases import base_config, build_base, random_ids, randomise_view

BLOCK = 6
CONTEXT_LENS = [9, 13]


class NaiveOrthrus:
    """One sequence at a time, fp64, dense masks, from a state dict and the fields of its config."""

    def __init__(self, model: OrthrusForCausalLM) -> None:
        self.config = model.config
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.windows = [layer.self_attn.window for layer in model.model.layers]
        self.rotates = getattr(model.config, "no_rope_layers", [1] * len(self.windows))
        if model.config.base_model_type == "exaone4" and model.config.sliding_window is not None:
            self.rotates = self.windows
        one = dict.fromkeys(("embedding_multiplier", "residual_multiplier"), 1.0)
        one["attention_multiplier"] = model.config.attention_head_dim**-0.5
        self.factors = {name: getattr(model.config, name, value) for name, value in one.items()}
        self.offset, self.gate = 0.0, torch.nn.functional.silu
        if model.config.base_model_type.startswith("gemma"):
            self.offset, self.gate = 1.0, lambda x: torch.nn.functional.gelu(x, approximate="tanh")
            self.factors["embedding_multiplier"] = model.config.hidden_size**0.5
            scalar = getattr(model.config, "query_pre_attn_scalar", model.config.attention_head_dim)
            self.factors["attention_multiplier"] = scalar**-0.5

    def project(self, x: torch.Tensor, layer: int, name: str, suffix: str = "") -> torch.Tensor:
        prefix = f"model.layers.{layer}.{name}"
        if f"{prefix}{suffix}.down.weight" in self.weights:
            delta = self.weights[f"{prefix}{suffix}.up.weight"] @ self.weights[f"{prefix}{suffix}.down.weight"]
            weight, bias = self.weights[f"{prefix}.weight"] + delta, self.weights.get(f"{prefix}.bias")
        else:
            weight, bias = self.weights[f"{prefix}{suffix}.weight"], self.weights.get(f"{prefix}{suffix}.bias")
        return x @ weight.T + (0 if bias is None else bias)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if name not in self.weights:
            return x
        normed = x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return normed * (self.offset + self.weights[name])

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, window: int | None) -> torch.Tensor:
        """x [T, heads, D]: pair (i, i + D/2) turned by position * theta^(-2i/R), or not at all from i = R/2 on."""
        half, rope = x.shape[-1] // 2, self.config.rope_parameters
        rope = rope.get("full_attention" if window is None else "sliding_attention", rope)
        rotated = int(half * rope.get("partial_rotary_factor", 1.0))  # R/2
        frequencies = rope["rope_theta"] ** (-torch.arange(half).double() / rotated)
        frequencies[rotated:] = 0
        angle = positions.double()[:, None] * frequencies
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        low, high = x[..., :half], x[..., half:]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def run(self, ids: torch.Tensor, start: int, cached: list | None, suffix: str) -> tuple[torch.Tensor, list]:
        """ids [T] at positions start.. -> logits [T, V] and each layer's (keys, values). Without a cache: causal."""
        T, D = ids.shape[0], self.config.attention_head_dim
        positions = torch.arange(start, start + T)
        hidden, kept = self.weights["model.embed_tokens.weight"][ids] * self.factors["embedding_multiplier"], []
        part = self.factors["residual_multiplier"]
        for layer, window in enumerate(self.windows):
            prefix = f"model.layers.{layer}"
            x = self.norm(hidden, f"{prefix}.input_layernorm.weight")
            q, k, v = (self.project(x, layer, f"self_attn.{n}_proj", suffix) for n in "qkv")
            norms = [f"{prefix}.self_attn.{n}_norm{suffix}.weight" for n in "qk"]
            if self.config.base_model_type in ("olmo2", "olmo3"):  # of all heads together
                q, k = self.norm(q, norms[0]), self.norm(k, norms[1])
            q, k, v = (numbers.view(T, -1, D) for numbers in (q, k, v))
            if self.config.base_model_type not in ("olmo2", "olmo3"):
                q, k = self.norm(q, norms[0]), self.norm(k, norms[1])
            if self.rotates[layer]:
                q, k = self.rotate(q, positions, window), self.rotate(k, positions, window)
            kept.append((k, v))
            if cached is None:
                visible = [[j <= i and (window is None or j > i - window) for j in range(T)] for i in range(T)]
            else:
                k, v = torch.cat((cached[layer][0], k)), torch.cat((cached[layer][1], v))
                # a window bounds what is seen of the cache; the block is seen whole
                in_window = [[window is None or j > start + i - window for j in range(start)] for i in range(T)]
                visible = [row + [True] * T for row in in_window]
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            scores = torch.einsum("thd,shd->hts", q, k) * self.factors["attention_multiplier"]
            weights = scores.masked_fill(~torch.tensor(visible), -torch.inf).softmax(-1)
            attended = torch.einsum("hts,shd->thd", weights, v).reshape(T, -1)
            out = self.project(attended, layer, "self_attn.o_proj", suffix)
            hidden = hidden + part * self.norm(out, f"{prefix}.post_self_attn_layernorm.weight")
            x = self.norm(hidden, f"{prefix}.post_attention_layernorm.weight")
            gate = self.gate(self.project(x, layer, "mlp.gate_proj"))
            out = self.project(gate * self.project(x, layer, "mlp.up_proj"), layer, "mlp.down_proj")
            hidden = hidden + part * self.norm(out, f"{prefix}.post_mlp_layernorm.weight")
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        # our final norm's weight has logits_scaling in it already
        return self.norm(hidden, "model.norm.weight") @ head.T, kept


def draft_logits(
    model: OrthrusForCausalLM, ids: torch.Tensor, block: torch.Tensor, anchor_rows: int | None
) -> torch.Tensor:  # fmt: skip
    """Prefill all of `ids` [B, L], roll back to CONTEXT_LENS, draft one block per sequence: as any rows of the view are
    read, or, with `anchor_rows`, as a decoder drafts."""
    cache = model.new_cache(len(CONTEXT_LENS), 32, BLOCK)
    cache.prompt_len.copy_(torch.tensor(CONTEXT_LENS))
    model.forward_view(ids, cache, cache.view_pass("ar", ids.shape[1], impl="torch"))
    cache.context_len.copy_(torch.tensor(CONTEXT_LENS))
    if anchor_rows is None:
        view_pass = cache.view_pass("diffusion", BLOCK, impl="torch")
    else:
        view_pass = cache.draft_pass(BLOCK, anchor_rows, impl="torch")
    return model.compute_logits(model.forward_view(block, cache, view_pass), "torch")


@pytest.mark.parametrize("view_rank", [None, 3])
@pytest.mark.parametrize(
    "case",
    [
        "ernie4_5 biases, untied", "exaone4", "gemma", "gemma3", "glm", "glm4", "granite", "llama",
        "llama all heads have keys", "llama biases, wide heads, tied", "mistral window", "olmo2", "olmo3", "qwen2",
        "qwen2 window in upper layers", "qwen3",
        "qwen3 biases, tied, window by layer types", "phi3 window, tied", "phi3 partial",
        "seed_oss no biases but those of o and MLP", "smollm3",
        "smollm3 biases, untied, window where nothing is rotated",
    ],
)  # fmt: skip
@torch.inference_mode()
def test_draft_logits_are_what_the_definition_gives(case: str, view_rank: int | None):
    base = build_base(base_config(case))
    model = OrthrusForCausalLM.from_base(base, block_size=BLOCK, view_rank=view_rank, dtype=torch.float64)
    untrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    randomise_view(model)
    assert all(not torch.equal(model.state_dict()[name], old) for name, old in untrained.items() if "_diff" in name)
    assert all(torch.equal(model.state_dict()[name], old) for name, old in untrained.items() if "_diff" not in name)
    ids = random_ids(16, batch=2)
    block = torch.full((2, BLOCK), model.mask_token_id)
    block[:, 0] = torch.tensor([3, 5])
    got = {anchor_rows: draft_logits(model, ids, block, anchor_rows) for anchor_rows in (None, 0, 1)}
    naive = NaiveOrthrus(model)
    for b, context_len in enumerate(CONTEXT_LENS):
        _, cached = naive.run(ids[b, :context_len], 0, None, "")
        alone, _ = naive.run(block[b], context_len, cached, "_diff")
        # the frozen view reads the anchor, which is then one more token that the masks see
        anchor, own = naive.run(block[b, :1], context_len, cached, "")
        cached = [tuple(torch.cat(pair) for pair in zip(*of_layer)) for of_layer in zip(cached, own)]
        masks, _ = naive.run(block[b, 1:], context_len + 1, cached, "_diff")
        for anchor_rows, expected in ((None, alone), (0, alone), (1, torch.cat((anchor, masks)))):
            # rotary angles and logits are fp32 in the model
            near = {"atol": 2e-5 * expected.abs().max().item(), "rtol": 0}
            torch.testing.assert_close(got[anchor_rows][b].double(), expected, **near)


@pytest.mark.parametrize("view_rank", [None, 2])
@torch.inference_mode()
def test_an_untrained_view_is_the_ar_view_seen_through_the_block(view_rank: int | None):
    """Right after from_base both views compute the same function: a one-token block has no mask to differ by."""
    model = OrthrusForCausalLM.from_base(build_base(base_config("qwen3 longrope")), view_rank=view_rank)
    assert all(tensor.any() == ("up." not in name) for name, tensor in model.state_dict().items() if "_diff" in name)
    ids = random_ids(1, batch=4)
    torch.testing.assert_close(*(model(ids, view=view, impl="torch").logits for view in ("diffusion", "ar")))


def test_a_low_rank_view_starts_from_the_same_numbers_every_time():
    base = build_base(base_config("llama"))
    torch.manual_seed(1)
    first = OrthrusForCausalLM.from_base(base, view_rank=2).state_dict()
    torch.manual_seed(2)
    again = OrthrusForCausalLM.from_base(base, view_rank=2).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    downs = [tensor for name, tensor in first.items() if "down.weight" in name and "_diff" in name]
    assert len(downs) > 1 and not torch.equal(downs[0][0], downs[1][0])


@pytest.mark.parametrize("case", ["qwen3", "granite", "gemma3 linear, biases, untied, other scores"])
@torch.inference_mode()
def test_a_mask_embedding_of_its_own_is_read_like_a_row_of_the_table(case: str):
    base, own = build_base(base_config(case)), torch.randn(64, generator=torch.Generator().manual_seed(3))
    models = [OrthrusForCausalLM.from_base(base, block_size=BLOCK, mask_embedding=has) for has in (True, False)]
    models[0].model.mask_embedding_diff.copy_(own)
    models[1].model.embed_tokens.weight[models[1].mask_token_id] = own
    ids, block = random_ids(16, batch=2), random_ids(BLOCK, batch=2, seed=7)
    block[:, 1:] = models[0].mask_token_id
    with_own, in_table = (draft_logits(model, ids, block, 0) for model in models)
    assert torch.equal(with_own, in_table)
