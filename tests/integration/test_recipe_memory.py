"""The table of recipes gives doctor's estimate of memory, from the published configurations of the models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from r1vfree_cli.config import recipes
from r1vfree_cli.doctor.probe import memory_estimate
from tests.published import config

TABLE = Path(__file__).parents[2] / "recipes" / "README.md"
TOKENS = 1024  # of the longest prompt that the recipes allow


def estimate(name: str, tmp_path: Path) -> float:
    """GB a process, as doctor adds them up."""
    stage, short = name.split("/")
    config(recipes.load(stage, short).model.name).save_pretrained(tmp_path)
    parts = memory_estimate(recipes.load(stage, short, [f"model.name={tmp_path}"]), TOKENS)
    return sum(gigabytes for part, gigabytes in parts.items() if part != "host")


@pytest.mark.parametrize("name", [n for n in recipes.shipped() if "tiny" not in n and not n.startswith("eval/")])
def test_the_table_has_doctors_estimate(name, tmp_path):
    row = re.search(rf"^\| {re.escape(name)} \|.*$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row, f"{name} has no row"
    found = estimate(name, tmp_path)
    assert f"| {found:.0f} |" in row.group(), f"{name}: {found:.1f} GB"
    assert found < 0.85 * (24 if "24gb" in name or name == "grpo/own-data" else 80)
