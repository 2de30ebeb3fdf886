"""From hidden states to tokens: logits, what processes them, and the choice. The same for drafts, for the AR view and
after the prefill, so that consensus is equality of choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from orthrus_triton import ops
from orthrus_triton.modules.decode_state import DecodeState
from orthrus_triton.modules.draft_chain import DraftNoise, Recalled
from orthrus_triton.modules.dual_view_model import DualViewModel
from orthrus_triton.modules.kv_cache import ViewPass
from orthrus_triton.modules.sampling_params import Choosing
from orthrus_triton.ops.gumbel import CHOICE

if TYPE_CHECKING:
    from orthrus_triton.modules.decode_cycle import DecodeCycle


def choose_tokens(
    model: DualViewModel, hidden: torch.Tensor, state: DecodeState, view_pass: ViewPass, choosing: Choosing,
    candidate: torch.Tensor | None, stream: int = CHOICE,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Tokens [B, T] int64 of T rows, VOID where the logits leave none, and the processed logits [B, T, V] fp32 they
    come from, if there are any.

    Args:
        model: see `DualViewModel`.
        hidden: [B, T, H].
        state: of the B slots.
        view_pass: the pass `hidden` comes from; row t's token stands at `view_pass.positions[b, t] + 1`.
        choosing: what the run is open for.
        candidate: [B, T], the block these rows read, or None in a draft, whose tokens are not known yet.
        stream: which of the independent draws at a position.
    """
    impl = view_pass.impl
    choose = getattr(model, "choose", None)
    if choosing == Choosing() and choose is not None and view_pass.linear_impl == impl:
        return choose(hidden, impl), None
    logits = choose_logits(model, hidden, state, view_pass, choosing, candidate, stream)
    if choosing.sampled:
        positions = view_pass.positions[:, : hidden.shape[1]] + 1
        choice = ops.sample_choice(logits, positions, state.sampling.sampling, stream=stream, impl=impl)
    else:
        choice = ops.greedy_choice(logits, impl=impl)
    return choice, logits


def choose_logits(
    model: DualViewModel, hidden: torch.Tensor, state: DecodeState, view_pass: ViewPass, choosing: Choosing,
    candidate: torch.Tensor | None, stream: int = CHOICE,
) -> torch.Tensor:  # fmt: skip
    """The logits [B, T, V] fp32 that the tokens are chosen from, processed. Arguments as in `choose_tokens`."""
    impl = view_pass.impl
    logits = model.compute_logits(hidden, view_pass.linear_impl)
    if logits.shape != (*hidden.shape[:-1], model.vocab_size):
        raise ValueError(
            f"model.compute_logits must return logits [B, T, {model.vocab_size}] of all rows of hidden "
            f"{tuple(hidden.shape)}, but returned {tuple(logits.shape)}"
        )
    positions = view_pass.positions[:, : hidden.shape[1]] + 1
    if choosing.processed:
        logits = ops.process_logits(logits, positions, candidate, state.eos_ids, state.sampling.processors, impl=impl)
    if choosing.hosted:
        logits = process_on_host(logits, positions, state, candidate, stream, impl)
    return logits


def choose_drafts(
    decoder: DecodeCycle, hidden: torch.Tensor, anchor: torch.Tensor, state: DecodeState, view_pass: ViewPass
) -> torch.Tensor:
    """Tokens [B, T] of a draft's rows, of which the first is the frozen view's own where that reads the anchor [B]:
    each for itself, or, if the view has a chain, in turn and with an eye to what was said before."""
    model, choosing, first = decoder.model, decoder.choosing, decoder.anchor_rows
    if not getattr(model, "has_chain", False):
        return decoder.choose(hidden, state, view_pass)
    noise, exact = None, None
    if any(choosing):  # a function on the host has seen the masks' own choices; most of them stay
        choice, logits = choose_tokens(model, hidden, state, view_pass, choosing, None)
        exact = choice[:, :first]
        if choosing.sampled:
            positions = view_pass.positions[:, first : hidden.shape[1]] + 1
            noise = DraftNoise(choice[:, first:], positions, state.sampling.sampling)
    else:  # the masks' own choices are not looked at
        logits = model.compute_logits(hidden, view_pass.linear_impl)
        if first:
            exact = ops.greedy_choice(logits[:, :first].contiguous(), impl=view_pass.impl)
    own = exact[:, 0].clamp(min=0) if first else anchor
    # [B]: `own` and its position
    found = ops.recall(
        state.prompt_ids, state.output_ids, view_pass.prompt_len, own, view_pass.positions[:, first],
        hidden.shape[1] - first, impl=view_pass.impl,
    )  # fmt: skip
    drafted = model.chain_drafts(hidden[:, first:], logits[:, first:], own, noise, Recalled(*found))
    return torch.cat((exact, drafted), dim=1) if first else drafted


def process_on_host(
    logits: torch.Tensor, positions: torch.Tensor, state: DecodeState, candidate: torch.Tensor | None, stream: int,
    impl: str,
) -> torch.Tensor:  # fmt: skip
    """Logits after each slot's own function, called row by row with the row's history. Slow, and right.

    In a draft, row t's history is what rows 0..t-1 draft. Rows behind a token that ends the text, or that the function
    has banned, stay as they are, for nobody looks at what they say: a function of a grammar need not know such texts.
    """
    logits = logits.clone()
    for b in range(logits.shape[0]):
        number = state.sampling.first + b
        if number not in state.sampling.hosts or bool(state.finished[b]):
            continue
        prompt, process = state.sampling.hosts[number]
        ids = torch.cat((prompt.to(logits.device), state.output_ids[b, : int(state.output_len[b])]))
        drafted = None  # [], what the row before says in a draft
        slot = ops.SamplingTensors(*(tensor[b : b + 1] for tensor in state.sampling.sampling))
        for t in range(logits.shape[1]):
            if t:
                read = drafted if candidate is None else candidate[b, t]
                # VOID is one of the ids that end a text, so that it is no index
                if bool((state.eos_ids == read).any()) or logits[b, t - 1, read] == -torch.inf:
                    break
                ids = torch.cat((ids, read[None]))
            scores = process(ids[None], logits[b, t][None].clone())
            came = tuple(scores.shape) if isinstance(scores, torch.Tensor) else f"a {type(scores).__name__}"
            if came != (1, logits.shape[-1]):
                raise ValueError(f"logits_processor must return a tensor [1, {logits.shape[-1]}], but got {came}")
            logits[b, t] = scores[0]
            if candidate is None:
                row = logits[b : b + 1, t : t + 1]
                place = positions[b : b + 1, t : t + 1]
                drafted = ops.sample_choice(row, place, slot, stream=stream, impl=impl)[0, 0]
    return logits
