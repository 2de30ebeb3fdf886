"""Evaluation: figures recomputed from the decoder's own runs, exactness that notices a difference, the command."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from orthrus_triton.cli import app
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.training import evaluate as measuring
from orthrus_triton.training.chart import save_chart
from orthrus_triton.training.evaluate import evaluate, repetition_share
from orthrus_triton.training.prompts import Prompt, encode, read_prompts
from tests.models.tiny_bases import base_config, build_base, randomise_view, tiny_tokenizer

NEW = 10


@pytest.fixture(scope="module")
def model() -> OrthrusForCausalLM:
    base = build_base(base_config("llama", eos_token_id=None))
    return randomise_view(OrthrusForCausalLM.from_base(base, block_size=4, mask_token_id=1), scale=0.05)


PROMPTS = [("code", [5, 6, 7]), ("prose", [8, 9, 10, 11]), ("code", [50, 3])]


def test_figures_are_those_of_the_runs(model):
    report = evaluate(model, PROMPTS, max_new_tokens=NEW)
    decoder = ConsensusDecoder(model)
    runs = [decoder.generate([torch.tensor(ids)], max_new_tokens=NEW).stats for _, ids in PROMPTS]
    cycles = sum(run.cycles for run in runs)
    assert report["tokens"] == 3 * NEW and report["cycles"] == cycles < 3 * (NEW - 1)  # some drafts are accepted
    assert report["tokens_per_cycle"] == pytest.approx(3 * (NEW - 1) / cycles)
    assert report["tokens_per_cycle_per_question"] == pytest.approx(sum((NEW - 1) / run.cycles for run in runs) / 3)
    assert report["tpf"] == pytest.approx(3 * NEW / (3 + 2 * cycles))
    assert report["tpf_per_question"] == pytest.approx(sum(NEW / (1 + 2 * run.cycles) for run in runs) / 3)
    accepted = [sum(column) for column in zip(*(run.accepted_histogram for run in runs))]
    assert report["acceptance_by_position"] == pytest.approx([sum(accepted[n:]) / cycles for n in (1, 2, 3)])
    given = report["acceptance_given_previous"]
    assert report["acceptance_by_position"][1] == pytest.approx(given[0] * given[1])
    assert list(report["domains"]) == ["code", "prose"]
    assert report["domains"]["code"]["prompts"] == 2
    assert report["domains"]["prose"]["tokens_per_cycle"] == pytest.approx((NEW - 1) / runs[1].cycles)
    assert report["exactness"] == {"checked": 3, "equal": 3, "different": []}
    for name in ("ar", "ar_one_row"):
        rates = report["tokens_per_second"]
        assert report["speedup"][name] == pytest.approx(rates["consensus"] / rates[name])
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("block_size", [None, 3])
def test_decoders_and_seconds_are_those_that_the_report_names(model, monkeypatch, block_size):
    generate, runs = ConsensusDecoder.generate, []

    def noted(self, prompts, **options):
        output = generate(self, prompts, **options)
        runs.append((self.mode, self.exact, self.block_size, output.stats))
        return output

    monkeypatch.setattr(ConsensusDecoder, "generate", noted)
    report = evaluate(model, PROMPTS[:2], max_new_tokens=NEW, block_size=block_size)
    of_names = {"consensus": ("consensus", True), "ar": ("ar", True), "ar_one_row": ("ar", False)}
    assert list(report["seconds"]) == list(of_names) and report["block_size"] == (block_size or 4)
    assert {size for mode, _, size, _ in runs if mode == "consensus"} == {report["block_size"]}
    for name, how in of_names.items():
        warm_up, *stats = (run[3] for run in runs if run[:2] == how)
        assert len(stats) == 2 and warm_up.tokens < NEW
        decode, prefill = (sum(getattr(one, f"{part}_seconds") for one in stats) for part in ("decode", "prefill"))
        assert min(decode, prefill) > 0 and report["decode_seconds"][name] == pytest.approx(decode)
        assert report["seconds"][name] == pytest.approx(decode + prefill)
        rate = 2 * NEW / (decode + prefill)
        assert report["tokens_per_second"][name] == pytest.approx(rate)
    for question, stats in zip(report["questions"], [run[3] for run in runs if run[0] == "consensus"][1:]):
        assert (question["tokens_per_cycle"], question["tpf"]) == (stats.tokens_per_cycle, stats.tpf)


def test_a_difference_is_found_and_no_speedup_claimed(model, monkeypatch):
    generate = ConsensusDecoder.generate

    def wrong_in_ar_mode(self, prompts, **options):
        output = generate(self, prompts, **options)
        if self.mode == "ar" and prompts[0].tolist() == PROMPTS[1][1]:
            output.sequences[0][-2] += 1
        return output

    monkeypatch.setattr(ConsensusDecoder, "generate", wrong_in_ar_mode)
    report = evaluate(model, PROMPTS, max_new_tokens=NEW)
    assert report["exactness"] == {"checked": 3, "equal": 2, "different": [{"prompt": 1, "token": NEW - 2}]}
    assert set(report["speedup"].values()) == {None}
    assert None not in report["domains"]["code"]["speedup"].values()


def test_what_is_not_asked_for_is_not_run(model):
    report = evaluate(model, PROMPTS[:1], max_new_tokens=4, check_exact=False, baseline=False)
    assert report["exactness"] is None and report["speedup"] == {}
    assert list(report["seconds"]) == ["consensus"]
    with pytest.raises(ValueError, match="max_new_tokens must be >= 2"):
        evaluate(model, PROMPTS, max_new_tokens=1)
    with pytest.raises(ValueError, match="at least one prompt"):
        evaluate(model, [])


def test_an_answer_of_the_prefill_alone_has_no_cycle(model):
    first = ConsensusDecoder(model).generate([torch.tensor(PROMPTS[0][1])], max_new_tokens=1).sequences[0][-1]
    stops = OrthrusForCausalLM.from_base(
        build_base(base_config("llama", eos_token_id=int(first))), block_size=4, mask_token_id=1
    )
    report = evaluate(stops, PROMPTS[:1], max_new_tokens=NEW)
    assert (report["tokens"], report["cycles"], report["tokens_per_cycle"]) == (1, 0, 0.0)
    assert report["acceptance_by_position"] == [None] * 3
    report = evaluate(stops, PROMPTS[:2], max_new_tokens=NEW)  # it does not count as one of 0 tokens per cycle
    (none, other), rate = report["questions"], report["tokens_per_cycle_per_question"]
    assert none["cycles"] == 0 < other["cycles"] and rate == other["tokens_per_cycle"] >= 1


def test_repetition_share():
    assert repetition_share([1, 2, 3]) == 0.0
    assert repetition_share(range(20)) == 0.0
    assert repetition_share([7] * 8) == pytest.approx(4 / 5)
    assert repetition_share([1, 2, 3, 4, 5, 1, 2, 3, 4, 6]) == pytest.approx(1 / 7)


def test_prompt_files(tmp_path):
    (tmp_path / "code.txt").write_text("one\n\n  two words \n")
    assert read_prompts(tmp_path / "code.txt") == [Prompt("one", "code"), Prompt("two words", "code")]
    for name, content in (("code.txt", "one"), ("mark.jsonl", '{"prompt": "one", "domain": "code"}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")  # as some editors begin a file
        assert read_prompts(tmp_path / name) == [Prompt("one", "code")]
    (tmp_path / "mine.txt").write_text("one")
    assert read_prompts(tmp_path / "mine.txt") == [Prompt("one", "all")]
    lines = ['{"prompt": "a", "domain": "docs", "chat": false}', "", '{"text": "b"}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert read_prompts(tmp_path / "x.jsonl") == [Prompt("a", "docs", False), Prompt("b", "all")]
    for bad in (
        "{",
        "[]",
        '{"prompt": " "}',
        '{"prompt": 3}',
        '{"prompt": "half \\ud83d"}',
        '{"text": "a", "chat": 1}',
        '{"text": "a", "domain": 4}',
    ):
        (tmp_path / "x.jsonl").write_text(f'{{"prompt": "a"}}\n{bad}\n')
        with pytest.raises(ValueError, match="x.jsonl, line 2"):
            read_prompts(tmp_path / "x.jsonl")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="at least one prompt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError, match="prompts must come from a file, but there is no .*nowhere.txt"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(IsADirectoryError, match="prompts must come from a file, but .* is a folder"):
        read_prompts(tmp_path)


def test_encode_follows_the_template():
    tokenizer = tiny_tokenizer([3, 4, 5])
    tokenizer.chat_template = "{% for m in messages %}w5{% endfor %}"
    assert encode(tokenizer, Prompt("w3")) == encode(tokenizer, Prompt("w3", chat=True)) == [5]
    assert encode(tokenizer, Prompt("w4", chat=False)) == [4]
    # what a tokenizer puts before a text is the template's matter in a chat
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w3 $A", special_tokens=[("w3", 3)])
    assert encode(tokenizer, Prompt("w4")) == [5] and encode(tokenizer, Prompt("w4", chat=False)) == [3, 4]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.chat_template = None
    assert encode(tokenizer, Prompt("w4")) == [4]
    with pytest.raises(ValueError, match="chat template"):
        encode(tokenizer, Prompt("w4", chat=True))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluated")
    tokenizer = tiny_tokenizer(list(range(2, 90)))
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    model.save_pretrained(path / "model", tokenizer=tokenizer)
    (path / "code.txt").write_text("w5\nw8\nw9\n")
    (path / "q.jsonl").write_text('{"prompt": "w30", "domain": "prose"}\n')
    return path


def run(folder, *options: object):
    fixed = ("evaluate", "--model", folder / "model", "--max-new-tokens", 6, "--device", "cpu", "--dtype", "fp32")
    return CliRunner().invoke(app, [str(option) for option in (*fixed, *options)])


@pytest.mark.parametrize("how", [(), ("--block-size", "auto")], ids=str)
def test_command_ends_with_json_and_draws(folder, tmp_path, how):
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib")
    prompts = ("--prompts", folder / "code.txt", "--prompts", folder / "q.jsonl")
    result = run(folder, *prompts, "--json", "--output", tmp_path, *how)
    assert result.exit_code == 0, (result.stderr, result.exception)
    report = json.loads(result.stdout)
    assert len(result.stdout.splitlines()) == 1
    assert report["prompts"] == 4 and report["domains"].keys() == {"code", "prose"}
    assert report["tokens_per_cycle"] >= 1 and report["tpf"] > 0 and report["exactness"]["equal"] == 4
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_chart_has_room_for_every_bar(tmp_path, monkeypatch):
    """Where the frozen view reads the anchor, a cycle of a block of two gives up to three tokens."""
    figures = pytest.importorskip("matplotlib.figure", reason="the chart needs matplotlib")
    tops = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: tops.append(figure.axes[0].get_ylim()[1]))
    domain = {"tokens_per_cycle": 2.9, "acceptance_by_position": [0.9]}
    save_chart({"domains": {"code": domain}, **domain}, tmp_path / "chart.png", "a title")
    assert tops == [pytest.approx(3)]


def test_command_prints_a_table(folder):
    result = run(folder, "--prompts", folder / "code.txt", "--limit", 2, "--no-baseline")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "same token ids on all 2 prompts" in result.stdout and "tokens/s of exact AR" in result.stdout
    assert "together" not in result.stdout
    prompts = ("--prompts", folder / "code.txt", "--prompts", folder / "q.jsonl")
    lines = run(folder, *prompts, "--no-baseline", "--no-check-exact").stdout.splitlines()
    (row,) = (line for line in lines if "together" in line)
    assert row.replace("│", " ").split()[1] == "4"


def test_options_arrive_and_a_difference_ends_with_1(folder, monkeypatch):
    heard, measure = [], measuring.evaluate

    def differing(network, prompts, **options):
        heard.append(options | {"domains": [domain for domain, _ in prompts]})
        report = measure(network, prompts, **options)
        if report["exactness"]:
            report["exactness"]["different"] = [{"prompt": 1, "token": 3}]
        return report

    monkeypatch.setattr(measuring, "evaluate", differing)
    (folder / "chat.jsonl").write_text('{"prompt": "w30", "domain": "prose", "chat": true}\n' * 2)
    files = ("--prompts", folder / "code.txt", "--prompts", folder / "chat.jsonl")
    assert run(folder, *files).exit_code == 2  # the tokenizer has no template
    result = run(folder, *files, "--raw", "--limit", 1, "--block-size", 3, "--no-baseline")
    assert result.exit_code == 1 and "DIFFERS on 1 of 2 prompts, first on prompt 1 from generated token 3 on" in (
        " ".join(result.stdout.split())
    )
    assert run(folder, *files, "--raw", "--no-check-exact").exit_code == 0
    monkeypatch.setattr(
        "orthrus_triton.training.prompts_builtin.held_out_prompts", lambda n, corpus: [Prompt("w9", "docs")] * n
    )
    assert run(folder, *files[:2], "--builtin", 2, "--no-check-exact").exit_code == 0
    assert heard.pop()["domains"] == ["code"] * 3 + ["docs"] * 2
    names = ("domains", "max_new_tokens", "block_size", "check_exact", "baseline")
    assert [[call[name] for name in names] for call in heard] == [
        [["code", "prose"], 6, 3, True, False], [["code"] * 3 + ["prose"] * 2, 6, None, False, True]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "--prompts FILE or --builtin N"),
        (("--prompts", "missing.txt"), "missing.txt"),
        (("--prompts", "{folder}/code.txt", "--corpus", "{folder}"), "--corpus"),
        (("--prompts", "{folder}/code.txt", "--limit", 0), "--limit"),
        (("--builtin", 0), "--builtin must be >= 1"),
        (("--prompts", "{folder}/code.txt", "--output", "{folder}/code.txt"), "--output"),
        (("--prompts", "{folder}/code.txt", "--block-size", 9), "block_size"),
        (("--prompts", "{folder}/code.txt", "--max-new-tokens", 1), "max_new_tokens"),
        (("--prompts", "{folder}/code.txt", "--view", "mine.safetensors"), "--view"),
        (("--prompts", "{folder}/code.txt", "--model", "{folder}/none/here"), "none/here"),
    ],
)
def test_command_names_bad_input(folder, options, complaint):
    result = run(folder, *(str(option).format(folder=folder) for option in options))
    assert result.exit_code == 2, (result.stdout, result.exception)
    assert complaint in result.stderr.splitlines()[-1]
