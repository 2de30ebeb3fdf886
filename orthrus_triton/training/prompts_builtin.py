"""Prompts built at run time: code tasks from docstrings of installed packages and from our own tables, chat questions,
and openings of documentation. NumPy and pip are left for evaluation."""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import product, zip_longest
from os import PathLike
from pathlib import Path

from orthrus_triton.training import prompt_tables as tables
from orthrus_triton.training.overlap import find_overlaps
from orthrus_triton.training.prompts import Prompt

PACKAGES = ("networkx", "sympy")  # beside the standard library; both come with torch
HELD_OUT_PACKAGES = ("numpy", "pip")
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "_vendor"}
PLAIN_TASK = "Write a Python function that {}."
TASK_LENGTH = range(25, 111)
# markup, methods of classes nobody has seen, and what is about to go
UNFIT_TASK = re.compile(r"[`\\:>\[\]{}$*@]|self|deprecat|subclass|this method|override", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[a-z)])\.\s|\n\n")
OPENING_LENGTH, OPENING_MIN = 400, 300
TEXT_SUFFIXES = (".txt", ".rst", ".md")


def _third_person(verb: str) -> str:
    if verb.endswith(("ch", "sh", "ss", "x")):
        return verb + "es"
    return verb[:-1] + "ies" if verb.endswith("y") and verb[-2] not in "aeiou" else verb + "s"


THIRD_PERSON = {_third_person(verb) for verb in tables.VERBS}


def builtin_prompts(
    seed: int = 0, corpus: str | PathLike[str] | None = None, packages: Sequence[str] = (), phrasings: int = 1
) -> list[Prompt]:
    """Code, chat and docs prompts in an order of which any beginning is a fair sample.

    Args:
        seed: of phrasings and order.
        corpus: a folder with more to ask about: WordNet's `index.noun`, and text files (.txt, .rst, .md) whose
            openings are to be continued, as prose.
        packages: more packages whose docstrings are read.
        phrasings: in how many ways each of our own tasks is put.

    Raises:
        ImportError: a package whose docstrings are needed is not installed.
        NotADirectoryError: `corpus` is not a folder.
        ValueError: a package is held out for evaluation or a single file, or phrasings is below 1.
    """
    if held_out := sorted(name for name in set(packages) if name.partition(".")[0] in HELD_OUT_PACKAGES):
        raise ValueError(f"packages must not be held out for evaluation, but got {', '.join(held_out)}")
    if phrasings < 1:
        raise ValueError(f"phrasings must be >= 1, but got {phrasings}")
    rng = random.Random(seed)
    templates, (docstrings, passages) = template_tasks(), read_docstrings(_training_roots(packages))
    rng.shuffle(templates)
    rng.shuffle(docstrings)
    tasks = [task for pair in zip_longest(templates * phrasings, docstrings) for task in pair if task is not None]
    code = [Prompt(_phrase_task(task, rng), "code", chat=True) for task in tasks]
    questions = [phrasing.format(subject) for subject, phrasing in product(tables.SUBJECTS, tables.CHAT_PHRASINGS)]
    openings = [Prompt(text, "docs", chat=False) for text in passages]
    if corpus is not None:
        folder = _corpus_folder(corpus)
        questions += [rng.choice(tables.NOUN_PHRASINGS).format(noun) for noun in wordnet_nouns(folder)]
        openings += [Prompt(text, "prose", chat=False) for text in text_openings(folder)]
    chat = [Prompt(question, "chat", chat=True) for question in questions]
    rng.shuffle(chat)
    rng.shuffle(openings)
    return list(dict.fromkeys(_interleave(code, chat, openings)))


def held_out_prompts(count: int, corpus: str | PathLike[str] | None = None) -> list[Prompt]:
    """Prompts for evaluation, from sources that training never reads.

    Args:
        count: code tasks from the docstrings of NumPy, and as many from pip, under the domains "code: numpy" and
            "code: pip". What a training prompt repeats (see `find_overlaps`) is left out.
        corpus: a folder of documentation held out from training, of which `count` openings are to be continued.

    Raises:
        ImportError: a package is not installed. ValueError: count is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, but got {count}")
    rng = random.Random(0)
    seen = [PLAIN_TASK.format(task) for task in template_tasks() + read_docstrings(_training_roots())[0]]
    prompts = []
    for name in HELD_OUT_PACKAGES:
        tasks, _ = read_docstrings([_package_folder(name)])
        texts = [PLAIN_TASK.format(task) for task in tasks]
        repeats = {overlap.held_out for overlap in find_overlaps(texts, seen)}
        fresh = [text for n, text in enumerate(texts) if n not in repeats]
        prompts += [Prompt(text, f"code: {name}", chat=True) for text in rng.sample(fresh, min(count, len(fresh)))]
    if corpus is not None:
        openings = text_openings(_corpus_folder(corpus))
        chosen = rng.sample(openings, min(count, len(openings)))
        prompts += [Prompt(text, "docs", chat=False) for text in chosen]
    return prompts


def template_tasks() -> list[str]:
    """Third-person tasks from the tables: "removes duplicates from a list of integers"."""
    combined = (
        (tables.SEQUENCE_TASKS, tables.SEQUENCES),
        (tables.TEXT_TASKS, tables.TEXTS),
        (tables.NUMBER_TASKS, tables.NUMBER_KINDS),
    )
    tasks = [task.format(thing) for actions, things in combined for task, thing in product(actions, things)]
    return tasks + list(tables.SINGLE_TASKS)


def read_docstrings(roots: Sequence[Path]) -> tuple[list[str], list[str]]:
    """From the modules below folders: functions' first sentences that read as a task ("returns ..."), sorted, and the
    openings of longer module docstrings."""
    tasks, openings = set(), []
    for tree in _parsed_modules(roots):
        text = ast.get_docstring(tree)
        if text and len(text) > OPENING_MIN:
            openings.append(_opening(text))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
                if task := _as_task(text):
                    tasks.add(task)
    return sorted(tasks), openings


def wordnet_nouns(folder: Path) -> list[str]:
    """Nouns of WordNet's `index.noun` that occur in its tagged texts, with their article; none without the file."""
    nouns = []
    for path in sorted(folder.rglob("index.noun")):
        for line in path.read_text(encoding="utf-8").splitlines():
            # lemma pos synsets pointers... senses tagged_senses offsets...; the licence is indented
            fields = line.split()
            if line.startswith(" ") or len(fields) < 6 or not fields[0].isalpha():
                continue
            tagged = int(fields[5 + int(fields[3])])
            if tagged > 0:
                nouns.append(f"{'an' if fields[0][0] in 'aeiou' else 'a'} {fields[0]}")
    return nouns


def text_openings(folder: Path) -> list[str]:
    """The openings of the text files in a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix in TEXT_SUFFIXES and path.is_file())
    texts = (path.read_text(encoding="utf-8", errors="ignore").strip() for path in paths)
    return [_opening(text) for text in texts if len(text) > OPENING_MIN]


def _phrase_task(task: str, rng: random.Random) -> str:
    if rng.random() < tables.OTHER_LANGUAGE_SHARE:
        return tables.OTHER_LANGUAGE_PHRASING.format(rng.choice(tables.OTHER_LANGUAGES), task)
    return rng.choice(tables.CODE_PHRASINGS).format(task)


def _as_task(docstring: str) -> str | None:
    sentence = SENTENCE_END.split(docstring.strip(), maxsplit=1)[0]
    sentence = " ".join(sentence.split()).rstrip(".")
    verb, _, rest = sentence.partition(" ")
    verb = verb.lower() if verb.lower() in THIRD_PERSON else _third_person(verb.lower())
    if verb not in THIRD_PERSON or not rest or len(sentence) not in TASK_LENGTH or UNFIT_TASK.search(sentence):
        return None
    return f"{verb} {rest}"


def _parsed_modules(roots: Sequence[Path]) -> Iterator[ast.Module]:
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
                continue
            try:
                yield ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
            except (SyntaxError, ValueError):  # templates, and tests of the parser itself
                continue


def _training_roots(packages: Sequence[str] = ()) -> list[Path]:
    return [Path(sysconfig.get_paths()["stdlib"]), *map(_package_folder, dict.fromkeys((*PACKAGES, *packages)))]


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"the built-in prompts need the package {name}, which is not installed: pip install {name}")
    if not spec.submodule_search_locations:
        raise ValueError(f"packages must be folders of modules, but {name} is a single file")
    return Path(spec.submodule_search_locations[0])


def _corpus_folder(corpus: str | PathLike[str]) -> Path:
    folder = Path(corpus)
    if not folder.is_dir():
        raise NotADirectoryError(f"corpus must be a folder, but got {str(folder)!r}")
    return folder


def _opening(text: str) -> str:
    return text[:OPENING_LENGTH].rsplit(" ", 1)[0]


def _interleave(code: list[Prompt], chat: list[Prompt], openings: list[Prompt]) -> Iterator[Prompt]:
    """Eight code tasks, two questions, one opening, and so on; what is left over comes last."""
    streams = [(iter(code), 8), (iter(chat), 2), (iter(openings), 1)]
    end = object()
    while streams:
        for stream in list(streams):
            prompts, count = stream
            for _ in range(count):
                if (prompt := next(prompts, end)) is end:
                    streams.remove(stream)
                    break
                yield prompt
