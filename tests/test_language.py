"""The language of the house: words, first sentences, comments, widths and lengths.

One word per concept, the field's own. A word that is not to be used stands in a table below with
what to say instead, so that the failure is also the remedy.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE_ROOMS = ("rl_edit", "actors", "learner", "examples")
SOURCES = sorted(path for room in CODE_ROOMS for path in (ROOT / room).rglob("*.py"))
DOCUMENTS = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").rglob("*.md"),
        *(path for room in CODE_ROOMS for path in (ROOT / room).rglob("README.md")),
    ]
    if path.name != "decisions.md" and path.parent.name != "weights"
)
"""``docs/decisions.md`` is a dated log: it may quote what a thing was called then. The model card
beside the built-in weights is written by code, and its own test compares it."""

WIDTH = 100
LONGEST_FILE = 450
LONGEST_FUNCTION = 60

WORDS = {
    r"seats?": "worker slot",
    r"crews?": "roles",
    r"rolled(?! (it )?out)": "rollout result, or rolled out",
    r"held(?!([- ]|\s+)out)": "snapshot, stored, kept",
    r"tell|tells|told|telling": "broadcast, report, say",
    r"announce[sd]?|announcements?|announcing": "broadcast, broadcast when idle",
    r"speaks?|heard|hears": "varies, informative",
    r"plugged": "plugin",
    r"judged": "scored, or judge reward",
    r"exhibits?": "test images",
    r"inquir(y|ies)": "audit session",
    r"dabs?": "patch",
    r"guests?": "reference rows",
    r"settles?|settled": "project",
    r"locality": "background pull",
    r"pictures?": "image",
    r"nobody|somebody": "no process, no reader, a user: name who",
    r"anchored": "background regularised",
    r"readouts?": "expected score",
    r"rubrics?": "prompt",
}
"""Words of prose and code that are not to be used, and what to say instead."""

FORMAT_NAMES = ("seat_quarantined",)
"""Names in files of run directories. They stay as they are: readers of old runs know them."""

NAMES = {
    "alone": "single, isolated",
    "answers": "responses",
    "asked": "requested",
    "damages": "corruptions",
    "due": "is_due",
    "found": "the noun: checkpoint, row, match",
    "given": "declared, arguments, or the noun",
    "kept": "retained, trained, decay, or the noun",
    "least": "min_...",
    "look": "heldout_evaluation",
    "looks": "heldout_evaluations",
    "most": "max_...",
    "over": "stop_reason",
    "own": "the noun",
    "patience_s": "judge_timeout_s",
    "plain": "the noun",
    "post": "worker_spec",
    "said": "returned, declared",
    "saw": "record",
    "sound": "valid",
    "wanted": "requested",
    "whole": "full, complete, or the noun",
}
"""Names of variables, functions, arguments, attributes and classes that are not to be used."""

QUESTION_WORDS = ("who", "what", "which", "whether", "how", "where", "whose", "whom", "when", "why")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def banned_words(text: str) -> Iterator[str]:
    """The places of a text where a word stands that is not to be used."""
    patterns = {
        re.compile(rf"(?<![A-Za-z]){word}(?![A-Za-z])", re.I): say for word, say in WORDS.items()
    }
    for number, line in enumerate(text.splitlines(), 1):
        for name in FORMAT_NAMES:
            line = line.replace(f'"{name}"', "")
        # A word may stand in a name between underscores, so underscores are no letters here.
        for pattern, instead in patterns.items():
            if match := pattern.search(line):
                yield f"line {number}: {match.group(0)!r}, say: {instead}"


def banned_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg"):
            name = getattr(node, field, None)
            if isinstance(name, str) and name.strip("_") in NAMES:
                line = getattr(node, "lineno", 0)
                yield f"line {line}: name {name!r}, say: {NAMES[name.strip('_')]}"


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, docstring) of every module, class and function that has one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "module"), text


def first_sentence(docstring: str) -> str:
    """Up to the first full stop, colon or semicolon that ends a clause, or the first empty line."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.:;!?])\s", paragraph)[0]


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None and isinstance(first, ast.Expr):
        length -= (first.end_lineno or first.lineno) - first.lineno + 1
    return length


def functions() -> Iterator[tuple[str, int]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name_of(path)}:{node.lineno} {node.name}", function_lines(node)


OLD_NAMES = ROOT / "rl_edit" / "config" / "renamed.py"
"""The one file that has to spell the old names of settings."""

FIRST_NAMES = ROOT / "rl_edit" / "rewards" / "first_names.py"
"""Names that stored hashes depend on."""

PROMPTS = ROOT / "rl_edit" / "rewards" / "vlm" / "prompt_texts.py"
"""Words for a judge. Another wording would be another reward, so they stay as they are."""


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p not in (OLD_NAMES, FIRST_NAMES, PROMPTS)], ids=name_of
)
def test_a_source_file_uses_the_words_of_the_field(path: Path) -> None:
    text = path.read_text()
    assert [*banned_words(text), *banned_names(ast.parse(text))] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_document_uses_the_words_of_the_field(path: Path) -> None:
    assert list(banned_words(path.read_text())) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstrings_begin_with_no_question_word(path: Path) -> None:
    begins = [
        (name, text.splitlines()[0])
        for name, text in docstrings(ast.parse(path.read_text()))
        if text.split()[0].lower().strip("\"'`,.:") in QUESTION_WORDS
    ]
    assert begins == []


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=name_of)
def test_lines_fit_a_hundred_columns(path: Path) -> None:
    """A row of a Markdown table cannot be broken, and a URL cannot either."""
    wide = [
        f"line {number}: {len(line)} columns"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > WIDTH
        and not (path.suffix == ".md" and (line.startswith("|") or "](http" in line))
    ]
    assert wide == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_short_enough_to_be_read_at_once(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def test_functions_are_short() -> None:
    lengths = dict(functions())
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}
    ordered = sorted(lengths.values())
    assert ordered[int(0.95 * len(ordered))] <= 35


def comment_share(sources: list[Path]) -> float:
    """Lines with a comment over lines with code."""
    comments, code = 0, 0
    for path in sources:
        commented, coded = set(), set()
        strings = {
            line
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.COMMENT:
                commented.add(token.start[0])
            elif token.type not in (
                tokenize.NL,
                tokenize.NEWLINE,
                tokenize.INDENT,
                tokenize.DEDENT,
                tokenize.ENDMARKER,
            ):
                coded.update(range(token.start[0], token.end[0] + 1))
        comments += len(commented)
        code += len(coded - strings)
    return comments / code


def test_comments_stand_beside_the_code() -> None:
    assert comment_share(SOURCES) >= 0.06


def test_first_sentences_are_short() -> None:
    lengths = [
        len(first_sentence(text).split())
        for path in SOURCES
        for _, text in docstrings(ast.parse(path.read_text()))
    ]
    assert statistics.median(lengths) <= 9


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 90
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    prose = "\n".join(
        line for line in prose.splitlines() if not line.startswith(("|", "#", "<", "!"))
    )
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?])\s|\n\n|\n[-*] ", prose)]
    assert statistics.median(len(words) for words in sentences if words) <= 16
