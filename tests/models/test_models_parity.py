"""Tier C: the AR view's logits agree with transformers within twice the error transformers itself has in that dtype.
Both are compared with transformers in fp64, for chunked prefill, single-token decode and K-row verification."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.testing import assert_within_budget
from tests.models.tiny_bases import CASES, ORIGINAL_LEN, base_config, build_base, random_ids

LENGTH = 36
BLOCK = 5


def transformers_logits(model: PreTrainedModel, ids: torch.Tensor, prompt_len: int) -> torch.Tensor:
    """Prefill, then token by token: what length-dependent rope types are defined by."""
    model(ids[:, :1])  # dynamic rope keeps the longest stretch it has seen, until it sees a short sequence
    cache = DynamicCache(config=model.config)
    logits = [model(ids[:, :prompt_len], past_key_values=cache, use_cache=True).logits]
    for t in range(prompt_len, ids.shape[1]):
        logits.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1).double()


@torch.inference_mode()
def view_logits(model: OrthrusForCausalLM, ids: torch.Tensor, prompt_len: int, chunks: list[int]) -> torch.Tensor:
    """The AR view over `ids` in passes of the given row counts, fp32."""
    cache = model.new_cache(ids.shape[0], ids.shape[1], BLOCK)
    cache.prompt_len.fill_(prompt_len)
    logits, done = [], 0
    for rows in chunks:
        view_pass = cache.view_pass("ar", rows, impl="torch")
        hidden = model.forward_view(ids[:, done : done + rows], cache, view_pass)
        logits.append(model.compute_logits(hidden, "torch"))
        cache.context_len += rows
        done += rows
    return torch.cat(logits, dim=1)


def chunk_plans(prompt_len: int) -> dict[str, list[int]]:
    rest = LENGTH - prompt_len
    chunked = [4] * (prompt_len // 4) + [1] * (prompt_len % 4)
    blocks = [BLOCK] * (rest // BLOCK) + ([rest % BLOCK] if rest % BLOCK else [])
    return {"chunked prefill, then tokens": chunked + [1] * rest, "one prefill, then blocks": [prompt_len, *blocks]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_ar_logits_agree_with_transformers(case: str, dtype: torch.dtype):
    config = base_config(case)
    base = build_base(config, dtype)
    oracle = build_base(config, torch.float64, rounded_to=dtype)
    model = OrthrusForCausalLM.from_base(base, block_size=BLOCK)
    assert model.dtype == dtype
    # the frequencies of length-dependent types change among the generated tokens, or lie behind the prompt's length
    for prompt_len in (ORIGINAL_LEN - 7, ORIGINAL_LEN + 4) if "rope_parameters" in CASES[case][1] else (14,):
        ids = random_ids(LENGTH, batch=2)
        theirs, exact = transformers_logits(base, ids, prompt_len), transformers_logits(oracle, ids, prompt_len)
        for chunks in chunk_plans(prompt_len).values():
            assert_within_budget(view_logits(model, ids, prompt_len, chunks), theirs, exact, what=f"{chunks}")


@pytest.mark.parametrize(
    "case",
    [
        "llama longrope", "llama dynamic", "mistral window", "qwen2 window in upper layers", "phi3 partial", "smollm3",
        "granite",
    ],
)  # fmt: skip
def test_the_cases_would_notice(case: str):
    """The rule moves the logits by far more than the tolerance; if it did not, the parity test could not fail."""
    family, fields = CASES[case]
    plain = {key: None for key in fields if key in ("rope_parameters", "sliding_window")}
    plain |= {key: 1.0 for key in fields if key.endswith("_multiplier")}
    plain |= {key: 99 for key in fields if key == "no_rope_layer_interval"}
    ids = random_ids(LENGTH)
    with_rule, without = build_base(base_config(case)), build_base(base_config(case, **plain))
    assert [p.shape for p in with_rule.parameters()] == [p.shape for p in without.parameters()]
    assert (transformers_logits(with_rule, ids, 14) - transformers_logits(without, ids, 14)).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["gemma", "gemma3"])
def test_an_embedding_is_multiplied_by_what_the_dtype_has_of_a_root(case: str, dtype: torch.dtype):
    base = build_base(base_config(case, hidden_size=48), dtype)
    ids = random_ids(40)
    ours = OrthrusForCausalLM.from_base(base).model.embed_tokens(ids)
    assert torch.equal(ours, base.get_input_embeddings()(ids))


def test_rotary_frequencies_stay_fp32_on_the_way_through_meta_and_bf16():
    base = build_base(base_config("llama longrope"))
    model = OrthrusForCausalLM.from_base(base, dtype=torch.bfloat16)
    rotary = model.model.rotary_emb
    assert model.dtype == torch.bfloat16 and rotary.inv_freq.dtype == rotary.long_inv_freq.dtype == torch.float32
    torch.testing.assert_close(rotary.inv_freq, base.model.rotary_emb.original_inv_freq, atol=0, rtol=0)


def test_logits_are_of_the_weights_as_they_are_now(with_and_without_c):
    """What a CPU packs of a weight does not see writes through `.data`, nor another tensor at the same address."""
    model = OrthrusForCausalLM.from_base(build_base(base_config("llama")), block_size=4)
    ids = random_ids(9)
    before = model(ids).logits
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    fresh = OrthrusForCausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, fresh(ids).logits) and not torch.equal(model(ids).logits, before)
