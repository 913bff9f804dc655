"""A reward in one file outside the package, and nothing else: a real tiny model is trained with it."""

from __future__ import annotations

import hashlib
import threading

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_models import draw_rows, save_tiny

from r1vfree_cli.config import recipes
from r1vfree_cli.core.errors import UsageError
from r1vfree_cli.core.files import read_json, read_jsonl
from r1vfree_cli.launch import preflight
from r1vfree_cli.run.attempt import Attempt
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training import grpo
from r1vfree_cli.training import worker as common
from r1vfree_cli.training.recorder import rollout_file

pytestmark = pytest.mark.xdist_group("grpo_worker")
FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("id", "problem", "solution", "thinking", "source")}
    | {"images": datasets.List(datasets.Image())}
)
CODE = '''
class Brevity:
    """Short replies score; those to questions about colours are not scored. It counts what it has seen."""

    def __init__(self, max_chars):
        self.max_chars, self.seen = max_chars, 0

    async def __call__(self, prompts, completions, problem, images, **kwargs):
        for prompt in prompts:
            system, user = prompt
            assert system["content"][0]["text"] == "You are terse." and "One word." in user["content"][-1]["text"]
        assert all(len(row) == 1 for row in images)
        self.seen += len(completions)
        texts = [c[0]["content"] for c in completions]
        return [None if "colour" in p else len(t) / self.max_chars for p, t in zip(problem, texts)]

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]

    def stats(self):
        return {"seen": self.seen}

    def close(self):
        with open(__file__ + ".closed", "a") as file:
            print(self.seen, file=file)


def letters(completions, trainer_state, fail_after=99):
    if trainer_state.global_step >= fail_after:
        raise KeyError("no such letter")
    return [len(set(c[0]["content"])) for c in completions]
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("user")
    save_tiny(root / "model")
    (root / "data").mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        rows = datasets.Dataset.from_list(draw_rows(12, seed=seed), features=FEATURES)
        rows.to_parquet(root / "data" / f"{split}-00000.parquet")
    return root


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "_stop", threading.Event())
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))


def start(home, where, rewards, *sets):
    where.mkdir()
    (where / "mine.py").write_text(CODE)
    train = {"num_generations": 4, "prompts_per_device": 2, "max_steps": 2, "max_completion_length": 8, "save_steps": 1,
             "beta": 0.0, "learning_rate": 1e-3, "logging_steps": 1, "gradient_checkpointing": False}  # fmt: skip
    document = {
        "model": {"name": str(home / "model"), "dtype": "float32", "min_pixels": 784, "max_pixels": 84 * 84},
        "data": {"path": str(home / "data")},
        "prompt": {"instruction": "One word.", "system": "You are terse."},
        "rewards": rewards,
        "train": train,
        "launch": {"preset": "cpu"},
    }
    (where / "recipe.yaml").write_text(yaml.safe_dump(document))
    return again(where, *sets)


def again(where, *sets):
    recipe = recipes.load("grpo", str(where / "recipe.yaml"), sets)
    assert preflight.check(recipe).errors == []
    run = RunDir(where / "run")
    run.begin(recipes.to_yaml(recipe), resume=run.holds_run)
    return recipes.validate("grpo", recipes.load_document(run.recipe), "as a worker reads it"), run


def test_one_file_is_all_it_takes(home, tmp_path, monkeypatch):
    where = tmp_path / "here"
    rewards = [
        {"name": "mine.py:Brevity", "label": "brevity", "weight": 0.3, "max_chars": 10},
        {"name": "mine.py:letters"},
    ]
    recipe, run = start(home, where, rewards)
    grpo.main(recipe, Attempt.of(run))
    lines = [line for _, line in read_jsonl(run.metrics)]
    assert [line["brevity/seen"] for line in lines] == [8, 16] and lines[1]["grad_norm"] > 0
    asked = 0
    for step, line in enumerate(lines, 1):
        found = pq.read_table(rollout_file(run, step)).to_pydict()
        scores = found["rewards/brevity"]
        asked += sum(s is not None for s in scores)
        assert [s is None for s in scores] == ["colour" in p for p in found["prompt"]]
        assert line["rewards/brevity/unscored"] == pytest.approx(sum(s is None for s in scores) / 8)
        assert all(s is not None for s in found["rewards/letters"]) and "rewards/letters/mean" in line
    assert asked
    contract = read_json(run.final / "r1v.json")
    identity = contract["rewards"][0]
    assert identity["sha256"] == hashlib.sha256(CODE.encode()).hexdigest() and identity["arguments"] == {
        "max_chars": 10
    }
    assert contract["prompt"]["system"] == "You are terse." and (where / "mine.py.closed").read_text() == "16\n"

    monkeypatch.chdir(tmp_path)  # the path in the run dir does not depend on where r1v is started
    recipe, run = again(where, "train.max_steps=3")
    grpo.main(recipe, Attempt.of(run, resume=True))
    assert [line["brevity/seen"] for _, line in read_jsonl(run.metrics)] == [8, 16, 24]


def test_an_exception_stops_the_run_with_file_line_and_a_checkpoint(home, tmp_path):
    recipe, run = start(home, tmp_path / "here", [{"name": "mine.py:letters", "fail_after": 1}])
    with pytest.raises(UsageError, match=r"reward letters raised KeyError: 'no such letter' \(.*mine\.py:\d+\)") as e:
        grpo.main(recipe, Attempt.of(run))
    assert e.value.exit_code == 2 and any("raise KeyError" in line for line in e.value.details)
    assert run.status["state"] == "stopped" and (run.checkpoints / "checkpoint-1").is_dir()


def test_canaries_ask_the_rows_that_are_trained_on(home, tmp_path, monkeypatch):
    asked = []

    class Judge:
        __name__, floor, required, max_failed_fraction, failures = "feedback", 0.0, True, 0.5, ()

        def ask(self, items, **_):
            asked.extend(items)
            return [0.9 if i < len(asked) else 0.1 for i, _ in enumerate(items)]

    monkeypatch.setattr(grpo, "build_rewards", lambda *_, **__: [Judge()])
    judge = {"name": "feedback", "backend": "local", "model": "x"}
    heldout = f"data.heldout={{path: {home / 'data'}, split: test}}"
    recipe, run = start(home, tmp_path / "here", [judge | {"model": str(home / "model")}], heldout)
    with pytest.raises(UsageError, match="fails its canaries"):
        grpo.main(recipe, Attempt.of(run))
    trained = {row["images"][0].tobytes() for row in draw_rows(12, seed=0)}
    assert asked and all(image.tobytes() in trained for (image,), _, _ in asked)
    assert {"One word.\n" in answer for _, _, answer in asked} == {True, False}  # the instruction is a template
