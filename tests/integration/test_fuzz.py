"""Bad input through the command line: exit 2 or 3 with one message, whatever the input (`tests.bench.fuzz` runs more)."""

import pytest

from tests.fuzz import data, evals, recipes, suite
from tests.fuzz.harness import Tally, run_process

CASES = 1450
# What only a process of its own shows: what is printed where, and the exit code that a shell sees.
THROUGH_A_PROCESS = [c for hand in (recipes.HAND, data.HAND, evals.HAND) for c in hand[::120] if c.call is None]


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def test_bad_input(tmp_path):
    tally = Tally()
    suite.run(tally, CASES, tmp_path / "pieces")
    assert tally.count.total() >= CASES and min(tally.count.values()) >= 20, tally.report()
    assert not tally.found, tally.report()


def test_bad_input_through_a_process():
    tally = Tally()
    for case in THROUGH_A_PROCESS:
        tally.check("process", case, run_process)
    assert tally.count.total() >= 5 and not tally.found, tally.report()
