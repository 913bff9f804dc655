"""HallusionBench's scores, to the count of the official script (tianyi-lab/HallusionBench, utils.py). Pure Python."""

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ...core.errors import DataError
from ..benchmark import RIGHT, UNCLEAR, WRONG, scored
from ..records import found_in

OFFICIAL_COUNTS = {"aAcc": 1129, "qAcc": 455, "fAcc": 346, "easy_aAcc": 455, "hard_aAcc": 430}
IMAGE_QUESTIONS = 951

# Names in the official result format.
CODE, SAME = "gpt4v_output_gpt_check", "same"
_WORDS = {"yes": 1, "no": 0, "true": 1, "false": 0, "y": 1, "n": 0}  # the answer key of some tools
ID = ("category", "subcategory", "set_id", "figure_id", "question_id")


@dataclass(frozen=True, slots=True)
class Item:
    """One judged question."""

    category: str
    subcategory: str
    set_id: str
    figure_id: str
    question_id: str
    visual_input: int  # 0 text only, 1 original figure, 2 modified figure
    gt: int  # 1 yes, 0 no
    code: int | None = None  # 1 right, 0 wrong, 2 unclear, None unjudged
    same: int | None = None  # 1: the response agrees with that to figure 0 of its pair, 0: not, None: unknown

    @property
    def id(self) -> str:
        return "_".join(getattr(self, name) for name in ID)

    @property
    def key(self) -> tuple:
        return self.id, self.gt, self.visual_input

    @property
    def cluster(self) -> tuple[str, str, str]:
        """The set: the unit of the statistics; its stratum is (category, subcategory)."""
        return (self.category, self.subcategory, self.set_id)

    @property
    def pair_key(self) -> tuple[str, str, str, str]:
        return (*self.cluster, self.question_id)

    @property
    def original(self) -> bool:
        """Figure 0: the original figure of a VD set, no figure at all for a VS set."""
        return self.figure_id == "0"

    @property
    def ok(self) -> bool:
        """Counted as right. Without a figure, a VS question may also be left open."""
        return self.code == RIGHT or (self.code == UNCLEAR and self.category == "VS" and self.original)


def whole(value: Any) -> int | None:
    """An integer given as int, float or string; None for null, NaN and the empty string. Raises ValueError: else."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        value = float(value) if value.strip().replace(".", "", 1).isdigit() else value
    if isinstance(value, int | float) and math.isfinite(value) and value == int(value):
        return int(value)
    raise ValueError(f"{value!r} is no whole number")


def from_record(record: dict, where: str, *, judged: bool = True) -> Item:
    """One question of the official JSON or result format; fields may be strings or integers.

    judged: also read `gpt4v_output_gpt_check` and `same`; absent or null means None.

    Raises DataError: a field is missing or has an impossible value; `where` says which record it is.
    """

    def number(name: str, allowed: tuple[int, ...]) -> int | None:
        value = record.get(name)
        try:
            words = _WORDS if name == "gt_answer" and isinstance(value, str) else {}
            found = whole(words.get(str(value).strip(" .\n").lower(), value))
        except (ValueError, OverflowError):
            found = -1
        if found is not None and found not in allowed:
            raise DataError(f"{where}: {name} is {value!r}, allowed: {', '.join(map(str, allowed))}")
        return found

    found: dict[str, Any] = dict(zip(ID, _names(record)))
    found |= {"visual_input": number("visual_input", (0, 1, 2)), "gt_answer": number("gt_answer", (0, 1))}
    for name, value in found.items():
        if value is None or value == "":
            hint = "--questions HallusionBench.json has the answer key" if name == "gt_answer" else None
            raise DataError(f"{where}: no {name}", details=[found_in(record)], hint=hint)
    if found["category"] not in ("VD", "VS"):
        raise DataError(f"{where}: category is {found['category']!r}, allowed: VD, VS")
    gt = found.pop("gt_answer")
    code, same = (number(CODE, (WRONG, RIGHT, UNCLEAR)), number(SAME, (0, 1))) if judged else (None, None)
    return Item(**found, gt=gt, code=code, same=same)


def record_id(record: dict) -> str:
    return "_".join(_names(record))


def _names(record: dict) -> list[str]:
    """The parts of the id as text, whole numbers without a fraction; "" for what is not there."""
    found = []
    for name in ID:
        value = record.get(name)
        with suppress(ValueError, OverflowError):
            value = whole(value)
        found.append("" if value is None else str(value).strip())
    return found


# What each metric counts: the group that a question belongs to, None when it belongs to none. A group is right when
# all its questions are; no group crosses a set.
_GROUP: dict[str, Callable[[Item], tuple | None]] = {
    "aAcc": lambda i: (*i.pair_key, i.figure_id),
    "qAcc": lambda i: i.pair_key,
    "fAcc": lambda i: None if i.category == "VS" and i.original else (*i.cluster, i.figure_id),
    "easy_aAcc": lambda i: None if i.visual_input == 2 else i.pair_key,
    "hard_aAcc": lambda i: i.pair_key if i.visual_input == 2 else None,
}
METRICS = tuple(_GROUP)


def groups(metric: str, items: Iterable[Item]) -> dict[tuple, list[bool]]:
    """Group -> ok of each of its questions."""
    found: dict[tuple, list[bool]] = {}
    for item in items:
        if (key := _GROUP[metric](item)) is not None:
            found.setdefault(key, []).append(item.ok)
    return found


def counts(items: list[Item]) -> dict[str, list[int]]:
    found = {metric: groups(metric, items).values() for metric in METRICS}
    return {metric: [sum(map(all, oks)), len(oks)] for metric, oks in found.items()}


def reads_same(item: Item, original: int | None) -> bool:
    """Whether the label of this question depends on `same`. `original` is the code of figure 0 of its pair."""
    if item.original or item.code != WRONG:
        return False
    if item.category == "VD":
        return original == RIGHT
    return original == WRONG or (original == RIGHT and item.visual_input == 2)


def label(item: Item, original: int | None) -> str | None:
    """`language`, `illusion` or `mixed` for a question that is judged and not ok, by get_eval_pair_all of the official
    script; None where figure 0 of the pair is not there or unjudged, or `same` is needed and unknown."""
    if item.original:
        return "illusion" if item.category == "VD" else "language"
    needs_same = reads_same(item, original)
    if original is None or (needs_same and item.same is None):
        return None
    if not needs_same:
        return "mixed" if item.category == "VS" and original == WRONG else "illusion"
    if item.category == "VD":
        return "mixed" if item.same else "illusion"
    return "language" if item.same else "mixed" if original == WRONG else "illusion"


def originals(items: Iterable[Item]) -> dict[tuple, int | None]:
    """Pair -> code of its figure 0."""
    return {item.pair_key: item.code for item in items if item.original}


def diagnostics(items: list[Item], codes: dict[tuple, int | None]) -> dict:
    """Yes/no bias, hallucination labels (counts of questions) and consistency (counts of figures).

    `yes_pct_diff` = mean[ok == gt] - mean[gt] and `fp_ratio` = share of not-ok questions with gt 0, as in yes_ratio_stats
    of the official script. The three labels are None when some wrong question cannot be labelled: `unlabelled`.
    """
    wrong = [item for item in items if not item.ok]
    labels = [label(item, codes.get(item.pair_key)) for item in wrong if item.code is not None]
    unlabelled = labels.count(None)
    n = len(items)
    figures = groups("fAcc", items).values()
    names = {"language_hallucination": "language", "visual_illusion": "illusion", "mixed": "mixed"}
    right, none = sum(map(all, figures)), sum(not any(oks) for oks in figures)
    return {
        "yes_pct_diff": (sum(int(i.ok) == i.gt for i in items) - sum(i.gt for i in items)) / n if n else None,
        "fp_ratio": sum(i.gt == 0 for i in wrong) / len(wrong) if wrong else None,
        **{key: None if unlabelled else labels.count(name) for key, name in names.items()},
        "unlabelled": unlabelled,
        "consistency": {"correct": right, "inconsistent": len(figures) - right - none, "wrong": none},
    }


def score(items: list[Item], protocol: str = "official") -> dict:
    """All scores of unique questions, in the shape that `--json` prints; unjudged ones count as not ok.

    metrics in percent, counts [right, total], by_subcategory of `VD_figure`, ...; for vlmevalkit `mean`, of aAcc, fAcc
    and qAcc, which its leaderboard shows.
    """
    codes = originals(items)

    def part(some: list[Item]) -> dict:
        return {**scored(counts(some)), "diagnostics": diagnostics(some, codes)}

    def baseline(answer: int) -> dict:
        return scored(counts([replace(item, code=int(item.gt == answer)) for item in items]))

    every = part(items)
    three = [every["metrics"][m] for m in ("aAcc", "fAcc", "qAcc")]
    mean = {} if protocol == "official" else {"mean": sum(three) / 3 if None not in three else None}
    strata = sorted({i.cluster[:2] for i in items})
    return {
        "protocol": protocol,
        "n_questions": len(items),
        **every,
        **mean,
        "by_category": {c: part([i for i in items if i.category == c]) for c in ("VD", "VS")},
        "by_subcategory": {"_".join(s): part([i for i in items if i.cluster[:2] == s]) for s in strata},
        "baselines": {"always_yes": baseline(1), "always_no": baseline(0)},
        "unjudged": sum(item.code is None for item in items),
        "unclear_right": sum(item.code == UNCLEAR and item.ok for item in items),
    }
