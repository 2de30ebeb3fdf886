"""Train a diffusion view in Python: the frozen model answers prompts, and its view learns to draft those answers.
Run: python examples/train_view.py BASE_MODEL PROMPTS.txt OUT [STEPS], with one prompt on each line of PROMPTS.txt."""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from orthrus_triton import ConsensusDecoder, OrthrusForCausalLM
from orthrus_triton.training.config import ViewTrainingArguments
from orthrus_triton.training.data import TextRow
from orthrus_triton.training.trainer import ViewTrainer

base, prompts_file, out = sys.argv[1:4]
steps = int(sys.argv[4]) if len(sys.argv) > 4 else 1000
tokenizer = AutoTokenizer.from_pretrained(base)
model = OrthrusForCausalLM.from_base(base, block_size=8, mask_embedding=True)
lines = [line for line in Path(prompts_file).read_text().splitlines() if line.strip()]
prompts = [torch.tensor(tokenizer(line)["input_ids"]) for line in lines]

# the frozen model's own answers are the training rows; (start, end) is where in a row the answer stands
texts = ConsensusDecoder(model, mode="ar").generate(prompts, max_new_tokens=128).sequences
rows = [TextRow("all", ids.tolist(), [(len(p), len(ids))]) for p, ids in zip(prompts, texts) if len(ids) > len(p) + 1]
args = ViewTrainingArguments(output_dir=out, max_steps=steps, cache_dir=f"{out}/frozen")
trainer = ViewTrainer(model, args, rows)
trainer.train(resume_from_checkpoint=True)  # goes on from the last checkpoint in OUT, if there is one
trainer.save_trained(f"{out}/model", tokenizer)

model.to(model.dtype)  # the view was trained in fp32
stats = ConsensusDecoder(model).generate(prompts, max_new_tokens=128).stats
print(f"{stats.tokens_per_cycle:.2f} tokens per cycle on the prompts it was trained on")
