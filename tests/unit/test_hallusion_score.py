"""HallusionBench scores against a second, deliberately naive reading of the definitions, on random judged files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1vfree_cli.core.errors import DataError
from r1vfree_cli.eval.hallusion import score
from r1vfree_cli.eval.questions import unique

REAL = Path(__file__).parents[3] / "shared" / "hallusionbench" / "HallusionBench.json"


def synthetic() -> list[dict]:
    """Questions with every shape of pair: VD original/modified, VS without, with original and with modified figure."""
    rows = []
    for category, sub, figures in (
        ("VD", "ocr", [(0, 1), (1, 2)]),
        ("VD", "video", [(0, 1), (1, 2), (2, 2)]),
        ("VS", "ocr", [(0, 0), (1, 1), (2, 2)]),
        ("VS", "chart", [(0, 0), (1, 1)]),
        ("VS", "chart", [(0, 0), (1, 2), (2, 2)]),
    ):
        first = len({r["set_id"] for r in rows if (r["category"], r["subcategory"]) == (category, sub)})
        for set_id in range(first, first + 3):
            for figure, visual in figures:
                for question in range(1 + set_id):
                    rows.append(
                        {
                            "category": category,
                            "subcategory": sub,
                            "visual_input": str(visual),
                            "set_id": str(set_id),
                            "figure_id": str(figure),
                            "question_id": str(question),
                            "gt_answer": str((set_id + figure + question) % 2),
                        }
                    )
    return rows


def judged(rows: list[dict], seed: int, right: float = 0.6) -> list[dict]:
    rng = random.Random(seed)
    weights = [(1 - right) / 2, right, (1 - right) / 2]
    return [r | {score.CODE: str(rng.choices((0, 1, 2), weights)[0]), score.SAME: str(rng.randint(0, 1))} for r in rows]


def items_of(rows: list[dict]) -> list[score.Item]:
    return unique([score.from_record(r, "test") for r in rows], "test")


def naive(rows: list[dict]) -> dict:
    """The definitions read line by line from the issue, on the raw records and with other data structures."""
    right = {}
    for i, r in enumerate(rows):
        code = int(r[score.CODE])
        text_only = r["category"] == "VS" and int(r["visual_input"]) == 0
        right[i] = code == 1 or (code == 2 and text_only)

    def share(chosen, keys):
        bad, every = set(), set()
        for i, r in enumerate(rows):
            if chosen(r):
                key = "|".join(str(r[k]) for k in ("category", "subcategory", "set_id", *keys))
                every.add(key)
                if not right[i]:
                    bad.add(key)
        return [len(every) - len(bad), len(every)]

    counts = {
        "aAcc": share(lambda r: True, ["figure_id", "question_id"]),
        "qAcc": share(lambda r: True, ["question_id"]),
        "fAcc": share(lambda r: r["category"] != "VS" or int(r["figure_id"]) > 0, ["figure_id"]),
        "easy_aAcc": share(lambda r: int(r["visual_input"]) < 2, ["question_id"]),
        "hard_aAcc": share(lambda r: int(r["visual_input"]) == 2, ["question_id"]),
    }
    zero = {}
    for r in rows:
        if int(r["figure_id"]) == 0:
            zero[r["category"], r["subcategory"], str(r["set_id"]), str(r["question_id"])] = int(r[score.CODE])
    labels = Counter()
    for i, r in enumerate(rows):
        if right[i]:
            continue
        this, same, figure = int(r[score.CODE]), int(r[score.SAME]), int(r["figure_id"])
        before = zero[r["category"], r["subcategory"], str(r["set_id"]), str(r["question_id"])]
        if figure == 0:
            labels["illusion" if r["category"] == "VD" else "language"] += 1
        elif r["category"] == "VD":
            labels["mixed" if (before, this, same) == (1, 0, 1) else "illusion"] += 1
        elif before == 0:
            labels["language" if (this, same) == (0, 1) else "mixed"] += 1
        elif before == 2:
            labels["illusion"] += 1
        else:
            labels["language" if (this, same, int(r["visual_input"])) == (0, 1, 2) else "illusion"] += 1
    figures = defaultdict(list)
    for i, r in enumerate(rows):
        if not (r["category"] == "VS" and int(r["figure_id"]) == 0):
            figures[r["category"], r["subcategory"], str(r["set_id"]), str(r["figure_id"])].append(right[i])
    gt = [int(r["gt_answer"]) for r in rows]
    said_yes = [int(right[i]) == gt[i] for i in range(len(rows))]
    missed = [gt[i] for i in range(len(rows)) if not right[i]]
    kinds = Counter("correct" if all(f) else "wrong" if not any(f) else "inconsistent" for f in figures.values())
    return {
        "counts": counts,
        "labels": labels,
        "consistency": {k: kinds[k] for k in ("correct", "inconsistent", "wrong")},
        "diff": sum(said_yes) / len(rows) - sum(gt) / len(rows),
        "fp": missed.count(0) / len(missed) if missed else None,
    }


def check(rows: list[dict], doc: dict) -> None:
    expected = naive(rows)
    assert doc["counts"] == expected["counts"]
    for metric, (right, total) in expected["counts"].items():
        assert doc["metrics"][metric] == 100 * right / total
    d = doc["diagnostics"]
    assert (d["language_hallucination"], d["visual_illusion"], d["mixed"]) == tuple(
        expected["labels"][k] for k in ("language", "illusion", "mixed")
    )
    assert d["consistency"] == expected["consistency"]
    assert d["yes_pct_diff"] == pytest.approx(expected["diff"], abs=1e-12)
    assert d["fp_ratio"] == (pytest.approx(expected["fp"]) if expected["fp"] is not None else None)


@given(st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_scores_equal_the_naive_reading(seed, right):
    rows = judged(synthetic(), seed, right)
    check(rows, score.score(items_of(rows)))


@given(st.randoms(use_true_random=False), st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_order_and_field_types_do_not_matter(rng, seed):
    rows = judged(synthetic(), seed)
    doc = score.score(items_of(rows))
    rng.shuffle(rows)
    keys = ("visual_input", "set_id", "figure_id", "question_id", "gt_answer", score.CODE, score.SAME)
    for row in rows:
        for key in keys:
            row[key] = rng.choice((str, int, float))(int(row[key]))
    assert score.score(items_of(rows)) == doc


@pytest.mark.parametrize("code", [0, 1, 2])
def test_uniform_files_score_without_a_crash(code):
    rows = [r | {score.CODE: code, score.SAME: 1} for r in synthetic()]
    doc = score.score(items_of(rows))
    check(rows, doc)
    if code == 1:
        assert doc["diagnostics"]["fp_ratio"] is None
        assert all(v == 100 for v in doc["metrics"].values())
    if code == 0:
        assert all(right == 0 for right, _ in doc["counts"].values())
    json.dumps(doc, allow_nan=False)


def test_unclear_is_right_only_without_a_figure_in_vs():
    rows = [r | {score.CODE: 2, score.SAME: 0} for r in synthetic()]
    for item in items_of(rows):
        assert item.ok == (item.category == "VS" and item.visual_input == 0)


def test_labels_cover_every_question_that_is_not_ok_once():
    rows = judged(synthetic(), 3, 0.3)
    items = items_of(rows)
    d = score.score(items)["diagnostics"]
    assert d["language_hallucination"] + d["visual_illusion"] + d["mixed"] == sum(not i.ok for i in items)
    assert d["unlabelled"] == 0


def test_same_is_needed_exactly_where_it_changes_the_label():
    for row in judged(synthetic(), 0):
        for code in (0, 1, 2):
            for original in (0, 1, 2):
                a, b = (score.from_record(row | {score.CODE: code, score.SAME: s}, "t") for s in (0, 1))
                if a.ok or (a.original and original != code):
                    continue
                assert score.reads_same(a, original) == (score.label(a, original) != score.label(b, original))


def test_missing_same_hides_the_labels_but_not_the_metrics():
    rows = judged(synthetic(), 5, 0.3)
    full = score.score(items_of(rows))
    doc = score.score(items_of([{k: v for k, v in r.items() if k != score.SAME} for r in rows]))
    assert doc["counts"] == full["counts"]
    assert doc["diagnostics"]["language_hallucination"] is None and doc["diagnostics"]["unlabelled"] > 0


def test_unjudged_questions_are_counted_and_never_right():
    rows = [r | {score.CODE: None} for r in synthetic()]
    doc = score.score(items_of(rows))
    assert doc["unjudged"] == len(rows)
    assert doc["counts"]["aAcc"][0] == 0


def test_a_part_without_questions_has_null_metrics():
    rows = [r | {score.CODE: 1} for r in synthetic() if r["category"] == "VD"]
    doc = score.score(items_of(rows))
    assert doc["by_category"]["VS"]["metrics"]["aAcc"] is None
    assert doc["by_category"]["VS"]["counts"]["aAcc"] == [0, 0]


def test_the_two_ocr_subcategories_stay_apart():
    doc = score.score(items_of(judged(synthetic(), 1)))
    assert {"VD_ocr", "VS_ocr"} <= set(doc["by_subcategory"])
    parts = [doc["by_subcategory"][k]["counts"]["aAcc"][1] for k in doc["by_subcategory"]]
    assert sum(parts) == doc["n_questions"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"category": "XX"}, "category"),
        ({"gt_answer": "2"}, "gt_answer"),
        ({"gt_answer": None}, "gt_answer"),
        ({score.CODE: "3"}, score.CODE),
        ({score.CODE: "yes"}, score.CODE),
        ({score.SAME: 2}, score.SAME),
        ({"set_id": None}, "set_id"),
        ({"visual_input": "x"}, "visual_input"),
        ({"visual_input": float("inf")}, "visual_input"),
    ],
)
def test_a_bad_field_is_named(change, named):
    with pytest.raises(DataError, match=named):
        score.from_record(judged(synthetic(), 0)[0] | change, "f.json, record 1")


def test_duplicates_and_empty_files_are_errors():
    rows = judged(synthetic(), 0)
    with pytest.raises(DataError, match="duplicate"):
        items_of([*rows, rows[0] | {"set_id": int(rows[0]["set_id"])}])
    with pytest.raises(DataError, match="no questions"):
        items_of([])


def test_scoring_imports_nothing_heavy():
    code = (
        "import sys, r1vfree_cli.eval.hallusion.score, r1vfree_cli.eval.stats, r1vfree_cli.eval.runner\n"
        "bad = {'torch', 'transformers', 'trl', 'datasets', 'openai', 'PIL', 'pyarrow'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not REAL.is_file(), reason="the published questions are not beside the checkout")
class TestRealQuestions:
    @pytest.fixture(scope="class")
    def rows(self):
        return json.loads(REAL.read_text(encoding="utf-8"))

    def test_denominators(self, rows):
        doc = score.score(items_of(judged(rows, 0)))
        assert {m: total for m, (_, total) in doc["counts"].items()} == score.OFFICIAL_COUNTS
        assert doc["baselines"]["always_yes"]["counts"]["aAcc"] == [484, 1129]
        assert doc["baselines"]["always_no"]["counts"]["aAcc"] == [645, 1129]

    @pytest.mark.parametrize("seed", range(6))
    def test_scores_equal_the_naive_reading(self, rows, seed):
        judged_rows = judged(rows, seed, (0.05, 0.3, 0.5, 0.7, 0.9, 0.99)[seed])
        check(judged_rows, score.score(items_of(judged_rows)))
        for category in ("VD", "VS"):
            some = [r for r in judged_rows if r["category"] == category]
            check(some, score.score(items_of(judged_rows))["by_category"][category])
