"""OrthrusForCausalLM: a transformers model with two views over one KV cache, for ConsensusDecoder and for training.
In its state dict, tensors carry the names of the published Orthrus checkpoints."""

from __future__ import annotations

import copy
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from orthrus_triton import ops
from orthrus_triton.models import checkpoint
from orthrus_triton.models.backbone import OrthrusModel
from orthrus_triton.models.config import OrthrusConfig
from orthrus_triton.models.convert import choose_mask_token_id, eos_token_ids, open_base, read_generation_config
from orthrus_triton.models.diffusion_view import DiffusionViewMixin
from orthrus_triton.models.forward import ForwardMixin
from orthrus_triton.models.generation import OrthrusGenerationMixin
from orthrus_triton.models.loading_options import loading_options
from orthrus_triton.models.quantization import QuantizationMixin
from orthrus_triton.modules.draft_chain import DraftNoise, Recalled
from orthrus_triton.modules.kv_cache import SharedKVCache, ViewPass
from orthrus_triton.modules.projection import Linear


class OrthrusForCausalLM(ForwardMixin, DiffusionViewMixin, QuantizationMixin, OrthrusGenerationMixin, PreTrainedModel):
    """A frozen model of one of `FAMILIES` with a diffusion view. Runs in `ConsensusDecoder` (`DualViewModel`).

    Make one with `from_base` or `from_pretrained`. Only the diffusion view's parameters require gradients.

    Source: Orthrus, arXiv 2605.12825.
    """

    config_class = OrthrusConfig
    base_model_prefix = "model"
    _no_split_modules = ["OrthrusDecoderLayer"]

    def __init__(self, config: OrthrusConfig) -> None:
        super().__init__(config)
        self.model = OrthrusModel(config)
        # a tied head has no weight of its own: logits come from the embedding
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        # a base's own takes its place; pipelines want one in any case
        ends = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.generation_config = GenerationConfig(**ends)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("_diff" in name)
        if config.int8_weights:
            self.quantize_weights(config.int8_rows, config.int8_head)
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """That of the frozen weights, which decide what is said; of a view in training, the weights are fp32."""
        return self.model.embed_tokens.weight.dtype

    @property
    def block_size(self) -> int:
        """Rows of the block the diffusion view was made for."""
        return self.config.block_size

    @property
    def anchor_rows(self) -> int:
        """Rows of a draft block that the frozen view reads: 1 with `anchor_view="ar"`, else 0."""
        return int(self.config.anchor_view == "ar")

    @property
    def mask_token_id(self) -> int:
        """The token that stands for a position to be drafted."""
        return self.config.mask_token_id

    @property
    def static_rope_len(self) -> int | None:
        """Prompts longer than this are rotated by their length (longrope, dynamic NTK); None where none is."""
        return self.model.rotary_emb.original_max_len

    @property
    def vocab_size(self) -> int:
        """Ids are 0..vocab_size-1."""
        return self.config.vocab_size

    @property
    def eos_token_ids(self) -> list[int]:
        """Stop tokens: those of the generation config where it has any, else the config's."""
        return eos_token_ids(self.generation_config) or eos_token_ids(self.config)

    def resize_token_embeddings(self, *_arguments: Any, **_options: Any) -> None:
        """Refused before anything is changed: transformers' own would leave half of it changed."""
        raise NotImplementedError(
            "resize_token_embeddings must be called on the base model, before from_base: its vocabulary is frozen here"
        )

    def new_cache(self, batch_size: int, max_len: int, block_size: int) -> SharedKVCache:
        """Static K/V buffers on this model's device and in its dtype."""
        config, weight = self.config, self.model.embed_tokens.weight
        return SharedKVCache(
            config.num_hidden_layers, config.num_key_value_heads, config.attention_head_dim, batch_size=batch_size,
            max_len=max_len, block_size=block_size, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip

    def forward_view(self, input_ids: torch.Tensor, cache: SharedKVCache, view_pass: ViewPass) -> torch.Tensor:
        """input_ids [B, T] through one view -> final hidden states [B, T, H], normed."""
        return self.model(input_ids, cache, view_pass)

    def compute_logits(self, hidden: torch.Tensor, linear_impl: str = "auto") -> torch.Tensor:
        """hidden [B, T, H] -> logits [B, T, V], fp32."""
        weight, how = self._head
        return ops.linear(hidden, weight, out_dtype=torch.float32, impl=linear_impl, **how)

    def choose(self, hidden: torch.Tensor, impl: str = "auto") -> torch.Tensor:
        """hidden [B, T, H] -> greedy tokens [B, T], the logits' own without writing them to memory."""
        weight, how = self._head
        return ops.lm_head_choice(hidden, weight, impl=impl, **how)

    def chain_drafts(
        self, hidden: torch.Tensor, logits: torch.Tensor, own: torch.Tensor, noise: DraftNoise | None = None,
        recalled: Recalled | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Drafts [B, T] of T masks that know of each other; see `DraftChain.choose`."""
        chain, embedding = self.model.draft_chain_diff, self.model.embed_tokens.weight
        return chain.choose(hidden, logits, own, embedding, self._head_rows, noise, recalled)

    @property
    def has_chain(self) -> bool:
        """Whether `chain_drafts` is to be used."""
        return self.model.draft_chain_diff is not None

    @property
    def _head(self) -> tuple[torch.Tensor, dict[str, torch.Tensor | bool | None]]:
        """As `Linear.factor`."""
        return (self.model.embed_tokens.weight, {}) if self.lm_head is None else self.lm_head.factor(draft=False)

    def _head_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The LM head's rows [..., H] of tokens [...]."""
        weight, how = self._head
        rows, scale = F.embedding(ids, weight), how.get("weight_scale")
        return rows if scale is None else (rows * scale[ids][..., None]).to(self.dtype)

    @classmethod
    def from_base(
        cls,
        model_or_path: PreTrainedModel | str | PathLike[str],
        block_size: int = 32,
        mask_token_id: int | None = None,
        view_rank: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mask_embedding: bool = False,
        anchor_view: str = "diffusion",
        chain_width: int | None = None,
    ) -> OrthrusForCausalLM:
        """A dual-view model of a frozen base, whose diffusion view starts as a copy of the AR weights.

        Args:
            model_or_path: a transformers model of one of `FAMILIES` (its weights are copied), a folder with its
                config.json and safetensors, or a hub id. Of a model that sees images, too (Gemma 3, Mistral Small
                3.1), the language model alone is taken.
            block_size: rows of a draft block, anchor included, >= 2.
            mask_token_id: the token that stands for a position to be drafted. None takes the base config's
                mask_token_id; without one, the first embedding row that the tokenizer in the folder does not use; else
                the padding token unless it ends sequences; else the last row.
            view_rank: None for full projections, r for rank-r deltas.
            dtype, device: of the new model; by default those of the base (a folder's own dtype, the CPU).
            mask_embedding: give the diffusion view a vector of its own for mask_token_id, to be trained with it.
            anchor_view: "diffusion", or "ar" to let the frozen view read a block's anchor; see `OrthrusConfig`.
            chain_width: None, or the width of a chain that makes drafts depend on each other; see `DraftChain`.

        Raises:
            ValueError: an unsupported architecture or option, weights that do not fit the config, pickle files.
            FileNotFoundError: no such folder, or a file it must hold is missing.
            TypeError: a dtype that is none, or a model_or_path of another kind.
        """
        base = open_base(model_or_path)
        if mask_token_id is None:
            mask_token_id = choose_mask_token_id(base)
        config = OrthrusConfig.from_base_config(
            base.config, block_size=block_size, mask_token_id=mask_token_id, view_rank=view_rank,
            mask_embedding=mask_embedding, anchor_view=anchor_view, chain_width=chain_width,
        )  # fmt: skip
        model = cls._load(config, base.weights, dtype or base.dtype, device or base.device, has_view=False)
        model.generation_config = base.generation_config or model.generation_config
        model.reset_view()
        return model

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: str | PathLike[str],
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        config: OrthrusConfig | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> OrthrusForCausalLM:
        """Load what `save_pretrained` wrote, or a published Orthrus checkpoint.

        Args:
            model_or_path: a folder with config.json and safetensors, or a hub id.
            dtype: None or "auto" takes the checkpoint's.
            device: None is the CPU.
            config: in place of the folder's own config.json.
            token, local_files_only: of huggingface_hub, for a hub id.
            **options: what AutoModelForCausalLM and pipeline() pass along; `device_map` may name one device.

        Raises:
            ValueError: an unsupported architecture or option, weights that do not fit the config, pickle files.
            FileNotFoundError: no such folder, or a file it must hold is missing.
            TypeError: a dtype that is none, or a model_or_path or config of another kind.
        """
        dtype, device = loading_options(dtype, device, options)
        folder = checkpoint.resolve_folder(model_or_path, token=token, local_files_only=local_files_only)
        if config is None:
            config = OrthrusConfig.from_dict(checkpoint.read_json(folder / "config.json"))
        elif not isinstance(config, OrthrusConfig):
            raise TypeError(f"config must be an OrthrusConfig or None, but got a {type(config).__name__}")
        config = OrthrusConfig.from_dict(config.to_dict())  # checks it anew: fields may have been set since
        config.name_or_path = str(model_or_path)
        source = checkpoint.folder_source(folder)
        model = cls._load(config, source, dtype or config.dtype or source.dtype(), device or "cpu", has_view=True)
        model.generation_config = read_generation_config(folder) or model.generation_config
        return model

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_shard_size: int | str = "5GB",
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Write config.json, safetensors and, where given, the tokenizer; complete or not at all.

        Args:
            folder: made if it does not exist. Of an existing one, only these files are replaced.
            tokenizer: saved beside the weights.
            max_shard_size: bytes, or text such as "5GB"; larger models are sharded.
            state_dict: weights to save instead of this model's, under the same names (transformers' Trainer).
        """
        config = copy.deepcopy(self.config)
        config.dtype, config.architectures = self.dtype, [type(self).__name__]
        weights = self.state_dict() if state_dict is None else state_dict
        config.int8_weights = any(tensor.dtype == torch.int8 for tensor in weights.values())
        config.int8_rows = config.int8_weights and self.rounds_rows
        head = weights.get("lm_head.weight")
        config.int8_head = head is not None and head.dtype == torch.int8
        config.tie_word_embeddings = config.tie_word_embeddings and head is None
        with checkpoint.atomic_folder(folder) as staging:
            checkpoint.write_weights(staging, weights, max_shard_size)
            config.to_json_file(staging / "config.json")
            if self.generation_config is not None:
                self.generation_config.to_json_file(staging / "generation_config.json")
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)

    @classmethod
    def _load(
        cls,
        config: OrthrusConfig,
        source: checkpoint.WeightSource,
        dtype: torch.dtype,
        device: torch.device | str,
        has_view: bool,
    ) -> OrthrusForCausalLM:
        """Build on meta, compare with the source, then allocate and copy: nothing is initialised to be overwritten."""
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating torch.dtype or None, but got {dtype!r}")
        with torch.device("meta"):
            model = cls(config)
        state = model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        in_int8 = {name for name, tensor in state.items() if tensor.dtype == torch.int8}
        if not has_view:
            shapes = {name: shape for name, shape in shapes.items() if "_diff" not in name}
        checkpoint.check_weights(source, shapes, config.tie_word_embeddings, in_int8)
        config.dtype = dtype
        model.to(dtype).to_empty(device=device)
        checkpoint.copy_weights(source, model.state_dict())
        return model.eval()
