"""The built-in prompts: docstrings as tasks, tables, a corpus; and that held-out ones are not among them."""

from __future__ import annotations

from collections import Counter

import pytest

from orthrus_triton.training import prompt_tables, prompts_builtin
from orthrus_triton.training.overlap import find_overlaps
from orthrus_triton.training.prompts import Prompt, read_prompts


def test_docstrings_become_tasks():
    as_task = prompts_builtin._as_task
    assert (
        as_task("Return the shortest path between two nodes.\n\nMore.") == "returns the shortest path between two nodes"
    )
    assert (
        as_task("Parses a header and gives back\n  its main parts. Then more.")
        == "parses a header and gives back its main parts"
    )
    assert as_task("Copy a file to another place on the disk") == "copies a file to another place on the disk"
    for unfit in ("Return x.", "Nonsense that does not begin with a known verb", "Return self after all has been done",
                  "Return the `value` of a node in a graph"):  # fmt: skip
        assert as_task(unfit) is None


def make_package(folder, name: str, text: str) -> None:
    (folder / name / "tests").mkdir(parents=True)
    (folder / name / "module.py").write_text(text)
    (folder / name / "tests" / "test_module.py").write_text(
        'def f():\n    """Return what a test alone would want."""\n'
    )
    (folder / name / "broken.py").write_text("def f(:\n")


def test_builtin_prompts_come_from_docstrings_tables_and_a_corpus(tmp_path, monkeypatch):
    opening = "This module is about many things. " * 20
    make_package(tmp_path, "lib", f'"""{opening}"""\ndef f():\n    """Count the leaves of a given tree."""\n')
    monkeypatch.setattr(prompts_builtin, "_training_roots", lambda packages=(): [tmp_path / "lib"])
    prompts = prompts_builtin.builtin_prompts(seed=1)
    assert prompts == prompts_builtin.builtin_prompts(seed=1) != prompts_builtin.builtin_prompts(seed=2)
    assert len(set(prompts)) == len(prompts)
    texts = [prompt.text for prompt in prompts]
    assert sum("counts the leaves of a given tree" in text for text in texts) == 1
    assert not any("a test alone would want" in text for text in texts)
    by_domain = Counter(prompt.domain for prompt in prompts)
    assert by_domain["code"] == len(set(prompts_builtin.template_tasks())) + 1
    assert by_domain["chat"] == len(prompt_tables.SUBJECTS) * len(prompt_tables.CHAT_PHRASINGS)
    assert [prompt for prompt in prompts if prompt.domain == "docs"] == [
        Prompt(opening[:400].rsplit(" ", 1)[0], "docs", False)
    ]
    assert {prompt.domain for prompt in prompts[:11]} == {"code", "chat", "docs"}
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "index.noun").write_text(
        "  1 licence\n"
        "owl n 1 2 @ ~ 1 1 01621127\n"  # two pointers, one sense, tagged once
        "zyx n 1 1 @ 1 0 01621128\n"
        "old_hand n 1 1 @ 1 1 01621129\n"
    )
    (corpus / "essay.txt").write_text("Once there was a long story. " * 30)
    more = set(prompts_builtin.builtin_prompts(seed=1, corpus=corpus)) - set(prompts)
    assert {"an owl"} == {noun for noun in ("an owl", "a zyx", "old") for prompt in more if noun in prompt.text}
    assert sum(prompt.domain == "prose" and not prompt.chat for prompt in more) == 1
    with pytest.raises(ValueError, match="must be folders of modules, but typing_extensions is a single file"):
        prompts_builtin._package_folder("typing_extensions")
    with pytest.raises(NotADirectoryError, match="corpus"):
        prompts_builtin.builtin_prompts(corpus=corpus / "essay.txt")


def test_held_out_prompts_are_of_other_sources(tmp_path, monkeypatch):
    roots = prompts_builtin._training_roots()
    assert {root.name for root in roots[1:]} == {"networkx", "sympy"}
    assert {"site-packages", "dist-packages", "test"} <= prompts_builtin.SKIPPED_FOLDERS
    same = 'def f():\n    """Count the leaves of a given tall tree."""\n'
    make_package(tmp_path, "lib", same)
    make_package(tmp_path, "numpy", same + 'def g():\n    """Return the inverse of a square array."""\n')
    make_package(tmp_path, "pip", 'def h():\n    """Remove every package that nobody needs."""\n')
    monkeypatch.setattr(prompts_builtin, "_training_roots", lambda packages=(): [tmp_path / "lib"])
    monkeypatch.setattr(prompts_builtin, "_package_folder", lambda name: tmp_path / name)
    assert prompts_builtin.held_out_prompts(5) == [
        Prompt("Write a Python function that returns the inverse of a square array.", "code: numpy", chat=True),
        Prompt("Write a Python function that removes every package that nobody needs.", "code: pip", chat=True),
    ]
    (tmp_path / "numpy" / "guide.txt").write_text("How to do it, in many words. " * 30)
    docs = prompts_builtin.held_out_prompts(1, corpus=tmp_path / "numpy")[2:]
    assert [(prompt.domain, prompt.chat) for prompt in docs] == [("docs", False)]
    with pytest.raises(ValueError, match="count must be >= 1"):
        prompts_builtin.held_out_prompts(0)
    with pytest.raises(ValueError, match="must not be held out for evaluation, but got numpy.linalg, pip"):
        prompts_builtin.builtin_prompts(packages=["numpy.linalg", "pip"])


def test_overlap_sees_the_same_task_in_other_words():
    phrased = [f"Write a Python function that handles case number {n}." for n in range(20)]
    training = [*phrased, "Please write a Python function that counts the red birds in a tree, with a docstring."]
    held_out = [
        "Write a Python function that counts the red birds in a tree.",
        "Write a Python function that paints a house before the winter comes.",
        "write a python function that handles case number 3",
        "Write a Python function that",
    ]
    found = {(overlap.held_out, overlap.training): overlap.share for overlap in find_overlaps(held_out, training)}
    assert found[0, 20] == 1.0 and found[2, 3] == 1.0  # but for phrasing, which does not count
    assert {pair[0] for pair in found} == {0, 2}
    # one 4-gram of two, the last
    assert find_overlaps(["Count red birds in trees"], ["Draw red birds in trees", "Red birds in"]) == [(0, 0, 0.5)]


def test_held_out_prompts_are_not_among_our_templates():
    """Those of the tables; the command checks docstrings too."""
    from pathlib import Path

    folder = Path(__file__).parents[2] / "examples" / "prompts"
    held_out = {name: read_prompts(folder / f"{name}.txt") for name in ("code", "chat", "prose", "docs")}
    assert {name: len(prompts) for name, prompts in held_out.items()} == {
        "code": 40,
        "chat": 20,
        "prose": 20,
        "docs": 20,
    }
    assert all(prompt.domain == name for name, prompts in held_out.items() for prompt in prompts)
    training = [f"Write a Python function that {task}." for task in prompts_builtin.template_tasks()]
    training += [phrasing.format(s) for s in prompt_tables.SUBJECTS for phrasing in prompt_tables.CHAT_PHRASINGS]
    texts = [prompt.text for prompts in held_out.values() for prompt in prompts]
    assert len(set(texts)) == 100
    assert [(texts[o.held_out], training[o.training]) for o in find_overlaps(texts, training)] == []
