"""One visit that makes a view: what its stages share, their timing, and the random weights it is rehearsed on."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.demo import load_demo_model

# hidden, layers, heads, key heads, intermediate, vocabulary
RANDOM = {"smollm2-135m": (576, 30, 9, 3, 1536, 49_152), "tiny": (128, 2, 2, 1, 96, 300)}


@dataclass
class Visit:
    """What the stages share. model: a folder with random weights, or None for the demo model. figures are printed,
    details are not; both go to out/figures.json. checkpoint: the last one of the training just done."""

    out: Path
    work: Path
    device: torch.device
    model: Path | None
    figures: dict[str, Any]
    details: dict[str, Any]
    checkpoint: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def load(self, folder: Path | None = None, view: Path | None = None) -> tuple[OrthrusForCausalLM, Any]:
        """Model and tokenizer for decoding."""
        if self.model is None:
            return load_demo_model(self.dtype, device=self.device, view=view or "copy")
        from transformers import AutoTokenizer

        network = OrthrusForCausalLM.from_pretrained(folder or self.model, dtype=self.dtype, device=self.device)
        return network, AutoTokenizer.from_pretrained(self.model)


@contextmanager
def stage(visit: Visit, name: str) -> Iterator[None]:
    """Time a stage. One that fails shows its traceback, and the next ones have their turn."""
    print(f"== {name}", flush=True)
    started = time.monotonic()
    try:
        yield
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        visit.figures.setdefault("failed", []).append(name)
    seconds = round(time.monotonic() - started, 1)
    visit.figures[f"{name}_seconds"] = seconds
    print(f"== {name}: {seconds} s", flush=True)
    staged = visit.out / "figures.json.tmp"
    staged.write_text(json.dumps(visit.figures | {"details": visit.details}, indent=1))
    staged.replace(visit.out / "figures.json")


def random_model(folder: Path, shape: str, device: torch.device) -> Path:
    """A Llama with random weights, in bf16, and a tokenizer that knows no word; no token ends its answers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, layers, heads, kv_heads, intermediate, vocab = RANDOM[shape]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, rms_norm_eps=1e-5, initializer_range=0.04,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        base = LlamaForCausalLM(config).to(torch.bfloat16)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(vocab)}, unk_token="w20"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "{% for m in messages %}w17 {{ m.content }} w18{% endfor %}"
    model = OrthrusForCausalLM.from_base(base, block_size=16, mask_token_id=16)
    model.save_pretrained(folder, tokenizer=tokenizer)
    return folder
