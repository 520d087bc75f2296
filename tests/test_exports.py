"""The public surface: one list of names, the same for people, type checkers and the running module; cheap to import."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shmbroker
from shmbroker import errors
from shmbroker._native import _core

PACKAGE = Path(shmbroker.__file__).parent
STUB = ast.parse((PACKAGE / "_native" / "_core.pyi").read_text())


def names_in(body: list[ast.stmt]) -> set[str]:
    """What a stub declares at one level."""
    named = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return named | {
        node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_every_public_name_can_be_imported() -> None:
    missing = [name for name in shmbroker.__all__ if not hasattr(shmbroker, name)]
    assert missing == []
    assert len(set(shmbroker.__all__)) == len(shmbroker.__all__)


def test_type_checkers_see_the_same_names() -> None:
    """The names imported under TYPE_CHECKING are those of __all__: neither list forgets one."""
    module = ast.parse((PACKAGE / "__init__.py").read_text())
    guarded = [node for node in module.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    names = {
        alias.asname or alias.name
        for guard in guarded
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert names == set(shmbroker.__all__)


def test_every_error_is_public_and_says_when_it_is_raised() -> None:
    classes = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type)}
    assert set(classes) <= set(shmbroker.__all__)
    assert [name for name, cls in classes.items() if not cls.__doc__] == []
    tree = errors.__doc__ or ""
    assert [name for name in classes if name not in tree] == [], "missing from the drawing"


def test_the_document_of_the_api_names_everything_public() -> None:
    """Every exported name, and every public method and attribute of the exported classes, in code style."""
    text = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    named = set(re.findall(r"[A-Za-z_]\w*", " ".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))))
    public = set(shmbroker.__all__)
    for name in shmbroker.__all__:
        found = getattr(shmbroker, name)
        if inspect.isclass(found):
            own = {key for cls in found.__mro__ if cls.__module__.startswith("shmbroker") for key in vars(cls)}
            public |= {key for key in own if not key.startswith("_")}
    public |= {"config", "holder_pid", "messages", "position", "path"}  # made in __init__
    assert public - named == set()


def test_public_classes_and_functions_have_docstrings() -> None:
    bare = []
    for name in shmbroker.__all__:
        found = getattr(shmbroker, name)
        if not inspect.getdoc(found):
            bare.append(name)
        members = vars(found).items() if inspect.isclass(found) and found.__module__.startswith("shmbroker") else ()
        bare += [
            f"{name}.{key}"
            for key, value in members
            if inspect.isfunction(value) and key[0] != "_" and not value.__doc__
        ]
    assert bare == []


def test_the_stub_of_the_native_core_names_what_the_module_has() -> None:
    stub = names_in(STUB.body)
    module = {name for name in vars(_core) if not name.startswith("_") and name != "annotations"}
    imported = {name for name in module if inspect.ismodule(getattr(_core, name))}
    assert stub - module == set(), "in the stub alone"
    assert module - imported - stub == set(), "in the module alone"


@pytest.mark.parametrize(
    "cls", [node for node in STUB.body if isinstance(node, ast.ClassDef)], ids=lambda cls: cls.name
)
def test_the_stub_of_a_native_class_names_what_the_class_has(cls: ast.ClassDef) -> None:
    stub = names_in(cls.body)
    built = getattr(_core, cls.name)
    public = {name for name in vars(built) if not name.startswith("_")}
    assert {name for name in stub if not hasattr(built, name)} == set(), "in the stub alone"
    assert public - stub == set(), "in the class alone"


def test_importing_the_library_does_not_import_what_only_workers_and_tools_need() -> None:
    code = "import sys, shmbroker; print(*sorted({'click', 'lark', 'lmdb', 'psutil', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_sending_and_receiving_need_neither_click_nor_rich_nor_psutil() -> None:
    code = (
        "import sys, shmbroker\nfor name in shmbroker.__all__: getattr(shmbroker, name)\n"
        "print(*sorted({'click', 'lark', 'psutil', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
