"""Canaries against judges over real HTTP: an honest one passes, each kind of bad one is refused with the evidence."""

from __future__ import annotations

import base64
import io
import json
import re
from types import SimpleNamespace

import judge_servers as js
import pytest
from PIL import Image

from r1vfree_cli.config.rewards import Canaries, FeedbackReward
from r1vfree_cli.core.errors import GuardStop, UsageError
from r1vfree_cli.core.prompts import DEFAULT, Prompt
from r1vfree_cli.rewards.canaries import TEMPLATES, check
from r1vfree_cli.rewards.registry import build_feedback
from r1vfree_cli.training import grpo
from r1vfree_cli.training.guard import Verdict

COLOURS = {"red": (200, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 200)}


def rows(labelled: bool = True) -> list[dict]:
    return [
        {
            "images": [Image.new("RGB", (40 + i, 40), rgb)],
            "problem": problem,
            "solution": answer if labelled else None,
        }
        for i in range(4)
        for name, rgb in COLOURS.items()
        for problem, answer in (("What colour is it?", name), (f"Is it {name}?", "yes"))
    ]


def asked(body: dict) -> tuple[Image.Image, str, str]:
    image, text = body["messages"][0]["content"]
    data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    question, answer = re.findall(r'^(?:Question|Answer): (".*")$', text["text"], re.MULTILINE)
    return Image.open(io.BytesIO(data)), json.loads(question), json.loads(answer)


def honest(image: Image.Image, question: str, answer: str) -> float:
    pixel = image.getpixel((image.width // 2, image.height // 2))
    nearest = min([*COLOURS, "yellow"], key=lambda n: sum(abs(a - b) for a, b in zip(pixel, RGB[n], strict=True)))
    if question.startswith("Is it"):
        return 0.9 if answer == ("yes" if nearest in question else "no") else 0.1
    return 0.9 if answer == nearest else 0.1


RGB = {**COLOURS, "yellow": (240, 210, 40)}
JUDGES = {
    "likes everything": (lambda i, q, a: 0.9, {"template", "right over wrong", "own image over another"}),
    "rejects everything": (lambda i, q, a: 0.05, {"right over wrong", "own image over another"}),
    "blind": (lambda i, q, a: 0.9 if a in {*COLOURS, "yes"} and len(a) > 2 else 0.1, {"right over wrong"}),
    "likes a template": (lambda i, q, a: 1.0 if a.startswith("Thought") else honest(i, q, a), {"template"}),
    "likes Yes": (lambda i, q, a: 1.0 if a == "Yes" else honest(i, q, a), {"template"}),
    "upside down": (lambda i, q, a: 1 - honest(i, q, a), {"right over wrong", "own image over another", "template"}),
}


def run(tmp_path, judge, data, cfg: Canaries | None = None, prompt: Prompt = DEFAULT, **settings):
    def behave(handler, body):
        score = judge(*asked(body))
        if score is None:
            return js.status(500)(handler, body)
        js.reply(handler, js.classify_reply([1 - score, score]))

    with js.JudgeServer(behave) as server:
        document = {"name": "feedback", "base_url": server.url, "cache": str(tmp_path), "max_retries": 0}
        reward = build_feedback(FeedbackReward.model_validate(document | settings))
        try:
            return check(reward, data, cfg or Canaries(), 1, prompt), server.requests
        finally:
            reward.close()


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "label-free"])
def test_an_honest_judge_passes(tmp_path, labelled):
    report, requests = run(tmp_path, honest, rows(labelled))
    assert report.ok
    names = {c.name for c in report.checks}
    assert names == {"empty", "template", "right over wrong", "own image over another"}
    assert all(c.ok for c in report.checks) and all(c.n for c in report.checks)
    answers = {asked(r)[2] for r in requests}
    assert {t for t in TEMPLATES if "<" not in t} <= answers
    # Yes is an answer to "Is it red?", so it is no template there.
    assert not [r for r in requests if asked(r)[2] == "Yes" and asked(r)[1].startswith("Is it")]
    assert ("disc" in str([asked(r)[1] for r in requests])) is not labelled


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_that_fails_is_refused_with_the_evidence(tmp_path, name):
    judge, failing = JUDGES[name]
    report, _ = run(tmp_path, judge, rows())
    assert not report.ok
    assert failing <= {c.name for c in report.checks if c.ok is False}
    error = report.error()
    assert isinstance(error, UsageError) and error.exit_code == 2
    assert any("FAILED" in line for line in error.details) and any("scored" in line for line in error.details)
    later = report.error(step=300)
    assert isinstance(later, GuardStop) and "300" in later.message and later.details == error.details


def test_floor_above_the_judges_scale_is_found(tmp_path):
    report, _ = run(tmp_path, honest, rows(), floor=0.95)
    assert [c.name for c in report.checks if c.ok is False] == ["empty", "empty"]


def test_margin_is_kept(tmp_path):
    weak = lambda i, q, a: 0.4 + 0.1 * honest(i, q, a)  # noqa: E731
    assert run(tmp_path, weak, rows())[0].ok
    assert not run(tmp_path, weak, rows(), Canaries(min_margin=0.3))[0].ok


def test_every_check_asks_anew_and_the_same_seed_the_same(tmp_path):
    first, again = run(tmp_path, honest, rows())[1], run(tmp_path, honest, rows())[1]
    texts = [sorted(asked(r)[1:] for r in requests) for requests in (first, again)]
    assert texts[0] == texts[1] and len(first) > 20


def test_a_judge_without_verdicts_is_a_usage_error(tmp_path):
    with js.JudgeServer(js.status(500)) as server:
        document = {"name": "feedback", "base_url": server.url, "cache": False, "max_retries": 0}
        with pytest.raises(UsageError, match="no verdict"):
            check(build_feedback(FeedbackReward.model_validate(document)), rows(), Canaries(), 1)


def test_asked_but_not_answered_is_a_failure_and_no_question_is_not(tmp_path):
    """A judge that is silent about one kind of question only must not pass for want of evidence."""
    silent = lambda i, q, a: None if a == "Thought process:" else honest(i, q, a)  # noqa: E731
    report, _ = run(tmp_path, silent, rows())
    (check,) = [c for c in report.checks if c.ok is False]
    assert (check.name, check.n, check.score) == ("template", 0, None) and check.of > 4 and not report.ok
    assert any("FAILED" in line and f"n=0 of {check.of}" in line for line in report.error().details)
    yes_no = [row for row in rows() if row["problem"].startswith("Is it")]  # to these, Yes is an answer
    report, _ = run(tmp_path, honest, [*yes_no, *yes_no])
    assert [c.asked for c in report.checks if c.ok is None] == ["'Yes'"]


@pytest.mark.parametrize("data", ["one answer", "one sample"])
def test_rows_that_have_no_wrong_answer_are_replaced_by_discs(tmp_path, data):
    """Else a judge that cannot tell right from wrong passed: two of the checks were not asked."""
    one = [row for row in rows() if row["solution"] == "yes"]
    given = (one, Canaries()) if data == "one answer" else (rows(), Canaries(samples=1))
    assert run(tmp_path / "a", honest, *given)[0].ok
    report, _ = run(tmp_path / "b", lambda i, q, a: 0.3, *given)
    assert {c.name for c in report.checks if c.ok is False} == {"right over wrong", "own image over another"}


def test_the_instruction_of_the_run_is_a_template(tmp_path):
    own = Prompt(instruction="Name the plant.")
    likes = lambda i, q, a: 1.0 if a.startswith("Name the plant.") else honest(i, q, a)  # noqa: E731
    assert run(tmp_path, likes, rows())[0].ok
    assert not run(tmp_path, likes, rows(), prompt=own)[0].ok


def training_with(judges: list, check_judge) -> grpo.GrpoTraining:
    """Of a run only what its callbacks on canaries and the guard look at."""
    training = object.__new__(grpo.GrpoTraining)
    training.recipe = SimpleNamespace(judges=judges)
    training._check_judge = check_judge
    return training


def test_every_judge_that_is_due_is_asked_although_one_failed():
    asked = []

    def failing(reward, step):
        asked.append((reward.key, step))
        raise UsageError(f"{reward.key} fails")

    judges = [SimpleNamespace(key=key, canaries=Canaries(every_steps=n)) for key, n in (("a", 2), ("b", 3), ("c", 2))]
    with pytest.raises(UsageError, match="a fails"):
        training_with(judges, failing)._ask_canaries(4)
    assert asked == [("a", 4), ("c", 4)]


def test_the_guards_reason_goes_before_a_canarys_of_the_same_step(tmp_path):
    training = training_with([], None)
    training.stopped = GuardStop("a canary")
    training.guard = SimpleNamespace(observe=lambda figures: Verdict(stop="no spread", figure="zero_std"))
    training.args = SimpleNamespace(device="cpu")
    training.run = SimpleNamespace(rollouts=tmp_path)
    control = SimpleNamespace()
    training._guard(1, [], {"loss": 0.0}, control)
    assert "no spread" in training.stopped.message and control.should_training_stop and control.should_save
