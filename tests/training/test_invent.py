"""Prompts that the model invents: plain, none twice, a function of the seed alone; and the command for them."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.modules.decode_run import DecodeRun
from orthrus_triton.modules.sampling_params import SamplingParams
from orthrus_triton.training import invent as inventing
from orthrus_triton.training.answers import answer_all
from orthrus_triton.training.invent import invent
from orthrus_triton.training.prompts import Prompt, read_prompts
from tests.models.tiny_bases import base_config, build_base, tiny_tokenizer
from tests.training.distill_command import distill_data

STOP = list(range(2, 12))  # one in ten answers ends at any token
SPECIAL = 87  # a token of the template
BEGINNINGS = ("w20 w21", "w22", "")
OPTIONS = {"max_new_tokens": 12, "batch_size": 5}


def make_tokenizer():
    tokenizer = tiny_tokenizer(list(range(101)))
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"w{SPECIAL}"]})
    tokenizer.chat_template = "{% for m in messages %}w88 {{ m.content }} w89{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def model() -> OrthrusForCausalLM:
    return OrthrusForCausalLM.from_base(
        build_base(base_config("llama", eos_token_id=STOP)), block_size=4, mask_token_id=1
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def texts(model, tokenizer) -> list[str]:
    return [prompt.text for prompt in invent(model, tokenizer, 9, beginnings=BEGINNINGS, **OPTIONS)]


def sampled_alone(model, tokenizer, beginning: str, number: int) -> list[int]:
    start = tokenizer("w88 " + beginning)["input_ids"]
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=0, sequence=number)
    decoder = ConsensusDecoder(model, mode="ar")
    output = decoder.generate([torch.tensor(start)], params=[params], max_new_tokens=OPTIONS["max_new_tokens"])
    return output.sequences[0][len(start) :].tolist()


def test_messages_are_what_the_model_samples_in_turn(model, tokenizer, texts):
    expected, rejected, n = [], 0, 0
    while len(expected) < len(texts):
        beginning = BEGINNINGS[n % 3]
        *tokens, last = sampled_alone(model, tokenizer, beginning, n)
        words = [*beginning.split(), *(f"w{token}" for token in tokens)]
        text, n = " ".join(words), n + 1
        if last in STOP and len(words) >= 4 and SPECIAL not in tokens and text not in expected:
            expected.append(text)
        else:
            rejected += 1
    assert texts == expected and rejected
    for beginning in BEGINNINGS[:2]:
        assert sum(text.startswith(beginning + " ") for text in texts) >= 2
    found = invent(model, tokenizer, 2, domain="code", **OPTIONS)
    assert all(type(prompt) is Prompt and prompt.chat and prompt.domain == "code" for prompt in found)


@pytest.mark.parametrize(("batch_size", "prefill_batch"), [(1, None), (7, 1), (18, None), (5, 2), (8, 8), (40, 3)])
def test_the_seed_alone_says_which(model, tokenizer, texts, monkeypatch, batch_size, prefill_batch):
    together, admit_together = [], DecodeRun.admit_together

    def counted(run, slots, *arguments):
        together.append(len(slots))
        admit_together(run, slots, *arguments)

    monkeypatch.setattr(DecodeRun, "admit_together", counted)
    monkeypatch.setattr(inventing, "answer_all", partial(answer_all, prefill_batch=prefill_batch))
    options = {**OPTIONS, "beginnings": BEGINNINGS, "batch_size": batch_size}
    assert [prompt.text for prompt in invent(model, tokenizer, 9, **options)] == texts
    assert bool(together) == ((prefill_batch or 1) > 1)
    assert [prompt.text for prompt in invent(model, tokenizer, 4, **options)] == texts[:4]
    other = [prompt.text for prompt in invent(model, tokenizer, 9, seed=1, **options)]
    assert len(set(other)) == 9 and not set(other) & set(texts)


def test_the_token_that_the_template_writes_behind_a_message_ends_it(model, tokenizer, texts):
    base = build_base(base_config("llama", eos_token_id=None))
    endless = OrthrusForCausalLM.from_base(base, block_size=4, mask_token_id=1)
    endless.load_state_dict(model.state_dict())
    behind = make_tokenizer()
    behind.add_special_tokens({"additional_special_tokens": ["w2", "w40"]})
    behind.chat_template = "{% for m in messages %}w88 {{ m.content }} w2{% endfor %}"
    found = invent(endless, behind, 3, beginnings=BEGINNINGS, max_new_tokens=60, batch_size=20)
    assert len(found) == 3 and not any("w2 " in prompt.text + " " for prompt in found)


def test_which_token_of_the_template_ends_a_message(model, monkeypatch):
    seen = []

    def answer(decoder, prompts, *_options, params_of, stop_ids):
        seen.append(stop_ids[len(STOP) :])
        yield from ((n, [30 + n, 31, 32, 33, 2]) for n in range(len(prompts)))

    monkeypatch.setattr(inventing, "answer_all", answer)
    for behind, ending in ((" w40 w41", [40]), ("\n\nw40", [40]), (" w50 w40", [])):
        tokenizer = tiny_tokenizer(list(range(101)))  # white space is a token of its own
        if " " in behind:
            tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.add_special_tokens({"additional_special_tokens": ["w40", "w41"]})
        tokenizer.chat_template = "{% for m in messages %}w88 {{ m.content }}" + behind + "{% endfor %}"
        invent(model, tokenizer, 1)
        assert seen.pop() == ending, behind


def test_a_tokenizers_own_beginning_of_a_text_is_left_to_the_template(model, texts):
    begins = make_tokenizer()
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="w86 $A", special_tokens=[("w86", 86)])
    assert begins("w30")["input_ids"] == [86, 30]
    assert [prompt.text for prompt in invent(model, begins, 4, beginnings=BEGINNINGS, **OPTIONS)] == texts[:4]
    begins.add_special_tokens({"additional_special_tokens": ["w86", "w41"]})
    assert inventing._ending(begins, "w41 w88") == [41]  # which no message ends with


def answers_from(monkeypatch, messages: list[list[int]], backwards: bool = False) -> list[int]:
    """Let `invent` have these answers, over and over, instead of the model's; returns how many it asks for."""
    asked = []

    def answer(decoder, prompts, *_options, params_of, stop_ids):
        first = params_of(0).sequence
        asked.append(len(prompts))
        numbers = range(len(prompts))
        for i in reversed(numbers) if backwards else numbers:
            yield i, messages[(first + i) % len(messages)]

    monkeypatch.setattr(inventing, "answer_all", answer)
    return asked


@pytest.mark.parametrize("backwards", [False, True])
def test_what_counts(model, tokenizer, monkeypatch, backwards):
    four = [30, 31, 32, 33]
    messages = [
        [*four, 40],  # cut off
        [*four, SPECIAL, 2],
        [30, 31, 32, 2],
        [2],
        [*four, 2],
        [*four, 3],  # again
        [34, *four, 11],
        [35, *four, 2],
    ]
    asked, seen = answers_from(monkeypatch, messages, backwards), []
    found = invent(model, tokenizer, 3, on_prompt=seen.append)
    assert [prompt.text for prompt in found] == ["w30 w31 w32 w33", "w34 w30 w31 w32 w33", "w35 w30 w31 w32 w33"]
    assert seen == found and asked == [6, 4]
    one = invent(model, tokenizer, 1, beginnings=["w50"], on_prompt=seen.append)
    assert one == [Prompt("w50 w30 w31 w32", "chat", True)] and len(seen) == 4


@pytest.mark.parametrize("text", ["a line\nand another one", "a bell \a in a text", "two lines\u2028in one text"])
def test_one_printable_line(model, tokenizer, monkeypatch, text):
    answers_from(monkeypatch, [[30, 2], [31, 2]])
    words = {30: text, 31: "how do plants grow"}
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, **_options: "".join(words.get(token, "<user>") for token in ids)
    )
    assert [prompt.text for prompt in invent(model, tokenizer, 1)] == ["how do plants grow"]


@pytest.mark.parametrize("messages", [[[30, 31, 32, 33, 40]], [[30, 31, 32, 33, 2]]])
def test_a_model_that_hardly_invents_is_given_up(model, tokenizer, monkeypatch, messages):
    answers_from(monkeypatch, messages)
    with pytest.raises(ValueError, match=r"model must invent messages that count, but only [01] of 1000 did"):
        invent(model, tokenizer, 5000)


def test_greedy_messages_are_as_many_as_beginnings(model, tokenizer, monkeypatch):
    monkeypatch.setattr(inventing, "FIRST_TRIES", 60)
    with pytest.raises(ValueError, match=r"only [0-3] of 60 did"):
        invent(model, tokenizer, 9, beginnings=BEGINNINGS, temperature=0.0, **OPTIONS)


def test_arguments_are_checked(model, tokenizer):
    for name in ("count", "max_new_tokens", "batch_size"):
        for wrong in (0, -1, 2.5):
            options = {"count": 1, **OPTIONS, name: wrong}
            with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, but got {wrong}"):
                invent(model, tokenizer, **options)
    for wrong in ((), "w20"):
        with pytest.raises(ValueError, match="beginnings must hold at least one text"):
            invent(model, tokenizer, 1, beginnings=wrong)
    for name, wrong in (("temperature", -1.0), ("top_p", 0.0), ("seed", 2**63)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            invent(model, tokenizer, 1, **{name: wrong})
    for template, complaint in (
        (None, "tokenizer must have a chat template"),
        ("{% for m in messages %}w88{% endfor %}", "chat template must write a user's message as it is"),
        ("{% for m in messages %}{{ m.content }} w89{% endfor %}", "beginnings must not be empty where"),
    ):
        other = make_tokenizer()
        other.chat_template = template
        with pytest.raises(ValueError, match=complaint):
            invent(model, other, 1)


# --- the command


run = partial(distill_data, max_new_tokens=12)


def test_command(model_folder, tmp_path):
    out, starts, held_out = (tmp_path / name for name in ("out.jsonl", "starts.jsonl", "held.txt"))
    starts.write_text('{"prompt": "w20 w21"}\n{"prompt": "w22"}\n')
    options = ("--invent", 5, "--prompts-only", "--beginnings", starts, "--batch-size", 4)
    result = run(model_folder, out, *options, "--domain", "docs")
    assert result.exit_code == 0 and "5 prompts" in result.stderr, (result.stderr, result.exception)
    found = read_prompts(out)
    assert len(set(found)) == 5 and {(one.domain, one.chat) for one in found} == {("docs", True)}
    assert all(one.text.startswith(("w20 w21 ", "w22 ")) for one in found)
    held_out.write_text(found[2].text.upper() + "?\n")
    result = run(model_folder, out, *options, "--held-out", held_out)
    assert result.exit_code == 0 and "1 prompts repeat held-out ones" in result.stderr
    assert [one.text for one in read_prompts(out)] == [one.text for one in found if one is not found[2]]
    result = run(model_folder, tmp_path / "rows", "--prompts", out)
    assert result.exit_code == 0 and (tmp_path / "rows" / "shard-00000.jsonl").is_file(), result.stderr


def test_the_bar_ends_at_its_total(model_folder, tmp_path, monkeypatch):
    answers_from(monkeypatch, [[30, 31, 32, 33, 2], [30, 31, 32, 33, 2], [34, 31, 32, 33, 2], [35, 31, 32, 33, 2]])
    steps = []
    monkeypatch.setattr("rich.progress.Progress.advance", lambda bar, task, advance=1: steps.append(advance))
    result = run(model_folder, tmp_path / "out.jsonl", "--invent", 2, "--prompts-only")
    assert result.exit_code == 0 and sum(steps) == 2


@pytest.mark.parametrize("messages", [0, 1, 2])
def test_command_stopped_by_hand(model_folder, tmp_path, monkeypatch, messages):
    def interrupted(*_args, **_options):
        for n in range(messages):
            yield n, [30 + n, 31, 32, 33, 2]
        raise KeyboardInterrupt

    monkeypatch.setattr(inventing, "answer_all", interrupted)
    result = run(model_folder, tmp_path / "out.jsonl", "--invent", 3, "--prompts-only", "--domain", "docs")
    assert result.exit_code == 130 and f"stopped; {messages} of 3 messages were found" in result.stderr
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    if not messages:
        assert not list(tmp_path.iterdir())
        return
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    expected = [Prompt(f"w{30 + n} w31 w32 w33", "docs", True) for n in range(messages)]
    assert read_prompts(tmp_path / "out.jsonl") == expected
    (tmp_path / "out.jsonl").write_text('{"prompt": "of a whole run"}\n')
    result = run(model_folder, tmp_path / "out.jsonl", "--invent", 3, "--prompts-only", "--domain", "docs")
    assert result.exit_code == 130 and "stays as it is" in " ".join(result.stderr.split())
    assert [one.text for one in read_prompts(tmp_path / "out.jsonl")] == ["of a whole run"]


@pytest.mark.parametrize(("budget", "least", "most"), [(0.5, 0, 0), (6.5, 1, 8), (1000, 9, 9)])
def test_a_time_limit_leaves_the_first_messages(model, tokenizer, texts, monkeypatch, budget, least, most):
    answers, clock = inventing.answer_all, [0.0]

    def slow(*arguments, **options):  # a second for every answer
        for answer in answers(*arguments, **options):
            clock[0] += 1.0
            yield answer

    monkeypatch.setattr(inventing, "answer_all", slow)
    monkeypatch.setattr("orthrus_triton.training.invent.time.perf_counter", lambda: clock[0])
    found = invent(model, tokenizer, 9, beginnings=BEGINNINGS, seconds=budget, **OPTIONS)
    assert [prompt.text for prompt in found] == texts[: len(found)] and least <= len(found) <= most


def test_command_with_a_budget(model_folder, tmp_path, monkeypatch):
    answers_from(monkeypatch, [[30, 31, 32, 33, 2], [34, 31, 32, 33, 2], [2]])
    clock = itertools.count(step=10.0)
    monkeypatch.setattr("orthrus_triton.training.invent.time.perf_counter", lambda: next(clock))
    out = tmp_path / "out.jsonl"
    result = run(model_folder, out, "--invent", 9, "--prompts-only", "--budget", "15s")
    assert result.exit_code == 0 and "the budget is spent; 2 of 9 messages were found" in result.stderr
    assert len(read_prompts(out)) == 2
    out.unlink()
    answers_from(monkeypatch, [[2]])
    result = run(model_folder, out, "--invent", 9, "--prompts-only", "--budget", "15s")
    assert result.exit_code == 2 and "--budget must leave time to find a message" in result.stderr
    assert not list(tmp_path.iterdir())


def test_command_names_bad_input(model_folder, tmp_path, monkeypatch):
    starts = tmp_path / "starts.txt"
    starts.write_text("w30\n")
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    out, invented = tmp_path / "out.jsonl", ("--invent", 3, "--prompts-only")
    cases = [
        (("--invent", 3), "--invent must come with --prompts-only"),
        ((*invented, "--prompts", starts), "one of them"),
        ((*invented, "--builtin"), "one of them"),
        (("--builtin", "--prompts-only", "--beginnings", starts), "--beginnings and --domain must come with --invent"),
        (("--prompts", starts, "--domain", "code"), "--beginnings and --domain must come with --invent"),
        ((*invented, "--corpus", tmp_path), "must come with --builtin"),
        (("--builtin", "--prompts-only", "--budget", "5m"), "--budget is for answers and for --invent, but"),
        (("--invent", 0, "--prompts-only"), "--invent must be >= 1, but got 0"),
        (("--invent", -3, "--prompts-only"), "--invent must be >= 1, but got -3"),
        ((*invented, "--batch-size", 0), "--batch-size must be >= 1, but got 0"),
        (("--prompts", starts, "--shard-rows", -1), "--shard-rows must be >= 1, but got -1"),
        ((*invented, "--beginnings", tmp_path / "missing.txt"), "missing.txt"),
        ((*invented, "--held-out", tmp_path / "missing.txt"), "missing.txt"),
    ]
    with monkeypatch.context() as patch:  # all of this is known before the model is loaded
        patch.setattr("orthrus_triton.cli.distill_data.load_model", None)
        results = [run(model_folder, out, *options) for options, _ in cases]
    cases.append(((*invented, "--seed", 2**63), "seed"))
    results.append(run(model_folder, out, *cases[-1][0]))
    cases.append((invented, "prompts must be written to a .jsonl file, but"))
    results.append(run(model_folder, folder, *invented))
    cases.append((("--prompts", starts), "OUT must be a folder, but"))
    results.append(run(model_folder, starts, "--prompts", starts))
    for result, (_, complaint) in zip(results, cases):
        assert result.exit_code == 2 and complaint in result.stderr, (result.stderr, result.exception)
        assert result.stderr.splitlines()[-1].startswith("orthrus-triton: error: ") and not out.exists()
        assert "Traceback" not in result.stderr
