"""Lint, format, types, and the shape of the tree are part of the tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
