"""Self-distillation data: the frozen model answers prompts greedily, many side by side, into shards of jsonl.
A run that was cut short goes on where it stopped; nothing but the answers then being written is lost."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from os import PathLike
from typing import Any

from orthrus_triton.models.modeling import OrthrusForCausalLM
from orthrus_triton.models.view import fingerprint
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.training.answers import answer_all
from orthrus_triton.training.prompts import Prompt, encode
from orthrus_triton.training.shards import Question, ShardFolder

FORMAT = 1


def distill(
    model: OrthrusForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    folder: str | PathLike[str],
    *,
    max_new_tokens: int = 192,
    max_prompt_tokens: int = 256,
    batch_size: int = 64,
    shard_rows: int = 256,
    impl: str = "auto",
    prefill_batch: int | None = None,
    seconds: float | None = None,
    on_row: Callable[[int], None] = lambda tokens: None,
    on_plan: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Answer every prompt with the AR view, and write what a view is trained on.

    Each line of a shard is {"id", "domain", "prompt_ids", "answer_ids"}; rows stand in the order of the prompts. A
    slot takes the next prompt as soon as its answer ends, so short answers cost no waiting. The cheapest pass is used
    (`exact=False`), and on a GPU prompts are read together: a rounding difference may choose another word where two are
    equally likely, and rows of a resumed run may differ there from those of an unbroken one.

    Args:
        model: only its AR view is used.
        tokenizer: of transformers; its chat template is applied where there is one, unless a prompt says otherwise.
        prompts: in the order in which they are answered.
        folder: where shards and manifest go; what an earlier run with the same arguments left there is kept.
        max_new_tokens: most tokens of an answer, the stop token included.
        max_prompt_tokens: longer raw prompts are cut, longer chat prompts are left out and counted.
        batch_size: answers generated side by side; may differ from run to run.
        shard_rows: rows of a shard. A shard appears under its name when it is complete.
        impl: "auto", "triton" or "torch".
        prefill_batch: free slots are waited for until there are so many, and their prompts read in one pass; by default
            1 on a CPU, and on a GPU a quarter of the slots.
        seconds: stop after so long, with the shards that are whole by then. Whole answers of the others stay in their
            .part files, which training does not read, and a run that goes on does.
        on_row: called with the tokens of each new answer.
        on_plan: called once with the rows there already and the rows in all.

    Returns:
        The manifest, as written.

    Raises:
        ValueError: an argument out of range, a folder of another run or one that another process writes into, a shard
            that was changed, or a model that gave NaN or infinity.
    """
    for name, value in (
        ("max_new_tokens", max_new_tokens), ("max_prompt_tokens", max_prompt_tokens), ("batch_size", batch_size),
        ("shard_rows", shard_rows),
    ):  # fmt: skip
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, but got {value!r}")
    questions, left_out = _encode(tokenizer, prompts, max_prompt_tokens)
    if not questions:
        raise ValueError(f"prompts must hold a prompt of at most {max_prompt_tokens} tokens, but none of them is")
    identity = {
        "format": FORMAT,
        "model": fingerprint(model.state_dict(), model.dtype),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompts": _hash_prompts(questions),
        "rows": len(questions),
        "left_out": left_out,
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "shard_rows": shard_rows,
        "stop_tokens": model.eos_token_ids,
    }
    with closing(ShardFolder(folder, identity, questions)) as output:
        pending = output.resume()
        on_plan(len(questions) - len(pending), len(questions))
        decoder = ConsensusDecoder(model, mode="ar", exact=False, impl=impl)
        started = time.perf_counter()
        prompt_ids = [questions[n].ids for n in pending]
        for i, answer in answer_all(decoder, prompt_ids, max_new_tokens, batch_size, prefill_batch=prefill_batch):
            n = pending[i]
            output.add(n, answer)
            on_row(len(answer))
            if seconds is not None and time.perf_counter() - started > seconds:
                break
    return output.manifest


def _encode(tokenizer: Any, prompts: Sequence[Prompt], longest: int) -> tuple[list[Question], int]:
    questions, left_out = [], 0
    has_template = bool(getattr(tokenizer, "chat_template", None))
    for prompt in prompts:
        ids = encode(tokenizer, prompt)
        is_chat = has_template if prompt.chat is None else prompt.chat
        if len(ids) > longest and is_chat:  # cut, it would lose the end of the question
            left_out += 1
            continue
        questions.append(Question(prompt.domain, ids[:longest]))
    return questions, left_out


def _hash_prompts(questions: Sequence[Question]) -> str:
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.domain, question.ids]).encode())
    return digest.hexdigest()
