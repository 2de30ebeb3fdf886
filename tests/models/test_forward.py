"""`model(input_ids)`: transformers' logits and loss over whole sequences, and padding that changes no bit."""

from __future__ import annotations

import math

import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from tests.models.tiny_bases import base_config, build_base, random_ids

B, T = 3, 30
LEFT, RIGHT = torch.ones(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.long)
LEFT[1, :9], LEFT[2, :25] = 0, 0
RIGHT[1, 21:], RIGHT[2, 5:] = 0, 0
MASKS = pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
# beyond 20 tokens, some angles depend on the prompt's length: in transformers, on that of the whole batch
CASES = [("qwen3", 11), ("mistral window", 30), ("llama longrope", 30), ("llama dynamic", 30)]


@pytest.mark.parametrize(("case", "length"), CASES)
def test_logits_are_transformers_own(case: str, length: int) -> None:
    base = build_base(base_config(case))
    ids = random_ids(length, batch=B)
    output = OrthrusForCausalLM.from_base(base)(ids, impl="torch")
    assert output.logits.dtype == torch.float32 and output.loss is None
    torch.testing.assert_close(output.logits, base(ids).logits, atol=1e-4, rtol=0)


@MASKS
@pytest.mark.parametrize("case", ["qwen3", "mistral window"])
def test_padded_logits_are_transformers_own(case: str, mask: torch.Tensor) -> None:
    base = build_base(base_config(case))
    ids = random_ids(T, batch=B)
    ours, theirs = (one(ids, attention_mask=mask).logits for one in (OrthrusForCausalLM.from_base(base), base))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-4, rtol=0)


@MASKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["qwen3", "llama longrope"])
def test_padding_changes_no_bit(case: str, dtype: torch.dtype, mask: torch.Tensor) -> None:
    model = OrthrusForCausalLM.from_base(build_base(base_config(case), dtype))
    ids = random_ids(T, batch=B)
    logits = model(ids, mask.bool(), impl="torch").logits
    for b in range(B):
        tokens = mask[b].bool()
        assert torch.equal(logits[b, tokens], model(ids[b : b + 1, tokens], impl="torch").logits[0])


def test_loss_is_transformers_own() -> None:
    base, ids = build_base(base_config("qwen3")), random_ids(T, batch=B)
    model, labels = OrthrusForCausalLM.from_base(base), ids.masked_fill(RIGHT == 0, -100)
    given = {"input_ids": ids, "attention_mask": RIGHT, "labels": labels}
    nothing = {"use_cache": False, "output_attentions": None, "token_type_ids": torch.zeros_like(ids)}
    for more in ({}, {"num_items_in_batch": 7}):
        torch.testing.assert_close(
            model(**given, **more, **nothing).loss, base(**given, **more).loss, atol=1e-4, rtol=0
        )
    loss, logits = model(**given, return_dict=False)
    scored = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0][labels[:, 1:] >= 0]
    assert len(scored) == 29 + 20 + 4 and math.isclose(-scored.mean().item(), loss.item(), rel_tol=1e-5)


def test_loss_does_not_depend_on_the_side_of_padding() -> None:
    """transformers has the padding before a text predict its first token."""
    model = OrthrusForCausalLM.from_base(build_base(base_config("qwen3")))
    left, texts = random_ids(T, batch=B), []
    right = left.clone()
    for b, length in enumerate(LEFT.sum(dim=1).tolist()):
        right[b, :length] = left[b, T - length :]
        texts.append(left[b, T - length :])
    losses = [
        model(ids, mask, labels=ids.masked_fill(mask == 0, -100), impl="torch").loss.item()
        for ids, mask in ((left, LEFT), (right, LEFT.flip(1)))
    ]
    alone = sum(model(ids[None], labels=ids[None]).loss.item() * (len(ids) - 1) for ids in texts) / (29 + 20 + 4)
    assert losses[0] == losses[1] and math.isclose(losses[0], alone, rel_tol=1e-5)


def test_masks_of_other_kinds_and_no_gradients() -> None:
    model = OrthrusForCausalLM.from_base(build_base(base_config("llama")), block_size=8)
    ids = random_ids(T, batch=B)
    logits = model(ids, LEFT).logits
    for mask in (LEFT.bool(), LEFT.float(), -LEFT):
        assert torch.equal(model(ids, mask).logits, logits)
    assert not model(ids[:, :8], view="diffusion", labels=ids[:, :8]).loss.requires_grad


def test_only_some_logits() -> None:
    model, ids = OrthrusForCausalLM.from_base(build_base(base_config("llama"))), random_ids(T, batch=B)
    logits = model(ids, LEFT, impl="torch").logits
    assert torch.equal(model(ids, LEFT, logits_to_keep=4, impl="torch").logits, logits[:, -4:])
    places = torch.tensor([28, 3])
    assert torch.equal(model(ids, LEFT, logits_to_keep=places, impl="torch").logits, logits[:, places])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"input_ids must be \[B, T\] with at least one token"),
        (
            {"attention_mask": torch.ones(B, T - 1)},
            r"attention_mask must be \[3, 30\], like input_ids, but got \[3, 29",
        ),
        ({"attention_mask": torch.zeros(B, T)}, "attention_mask must have one run of tokens in each row"),
        ({"attention_mask": LEFT * (torch.arange(T) != 27)}, "with padding only before or after it"),
        ({"attention_mask": LEFT, "view": "diffusion"}, "attention_mask is for view='ar', but got view='diffusion'"),
        ({"attention_mask": "diffusion"}, r"attention_mask must be \[3, 30\], like input_ids, but got 'diffusion'"),
        ({"labels": torch.zeros(B, T - 1)}, r"labels must be \[3, 30\], like input_ids, but got \[3, 29\]"),
        ({"labels": torch.zeros(B, T), "logits_to_keep": 3}, "labels need the logits of every position"),
        ({"past_key_values": object()}, "past_key_values must be None: whole sequences are read, but got an? object"),
        ({"output_hidden_states": True}, "output_hidden_states must be False or None"),
        (
            {"cache_position": torch.arange(T)},
            "cache_position must be None: whole sequences are read, but got a Tensor",
        ),
    ],
)
def test_what_cannot_be_had_is_named(wrong: dict, message: str) -> None:
    model = OrthrusForCausalLM.from_base(build_base(base_config("llama")))
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": random_ids(T, batch=B)} | wrong)
    with pytest.raises(TypeError, match="forward.. got an unexpected argument 'lables'"):
        model(random_ids(T), lables=None)
