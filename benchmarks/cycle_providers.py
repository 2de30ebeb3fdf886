"""Whose cycles are timed: ours, ours in AR mode, the official implementation, transformers as it is and compiled.
Random prompts, greedy unless the name says so; every sample is the wall-clock of one cycle, host work included."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.library_products import LibraryProducts
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import Choosing, ConsensusDecoder, SamplingParams
from orthrus_triton.modules.sampling_params import SamplingRule

WARM_UP = 3
SAMPLED = SamplingParams(temperature=0.6, top_k=20, top_p=0.95)  # what Qwen3's own generation config asks for


class CannotRun(Exception):
    """Why a provider has no row here."""


@dataclass
class Cycles:
    """`seconds` of each cycle (of an AR step), `ttft` to the first token of all prompts, `views` a cycle passes."""

    views: tuple[str, ...]
    ttft: float
    seconds: list[float] = field(default_factory=list)


@dataclass
class Workload:
    """One cell of the benchmark. prompts [B, context]; cycles to time; `official` is a checkout or None."""

    model: OrthrusForCausalLM
    prompts: torch.Tensor
    cycles: int
    official: Path | None = None


def ours(
    load: Workload, mode: str = "consensus", params: SamplingParams = SamplingParams(), rule: SamplingRule = "coupled",
    decoder_type: type[ConsensusDecoder] | None = None, **options: Any,
) -> Cycles:  # fmt: skip
    """Our cycle: on a GPU one graph replay, and the host a step behind."""
    batch, context = load.prompts.shape
    decoder = (decoder_type or ConsensusDecoder)(load.model, mode=mode, **options)
    # random drafts are rarely accepted, and a limit is there to be out of reach
    tokens = 16 * (load.cycles + WARM_UP + 2)
    run = decoder.open(batch, context + tokens, eos_token_id=[], choosing=Choosing.of([params], rule))
    for b, prompt in enumerate(load.prompts):  # compiles and loads what the time to the first token should not hold
        run.admit(b, prompt, 1, params)
        run.poll(lag=0)
    started = time.perf_counter()
    for b, prompt in enumerate(load.prompts):
        run.admit(b, prompt, tokens, params)
    run.poll(lag=0)
    result = Cycles(("ar",) if mode == "ar" else ("diffusion", "ar"), time.perf_counter() - started)
    last, known = time.perf_counter(), run.cycles_known
    while len(result.seconds) < load.cycles + WARM_UP and not run.done:
        run.advance()
        # on a GPU the first steps bring nothing yet, and a replay in AR mode brings several cycles
        if done := run.cycles_known - known:
            now, known = time.perf_counter(), run.cycles_known
            result.seconds += [(now - last) / done] * done
            last = now
    result.seconds = result.seconds[WARM_UP:]
    return result


@contextmanager
def int8_drafts(model: OrthrusForCausalLM) -> Iterator[None]:
    """Inside, drafts read int8 copies of the weights; behind it, there are none."""
    try:
        model.quantize_drafts()  # memory may run out in the middle of it
        yield
    finally:
        model.unquantize_drafts()


def ours_int8_drafts(load: Workload) -> Cycles:
    """Our cycle with drafts from int8 copies."""
    with int8_drafts(load.model):
        measured = ours(load)
    measured.views = ("diffusion-int8", "ar")
    return measured


def in_int8(model: OrthrusForCausalLM, round_rows: bool = False, head: bool = False) -> OrthrusForCausalLM:
    """The model with weights in int8; another one, because there is no way back."""
    quantized = copy.deepcopy(model)
    quantized.quantize_weights(round_rows, head)
    return quantized


def ours_int8(load: Workload, mode: str = "consensus", round_rows: bool = False, head: bool = False) -> Cycles:
    """Our cycle of the model with weights in int8."""
    measured = ours(replace(load, model=in_int8(load.model, round_rows, head)), mode)
    measured.views = tuple(f"{view}-int8{'-head' * head}" for view in measured.views)
    return measured


class _Stopwatch:
    """A streamer that takes the time of every token it is given and ends the generation when it has enough."""

    class Enough(Exception):
        pass

    def __init__(self, samples: int, counts: Callable[[torch.Tensor], bool]) -> None:
        self.samples, self.counts = samples, counts
        self.prompt_seen, self.marks = False, [time.perf_counter()]

    def put(self, ids: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
        elif self.counts(ids):
            self.marks.append(time.perf_counter())
            if len(self.marks) > self.samples + 1:
                raise _Stopwatch.Enough

    def end(self) -> None:
        pass

    def cycles(self, views: tuple[str, ...]) -> Cycles:
        steps = [b - a for a, b in zip(self.marks[1:], self.marks[2:])]
        return Cycles(views, self.marks[1] - self.marks[0], steps[WARM_UP:])


def _watched(generate: Callable[[_Stopwatch], Any], watch: _Stopwatch, views: tuple[str, ...]) -> Cycles:
    try:
        generate(watch)
    except _Stopwatch.Enough:
        pass
    return watch.cycles(views)


def official(load: Workload) -> Cycles:
    """The official implementation's generate, its diffusion mode."""
    if load.official is None:
        raise CannotRun("needs --official PATH, a checkout of the official repository")
    if load.prompts.shape[0] > 1:
        raise CannotRun("the official implementation decodes one sequence")
    model = shapes.official_model(load.model, load.official)
    # the end of a cycle streams the bonus token, [1]; accepted drafts come as [1, n]
    watch = _Stopwatch(load.cycles + WARM_UP, lambda ids: ids.dim() == 1)
    # a limit far away: the official cycle shrinks its last blocks
    tokens = (load.cycles + WARM_UP + 2) * load.model.block_size
    return _watched(
        lambda streamer: model.generate(load.prompts, max_new_tokens=tokens, eos_token_id=-1, streamer=streamer),
        watch, ("diffusion", "ar"),
    )  # fmt: skip


def hf(load: Workload) -> Cycles:
    """transformers' generate with sdpa: AR decoding as most people run it."""
    return _hf(load, shapes.transformers_model(load.model))


def _hf(load: Workload, model: Any, **options: Any) -> Cycles:
    watch = _Stopwatch(load.cycles + WARM_UP, lambda ids: True)
    mask = torch.ones_like(load.prompts)
    return _watched(
        lambda streamer: model.generate(
            load.prompts, attention_mask=mask, do_sample=False, max_new_tokens=load.cycles + WARM_UP + 2,
            pad_token_id=0, streamer=streamer, **options,
        ),
        watch, ("ar",),
    )  # fmt: skip


def hf_compiled(load: Workload) -> Cycles:
    """transformers' generate over a static cache, compiled with CUDA graphs: a fast AR baseline."""
    if load.prompts.device.type != "cuda":
        raise CannotRun("transformers compiles its decoding on a GPU only")
    from transformers import CompileConfig

    options = {
        "cache_implementation": "static",
        "compile_config": CompileConfig(mode="reduce-overhead", fullgraph=True, dynamic=False),
    }
    model = shapes.transformers_model(load.model)
    _hf(load, model, **options)  # compiles
    return _hf(load, model, **options)


PROVIDERS: dict[str, Callable[[Workload], Cycles]] = {
    "ours": ours,
    "ours-ar": lambda load: ours(load, "ar"),
    "ours-eager": lambda load: ours(load, cuda_graph=False),  # nothing captured or recorded: all modules, every time
    "ours-ar-eager": lambda load: ours(load, "ar", cuda_graph=False),
    "ours-int8-drafts": ours_int8_drafts,
    "ours-int8-weights": ours_int8,
    "ours-ar-int8-weights": lambda load: ours_int8(load, "ar"),
    "ours-int8-rows": lambda load: ours_int8(load, round_rows=True),
    "ours-ar-int8-rows": lambda load: ours_int8(load, "ar", round_rows=True),
    "ours-int8-head": lambda load: ours_int8(load, round_rows=True, head=True),  # rows, too
    "ours-ar-int8-head": lambda load: ours_int8(load, "ar", round_rows=True, head=True),
    "ours-sampled": lambda load: ours(load, params=SAMPLED),
    "ours-rejection": lambda load: ours(load, params=SAMPLED, rule="rejection"),
    "ours-ar-sampled": lambda load: ours(load, "ar", SAMPLED),
    "ours-inexact": lambda load: ours(load, decoder_type=LibraryProducts),
    "ours-ar-inexact": lambda load: ours(load, "ar", exact=False),
    "official": official,
    "hf": hf,
    "hf-compiled": hf_compiled,
}


@torch.no_grad()
def problems(load: Workload, names: Sequence[str], tokens: int = 16) -> list[str]:
    """The correctness gate, on the weights that will be timed: tier B here, and logits like the baselines' own."""
    model, found = load.model, []
    prompts = load.prompts[:2, :96]

    def text(mode: str, model: OrthrusForCausalLM = model, **options: Any) -> list[list[int]]:
        decoder = ConsensusDecoder(model, mode=mode, **options)
        output = decoder.generate(prompts, max_new_tokens=tokens, eos_token_id=[])
        return [sequence.tolist() for sequence in output.sequences]

    said = text("ar")
    got = {"consensus": text("consensus"), "auto": text("consensus", block_size="auto")}
    if "ours-int8-drafts" in names:
        with int8_drafts(model):
            got["consensus with int8 drafts"] = text("consensus")
    found += [f"mode {name} does not emit the tokens of AR mode" for name, one in got.items() if one != said]
    for kind in ("weights", "rows", "head"):
        if any(name.endswith(f"int8-{kind}") for name in names):
            quantized = in_int8(model, kind != "weights", kind == "head")
            if text("consensus", quantized) != text("ar", quantized):
                found.append(f"with {kind} in int8, mode consensus does not emit the tokens of AR mode")
    ids = prompts[:1, :64]
    if "hf" in names or "hf-compiled" in names:
        theirs = shapes.transformers_model(model)(ids, logits_to_keep=8).logits
        found += _unlike("transformers' AR logits", model(ids, logits_to_keep=8).logits, theirs)
    if "official" in names and load.official is not None:
        found += _compare_with_official(load, ids)
    return found


def _compare_with_official(load: Workload, ids: torch.Tensor) -> list[str]:
    """Both views: the AR logits of a prompt, and the draft's logits after it."""
    from transformers import DynamicCache

    model, (length, block) = load.model, (ids.shape[1], load.model.block_size)
    official_model = shapes.official_model(model, load.official)
    past = DynamicCache(config=official_model.config)
    masks = torch.full((1, block), model.mask_token_id, device=ids.device)
    theirs_ar = official_model(input_ids=ids, past_key_values=past).logits
    theirs = official_model(
        input_ids=masks, position_ids=torch.arange(length, length + block, device=ids.device)[None],
        past_key_values=past, use_cache=False, is_diffusion_pass=True, ar_seq_len=length,
    ).logits  # fmt: skip
    cache = model.new_cache(1, length + block, block)
    cache.prompt_len.fill_(length)
    ours_ar = model.compute_logits(model.forward_view(ids, cache, cache.view_pass("ar", length)))
    cache.context_len.fill_(length)
    ours = model.compute_logits(model.forward_view(masks, cache, cache.draft_pass(block)))
    found = _unlike("the official AR logits", ours_ar[:, -8:], theirs_ar[:, -8:])
    return found + _unlike("the official draft's logits", ours, theirs)


def _unlike(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> list[str]:
    """Two correct programs round differently, and random layers amplify it: near is what can be asked for here, and
    a wrong mask, position or weight is far. The tight budget is that of the parity tests."""
    alike = torch.nn.functional.cosine_similarity(ours.float(), theirs.float(), dim=-1).min().item()
    needed = 0.9999 if ours.dtype == theirs.dtype == torch.float32 else 0.98
    return [] if alike >= needed else [f"{what} are not ours: cosine {alike:.4f}, needed {needed}"]
