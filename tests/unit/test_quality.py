"""Lint, format, types, and the shape of the tree are part of the tests."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["lint", "format", "types"],
)
def test_quality(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_quick_start_has_exactly_two_commands():
    blocks = re.findall(r"^```\w*\n(.*?)^```", quick_start(), re.DOTALL | re.MULTILINE)
    assert [b.strip() for b in blocks] == [
        "pip install -e . && r1v grpo --recipe tiny",
        "pip install -e '.[test]' && pytest",
    ]


def quick_start() -> str:
    text = (ROOT / "README.md").read_text()
    start = text.index("## Quick start")
    assert "```" not in text[:start], "the quick start's commands are the first ones"
    return text[start : text.index("\n## ", start + 1)]


def test_every_recipe_is_in_the_table():
    table = (ROOT / "recipes" / "README.md").read_text()
    for file in (ROOT / "recipes").glob("*/*.yaml"):
        assert f"{file.parent.name}/{file.stem}" in table, file


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
REQUIRED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_can_be_met(extra):
    """Resolving them takes an index and minutes. What can be told here: each line is a requirement, leaves a version
    between its bounds, contradicts no other line on the same package, and is met by what is installed."""
    known: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, [*REQUIRED, *EXTRAS[extra]]):
        known.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    for requirement in map(Requirement, EXTRAS[extra]):
        name = canonicalize_name(requirement.name)
        together = SpecifierSet(",".join(str(r.specifier) for r in known[name]))
        lowest = [Version(s.version) for s in together if s.operator in (">=", "==", "~=")]
        assert not lowest or together.contains(max(lowest)), f"{extra}: no {name} is {together}"
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        assert together.contains(found, prereleases=True), f"{extra}: {name} {found} is not {together}"


def test_the_extras_that_users_are_told_to_install_are_there():
    texts = {
        str(f): f.read_text()
        for kind in ("*.md", "*/*.md", "r1vfree_cli/**/*.md", "r1vfree_cli/**/*.py")
        for f in ROOT.glob(kind)
    }
    told = {(extra, file) for file, text in texts.items() for extra in re.findall(r"'\.\[(\w+)\]'", text)}
    assert {extra for extra, _ in told} >= {"test", "vllm", "qlora"}
    assert [where for where in told if where[0] not in EXTRAS] == []
    # The build of flash-attn imports torch, which an isolated one does not have.
    assert [file for extra, file in told if extra == "flash"] == []
    lines = [
        line for text in texts.values() for line in text.splitlines() if re.search("pip install.*flash-attn>", line)
    ]
    assert lines and all("--no-build-isolation" in line for line in lines)
