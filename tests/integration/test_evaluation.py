"""Evaluation while training: held-out rows and a benchmark, resume, the best checkpoint, reward hacking."""

import json
import threading
from pathlib import Path

import grpo_worker
import pytest
from tiny_models import draw, draw_rows, save_tiny, write_rows

from r1vfree_cli.config import recipes
from r1vfree_cli.core.errors import GuardStop, Interrupted, UsageError
from r1vfree_cli.core.files import read_json, read_jsonl
from r1vfree_cli.eval import worker as eval_worker
from r1vfree_cli.launch import plan as plans
from r1vfree_cli.run.attempt import Attempt
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training import evaluation, grpo
from r1vfree_cli.training import worker as common

pytestmark = pytest.mark.xdist_group("evaluation")
JUDGE = {"name": "feedback", "backend": "local", "model": "x", "canaries": None}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    save_tiny(root / "model")
    write_rows(root / "data", draw_rows(4))
    write_rows(root / "data", [row | {"solution": None} for row in draw_rows(4, seed=1)], "test")
    for i in range(3):
        draw(i).save(root / f"{i}.png")
    questions = [
        {"question_id": i, "image": f"{i % 3}.png", "text": "Is there a circle in the image?"} for i in range(6)
    ]
    lines = [json.dumps(q | {"label": "yes" if q["question_id"] % 2 else "no"}) for q in questions]
    (root / "coco_pope_random.json").write_text("\n".join(lines))
    return root


def begin(home: Path, where: Path, settings: dict, **train):
    document = {
        "model": {"name": str(home / "model"), "dtype": "float32", "min_pixels": 784, "max_pixels": 56 * 56},
        "data": {"path": str(home / "data"), "heldout": {"path": str(home / "data")}},
        "rewards": [{"name": "format"}, JUDGE],
        "eval": {"every_steps": 2} | settings,
        "train": {"max_steps": 4, "logging_steps": 1, "save_steps": 1, "save_total_limit": 1, "learning_rate": 1e-3}
        | {"num_generations": 2, "max_completion_length": 4, "gradient_checkpointing": False}
        | train,
        "launch": {"preset": "cpu"},
    }
    recipe = recipes.validate("grpo", document, "test")
    run = RunDir(where)
    run.begin(recipes.to_yaml(recipe), resume=run.holds_run)
    return recipe, run


class Scripted(grpo_worker.Judge):
    """Scores held-out answers by how often it was asked: `score(evaluation, i)`; asks the run to end in step `stop`."""

    def __init__(self, score, stop: int = 0):
        self.score, self.asked, self.stop = score, 0, stop

    async def __call__(self, *args, trainer_state, **kwargs):
        if trainer_state.global_step + 1 == self.stop:
            common._stop.set()
        return await super().__call__(*args, trainer_state=trainer_state, **kwargs)

    def ask(self, items):
        self.asked += 1
        return [self.score(self.asked - 1, i) for i in range(len(items))]

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


@pytest.fixture
def judged(monkeypatch):
    """`judged(training judge, other judge)` before a run."""

    def build(judge, other=None):
        monkeypatch.setattr(grpo, "build_rewards", lambda *a, **k: [grpo_worker.Letters(), judge])
        monkeypatch.setattr(grpo, "build_feedback", lambda *a, **k: other)
        monkeypatch.setattr(common, "_stop", threading.Event())

    return build


def evaluations(run: RunDir) -> list[dict]:
    lines = [line for _, line in read_jsonl(run.metrics)]
    return [line for line in lines if any(key.startswith("eval/") for key in line)]


def best_first(evaluation: int, i: int) -> float:
    return [0.1, 0.9, 0.5][evaluation] + i / 100


def test_unlabelled_rows_are_judged_the_best_checkpoint_stays_and_a_resume_is_the_same_run(home, tmp_path, judged):
    judged(Scripted(best_first))
    recipe, whole = begin(home, tmp_path / "whole", {"keep_best": "feedback"})
    grpo.main(recipe, Attempt.of(whole))
    found = evaluations(whole)
    assert [line["step"] for line in found] == [0, 2, 4]
    assert [line["eval/heldout/feedback"] for line in found] == pytest.approx([0.115, 0.915, 0.515])
    low, high = (found[0][f"eval/heldout/feedback/{end}"] for end in ("low", "high"))
    assert low < 0.115 < high and 0 <= found[0]["eval/heldout/format/high"] <= 1
    assert {p.name for p in whole.checkpoints.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    summary = read_json(whole.summary)
    assert summary["evaluation"]["best"] == {"step": 2, "feedback": pytest.approx(0.915)}
    assert summary["steps"] == 4 and "heldout_accuracy" not in summary

    judged(Scripted(best_first, stop=2))  # the signal falls into a step that is evaluated
    recipe, run = begin(home, tmp_path / "run", {"keep_best": "feedback"})
    with pytest.raises(Interrupted):
        grpo.main(recipe, Attempt.of(run))
    assert [line["step"] for line in evaluations(run)] == [0]
    judged(Scripted(best_first))
    begin(home, run.path, {"keep_best": "feedback"})
    grpo.main(recipe, Attempt.of(run, resume=True))
    assert evaluations(run) == found
    assert {p.name for p in run.checkpoints.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert read_json(run.summary)["evaluation"] == summary["evaluation"]
    final = [(r.final / "model.safetensors").read_bytes() for r in (run, whole)]
    assert final[0] == final[1]


@pytest.mark.parametrize("hacked", [True, False])
def test_a_judge_that_rises_alone_is_reward_hacking(home, tmp_path, judged, hacked):
    rising = Scripted(lambda n, i: 0.2 + 0.1 * n + i / 100)
    judged(rising, Scripted(lambda n, i: 0.3 + i / 100 + (0 if hacked else 0.09 * n)))
    recipe, run = begin(home, tmp_path, {"every_steps": 1, "judge_holdout": JUDGE})
    if not hacked:
        grpo.main(recipe, Attempt.of(run))
        return
    with pytest.raises(GuardStop, match=r"reward hacking: at step 2 .* feedback .* risen by 0.200") as caught:
        grpo.main(recipe, Attempt.of(run))
    assert "judge_holdout 0.3" in caught.value.details[0] and "->" in caught.value.details[0]
    assert run.status["state"] == "stopped" and (run.checkpoints / "checkpoint-2").is_dir()


def test_a_benchmark_is_answered_while_training_by_a_worker_of_its_own(home, tmp_path, judged):
    judged(grpo_worker.Judge())
    settings = {
        "benchmark": "pope",
        "questions": str(home / "coco_pope_random.json"),
        "limit": 4,
        "keep_best": "accuracy",
    }
    recipe, run = begin(home, tmp_path / "run", settings, max_steps=2)
    assert plans.plan("grpo", recipe, run.path).argv[-2] == "r1vfree_cli.eval.worker"
    eval_worker.main(recipe, Attempt.of(run))
    found = evaluations(run)
    assert [line["step"] for line in found] == [0, 2]
    assert 0 <= found[0]["eval/pope/accuracy/low"] <= found[0]["eval/pope/accuracy"] <= 100
    assert (run.checkpoints / "checkpoint-2").is_dir() and run.status["state"] == "finished"
    exam = eval_worker.benchmark_exam(recipe)
    assert exam.n == 4  # two figures with all their questions
    scored = exam.score(["<think>.</think><answer>yes</answer>"] * 4)
    assert scored.metrics["accuracy"][0] == 50 and scored.metrics["yes_rate"][0] == 100
    messages, images = exam.get(0)
    assert messages[-1]["content"][0]["type"] == "image" and images[0].mode == "RGB"

    recipe, run = begin(home, tmp_path / "other", settings | {"keep_best": "aAcc"}, max_steps=2)
    with pytest.raises(UsageError, match="keep_best aAcc: pope has accuracy"):
        eval_worker.main(recipe, Attempt.of(run))


def test_intervals_are_wilsons_and_the_normal_one():
    assert evaluation.share([True] * 8 + [False] * 2) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert evaluation.mean([0.0, 1.0, 0.0, 1.0])[1] == pytest.approx(0.5 - 1.96 * 0.57735 / 2, abs=1e-4)


def test_what_contradicts_itself_is_known_before_anything_loads():
    base = recipes.load("grpo", "tiny").model_dump(mode="json")
    for change, words in (
        ({"data": base["data"] | {"heldout": None}, "eval": {"every_steps": 1}}, "needs data.heldout"),
        ({"eval": {"benchmark": "pope", "judge_holdout": JUDGE}}, "needs benchmark heldout"),
        ({"eval": {"judge_holdout": JUDGE}, "rewards": [{"name": "format"}]}, "rewards has none"),
    ):
        with pytest.raises(UsageError) as caught:
            recipes.validate("grpo", base | change, "test")
        assert words in " ".join(caught.value.details), caught.value.details
