"""The walls between the rooms: who may import what, read from the sources themselves.

Imports inside functions and under ``TYPE_CHECKING`` count like all others, and so does
``import_module("name")``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from rl_edit import structure
from rl_edit.editors import FAMILIES
from rl_edit.structure import MATHEMATICS, PACKAGES
from rl_edit.types import LossOutput

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
EVERYTHING = sorted(
    {
        *PRODUCT,
        *(
            path
            for room in ("tests", "benchmarks", "deploy", "docs")
            for path in (ROOT / room).rglob("*.py")
        ),
    }
)

MODEL_LIBRARIES = ("diffusers", "transformers", "peft", "accelerate", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Room:
    """Files that share their walls.

    Attributes:
        files: patterns relative to the repository root.
        never: modules no file here may import, nor anything below them.
    """

    files: tuple[str, ...]
    never: tuple[str, ...]


ROOMS = {
    "mathematics": Room(
        files=(
            "rl_edit/types.py",
            "rl_edit/scores.py",
            "rl_edit/messages.py",
            "rl_edit/method/*.py",
            "rl_edit/method/objectives/*.py",
        ),
        never=("ray", "PIL", *MODEL_LIBRARIES),
    ),
    "measures": Room(files=("rl_edit/measures/*.py",), never=("ray", "PIL", *MODEL_LIBRARIES)),
    "models": Room(
        files=tuple(f"rl_edit/editors/{part}*.py" for part in ("", "tiny/", "tiny_families/")),
        never=("ray",),
    ),
    "judges": Room(
        files=("rl_edit/rewards/vlm/backends/*.py", "rl_edit/rewards/networks/*.py"),
        never=("ray", "rl_edit.rewards.term"),
    ),
    "services": Room(
        files=tuple(
            f"rl_edit/{name}{end}"
            for name in (
                "rewards",
                "rewards/vlm",
                "audit",
                "audit/checks",
                "structure",
                "data",
                "data/shapes",
                "evaluation",
                "report",
                "wire",
                "config",
                "training",
                "last_resort",
                "run_end",
                "preparation",
                "readiness",
                "jobs",
                "device_settings",
            )
            for end in (".py", "/*.py")
        ),
        never=("ray", *MODEL_LIBRARIES),
    ),
    "foundation": Room(
        files=(
            "rl_edit/__init__.py",
            "rl_edit/errors.py",
            "rl_edit/provenance.py",
            "rl_edit/files.py",
            "rl_edit/lease_holder.py",
            "rl_edit/run_directory.py",
            "rl_edit/run_record.py",
            "rl_edit/presets/*.py",
        ),
        never=("ray", "torch", *MODEL_LIBRARIES),
    ),
    "cli": Room(files=("rl_edit/cli/*.py", "rl_edit/__main__.py"), never=MODEL_LIBRARIES),
    "ray": Room(files=("actors/ray_*.py",), never=MODEL_LIBRARIES),
    "actors": Room(files=("actors/*.py",), never=("ray", *MODEL_LIBRARIES)),
    "learner": Room(
        files=("learner/*.py", "learner/controller/*.py"), never=("ray", "actors", *MODEL_LIBRARIES)
    ),
}
"""The first room that matches a file is its room."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """``rl_edit/data/__init__.py`` is ``rl_edit.data``."""
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=name_of(path))


def room_of(path: Path) -> str | None:
    relative = path.relative_to(ROOT)
    return next(
        (
            name
            for name, room in ROOMS.items()
            if any(
                len(relative.parts) == len(Path(p).parts) and relative.match(p) for p in room.files
            )
        ),
        None,
    )


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of everything a file imports."""
    for each in structure.imports_of(path, module_of(path)):
        yield each.line, each.imported


def reaches(imported: str, module: str) -> bool:
    return imported == module or imported.startswith(module + ".")


def breaches(path: Path, never: tuple[str, ...]) -> list[str]:
    return [
        f"{name_of(path)}:{line} imports {name}"
        for line, name in imports_of(path)
        for module in never
        if reaches(name, module)
    ]


def test_every_file_of_the_product_has_a_room() -> None:
    homeless = [name_of(path) for path in PRODUCT if room_of(path) is None]
    assert len(PRODUCT) > 20
    assert homeless == []


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_no_file_imports_through_its_walls(path: Path) -> None:
    room = room_of(path)
    assert room is not None
    assert breaches(path, ROOMS[room].never) == []


@pytest.mark.parametrize("name", MATHEMATICS)
def test_mathematics_imports_tensors_and_what_stands_to_its_left(name: str) -> None:
    outside = {
        "torch",
        "numpy",
        "pydantic",
        "pydantic_core",
        "jaxtyping",
        "typing_extensions",
        *sys.stdlib_module_names,
    }
    inside = [
        "rl_edit.errors",
        *(f"rl_edit.{left}" for left in MATHEMATICS[: MATHEMATICS.index(name) + 1]),
    ]
    files = [
        path
        for path in PRODUCT
        if room_of(path) == "mathematics" and reaches(module_of(path), f"rl_edit.{name}")
    ]
    assert files
    wrong = [
        f"{name_of(path)}:{line} imports {imported}"
        for path in files
        for line, imported in imports_of(path)
        if imported.split(".")[0] not in outside
        and not any(reaches(imported, module) for module in inside)
    ]
    assert wrong == []


def climbs(path: Path) -> list[str]:
    """Lists the imports of a file that lead to a higher floor, or to another room of its own."""
    here = structure.room_of(module_of(path))
    assert here is not None, f"{name_of(path)} lies in no room of rl_edit/structure/floors.py"
    return [
        f"{name_of(path)}:{line} imports {name}"
        for line, name in imports_of(path)
        if (there := structure.room_of(name)) is not None and structure.runs_back_up(here, there)
    ]


@pytest.mark.parametrize(
    "path", [path for path in PRODUCT if path != ROOT / "rl_edit/__init__.py"], ids=name_of
)
def test_no_import_runs_back_up(path: Path) -> None:
    assert climbs(path) == []


def test_ray_is_imported_by_at_most_five_files() -> None:
    users = [name_of(path) for path in PRODUCT if breaches(path, ("ray",))]
    assert "actors/ray_executor.py" in users
    assert len(users) <= 5
    assert [user for user in users if not user.startswith(("actors/ray_", "rl_edit/cli/"))] == []


def test_torchvision_is_imported_nowhere() -> None:
    assert [breach for path in EVERYTHING for breach in breaches(path, ("torchvision",))] == []


def test_the_product_neither_unpickles_nor_evaluates() -> None:
    """A checkpoint, a blob or a reply of a judge is data: reading it must not be able to run
    code."""
    modules = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
    found = [breach for path in PRODUCT for breach in breaches(path, modules)]
    for path in PRODUCT:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            unpickles = any(
                keyword.arg == "allow_pickle"
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                for keyword in node.keywords
            )
            if (
                called
                in ("eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load")
                or unpickles
            ):
                found.append(f"{name_of(path)}:{node.lineno} calls {called}")
    assert found == []


METHOD_NAME = re.compile(
    r"grpo|(?<![a-z])nft(?![a-z])|rc[-_]?grpo|neighbou?r[-_ ]?grpo|spatial[-_]?flow|cocoedit",
    re.IGNORECASE,
)
LOOPS = [
    path
    for path in PRODUCT
    if path.relative_to(ROOT).parts[0] in ("actors", "learner")
    or name_of(path) in ("rl_edit/method/rollout.py", "rl_edit/method/update.py")
]


FAMILY_NAME = re.compile(
    "|".join(
        rf"(?<!\w){name}(?!\w)"
        for family in FAMILIES
        for name in (
            family.model_fields["kind"].default,
            family.pipeline,
            family.__name__,
            *map(re.escape, family.released),
        )
    )
)
"""Kinds, classes and released checkpoints. Where a paper's numbers come from may be said."""
OUTSIDE_EDITORS = [path for path in PRODUCT if not name_of(path).startswith("rl_edit/editors/")]


def words_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, word) of every name and string of a file's code; docstrings are prose, not code."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield line, node.value
        for field in ("id", "attr", "name", "arg", "module"):
            word = getattr(node, field, None)
            if isinstance(word, str):
                yield line, word


@pytest.mark.parametrize("path", LOOPS, ids=name_of)
def test_no_loop_knows_the_name_of_a_method(path: Path) -> None:
    assert [
        f"{name_of(path)}:{line} says {word!r}"
        for line, word in words_of(tree_of(path))
        if METHOD_NAME.search(word)
    ] == []


@pytest.mark.parametrize("path", OUTSIDE_EDITORS, ids=name_of)
def test_no_file_outside_the_editors_names_a_family(path: Path) -> None:
    assert [
        f"{name_of(path)}:{line} says {word!r}"
        for line, word in words_of(tree_of(path))
        if FAMILY_NAME.search(word)
    ] == []


def test_only_the_update_steps_the_policy_optimizer() -> None:
    """Making a base from nothing is another activity, with an optimizer of its own; it is the one
    exception."""
    steps = {
        name_of(path)
        for path in PRODUCT
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "step"
        and "optim" in ast.unparse(node.func.value)
    }
    assert steps - {"rl_edit/editors/tiny/pretraining.py"} == {"rl_edit/method/update.py"}


Function = ast.FunctionDef | ast.AsyncFunctionDef


def proves(function: ast.AST, helpers: dict[str, Function]) -> bool:
    """Whether a function asserts: by statement, ``pytest.raises``, a library's ``assert_...``, or a
    helper beside it that does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called.rsplit(".", 1)[-1]
            if called in ("pytest.raises", "pytest.warns", "pytest.fail") or last.startswith(
                "assert_"
            ):
                return True
            if called in helpers and proves(
                helpers[called],
                {name: helper for name, helper in helpers.items() if name != called},
            ):
                return True
    return False


def test_every_test_asserts_something() -> None:
    silent = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = tree_of(path)
        helpers = {
            node.name: node
            for node in tree.body
            if isinstance(node, Function) and not node.name.startswith("test")
        }
        tests = [
            node
            for node in ast.walk(tree)
            if isinstance(node, Function) and node.name.startswith("test_")
        ]
        silent += [
            f"{name_of(path)}:{test.lineno} {test.name}"
            for test in tests
            if not proves(test, helpers)
        ]
    assert silent == []


def test_shapes_written_in_the_mathematics_are_checked_while_tests_run() -> None:
    with pytest.raises(TypeCheckError):
        LossOutput(loss=torch.zeros(2), metrics={})
    assert LossOutput(loss=torch.zeros(()), metrics={}).loss.shape == ()
