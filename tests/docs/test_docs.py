"""The pages and the words: references hold, what is made from the code is up to date, public names
say what they take, names say what they are."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tspc
import tspc.trainer
from docs import picture, reference
from tests.house.test_imports import FILES, ROOT

PRODUCT = FILES
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TESTS = [p for p in sorted((ROOT / "tests").rglob("*.py")) if p != Path(__file__)]
FILLERS = set(["made", "given", "rest", "found", "every", "told", "met", "known", "mine", "own"])
FOLDERS = "tspc|passes|runtime|tests|docs|bench|examples"
PUBLIC = {n: getattr(tspc, n) for n in tspc.__all__}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_commands_that_pages_name_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"`make (\w+)`", text):
        assert target in targets, target


@pytest.mark.parametrize("path", [*PRODUCT, *TESTS], ids=name)
def test_references_in_code_hold(path: Path) -> None:
    """To a page by the title of a heading: `docs/design.md, "Layouts"`; to a file by its path."""
    text = re.sub(r"\n\s*#?\s*", " ", path.read_text())
    for file in re.findall(rf"`((?:{FOLDERS})/\w[\w/.]*\.(?:py|md))`", text):
        assert (ROOT / file).exists(), file
    for page, title in re.findall(r'(docs/\w+\.md)(?:, "([^"]+)")?', text):
        assert (ROOT / page).exists(), page
        titles = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.M)
        assert not title or title in titles, (page, title)
    assert not re.search(r"\bDESIGN\b|\b[Ss]ections? \d", text)


def test_pages_made_from_the_code_are_up_to_date() -> None:
    before = picture.PAGE.read_text()
    assert before == picture.page(before), "make docs"
    assert reference.PAGE.read_text() == reference.text(), "make docs"


@pytest.mark.parametrize("page", ["debugging.md"])
def test_code_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S):
        exec(compile(code, page, "exec"), {})
    assert "region blocks.0.mlp" in capsys.readouterr().out


def described() -> Iterator[tuple[str, Any]]:
    """Public functions and methods."""
    for n, item in {**PUBLIC, "trainer.register": tspc.trainer.register}.items():
        if inspect.isfunction(item):
            yield n, item
        elif inspect.isclass(item):
            assert item.__doc__, n
            for member, value in vars(item).items():
                if not member.startswith("_") and callable(value):
                    yield f"{n}.{member}", value


@pytest.mark.parametrize("item", [pytest.param(x, id=n) for n, x in described()])
def test_public_docstrings_name_every_argument(item: Any) -> None:
    text = inspect.getdoc(item) or ""
    arguments = [p for p in inspect.signature(item).parameters if p != "self"]
    assert text and not [p for p in arguments if not re.search(rf"\b{p}\b", text)]


def documented(path: Path) -> Iterator[tuple[Any, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node, ast.get_docstring(node) or ""


def names_of(node: Any) -> set[str]:
    """Parameters of a function, fields of a class."""
    if isinstance(node, ast.ClassDef):
        targets = [x.target for x in node.body if isinstance(x, ast.AnnAssign)]
        return {t.id for t in targets if isinstance(t, ast.Name)}
    a = node.args
    return {x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x}


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_no_docstring_begins_by_a_capitalised_name(path: Path) -> None:
    """What a formatter makes of `q: the rows`."""
    for node, text in documented(path):
        first = re.match(r"([A-Z]\w*)(.?)", text)
        if first and (first[1], first[2]) != ("A", " "):
            names = {n[:1].upper() + n[1:] for n in names_of(node)} | {
                n.upper() for n in names_of(node) if len(n) == 1
            }
            assert first[1] not in names, f"{node.name}: {text[:60]}"


def fillers(path: Path) -> Counter[str]:
    """Variables and arguments that are called by a word that says nothing."""
    out: Counter[str] = Counter()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            out[node.id] += 1
        elif isinstance(node, ast.arg):
            out[node.arg] += 1
    return Counter({w: n for w, n in out.items() if w in FILLERS})


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_names_say_what_they_are(path: Path) -> None:
    assert not fillers(path)


def test_words_given_up_are_nowhere() -> None:
    for path in [*PRODUCT, ROOT / "README.md"]:
        text = " ".join(path.read_text().split())
        assert "made again" not in text, name(path)


def test_the_glossary_has_each_word_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text().split("## Words given up")[0]
    words = [w.strip() for row in re.findall(r"^\| ([^|]+) \|", text, re.M) for w in row.split(",")]
    words = [w for w in words if w not in ("word", "---")]
    assert len(words) > 40 and len(words) == len(set(words))
