"""Bad input through the command line: exit 2 or 3 with one message, whatever the input (`tests.bench.fuzz` runs more)."""

from tests.fuzz import suite
from tests.fuzz.harness import Tally

CASES = 1200


def test_bad_input(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    tally = Tally()
    suite.run(tally, CASES, tmp_path / "pieces")
    assert tally.count.total() >= CASES
    assert not tally.found, tally.report()
