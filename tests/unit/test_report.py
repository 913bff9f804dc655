"""The report's pure parts: what is read, what is refused, what is escaped. No torch, no matplotlib."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt

from r1vfree_cli.core.errors import DataError, UsageError
from r1vfree_cli.report.load import clean, collect, labels, read_metrics
from r1vfree_cli.report.render import fence, markdown
from r1vfree_cli.report.rollouts import question, read_groups
from r1vfree_cli.report.view import duration, flatten, p_value, plain, signed

HOSTILE = [
    "<script>alert(1)</script>",
    "a | b || c",
    "`code` ``` fence",
    "**bold** _em_ ~~no~~ [link](http://x) ![i](y)",
    "# heading",
    "- item",
    "+ item",
    "1. one",
    "---",
    "===",
    "> quote",
    "back\\slash\\|",
    "&lt;already&gt;",
    "    indented",
]


def shown(html: str) -> str:
    """The text that a browser would show of one paragraph."""
    import html as h
    import re

    return h.unescape(re.sub(r"<[^>]*>", "", html.replace("<br>", "\n"))).strip()


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_exactly_the_text_and_starts_nothing(text):
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(f"{markdown(text)}\n")
    assert html.startswith("<p>") and html.count("<") == 2, html
    assert shown(html) == text.strip()


def test_markdown_text_opens_no_tag_that_the_report_itself_would_close():
    assert "<" not in markdown("<img src=x onerror=alert(1) ").replace("<br>", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_cell_stays_one_cell(text):
    table = f"| a | b |\n| --- | --- |\n| {markdown(text)} | end |\n"
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(table)
    assert html.count("<td>") == 2 and "<script" not in html
    assert shown(html.split("<td>")[1].split("</td>")[0]) == text.strip()


def test_fence_cannot_be_ended_by_its_text():
    text = "```\n<script>x</script>\n`````\n# h\n\n\n\nend"
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(str(fence(text)))
    assert html.count("<pre>") == 1 and "<script" not in html and "<h1" not in html
    assert shown(html) == text


def test_cut_last_line_of_a_killed_writer_is_left_out_and_said(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.6}\n{"step": 3, "rew')
    notes: list[str] = []
    assert [m["step"] for m in read_metrics(file, notes)] == [1, 2]
    assert len(notes) == 1 and "cut" in notes[0]


def test_metrics_survive_damage_nan_and_steps_logged_twice(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 2, "reward": 0.2, "step_time": 3}\n{"step": 1, "reward": NaN, "kl": 0.1}\nnot json\n[1]\n{"no": "step"}\n'
        f'{{"step": true}}\n{{"step": 2, "reward": 0.9, "loss": {10**400}}}\n{{"step": {10**400}}}\n'
    )
    notes: list[str] = []
    assert read_metrics(file, notes) == [{"step": 1.0, "kl": 0.1}, {"step": 2.0, "reward": 0.9, "step_time": 3.0}]
    assert notes == ["metrics.jsonl: 1 damaged line left out"]


def test_secrets_are_replaced_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "planted-value-123")
    document = {
        "command": "r1v grpo --set rewards.1.base_url=https://me:pa55@host/v1 x=planted-value-123",
        "argv": ["judge", "--api-key", "abc", "--model", "m"],
        "env": {"OPENAI_API_KEY": "zzz"},
        "settings": {"api_key": "k", "api_key_env": "OPENAI_API_KEY", "max_prompt_tokens": 512, "hf_token": "t"},
        "error": "401 for Authorization: Bearer abcdefghijklmnop, key sk-abcdefghijklmnopqrstuv, api_key=qwerty",
    }
    found = clean(document)
    text = json.dumps(found)
    assert "Bearer" not in text and "abcdefghijklmnop" not in text
    for secret in ("planted-value-123", "pa55", "abc", "zzz", "sk-abcdefgh", "qwerty"):
        assert (
            f'"{secret}' not in text
            and f"={secret}" not in text
            and f" {secret}" not in text
            and f":{secret}@" not in text
        )
    assert found["argv"] == ["judge", "--api-key", "[redacted]", "--model", "m"]
    assert found["settings"] == {
        "api_key": "[redacted]",
        "api_key_env": "OPENAI_API_KEY",
        "max_prompt_tokens": 512,
        "hf_token": "[redacted]",
    }


def test_text_that_no_file_could_hold_is_made_writable():
    assert clean("a\ud800b\x00c\x1b[31m\nd") == "a?b\ufffdc\ufffd[31m\nd"


def test_labels_are_short_and_different():
    names = labels([Path("/a/x/run"), Path("/a/y/run"), Path("/a/z")])
    assert names == ["x/run", "y/run", "z"]


def scores(path: Path, **changes) -> Path:
    path.mkdir()
    document = {"protocol": "official", "n_questions": 4, "metrics": {"aAcc": 50.0}} | changes
    (path / "scores.json").write_text(json.dumps(document))
    return path


def test_mixed_protocols_are_refused_and_named(tmp_path):
    a, b = scores(tmp_path / "a"), scores(tmp_path / "b", protocol="vlmevalkit")
    with pytest.raises(UsageError, match="different protocols") as e:
        collect([a, b])
    assert any("vlmevalkit" in line and str(b) in line for line in e.value.details)


def test_different_question_sets_are_refused(tmp_path):
    with pytest.raises(DataError, match="numbers of questions"):
        collect([scores(tmp_path / "a"), scores(tmp_path / "b", n_questions=5)])


def test_a_folder_that_is_neither_is_refused_with_what_was_found(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "logs").mkdir()
    with pytest.raises(DataError, match="neither a run dir nor an eval dir") as e:
        collect([tmp_path])
    assert e.value.details == ["found in it: logs/, model.safetensors"]


@pytest.mark.parametrize("kind", ["absent", "file", "unscored"])
def test_other_wrong_folders_say_what_is_wrong(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "file":
        path.touch()
    elif kind == "unscored":
        path.mkdir()
        (path / "eval.json").write_text("{}")
    wanted = {"absent": "does not exist", "file": "is a file", "unscored": "not scored yet"}[kind]
    with pytest.raises(DataError, match=wanted):
        collect([path])


@pytest.mark.parametrize("text", ["{", "[]", '{"metrics": 3}', "null", "\x00"])
def test_damaged_scores_are_a_data_error(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(DataError, match=r"scores\.json"):
        collect([tmp_path])


@pytest.mark.parametrize("text", ["", "- a", ": : :", "a: &a [*a]", "\x00"])
def test_a_damaged_recipe_is_noted(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "status.json").write_text('{"state": "failed", "reason": "why"}')
    runs, _ = collect([tmp_path, tmp_path])
    assert len(runs) == 1
    assert any("recipe.yaml" in note for note in runs[0].notes) and runs[0].recipe == {}
    assert any("not finished: failed (why)" in note for note in runs[0].notes)


def test_no_folder_is_a_usage_error():
    with pytest.raises(UsageError):
        collect([])


def test_numbers_are_written_honestly():
    assert signed(-0.04) == "±0.0" and signed(-1.25) == "−1.2" and signed(None) == "n/a"
    assert p_value(0.0001) == "p < 0.001" and p_value(None) == ""
    assert duration(59.96) == "60.0 s" and duration(61) == "1 min 1 s" and duration(7260) == "2 h 1 min"
    assert plain(float("inf")) == "n/a" and plain(0) == "0" and plain(False) == "no" and plain([]) == "n/a"
    assert flatten({"a": {"b": 1}, "c": [{"d": 2}], "e": {}}) == [("a.b", "1"), ("c.0.d", "2")]


def test_a_prompt_with_chat_markup_is_shown_as_its_question():
    raw = "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>Why?<|im_end|>\n<|im_start|>assistant\n"
    assert question(raw) == "Why?"


def test_no_two_metrics_share_a_picture(tmp_path):
    from r1vfree_cli.report import training
    from r1vfree_cli.report.load import Run

    metrics = [{"step": i, "reward": 0.1 * i, "rewards/a b/mean": 0.5, "rewards/a-b/mean": 0.5} for i in range(3)]
    figures = training.curves([Run(tmp_path, "run", metrics=[m | {"rewards/🐈/mean": 1.0} for m in metrics])])
    assert len(figures) == 4 and len({f.name for f in figures}) == 4


def test_an_evaluation_is_one_curve_with_its_interval(tmp_path):
    from r1vfree_cli.report import training
    from r1vfree_cli.report.load import Run

    ends = {"eval/hallusion/aAcc/low": 30.0, "eval/hallusion/aAcc/high": 50.0}
    metrics = [{"step": i, "eval/hallusion/aAcc": 40.0 + i} | ends for i in (0, 2)] + [{"step": 1, "reward": 0.1}]
    figures = training.curves([Run(tmp_path, "run", metrics=metrics)])
    assert [f.alt.split(" over ")[0] for f in figures] == ["Reward", "hallusion, greedy: aAcc"]
    assert "40 at step 0, 42 at step 2" in figures[1].alt and "fill-opacity: 0.15" in figures[1].svg


def test_the_verdict_says_what_changed_and_whether_it_is_established(tmp_path):
    from r1vfree_cli.report.load import Run
    from r1vfree_cli.report.render import verdict

    def said(before, after, rows):
        summary = {"heldout_accuracy": {"greedy": {"before": before, "after": after}}, "heldout_rows": rows}
        return verdict([Run(tmp_path, "run", summary=summary)], [])[0]

    assert "+38.0 points ± 5.5 (512 rows, 95 %), established" in said(0.42, 0.80, 512)
    assert "not established" in said(0.42, 0.44, 100) and "no interval" in said(0.42, 0.44, None)

    def measured(last):
        key, lines = "eval/pope/accuracy", ((0, 60.0), (1, None), (2, last))
        metrics = [{"step": i} | ({key: v, f"{key}/low": v - 4, f"{key}/high": v + 4} if v else {}) for i, v in lines]
        return verdict([Run(tmp_path, "run", metrics=metrics, summary={"reward": {"first": 0.1, "last": 0.4}})], [])

    assert measured(70.0) == ["run: pope/accuracy, greedy, 60 (56 to 64) → 70 (66 to 74), established."]
    assert "not established: the intervals overlap" in measured(66.0)[0]

    def compared(low, p):
        found = {"difference": 16.7, "interval": [low, 20.0], "p_swap": p}
        both = {"label": "B", "reference": "A", "metrics": {"aAcc": found}, "level": 0.95}
        return verdict([], [both])[0]

    assert compared(14.3, 0.01).endswith("+20.0, established.")
    assert "not established: the interval holds 0" in compared(-1.0, 0.01)
    # Three sets of questions: resampling them says nothing of those that were not asked.
    assert "not established: the two swapped at random differ as much (p 0.5)" in compared(14.3, 0.5)


def test_costs_of_several_judges_are_added_up(tmp_path):
    from types import SimpleNamespace

    from r1vfree_cli.report.training import _cost

    line = {"judge/a/calls": 2, "judge/b/calls": 3, "judge/b/failed/timeout": 1, "judge/a/latency_p50": 0.1}
    found = _cost(SimpleNamespace(summary={}, metrics=[line, line]))
    assert [[cell.text for cell in row] for row in found.rows] == [
        ["judge calls", "10"],
        ["judge calls failed: b/timeout", "2"],
    ]


def test_judges_differ_with_judges_only(tmp_path):
    """A reward of one's own is no second judge."""
    rows = [
        {"step": 1, "group": 0, "id": "a", "prompt": "What?", "completion": text, "reward": 1.0, "advantage": 0.0,
         "rewards/format": 1.0, "rewards/feedback": first, "rewards/strict": second, "rewards/brevity": 9.0}
        for text, first, second in (("x", 0.2, 0.5), ("y", 0.9, None))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "step.parquet")
    told = [{"name": "format"}, {"name": "feedback"}, {"name": "f.py:brevity"}, {"name": "feedback", "label": "strict"}]
    (group,) = read_groups(tmp_path / "step.parquet", 1, {"rewards": told})
    assert group["disagreement"] == pytest.approx(0.3)
    (group,) = read_groups(tmp_path / "step.parquet", 1, {"rewards": told[:3]})
    assert group["disagreement"] == 0
