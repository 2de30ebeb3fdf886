"""chat and serve: turns that go on from their cache, two colours, pipes, and refusals before a model is loaded."""

from __future__ import annotations

import io
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from typer.testing import CliRunner

from orthrus_triton.cli import app, serve
from orthrus_triton.cli.chat_view import ColourView, PlainView
from orthrus_triton.cli.common import one_line_errors, require_text
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from tests.cli_models import assert_bad_input, make_tokenizer, save_base_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    save_base_model(tokenizer, base)
    OrthrusForCausalLM.from_base(base, block_size=4).save_pretrained(folder, tokenizer=tokenizer)
    return folder


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def turn(decoder: ConsensusDecoder, tokenizer, messages: list[dict], said: str, **sampling) -> str:
    messages.append({"role": "user", "content": said})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    new = decoder.generate(ids, max_new_tokens=12, reuse_cache=True, **sampling).sequences[0][ids.shape[1] :]
    messages.append({"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)})
    return messages[-1]["content"]


def decoders_made(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The options of each decoder that a command makes."""
    made: list[dict] = []
    noted = lambda model, **how: made.append(how) or ConsensusDecoder(model, **how)  # noqa: E731
    monkeypatch.setattr("orthrus_triton.modules.ConsensusDecoder", noted)
    return made


def asked_of_decoders(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The options of each call of a decoder."""
    asked: list[dict] = []
    generate = ConsensusDecoder.generate
    noted = lambda self, ids, **how: asked.append({"ids": ids} | how) or generate(self, ids, **how)  # noqa: E731
    monkeypatch.setattr(ConsensusDecoder, "generate", noted)
    return asked


PLAIN = ("--device", "cpu", "--dtype", "fp32")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 1e-3, "seed": 3}])
def test_a_piped_conversation_is_the_librarys(
    folder: Path, sampling: dict, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    made, asked = decoders_made(monkeypatch), asked_of_decoders(monkeypatch)
    options = [part for name, value in sampling.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run(
        "chat", folder, "--max-new-tokens", 12, *PLAIN, "--system", "Be brief.", *options,
        stdin="hello\nand then?\n/clear\nhello\n /exit \nnobody hears this\n",
    )  # fmt: skip
    assert [call["reuse_cache"] for call in asked] == [True] * 3
    assert result.exit_code == 0, result.output
    assert made == [{"mode": "consensus", "block_size": "auto", "max_cache_len": 4096}]
    model, tokenizer = OrthrusForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    decoder = ConsensusDecoder(model, max_cache_len=4096)
    messages = [{"role": "system", "content": "Be brief."}]
    expected = [turn(decoder, tokenizer, messages, said, **sampling) for said in ("hello", "and then?")]
    expected.append(turn(decoder, tokenizer, messages[:1], "hello", **sampling))
    assert result.stdout == "".join(f"{reply}\n" for reply in expected)


def test_a_tokenizers_own_beginning_of_a_text_is_left_to_the_template(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.convert_tokens_to_ids("<|system|>"))]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    said = []
    for model in (folder, tmp_path / "model"):
        asked = asked_of_decoders(monkeypatch)
        assert run("chat", model, "--max-new-tokens", 2, *PLAIN, stdin="one\n").exit_code == 0
        monkeypatch.undo()
        said.append(asked[0]["ids"].tolist())
    assert said[0] == said[1] != tokenizer(tokenizer.decode(said[0][0]))["input_ids"]


def test_a_reply_ends_where_the_conversation_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its newest token is never cached, and so has room behind the last row."""
    asked = asked_of_decoders(monkeypatch)
    run("chat", folder, *PLAIN, "--max-new-tokens", 1, stdin="hello\n")
    longest = asked[0]["ids"].shape[1] + 3
    result = run("chat", folder, *PLAIN, "--max-len", longest, "--max-new-tokens", 12, stdin="hello\n")
    assert result.exit_code == 0 and asked[-1]["max_new_tokens"] == 4
    run("chat", folder, *PLAIN, "--max-len", longest, "--max-new-tokens", 3, stdin="hello\n")
    assert asked[-1]["max_new_tokens"] == 3


def test_an_interrupted_turn_is_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("chat", folder, *PLAIN, "--max-new-tokens", 6, stdin="hello\nand then?\n")
    generate = ConsensusDecoder.generate

    def interrupted(self, ids, **how):
        if calls.pop():
            generate(self, ids, **how | {"max_new_tokens": 3, "streamer": None})
            raise KeyboardInterrupt
        return generate(self, ids, **how)

    monkeypatch.setattr(ConsensusDecoder, "generate", interrupted)
    calls = [False, True, False]
    result = run("chat", folder, *PLAIN, "--max-new-tokens", 6, stdin="hello\nstop this\nand then?\n")
    assert result.exit_code == 0 and result.stdout == expected.stdout and "(interrupted" in result.stderr


def test_drafted_and_bonus_tokens_have_their_colours() -> None:
    """The block of a cycle is drafts, then one bonus token; the first token of all is the AR view's own."""
    tokenizer, file = make_tokenizer(), io.StringIO()
    view = ColourView(tokenizer, Console(file=file, force_terminal=True, color_system="standard", width=80))
    one, two, three = (tokenizer(text)["input_ids"] for text in ("p", "ab", "c\nd"))
    view.put(torch.tensor([[1, 2]]))
    for tokens in (one, two, three):
        view.put(torch.tensor(tokens))
    view.end()
    shown = file.getvalue()
    assert view.text == "pabc\nd"
    # the token of the prefill belongs to no cycle
    assert shown.rstrip().count(f"{(len(two) + len(three)) / 2:.2f} tokens/cycle") >= 1
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()[-2] == "d"  # a line begins anew
    spans = re.findall(r"\x1b\[([0-9;]+)m([^\x1b]+)\x1b\[0m", shown)
    styles = {text: code for code, text in spans}
    assert styles["p"] == "1;33" and styles["a"] == "36" and styles["d"] == "1;33"


def test_several_passes_of_ar_are_no_drafts() -> None:
    """On a GPU several of them come at once."""
    tokenizer, file = make_tokenizer(), io.StringIO()
    view = ColourView(tokenizer, Console(file=file, force_terminal=True, color_system="standard", width=80), False)
    for ids in ([1], tokenizer("p")["input_ids"], tokenizer("abcd")["input_ids"]):
        view.put(torch.tensor(ids))
    view.end()
    assert "1.00 tokens/cycle" in file.getvalue() and "\x1b[36m" not in file.getvalue()


def test_a_stop_token_is_no_part_of_a_reply() -> None:
    """Not every tokenizer knows that it is special, and the template writes it itself in the next turn."""
    tokenizer = make_tokenizer()
    stop = tokenizer("k")["input_ids"]
    view = PlainView(tokenizer, stop_ids=stop)
    for tokens in ([1, 2], tokenizer("p")["input_ids"], tokenizer("ab")["input_ids"] + stop):
        view.put(torch.tensor(tokens))
    view.end()
    assert view.text == "pab"


def test_a_reply_that_ends_within_a_character_is_shown_to_its_end(capsys: pytest.CaptureFixture) -> None:
    tokenizer = make_tokenizer()
    ids = [*tokenizer("p")["input_ids"], *tokenizer("🙂")["input_ids"][:2]]
    view = PlainView(tokenizer)
    for tokens in ([1, 2], ids[:1], ids[1:]):
        view.put(torch.tensor(tokens))
    view.end()
    assert view.text == tokenizer.decode(ids) != "p" and capsys.readouterr().out == view.text + "\n"


def test_a_template_that_refuses_the_messages_is_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role, please') }}"
    tokenizer.save_pretrained(tmp_path)
    options = ("--system", "Be brief.", "--device", "cpu", "--dtype", "fp32")
    for result in (run("chat", tmp_path, *options, stdin="hello\n"), run("generate", tmp_path, "hello", *options)):
        assert_bad_input(result, "roles ['system', 'user'], but: no system role, please")


def test_arguments_that_are_no_text_are_named(folder: Path) -> None:
    bad, options = "hi \udcff", ("--device", "cpu", "--dtype", "fp32")
    assert_bad_input(run("chat", folder, "--system", bad, *options, stdin="hello\n"), "--system must be UTF-8")
    assert_bad_input(run("generate", folder, "hello", "--system", bad, *options), "--system must be UTF-8")
    assert_bad_input(run("generate", folder, bad, *options), "PROMPT must be UTF-8")


def test_bad_options_are_one_line(folder: Path) -> None:
    assert_bad_input(run("chat", folder, "--temperature", -1), "temperature must be in 0..10000, but got -1")
    assert_bad_input(run("chat", folder, "--top-p", 0), "top_p must be in (0, 1], but got 0")
    small = run("chat", folder, "--max-len", 2, "--device", "cpu", stdin="hello there\n")
    assert_bad_input(small, "--max-len must exceed the conversation")
    assert_bad_input(run("serve", folder, "--host", "0.0.0.0"), "--host 0.0.0.0", "--api-key")
    assert_bad_input(run("serve", folder, "--api-key", " "), "--api-key must not be empty")


def test_what_only_runs_can_show_is_one_line_too(capsys: pytest.CaptureFixture) -> None:
    for raised, code in (
        (RuntimeError("can't allocate memory: you tried"), 2), (torch.OutOfMemoryError("CUDA out of memory"), 2),
        (RuntimeError("a bug"), None), (BrokenPipeError(), None),  # the reader of stdout has gone: click ends it
    ):  # fmt: skip
        with pytest.raises((typer.Exit, RuntimeError, BrokenPipeError)) as caught, one_line_errors():
            raise raised
        assert getattr(caught.value, "exit_code", None) == code
    capsys.readouterr()
    with pytest.raises(typer.Exit), one_line_errors():
        raise ValueError("what is wrong\n  and why")
    assert capsys.readouterr().err == "orthrus-triton: error: what is wrong and why\n"
    with pytest.raises(ValueError, match="stdin must be UTF-8"):
        require_text("stdin", b"hi \xff".decode("utf-8", "surrogateescape"))


def test_serve_listens_as_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip(
        "orthrus_triton.serving.server", reason="needs the extra [serve]", exc_type=ImportError
    )
    from orthrus_triton.serving import Scheduler
    from orthrus_triton.serving.app import create_app

    seen, heard, closed = [], [], []
    monkeypatch.setattr(server.Server, "run", lambda server: seen.append(server))
    noted = lambda decoder, **how: heard.append((decoder.model, how)) or Scheduler(decoder, **how)  # noqa: E731
    monkeypatch.setattr("orthrus_triton.serving.Scheduler", noted)
    close = Scheduler.close
    monkeypatch.setattr(Scheduler, "close", lambda scheduler: closed.append(scheduler) or close(scheduler))
    monkeypatch.setattr(
        "orthrus_triton.serving.app.create_app",
        lambda *all, **how: heard.append((all[2], how)) or create_app(*all, **how),
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_bad_input(
            run("serve", tmp_path, "--port", port), f"--host 127.0.0.1 --port {port}: Address already in use"
        )
    made = decoders_made(monkeypatch)
    result = run("serve", folder, "--device", "cpu", "--slots", 2, "--max-len", 64, "--port", port)
    assert result.exit_code == 0, result.output
    assert made == [{"block_size": "auto", "batch_invariant_prefill": True, "prefill_chunk": 256}]
    config = seen[0].config
    assert (config.host, config.port, config.timeout_graceful_shutdown) == ("127.0.0.1", port, 5)
    assert f"http://127.0.0.1:{port}/v1" in result.stderr
    (_, limits), (name, guard) = heard
    assert limits == {"slots": 2, "max_len": 64, "max_waiting": 64, "sampling": "coupled"}
    assert (name, guard) == (folder.name, {"api_key": None, "max_body_bytes": 1 << 20, "allow_origins": ()})
    assert len(closed) == 1
    monkeypatch.setattr(serve, "_require_free", lambda *_: None)  # not every machine has ::1
    options = ("--slots", 3, "--max-len", 96, "--port", port, "--host", "::1", "--fast-prefill", "--dtype", "fp16")
    options += ("--max-waiting", 5, "--sampling", "rejection", "--max-body-bytes", 99, "--api-key", "a key")
    options += ("--allow-origin", "http://a:1", "--allow-origin", "https://b")
    result = run("serve", folder, "--device", "cpu", *options, "--name", "mine", "--int8-drafts", "--block-size", 3)
    assert (made[1]["batch_invariant_prefill"], made[1]["block_size"]) == (False, 3)
    (network, limits), (name, guard) = heard[2:]
    assert limits == {"slots": 3, "max_len": 96, "max_waiting": 5, "sampling": "rejection"}
    pages = ["http://a:1", "https://b"]
    assert (name, guard) == ("mine", {"api_key": "a key", "max_body_bytes": 99, "allow_origins": pages})
    assert len(closed) == 2
    assert_bad_input(
        run("serve", folder, "--device", "cpu", "--allow-origin", "a"), "--allow-origin must be like https"
    )
    assert network.dtype == torch.float16
    assert all(layer.mlp.down_proj.draft_weight is not None for layer in network.model.layers)
    assert f"http://[::1]:{port}/v1" in result.stderr
    hosts = {"localhost": True, "::1": True, "0.0.0.0": False, "example.org": False}
    assert {host: serve._is_loopback(host) for host in hosts} == hosts


def test_ctrl_c_while_serve_loads_gives_the_cursor_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is loaded in another thread, whose spinner has hidden it and does not end by itself."""
    pytest.importorskip("orthrus_triton.serving.server", reason="needs the extra [serve]", exc_type=ImportError)
    shown = []

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orthrus_triton.serving.apart.run_apart", interrupted)
    monkeypatch.setattr(serve.status_console, "show_cursor", lambda: shown.append(True))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert run("serve", folder, "--device", "cpu", "--port", port).exit_code != 0 and shown == [True]
