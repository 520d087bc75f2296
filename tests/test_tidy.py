"""What we promise about the code and its documents, checked where it can be checked by reading them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click
import pytest

from shmbroker._native import _core
from shmbroker.failpoint import FAILPOINTS
from shmbroker.tools.cli import cli

ROOT = Path(__file__).parents[1]
CODE = ("shmbroker", "workers", "tools", "tests")
LINES_MAX = 700
LINES_TO_EXPLAIN = 400

# Files over 400 lines, each with the reason why it is not two.
LONG_FILES: dict[str, str] = {
    "shmbroker/config.py": "every setting with its limits and meaning stands beside the only code that reads one",
    "shmbroker/_native/layout.h": "every structure in shared memory and in the log is drawn in one place",
    "shmbroker/_native/_core.pyi": "the types of one extension module",
    "shmbroker/_native/reader.pxi": "one class: how a message is found, claimed and copied, wherever it lies",
    "shmbroker/_native/region.pxi": "one class: the whole face that workers and tools see of the memory",
    "shmbroker/_native/wait.c": "flag, fence, look again: both sides of every wake-up stand beside each other",
    "tests/test_producer.py": "one promise of the producer after the other, in the order of its documentation",
    "tests/native/ring_test.c": "one program per header, so that a sanitizer sees all of its races",
    "tests/native/wait_test.c": "likewise",
    "tests/test_lifecycle.py": "a list of independent ways to die and to come back",
    "tests/test_recovery.py": "a table of drawn damages beside the rule that they are judged by",
    "tools/bench_floors.c": "one program of independent parts, so that no build stands before a benchmark",
}

# (what, where it is banned, what to use instead)
BANNED: list[tuple[str, tuple[str, ...], str]] = [
    (r"\btime\.sleep\(", ("tests",), "wait for a condition with a deadline: support/waiting.py"),
    (
        r"\btime\.time\(",
        ("shmbroker", "workers", "tools"),
        "time.monotonic() for deadlines, time.time_ns() for what is written down",
    ),
    (r"^\s*except\s*:", CODE, "name the exceptions that you expect"),
    (
        r"multiprocessing[. ](import )?shared_memory",
        CODE,
        "posix_ipc: its resource tracker unlinks the memory of others",
    ),
    (r"\bos\.system\(|shell=True", CODE, "subprocess with a list"),
    (r"\bunittest\.mock\b", ("tests",), "the real thing, or a failpoint"),
    (r"\bprint\(", ("shmbroker",), "logging; a library does not print"),
    (r"\bassert_called|\bpytest\.skip\(\)", ("tests",), "a test that can fail, a skip that says why"),
    (r"\bTODO\b|\bFIXME\b|\bXXX\b|\bHACK\b", CODE, "do it, or write it into the documents as a limit"),
    (
        r"\bsem_timedwait\b|\bpthread_mutex_timedlock\b",
        ("shmbroker",),
        "the clockwait forms: a step of the wall clock changes nothing",
    ),
    (r"\bstrcpy\(|\bsprintf\(|\bstrcat\(", ("shmbroker",), "the forms that know the size"),
]

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home/\w+|work|Users/\w+)/|\.pyenv")


def files(*suffixes: str, under: tuple[str, ...] = CODE) -> list[Path]:
    found = [path for top in under for path in sorted((ROOT / top).rglob("*")) if path.suffix in suffixes]
    return [path for path in found if "build" not in path.parts and path.name != "_core.c"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("config/*.md"))]


SOURCES = files(".py", ".pyi", ".pyx", ".pxi", ".pxd", ".c", ".h", ".sh")


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: n for name, n in lengths.items() if n > LINES_MAX} == {}
    unexplained = {name: n for name, n in lengths.items() if n > LINES_TO_EXPLAIN and name not in LONG_FILES}
    assert unexplained == {}, "split it, or give the reason in LONG_FILES"
    assert {name for name in LONG_FILES if lengths.get(name, 0) <= LINES_TO_EXPLAIN} == set(), "no longer long"


@pytest.mark.parametrize(("pattern", "where", "instead"), BANNED, ids=[row[0] for row in BANNED])
def test_banned_calls_stay_out(pattern: str, where: tuple[str, ...], instead: str) -> None:
    expression = re.compile(pattern)
    hits = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in SOURCES
        if name_of(path).startswith(where) and path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if expression.search(line)
    ]
    assert hits == [], f"use {instead}"


def test_no_path_of_somebodys_machine_is_in_the_repository() -> None:
    others = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run", *documents()]
    hits = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in [*SOURCES, *others]
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert hits == []


def test_documents_name_only_files_that_exist() -> None:
    """A path in `code` style that starts at the top of the repository, or a relative link, must exist."""
    missing = []
    for document in documents():
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        names = re.findall(r"`((?:shmbroker|workers|tools|tests|config|docs|\.ci)/[\w./-]*)`", text)
        missing += [f"{name_of(document)}: {name}" for name in names if not (ROOT / name).exists()]
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
        missing += [f"{name_of(document)}: {link}" for link in links if not (document.parent / link).exists()]
    assert missing == []


def test_documents_name_only_tests_that_exist() -> None:
    """As `tests/test_x.py::test_y`, the beginning of a test's name."""
    missing = []
    for document in documents():
        for path, name in re.findall(r"`(tests/\w+\.py)::(test_\w+)`", document.read_text()):
            if not re.search(rf"^def {name}", (ROOT / path).read_text(), flags=re.MULTILINE):
                missing.append(f"{name_of(document)}: {path}::{name}")
    assert missing == []


def test_the_build_group_is_what_the_build_system_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["dependency-groups"]["build"] == project["build-system"]["requires"]


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {name for document in documents() for name in re.findall(r"\bmake ([a-z][a-z-]+)`", document.read_text())}
    assert named - targets == set()


def test_every_command_in_the_documents_exists() -> None:
    """`shmbroker NAME [NAME]` in code, options left out."""
    unknown = []
    for document in documents():
        code = re.findall(r"```.*?```|`[^`\n]+`", document.read_text(), flags=re.DOTALL)
        for words in re.findall(r"(?<!from )\bshmbroker((?: +(?:-d +\S+|--json|[a-z][a-z-]+))+)", "\n".join(code)):
            names = re.sub(r"-d +\S+|--json", "", words).split()
            context = click.Context(cli)
            command = cli.get_command(context, names[0])
            if command is None:
                unknown.append(f"{name_of(document)}: shmbroker {names[0]}")
            elif isinstance(command, click.Group) and names[1:] and not command.get_command(context, names[1]):
                unknown.append(f"{name_of(document)}: shmbroker {names[0]} {names[1]}")
    assert unknown == []


def test_every_word_of_the_memory_is_used_by_the_code() -> None:
    """A word that nobody reads or writes has a comment that nobody keeps true."""
    native = ROOT / "shmbroker" / "_native"
    layout = re.sub(r"/\*.*?\*/", "", (native / "layout.h").read_text(), flags=re.DOTALL)
    declared = [part for words in re.findall(r"\bsb_(?:word|half) ([^;()]+);", layout) for part in words.split(",")]
    words = {part.split("[")[0].strip() for part in declared}
    assert {"tail", "deadline_ms", "word"} <= words
    used = "\n".join(path.read_text() for path in [*native.glob("*.[ch]"), *native.glob("*.pxi")]
                     if path.name not in ("layout.h", "native.pxi", "_core.c"))  # fmt: skip
    assert {word for word in words - {"reserved"} if not re.search(rf"\b{word}\b", used)} == set()
    constants = re.findall(r"#define (SB_\w+) ", layout)
    assert [name for name in constants if len(re.findall(rf"\b{name}\b", layout + used)) < 2] == []


def test_every_failpoint_is_registered_used_and_named_in_a_test() -> None:
    """One that no test names is a promise that nobody has tried."""
    code = {path: path.read_text() for path in SOURCES}
    library = "\n".join(text for path, text in code.items() if not name_of(path).startswith("tests"))
    tests = [text for path, text in code.items() if name_of(path).startswith("tests") and path != Path(__file__)]
    used = set(re.findall(r"""\bfailpoint\("([\w.]+)"\)""", library))
    assert used == set(FAILPOINTS), "registry and code differ"
    native = dict(re.findall(r"""X\((\w+), "([\w.]+)"\)""", library))
    assert set(native.values()) == set(_core.failpoint_names())
    assert set(native) == set(re.findall(r"SB_FAILPOINT\((\w+)\)", library)) - {"id"}, "declared and placed differ"
    identifiers = {name: identifier for identifier, name in native.items()}
    untested = {
        name
        for name in [*FAILPOINTS, *native.values()]
        if not any(_names_failpoint(text, name, identifiers.get(name)) for text in tests)
    }
    assert untested == set()


def _names_failpoint(text: str, name: str, identifier: str | None) -> bool:
    """As "append.locked", as "locked" beside "append.", or in a C test as SB_FP_append_locked."""
    prefix, _, rest = name.partition(".")
    return (
        name in text
        or (f"{prefix}." in text and f'"{rest}"' in text)
        or (identifier is not None and f"SB_FP_{identifier}" in text)
    )
