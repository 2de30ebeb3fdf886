"""A tiny saved model and its tokenizer for tests of the command line, and how a command is run and found wanting."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from orthrus_triton.cli import app
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder, SamplingParams

BLOCK_SIZE = 4
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with hardly a merge: letters beyond ASCII take several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the tokens of the text"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", clean_up_tokenization_spaces=False)
    fast.add_special_tokens({"extra_special_tokens": special[1:]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_base_model(tokenizer: PreTrainedTokenizerFast, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A random Llama saved by transformers, with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=512,
        initializer_range=0.6, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(*arguments: object, stdin: str | None = None):
    """Run the command in this process, on the CPU unless it says otherwise: expected texts are computed there."""
    if arguments[0] in ("generate", "demo") and "--device" not in arguments:
        arguments = (*arguments, "--device", "cpu")
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def assert_bad_input(result, *fragments: str) -> None:
    """Exit code 2, and one line on stderr that names the trouble."""
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("orthrus-triton: error: "), result.stderr
    for fragment in fragments:
        assert fragment in lines[0]


def expected_text(
    folder: Path, prompt: str, tokens: int, params: SamplingParams = SamplingParams(), int8_weights: bool = False,
    **also: bool,
) -> str:  # fmt: skip
    """Plain AR decoding through the library, as text."""
    model = OrthrusForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if int8_weights:
        model.quantize_weights(**also)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    decoder = ConsensusDecoder(model, mode="ar")
    sequence = decoder.generate(ids, max_new_tokens=tokens, params=[params]).sequences[0]
    return tokenizer.decode(sequence[ids.shape[1] :], skip_special_tokens=True)
