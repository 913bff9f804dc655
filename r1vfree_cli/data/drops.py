"""What is left out of the data, and why: reasons that can be counted."""

from collections import Counter

PLACES = 5  # kept of each reason


class RowProblem(Exception):
    """A record that cannot become a row.

    `reason` is one of a few fixed texts, so that reasons can be counted; `detail` stands beside the record's place.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Drops:
    """How many records were dropped, by reason, with the first few places of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, reason: str, place: str) -> None:
        """Count one record; `place` says where it was, like `questions.jsonl:12`."""
        self.counts[reason] += 1
        self.places[reason] = [*self.places.get(reason, []), place][:PLACES]

    @property
    def total(self) -> int:
        return self.counts.total()

    def lines(self) -> list[str]:
        """A line a reason, most frequent first: `12 x missing image (questions.jsonl:3, ...)`."""
        ranked = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        shown = {reason: ", ".join(self.places[reason]) + ", ..." * (count > PLACES) for reason, count in ranked}
        return [f"{count} x {reason} ({shown[reason]})" for reason, count in ranked]
