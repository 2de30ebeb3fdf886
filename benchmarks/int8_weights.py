"""What rounding the weights changes: a text's next-token distributions by the model in fp32, by the model in its dtype,
and by that with its weights, rows and LM head in int8. `python -m benchmarks.int8_weights --prompts FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import Report
from benchmarks.cycle_providers import in_int8
from orthrus_triton.autotune.config import DTYPE_NAMES
from orthrus_triton.cli.common import DtypeOption, one_line_errors, resolve_device, resolve_dtype
from orthrus_triton.cli.load import DEMO_NAME, ModelOption, load_model
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.training.prompts import encode, read_prompts


@torch.no_grad()
def log_probabilities(model: OrthrusForCausalLM, text: torch.Tensor, first: int) -> torch.Tensor:
    """[T - first, V] of the tokens of `text` [T] from number `first` on."""
    return model(text[None]).logits[0, first - 1 : -1].log_softmax(dim=-1)


class Distance:
    """How far one model's distributions are from the exact ones, over all tokens of all texts."""

    def __init__(self) -> None:
        self.tokens = self.same = 0
        self.divergence = self.said = 0.0

    def add(self, exact: torch.Tensor, other: torch.Tensor, text: torch.Tensor) -> None:
        """Log probabilities [T, V] of both for the tokens of `text` [T]."""
        self.tokens += len(text)
        self.same += int((exact.argmax(-1) == other.argmax(-1)).sum())
        self.divergence += float((exact.exp() * (exact - other)).sum())
        self.said -= float(other.gather(1, text[:, None]).sum())

    def row(self) -> dict[str, Any]:
        """For a report."""
        return {
            "tokens": self.tokens, "same_likeliest": f"{self.same / self.tokens:.2%}",
            "kl_nats": f"{self.divergence / self.tokens:.5f}",
            "perplexity": f"{torch.tensor(self.said / self.tokens).exp().item():.4f}",
        }  # fmt: skip


def main(
    prompts: Annotated[
        list[Path], typer.Option(metavar="FILE", help='One prompt a line, or .jsonl with {"prompt", "chat"}.')
    ],
    model: ModelOption = None,
    dtype: DtypeOption = "bf16",
    limit: Annotated[int, typer.Option(min=1, help="Take the first N prompts of each file.")] = 10,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer, which is the text that is read.")] = 128,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures.")] = None,
) -> None:
    """Answer every prompt with the model in its dtype, and read the answers with all of them.

    kl_nats is the mean divergence from the model in fp32, perplexity that of the answers.
    """
    with one_line_errors():
        questions = [question for path in prompts for question in read_prompts(path)[:limit]]
        device = resolve_device("auto")
        of = resolve_dtype(dtype, device)
        report = Report(f"int8_weights_{DTYPE_NAMES[of]}", device, out)
        rounded, tokenizer, _ = load_model(model, of, device)
        exact, _, _ = load_model(model, torch.float32, device)
        others = {
            "as it is": rounded, "weights in int8": in_int8(rounded), "rows, too": in_int8(rounded, True),
            "rows and LM head, too": in_int8(rounded, True, True),
        }  # fmt: skip
    distances = {name: Distance() for name in others}
    decoder = ConsensusDecoder(rounded)
    with typer.progressbar(questions, label="prompts") as shown:
        for question in shown:
            prompt = encode(tokenizer, question)
            text = decoder.generate(torch.tensor(prompt), max_new_tokens=tokens).sequences[0]
            reference = log_probabilities(exact, text, len(prompt))
            for name, network in others.items():
                found = log_probabilities(network, text, len(prompt))
                distances[name].add(reference, found, text[len(prompt) :])
    for name, distance in distances.items():
        report.add(model=model or DEMO_NAME, dtype=DTYPE_NAMES[of], weights=name, **distance.row())
    report.publish(report.markdown())


if __name__ == "__main__":
    typer.run(main)
