"""The visit that makes a view, whole, on a model of two layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import view, view_data
from orthrus_triton.training.prompts import Prompt, read_prompts

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_rehearsal_passes_through_all_stages(tmp_path: Path, device: str) -> None:
    prompts = ({"prompt": f"put {n} words into order", "domain": ("code", "chat", "docs")[n % 3]} for n in range(24))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    changes = ("block_size=16", "num_anchors=4", "per_device_train_batch_size=4", "dataloader_num_workers=1",
               "logging_steps=5", f"compile_layers={device == 'cuda'}")  # fmt: skip
    command = [
        sys.executable, "-m", "benchmarks.view", tmp_path / "out", "--prompts", tmp_path / "prompts.jsonl",
        "--random", "tiny", "--work", tmp_path / "work", "--train-seconds", "2", "--batch-size", "8",
        "--eval-limit", "1", "--eval-tokens", "8", "--profile", "--device", device,
        *(word for change in changes for word in ("--set", change)),
    ]  # fmt: skip
    run = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["data"]["finished_rows"] == 24 and figures["train"]["steps"] > 1
    assert {"train_log", "step", "evaluation_k16", "evaluation_k8"} == figures["details"].keys()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "figures.json", "prompts.jsonl", "rows.tgz", "view.safetensors.0",
    ]  # fmt: skip


@pytest.fixture
def visit(tmp_path: Path) -> view.Visit:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "shard-00000.jsonl").write_text("{}\n")
    return view.Visit(tmp_path, tmp_path / "work", torch.device("cpu"), None, {}, {})


def test_a_failure_is_tried_again_without_compiling(visit, monkeypatch) -> None:
    tried = []

    def train_view(options, resume):
        assert options["use_cpu"]
        tried.append(options["compile_layers"])
        if options["compile_layers"]:
            raise RuntimeError("no compiler")
        dataset, state = SimpleNamespace(rows=[0]), SimpleNamespace(global_step=7, log_history=[])
        return SimpleNamespace(clock=SimpleNamespace(started=1.0, ended=4.0), state=state, train_dataset=dataset)

    monkeypatch.setattr(view, "read_config", lambda path, **changes: changes)
    monkeypatch.setattr(view, "train_view", train_view)
    changes = {"compile_layers": True}
    view.train(visit, Path("view.yaml"), [visit.out / "rows"], Path("held-out"), changes, profile=False)
    assert tried == [True, False] and visit.figures["train"]["ms_per_step"] == 500
    # what it exports is this run's
    assert visit.checkpoint == visit.work / "run" / "checkpoint-7"
    with pytest.raises(ValueError, match="time for 25 steps, .* at rate 0.1"):
        view.try_rates(visit, [0.1], Path("view.yaml"), [visit.out / "rows"], Path("held-out"), changes=changes)


def test_short_runs_leave_an_earlier_training_as_it_is(visit, monkeypatch) -> None:
    folders = []

    def train_view(options, resume):
        folders.append(Path(options["output_dir"]))
        log = [{"loss": 1.0, "tokens_per_cycle": 2.0}]
        dataset, state = SimpleNamespace(rows=[0]), SimpleNamespace(global_step=7, log_history=log)
        return SimpleNamespace(clock=SimpleNamespace(started=1.0, ended=4.0), state=state, train_dataset=dataset)

    monkeypatch.setattr(view, "read_config", lambda path, **changes: changes)
    monkeypatch.setattr(view, "train_view", train_view)
    view.try_rates(visit, [0.1, 0.2], Path("view.yaml"), [visit.out / "rows"], Path("held-out"), changes={})
    assert folders == [visit.work / "rates"] * 2 and visit.checkpoint is None
    assert visit.figures["rates"] == {rate: {"loss": 1.0, "tokens_per_cycle": 2.0} for rate in (0.1, 0.2)}


def test_rows_of_several_folders_are_linked_once_each(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    all_rows = Path("work/all_rows")
    for folder in ("new", "old", "empty"):
        Path(folder).mkdir()
    for shard in ("new/shard-0.jsonl", "old/shard-0.jsonl", "old/shard-1.jsonl"):
        Path(shard).write_text(shard)
    Path("new/shard-1.jsonl.part").write_text("not whole")

    def linked() -> list[str]:
        return sorted(file.read_text() for file in all_rows.iterdir())

    every = ["new/shard-0.jsonl", "old/shard-0.jsonl", "old/shard-1.jsonl"]
    view_data.link_rows([Path("new"), Path("old"), Path("empty"), Path("missing"), tmp_path / "new"], all_rows)
    assert linked() == every
    view_data.link_rows([Path("new"), all_rows], all_rows)  # the folder that is replaced is one of them
    assert linked() == every
    view_data.link_rows([Path("new")], all_rows)
    assert linked() == every[:1]
    with pytest.raises(FileNotFoundError, match="rows must be in one of .*empty.*, but there are none"):
        view_data.link_rows([Path("empty")], all_rows)


def test_prompts_that_are_evaluated_on_are_left_out(visit, monkeypatch) -> None:
    """From whatever folder the command is given, and also those of other files."""
    monkeypatch.chdir(visit.out)
    (visit.out / "mine.txt").write_text("Explain how a bicycle stays upright while it is moving slowly\n")
    reserved = view_data.held_out_prompts([visit.out / "mine.txt"])
    assert {prompt.domain for prompt in reserved} == {"code", "chat", "prose", "docs", "all"}
    assert not {prompt.text for prompt in reserved} & {prompt.text for prompt in read_prompts(view_data.BEGINNINGS)}
    answered = []

    def distill(model, tokenizer, prompts, folder, **options):
        answered.extend(prompts)
        folder.mkdir(parents=True)
        return dict.fromkeys(("rows", "finished_rows", "answer_tokens", "domains", "left_out"), 0)

    invented = [Prompt("Write a haiku about the sea at dawn and its fishermen", "chat")]
    monkeypatch.setattr(view.Visit, "load", lambda self: (SimpleNamespace(vocab_size=2000), None))
    monkeypatch.setattr(view_data, "distill", distill)
    monkeypatch.setattr(view_data, "invent", lambda *arguments, **options: [*invented, reserved[0]])
    view_data.make_data(visit, [reserved[-1], Prompt("Why is the sky blue at noon?")], {"chat": 2}, reserved, 1.0, 4)
    assert sorted(prompt.text for prompt in answered) == sorted(["Why is the sky blue at noon?", invented[0].text])
    assert read_prompts(visit.out / "prompts.jsonl") == answered


def test_a_model_may_invent_all_prompts(tmp_path: Path, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(view, "make_data", lambda visit, questions, invented, *rest: made.append((questions, invented)))
    application = typer.Typer()
    application.command()(view.main)
    options = ("--stages", "data", "--invent-chat", "5", "--device", "cpu")
    result = CliRunner().invoke(application, [str(tmp_path / "out"), *options])
    assert result.exit_code == 0 and made == [([], {"chat": 5})], result.output


def test_a_rehearsal_without_its_model_ends(tmp_path: Path, monkeypatch) -> None:
    def random_model(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(view, "random_model", random_model)
    monkeypatch.setattr(view, "train", lambda *arguments: pytest.fail("the demo model was trained"))
    application = typer.Typer()
    application.command()(view.main)
    options = ("--random", "tiny", "--stages", "train", "--device", "cpu")
    result = CliRunner().invoke(application, [str(tmp_path / "out"), *options])
    assert result.exit_code == 1 and "out of memory" in result.output + result.stderr


def test_without_a_checkpoint_there_is_nothing_to_export(visit) -> None:
    with pytest.raises(FileNotFoundError, match="a checkpoint must be in .*run, but there is none"):
        view.export(visit)


def test_pieces_of_an_earlier_view_are_not_left_beside_the_new_ones(visit, monkeypatch) -> None:
    def save_view(model, target, max_bytes):
        target.write_bytes(b"new")
        return 3

    visit.work.mkdir()
    visit.checkpoint = visit.out
    (visit.out / "view.safetensors.1").write_bytes(b"old")
    monkeypatch.setattr(view, "read_trained", lambda source: None)
    monkeypatch.setattr(view, "save_view", save_view)
    view.export(visit)
    assert [path.read_bytes() for path in visit.out.glob("view.safetensors.?")] == [b"new"]


def test_training_may_go_without_held_out_rows(visit, monkeypatch) -> None:
    trained = []
    monkeypatch.setattr(view, "train", lambda *arguments: trained.append(arguments[4]))
    application = typer.Typer()
    application.command()(view.main)
    options = (visit.out / "out", "--stages", "train", "--held-out", "none", "--rows", visit.out / "rows", "--device",
               "cpu", "--set", "eval_data=null", "--set", "eval_strategy=no")  # fmt: skip
    result = CliRunner().invoke(application, [str(option) for option in options])
    assert result.exit_code == 0 and trained[0]["eval_data"] is None, result.output


def test_a_config_may_leave_the_block_size_to_the_model(visit, monkeypatch) -> None:
    measured = []
    (visit.out / "view.yaml").write_text(f"output_dir: {visit.out}\nmax_steps: 1\nuse_cpu: true\n")
    monkeypatch.setattr(view, "measure", lambda *arguments: measured.append(arguments[-1]))
    application = typer.Typer()
    application.command()(view.main)
    arguments = (visit.out / "out", "--config", visit.out / "view.yaml", "--stages", "evaluate", "--device", "cpu",
                 "--work", visit.work)  # fmt: skip
    result = CliRunner().invoke(application, [str(argument) for argument in arguments])
    assert result.exit_code == 0 and measured == [[8]], result.output


@pytest.mark.parametrize("earlier", [True, False])
def test_a_visit_hands_on_rows_where_there_are_any(tmp_path: Path, earlier: bool) -> None:
    data, python = tmp_path / "data", tmp_path / "python"
    (data / "rows").mkdir(parents=True) if earlier else data.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    own = {"PYTHON": str(python), "VIEW_DATA": str(data), "VIEW_OPTIONS": "--invent-chat 7"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_visit.sh"), "view:20", str(tmp_path / "out")]
    subprocess.run(command, env=os.environ | own, check=True, capture_output=True)
    asked = (tmp_path / "out" / "view.log").read_text().split()
    assert asked[asked.index("--held-out") + 1] == str(data / "held-out")
    assert asked[asked.index("--invent-chat") + 1] == "7"
    assert ("--rows" in asked) == earlier and (str(data / "rows") in asked) == earlier


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stages", "data,trian"), "--stages must be one of data, train, export, evaluate, none, but got 'trian'"),
        (("--block-sizes", "8,x"), "--block-sizes must be whole numbers >= 1"),
        (("--rates", "1e-3;2e-3"), "--rates must be numbers separated by commas"),
        (("--random", "big"), "--random must be one of smollm2-135m, tiny, but got 'big'"),
        (("--random", "tiny", "--invent-chat", "5"), "are not for --random"),
        (("--invent-code", "-1"), "--invent-code must be >= 0, but got -1"),
        (("--limit", "0"), "--limit must be >= 1, but got 0"),
        (("--set", "max_seconds=5"), "--set max_seconds is not for this command: use --train-seconds"),
        (("--set", "output_dir=run"), "--set output_dir is not for this command: use --work"),
        (("--prompts", "none.jsonl"), "there is no file 'none.jsonl'"),
        (("--eval-prompts", "none.txt"), "there is no file 'none.txt'"),
        (("--rows", "no-rows"), "--rows must be a folder with .jsonl files, but 'no-rows' has none"),
        (("--held-out", "no-rows"), "--held-out must be a folder with .jsonl files, but 'no-rows' has none"),
    ],
)
def test_bad_options_are_said_before_anything_runs(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    application = typer.Typer()
    application.command()(view.main)
    result = CliRunner().invoke(application, [str(tmp_path / "out"), *options, "--device", "cpu"])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
