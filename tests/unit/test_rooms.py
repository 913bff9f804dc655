"""The map of README's architecture section: arrows between rooms go down only, and each room has a budget of lines."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "r1vfree_cli"

# From the bottom up: a room may import itself and those above it in this table. Numbers: non-blank lines at most.
# A room that needs more first asks what can go; a budget is raised in the commit that needs it, with the reason.
ROOMS = {
    "core": 777,
    "config": 933,
    "run": 388,
    "data": 1515,
    "launch": 1128,
    "models": 639,
    "shared_prefix": 1315,
    "judges": 1716,
    "rewards": 903,
    "training": 2472,
    "eval": 2913,
    "report": 1248,
    "doctor": 374,
    "tiny": 365,
    "cli": 485,
}
ORDER = list(ROOMS)


def imports(path: Path) -> set[str]:
    """Rooms that a module imports, anywhere in it: in functions and for types too."""
    found = set()
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            name = [*base, *(node.module or "").split(".")] if node.module else list(base)
            found |= {name[0]} if name else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("r1vfree_cli."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("r1vfree_cli.")}
    return found & set(ORDER)


def modules(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def test_every_folder_is_in_the_table():
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    assert folders == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_arrows_go_down_only(room):
    allowed = set(ORDER[: ORDER.index(room) + 1])
    against = {
        str(path.relative_to(PACKAGE)): sorted(imports(path) - allowed)
        for path in modules(room)
        if imports(path) - allowed
    }
    assert not against, against


@pytest.mark.parametrize("room", ORDER)
def test_a_room_keeps_its_budget(room):
    lines = sum(1 for path in modules(room) for line in path.read_text().splitlines() if line.strip())
    assert lines <= ROOMS[room], f"{room} has {lines} non-blank lines"


def test_modules_and_functions_stay_of_a_size_to_read():
    """Modules up to 400 lines, functions up to 60."""
    long = []
    for path in PACKAGE.rglob("*.py"):
        text, name = path.read_text(), str(path.relative_to(PACKAGE))
        long += [name] * (len(text.splitlines()) > 400)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{name}: {node.name}")
    assert not long


def test_the_law_sees_every_way_to_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    room = tmp_path / "core"
    room.mkdir()
    file = room / "x.py"
    for text in (
        "from ..eval import runner",
        "from .. import eval",
        "def f():\n    from ..eval.runner import run",
        "import r1vfree_cli.eval.stats",
        "from r1vfree_cli.eval import stats",
    ):
        file.write_text(text)
        assert imports(file) == {"eval"}, text
    file.write_text("from .errors import R1VError\nimport json")
    assert imports(file) == {"core"}
