"""The serving benchmark end to end on a tiny model: a row per level of load, and none where an answer is wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import serving
from orthrus_triton.modules import DecodeRun

TINY = ("--shape", "tiny", "--dtype", "fp32", "--device", "cpu", "--prompt-tokens", "20", "--tokens", "6")


def run(*arguments: str):
    app = typer.Typer()
    app.command()(serving.main)
    return CliRunner().invoke(app, arguments)


def test_ctrl_c_while_the_model_loads_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orthrus_triton.serving.apart.run_apart", interrupted)
    monkeypatch.setattr("orthrus_triton.cli.load.status_console.show_cursor", lambda: shown.append(True))
    assert run("nowhere", "--device", "cpu").exit_code == 130 and shown == [True]


def test_a_row_for_every_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    admit, kept = DecodeRun.admit, []

    def spy(self, b, prompt, max_new_tokens, params, cached=0, **others) -> None:
        kept.append(cached)
        admit(self, b, prompt, max_new_tokens, params, cached, **others)

    monkeypatch.setattr(DecodeRun, "admit", spy)
    result = run(*TINY, "--clients", "1,3", "--requests", "5", "--out", str(tmp_path))
    assert result.exit_code == 0, (result.output, result.exception)
    (path,) = tmp_path.rglob("serving_tiny.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["clients"], row["slots"], row["requests"], row["output_tokens"]) for row in rows] == [
        ("1", "3", "5", "30"), ("3", "3", "5", "30"),
    ]  # fmt: skip
    for row in rows:
        seconds = float(row["seconds"])
        assert float(row["requests_s"]) == pytest.approx(5 / seconds, rel=0.05)
        assert float(row["tokens_s"]) == pytest.approx(30 / seconds, rel=0.05)
        assert 0 < float(row["ttft_p50_ms"]) <= float(row["ttft_p95_ms"]) < 1e3 * seconds
        assert row["model"] == "tiny, random weights" and row["device"] and row["git_sha"]
    # one client at a time: the five waits for a first text lie side by side, three of them as long as the median
    assert 3 * float(rows[0]["ttft_p50_ms"]) < 1e3 * float(rows[0]["seconds"])
    assert path.with_suffix(".md").read_text() in result.output + "\n"
    # gate and two levels, each after a first load of three, and three AR answers; nothing was in a cache already
    assert len(kept) == (3 + 3) + 3 + 2 * (3 + 5) and max(kept) < 3


def test_levels_that_were_measured_before_an_interruption_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops_at_the_second(decoder, tokenizer, prompts, tokens, clients, slots):
        if clients == 3:
            raise KeyboardInterrupt
        return [serving.Answer(" 1", 6, 0.1)] * len(prompts), 2.0

    monkeypatch.setattr(serving, "problems", lambda *_: [])
    monkeypatch.setattr(serving, "timed_load", stops_at_the_second)
    result = run(*TINY, "--clients", "1,3", "--requests", "5", "--out", str(tmp_path))
    (path,) = tmp_path.rglob("serving_tiny.csv")
    assert result.exit_code == 130 and len(path.read_text().splitlines()) == 1 + 1
    assert "| 1 | 3 | 5 | 30 | 2.0 | 2.5 | 15.0 |" in result.stdout


def test_a_wrong_answer_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = serving.ask

    async def wrong(*arguments: object) -> serving.Answer:
        answer = await right(*arguments)
        return answer._replace(text=answer.text[:-1])

    monkeypatch.setattr(serving, "ask", wrong)
    result = run(*TINY, "--clients", "2", "--out", str(tmp_path))
    assert result.exit_code == 1 and "WRONG: prompt 0: 2 clients get" in result.stderr
    assert "tokens_s" not in result.stdout and not list(tmp_path.iterdir())


def test_the_gate_has_the_blocks_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def wrong(decoder, tokenizer, prompts, *_):
        seen.append(decoder.block_size)
        return [serving.Answer("no", 1, 0.1)] * len(prompts), 1.0

    monkeypatch.setattr(serving, "timed_load", wrong)
    assert run(*TINY, "--clients", "1", "--block-size", "3").exit_code == 1 and seen == [3]


def test_a_refusal_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "problems", lambda *_: [])
    start = serving.running_server
    monkeypatch.setattr(serving, "running_server", lambda *arguments: start(*arguments[:3], 20, 9))  # max_len
    result = run(*TINY, "--clients", "1", "--requests", "1")
    assert isinstance(result.exception, RuntimeError) and "status 200, but got 400" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "9b"), "--shape must be one of tiny, "),
        (("--shape", "tiny", "folder"), "--shape must not be given with a MODEL"),
        (("--shape", "tiny", "--clients", "2,0"), "--clients must be whole numbers >= 1 separated by commas, but got"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()) and result.stdout == ""


def test_prompts_are_asked_once_and_percentiles_are_nearest_ranks(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="must be at most 2, the prompts of .*prompts.txt, but ask 3"):
        serving.make_prompts(None, tmp_path / "prompts.txt", 3, 0, 0)
    values = [float(n) for n in range(20, 0, -1)]
    assert [serving.nearest_rank(values, share) for share in (0.5, 0.95, 0.0)] == [10.0, 19.0, 1.0]
    assert serving.nearest_rank([7.0], 0.95) == 7.0
