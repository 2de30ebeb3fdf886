"""What transformers' GenerationConfig asks for, in terms of this library: lengths, stop tokens, SamplingParams.
What cannot be done is refused by name, never ignored."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation import EosTokenCriteria

from orthrus_triton.models.convert import eos_token_ids
from orthrus_triton.modules import SamplingParams
from orthrus_triton.ops._dispatch import require_size

# with nothing said, as in transformers; the latter with do_sample
DEFAULT_NEW_TOKENS, DEFAULT_TOP_K = 20, 50
# fields that must be as if they had not been set, and what to do instead
UNSUPPORTED = {
    "num_beams": "one sequence of tokens is verified at a time: num_return_sequences with do_sample gives several",
    "num_beam_groups": "there is no beam search", "penalty_alpha": "there is no contrastive search",
    "diversity_penalty": "there is no beam search", "constraints": "there is no beam search",
    "force_words_ids": "there is no beam search", "dola_layers": "there is no layer contrast",
    "typical_p": "use top_p or min_p", "epsilon_cutoff": "use min_p", "eta_cutoff": "use min_p", "top_h": "use min_p",
    "encoder_repetition_penalty": "use repetition_penalty", "encoder_no_repeat_ngram_size": "use no_repeat_ngram_size",
    "guidance_scale": "there is no second prompt", "watermarking_config": "pass a logits_processor",
    "forced_bos_token_id": "put it into the prompt", "forced_eos_token_id": "cut or append it afterwards",
    "exponential_decay_length_penalty": "pass a logits_processor", "token_healing": "heal the prompt before",
    "prompt_lookup_num_tokens": "the diffusion view drafts", "assistant_early_exit": "the diffusion view drafts",
    "use_mtp": "the diffusion view drafts", "speculation_type": "the diffusion view drafts",
    "output_scores": "what processors make of logits is not kept; output_logits=True gives what they began with",
    "output_attentions": "attention weights are never formed", "output_hidden_states": "they are not kept",
    "remove_invalid_values": "a sequence ends where the logits are not finite, and the error has what the others got",
    "renormalize_logits": "nothing reads the logits afterwards",
}  # fmt: skip
# a processor of the caller's own stands in for what the field asks for, as in transformers
REPLACED = {
    RepetitionPenaltyLogitsProcessor: "repetition_penalty", NoRepeatNGramLogitsProcessor: "no_repeat_ngram_size",
    SequenceBiasLogitsProcessor: "sequence_bias", NoBadWordsLogitsProcessor: "bad_words_ids",
    SuppressTokensLogitsProcessor: "suppress_tokens", SuppressTokensAtBeginLogitsProcessor: "begin_suppress_tokens",
    MinLengthLogitsProcessor: "min_length", MaxTimeCriteria: "max_time", StopStringCriteria: "stop_strings",
}  # fmt: skip
# what asks for nothing, besides None and False: in most fields 0, which names a token in others
NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "typical_p": 1, "encoder_repetition_penalty": 1, "guidance_scale": 1,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "speculation_type": "none",
}  # fmt: skip


@dataclass(frozen=True)
class GenerationSettings:
    """A GenerationConfig, resolved for prompts of `prompt_length` columns."""

    max_new_tokens: int
    eos_token_ids: list[int]
    pad_token_id: int
    num_return_sequences: int
    return_dict: bool
    output_logits: bool
    stop_strings: list[str]
    max_time: float | None
    params: list[SamplingParams]

    @classmethod
    def of(
        cls, config: GenerationConfig, prompt_length: int, lengths: list[int], vocab_size: int, *,
        seed: int | None = None, default_eos: list[int], positions: int | None = None,
        processors: LogitsProcessorList | None = None, prefix_allowed: Any = None,
        criteria: StoppingCriteriaList | None = None,
    ) -> GenerationSettings:  # fmt: skip
        """Read `config`.

        Args:
            config: transformers' own.
            prompt_length: columns of the padded prompts, which max_length and min_length count.
            lengths: of the prompts without padding; with num_return_sequences > 1 each is decoded that often.
            vocab_size: tokens to suppress that lie outside are none.
            seed: of sampling; None draws one from torch's global generator.
            default_eos: stop tokens when the config has none.
            positions: of the model, the most that a text of no named length may have.
            processors: the caller's own, run on the host, in place of what `config` asks for by the same class.
            prefix_allowed: transformers' `prefix_allowed_tokens_fn`.
            criteria: the caller's own; they, too, stand in for what `config` asks for by the same class.

        Raises:
            ValueError: a field that asks for what this library does not do.
        """
        for name, instead in UNSUPPORTED.items():
            value = getattr(config, name, None)
            if value is not None and value is not False and value != NEUTRAL.get(name, 0):
                raise ValueError(f"{name} must be left at its default, but got {value!r}: {instead}")
        _require_numbers(config)
        config = copy.copy(config)
        for one in [*(processors or []), *(criteria or [])]:
            if type(one) in REPLACED:
                setattr(config, REPLACED[type(one)], None)
        max_new = _max_new_tokens(config, prompt_length, positions)
        eos_ids = stop_tokens(config, default_eos)
        pad_id = config.pad_token_id
        if pad_id is None:
            pad_id = eos_ids[0] if eos_ids else 0
        strings = config.stop_strings or []
        strings = [strings] if isinstance(strings, str) else strings
        _require_lists(config, strings, vocab_size)
        copies = 1 if config.num_return_sequences is None else config.num_return_sequences
        require_size("num_return_sequences", copies)
        if copies > 1 and not config.do_sample:
            raise ValueError(f"num_return_sequences must be 1 without do_sample, but got {copies}: all would be equal")
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ())) if config.do_sample else 0
        shared = _shared_params(config, prompt_length, vocab_size, seed, eos_ids)
        if ends := [one.eos_token_id.flatten().tolist() for one in criteria or [] if type(one) is EosTokenCriteria]:
            options_eos, eos_ids = eos_ids, sorted({token for ids in ends for token in ids})
            if shared["min_new_tokens"] and set(eos_ids) != set(options_eos):
                raise ValueError(
                    f"min_new_tokens and min_length are about eos_token_id={options_eos}, but stopping_criteria has an "
                    f"EosTokenCriteria of {eos_ids}: name the same"
                )
        hosts = [
            _host_processors(config, length, processors, prefix_allowed, row)
            for row, length in enumerate(lengths) for _ in range(copies)
        ]  # fmt: skip
        return_dict, output_logits = bool(config.return_dict_in_generate), bool(config.output_logits)
        if output_logits and not return_dict:
            raise ValueError("output_logits=True must come with return_dict_in_generate=True, but that is not set")
        if longest := [one.max_length for one in criteria or [] if type(one) is MaxLengthCriteria]:
            max_new = max(min(longest) - prompt_length, 1)
        return cls(
            max_new, eos_ids, pad_id, copies, return_dict, output_logits, list(strings), config.max_time,
            [SamplingParams(**shared, sequence=b, logits_processor=host or None) for b, host in enumerate(hosts)],
        )  # fmt: skip


def stop_tokens(config: GenerationConfig, default_eos: list[int]) -> list[int]:
    """The tokens that end a sequence, by `config` or else by the model."""
    return default_eos if config.eos_token_id is None else eos_token_ids(config)


def _max_new_tokens(config: GenerationConfig, prompt_length: int, positions: int | None) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    longest = config.max_length
    if longest is None:
        longest = prompt_length + DEFAULT_NEW_TOKENS
        longest = longest if positions is None else min(longest, positions)
    if longest <= prompt_length:
        raise ValueError(
            f"max_length must exceed the prompt's {prompt_length} tokens, but is {longest}: pass max_new_tokens"
        )
    return longest - prompt_length


def _require_numbers(config: GenerationConfig) -> None:
    """Raise a ValueError where a length is no integer, or a time no number."""
    for name in ("max_new_tokens", "max_length", "min_new_tokens", "min_length", "pad_token_id"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise ValueError(f"{name} must be an integer or None, but got {value!r}")
    if config.max_time is not None and not isinstance(config.max_time, Real):
        raise ValueError(f"max_time must be a number of seconds or None, but got {config.max_time!r}")


def _require_lists(config: GenerationConfig, stop_strings: Any, vocab_size: int) -> None:
    """Raise a ValueError where what must be a list is none, or holds something else."""
    if not isinstance(stop_strings, (list, tuple)) or not all(isinstance(one, str) for one in stop_strings):
        raise ValueError(f"stop_strings must be strings, but got {stop_strings!r}")
    for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a list, but got {value!r}")
        if name != "bad_words_ids" and not all(type(one) is int for one in value or []):
            raise ValueError(f"{name} must hold integers, but got {value!r}")
    for words in config.bad_words_ids or []:
        is_list = isinstance(words, (list, tuple)) and len(words) > 0
        if not is_list or not all(type(one) is int and 0 <= one < vocab_size for one in words):
            raise ValueError(f"bad_words_ids must hold lists of ids in 0..{vocab_size - 1}, but got {words!r}")


def _shared_params(
    config: GenerationConfig, prompt_length: int, vocab_size: int, seed: int, eos_ids: list[int]
) -> dict[str, Any]:
    bias = {token: -torch.inf for token in config.suppress_tokens or [] if 0 <= token < vocab_size}
    for words in config.bad_words_ids or []:
        if len(words) == 1 and words[0] not in eos_ids:
            bias[words[0]] = -torch.inf
    min_new = config.min_new_tokens
    if min_new is None:  # it is the stronger
        min_new = max((config.min_length or 0) - prompt_length, 0)
    params = {
        "seed": seed,
        "repetition_penalty": 1.0 if config.sequence_bias else _repetition_penalty(config),
        "min_new_tokens": min_new,
        "logit_bias": bias,
    }
    if config.do_sample:
        params |= {
            "temperature": 1.0 if config.temperature is None else config.temperature,
            "top_k": DEFAULT_TOP_K if config.top_k is None else config.top_k,
            "top_p": 1.0 if config.top_p is None else config.top_p,
            "min_p": 0.0 if config.min_p is None else config.min_p,
        }
        if params["temperature"] == 0:
            raise ValueError("temperature must be > 0 with do_sample, but got 0: use do_sample=False")
    return params


def _host_processors(
    config: GenerationConfig, prompt_length: int, processors: LogitsProcessorList | None, prefix_allowed: Any, row: int
) -> LogitsProcessorList:
    """What needs the history as a sequence: transformers' own classes, row by row on the host."""
    found = LogitsProcessorList()
    if config.sequence_bias:
        found.append(SequenceBiasLogitsProcessor(config.sequence_bias))
        # comes behind the bias in transformers, and so behind it here
        found.append(RepetitionPenaltyLogitsProcessor(float(_repetition_penalty(config))))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    several = [words for words in config.bad_words_ids or [] if len(words) > 1]
    if several:
        found.append(NoBadWordsLogitsProcessor(several))
    if prefix_allowed is not None:
        found.append(PrefixConstrainedLogitsProcessor(lambda _, ids: prefix_allowed(row, ids), 1))
    if config.begin_suppress_tokens:
        found.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, prompt_length))
    found.extend(processors or [])
    return found


def _repetition_penalty(config: GenerationConfig) -> float:
    return 1.0 if config.repetition_penalty is None else config.repetition_penalty


def merged_config(own: GenerationConfig | None, given: GenerationConfig | None, options: dict[str, Any]) -> tuple:
    """(config, options that are no fields of it): the model's config, then the caller's, then the keywords."""
    config = copy.deepcopy(own) if own is not None else GenerationConfig()
    if options.get("max_new_tokens") is None and options.get("max_length") is not None:
        config.max_new_tokens = None  # a length the caller names is stronger than one the checkpoint came with
    if given is not None:
        config.update(**{name: value for name, value in given.to_dict().items() if value is not None})
    # said by name, None is none, and not the default
    none = {"eos_token_id": [], "top_k": 0}
    options = options | {name: none[name] for name in none.keys() & options if options[name] is None}
    return config, config.update(**options)
