"""generate() as transformers users know it, over ConsensusDecoder. Padded batches in, padded sequences out;
every token is the frozen model's own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from orthrus_triton.models.generation_settings import GenerationSettings, merged_config, stop_tokens
from orthrus_triton.models.stop_strings import StopStrings
from orthrus_triton.models.stopping import Stopping
from orthrus_triton.modules import ConsensusDecoder, DecodeStats
from orthrus_triton.modules.decode_options import BlockSize, Mode, require_streamer
from orthrus_triton.modules.prompts import split_prompts
from orthrus_triton.modules.sampling_params import SamplingRule

# what callers pass out of habit, with the only values that mean what happens here
HABITS = {
    "use_cache": (True, None), "synced_gpus": (False, None), "past_key_values": (None,), "cache": (None,),
    "inputs_embeds": (None,), "assistant_model": (None,), "negative_prompt_ids": (None,), "token_type_ids": None,
    "position_ids": (None,), "cache_implementation": (None,), "return_legacy_cache": None, "custom_generate": (None,),
}  # fmt: skip


class OrthrusGenerationMixin:
    """`generate` for a `DualViewModel` that is a transformers model.

    Attributes:
        last_stats: what the last call cost; see `DecodeStats`.
    """

    last_stats: DecodeStats | None = None

    @classmethod
    def can_generate(cls) -> bool:
        """transformers asks."""
        return True

    def consensus_decoder(self, mode: Mode = "consensus") -> ConsensusDecoder:
        """The decoder that `generate` uses for "consensus" or "ar". It keeps its cache from call to call; set its
        attributes (max_cache_len, prefill_chunk ...) to change how it runs."""
        decoders = self.__dict__.setdefault("_decoders", {})
        if mode not in decoders:
            decoders[mode] = ConsensusDecoder(self, mode=mode)
        return decoders[mode]

    def __getstate__(self) -> dict[str, Any]:
        """Copies get decoders of their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_decoders"}

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Any | None = None,
        *,
        streamer: Any | None = None,
        use_diffusion_mode: bool = True,
        seed: int | None = None,
        sampling: SamplingRule = "coupled",
        block_size: BlockSize | None = None,
        reuse_cache: bool = False,
        tokenizer: Any | None = None,
        **options: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Generate tokens.

        Args:
            inputs: [B, L] prompts, or `input_ids=`; padding on the left or right, with `attention_mask=`. Without, it
                is where the padding token is, unless that ends sequences, too.
            generation_config: by default the model's own; its fields may be passed as keywords too. With no length
                named anywhere, there are 20 new tokens; eos_token_id=None is no stop token, top_k=None no limit.
                Penalties and n-grams do not count the padding before a prompt, which transformers' do.
            logits_processor: run on the host, row by row with the row's own history. Each must be a function of
                (input_ids, scores) alone.
            stopping_criteria: asked what transformers asks them, about the whole batch after every token that all
                sequences have, or have ended before; but for scores, which are None, and what stands behind a
                sequence that one of them has ended, which is padding even where there is no eos_token_id.
            prefix_allowed_tokens_fn: as in transformers; its batch_id is the prompt's row, of all
                num_return_sequences alike.
            streamer: TextStreamer, TextIteratorStreamer or the like; one sequence. It gets the prompt as it came first.
            use_diffusion_mode: False decodes with the AR view alone. The tokens are the same.
            seed: of sampling; by default drawn from torch's global generator.
            sampling: "coupled", or "rejection"; see `ConsensusDecoder.generate`.
            block_size: rows of a draft block, or "auto"; by default the model's own.
            reuse_cache: go on from the cache of the last call where the prompt begins as that text did. Its K/V have
                the bits of a fresh prefill only with `consensus_decoder(mode).batch_invariant_prefill = True`: by
                default a prompt is read by the library's product, which may round differently from decoding.
            tokenizer: needed with stop_strings, which may begin in the prompt and end in what is generated.

        Returns:
            [B * num_return_sequences, L + new] int64: the prompts as they came, what was generated, then pad tokens;
            or, with return_dict_in_generate, an object with these `sequences` and, with output_logits, the model's
            `logits` [B * num_return_sequences, V] fp32 at each step, before processors; 0 behind a sequence's end.

        Raises:
            ValueError: an option out of range, or one that asks for what cannot be had; it names the option.
            TypeError: an option nobody knows.
        """
        if inputs is None:
            inputs = options.pop("input_ids", None)
        attention_mask = options.pop("attention_mask", None)
        for name, allowed in HABITS.items():
            value = options.pop(name, None)
            if allowed is not None and value is not None and value not in allowed:
                hint = "; reuse_cache=True continues a text" if name in ("past_key_values", "cache") else ""
                raise ValueError(f"{name} must be {allowed[0]}, but got {type(value).__name__} {value!r:.40}{hint}")
        for name, several in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
            if several is not None and not isinstance(several, (list, tuple)):
                raise ValueError(f"{name} must be a list, but got a {type(several).__name__}")
        if not isinstance(generation_config, GenerationConfig | None):
            raise ValueError(
                f"generation_config must be a GenerationConfig, but got a {type(generation_config).__name__}"
            )
        config, unknown = merged_config(self.generation_config, generation_config, options)
        if unknown:
            raise TypeError(f"generate() got options it does not know: {sorted(unknown)}")
        if not isinstance(inputs, torch.Tensor):
            raise ValueError(f"input_ids must be a tensor [B, L], but got {type(inputs).__name__}")
        inputs = inputs[None] if inputs.dim() == 1 else inputs
        if attention_mask is None:
            attention_mask = _mask_of_padding(inputs, config, self.eos_token_ids)
        prompts = split_prompts(inputs, attention_mask, self.vocab_size)
        settings = GenerationSettings.of(
            config, inputs.shape[1], [len(prompt) for prompt in prompts], self.vocab_size, seed=seed,
            default_eos=self.eos_token_ids,
            positions=getattr(self.config, "max_position_embeddings", None), processors=logits_processor,
            prefix_allowed=prefix_allowed_tokens_fn, criteria=stopping_criteria,
        )  # fmt: skip
        prompts = [prompt for prompt in prompts for _ in range(settings.num_return_sequences)]
        rows = inputs.long().repeat_interleave(settings.num_return_sequences, dim=0)
        strings = None
        if settings.stop_strings:
            if isinstance(tokenizer, (str, bytes)) or not hasattr(tokenizer, "decode"):
                raise ValueError(f"tokenizer must be given with stop_strings, but got {tokenizer!r}")
            strings = [StopStrings(tokenizer, settings.stop_strings, prompt.tolist()) for prompt in prompts]
        stop = None
        if stopping_criteria or strings is not None or settings.max_time is not None:
            stop = Stopping(
                rows, set(settings.eos_token_ids), settings.pad_token_id,
                criteria=stopping_criteria or [], strings=strings, max_time=settings.max_time,
            )  # fmt: skip
        require_streamer(streamer)
        if streamer is not None:
            streamer = _PromptAsItCame(streamer, rows)
        decoder, logits = self.consensus_decoder("consensus" if use_diffusion_mode else "ar"), None
        with decoder.turn:  # until the logits are there, which are of its latest run
            output = decoder.generate(
                prompts, max_new_tokens=settings.max_new_tokens, eos_token_id=settings.eos_token_ids, streamer=streamer,
                block_size=block_size, params=settings.params, sampling=sampling, reuse_cache=reuse_cache,
                stop=stop,
            )  # fmt: skip
            if settings.output_logits:
                of_each = [decoder.run.logits(b) for b in range(len(prompts))]
                logits = torch.nn.utils.rnn.pad_sequence(of_each, batch_first=True).unbind(1)
        self.last_stats = output.stats
        new = [ids[len(prompt) :] for prompt, ids in zip(prompts, output.sequences)]
        new = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=settings.pad_token_id)
        sequences = torch.cat((rows, new.to(rows)), dim=1)
        if not settings.return_dict:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, logits=logits)


def _mask_of_padding(inputs: torch.Tensor, config: GenerationConfig, default_eos: list[int]) -> torch.Tensor | None:
    """Where `inputs` [B, L] are text, by the padding token; None where that does not tell."""
    pad_id = config.pad_token_id
    if pad_id is None or pad_id in stop_tokens(config, default_eos):
        return None
    text = inputs != pad_id
    if bool(text.all()):
        return None
    before, behind = text.cumsum(dim=1) > 0, text.flip(1).cumsum(dim=1).flip(1) > 0
    if bool((before & behind & ~text).any()) or not bool(text.any(dim=1).all()):
        raise ValueError(
            f"attention_mask must be given where pad_token_id={pad_id} is part of a prompt, but got None: it stands "
            "between other tokens, or alone"
        )
    return text


class _PromptAsItCame:
    """A streamer's first tokens are the prompt, as in transformers with its padding, which the decoder leaves out."""

    def __init__(self, streamer: Any, rows: torch.Tensor) -> None:
        self.streamer, self.rows = streamer, rows

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, then new tokens."""
        if self.rows is not None:
            tokens, self.rows = self.rows.cpu(), None
        self.streamer.put(tokens)

    def end(self) -> None:
        """Nothing more comes."""
        self.streamer.end()
