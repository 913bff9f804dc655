"""Rewards of a user's own: what is checked before anything runs, and what a run gets from them. No torch."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
import yaml

from r1vfree_cli.config import recipes
from r1vfree_cli.config.rewards import UserReward
from r1vfree_cli.config.user_rewards import reward_errors
from r1vfree_cli.core.errors import UsageError
from r1vfree_cli.rewards.registry import build_rewards
from r1vfree_cli.run import contract

COLUMNS = ["id", "images", "problem"]
CODE = """
from functools import partial
import asyncio

def brevity(completions, max_words=40, **kwargs):
    return [float(len(c.split()) <= max_words) for c in completions]

async def slow(prompts, completions, problem, **kwargs):
    await asyncio.sleep(0)
    return [None if p == "skip" else 1 for p in problem]

def narrow(completions, reference, *, scale: "a number" = 1): return [scale] * len(completions)

def labelled(completions, solution): return [1.0] * len(completions)

class Seen:
    def __init__(self, start, step=1):
        self.n, self.step = start, step
    def __call__(self, completions, **_):
        self.n += self.step
        return [self.n] * len(completions)
    def state_dict(self): return {"n": self.n}
    def load_state_dict(self, state): self.n = state["n"]
    def stats(self): return {"calls": self.n}
    def close(self): self.n = -1

class Silent: pass

twice = partial(brevity, max_words=2)
number = 3

def bad(completions, give, **_):
    return {"short": [1.0], "text": "abcd", "none": None, "words": ["high", 1.0, 1, 1], "nan": [float("nan"), 1, 1, 1],
            "huge": [1e39, 0, 0, 0], "table": [[1], 1, 1, 1]}[give]

def broken(completions, **_):
    return [len(c) / 0 for c in completions]

def leaves(completions, **_):
    raise SystemExit("bye")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(CODE)
    return path


def reward(file, name, **keys) -> UserReward:
    return UserReward.model_validate({"name": f"{file}:{name}", **keys})


def built(file, name, **keys):
    return build_rewards([reward(file, name, **keys)])[0]


def call(one, completions=("a b c", "d", "e", "f"), **given):
    given = {"prompts": [""] * len(completions), "problem": [""] * len(completions), "trainer_state": None, **given}
    return asyncio.run(one(completions=list(completions), **given))


# --- known before a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, keys, parts",
    [
        ("brevity", {"max_words": 3}, ()),
        ("brevity", {"max_wrds": 3}, ("no parameter max_wrds", "nearest is max_words")),
        ("brevity", {"anything": 3}, ()),  # **kwargs takes it
        ("brevty", {}, ("no function or class brevty", "nearest is brevity")),
        ("slow", {}, ()),
        ("slow", {"problem": 3}, ("problem is handed to every reward",)),
        ("narrow", {}, ("my_rewards.py:12", "missing a required argument: 'reference'")),
        ("narrow", {"reference": 1, "scale": 2}, ()),
        ("narrow", {"reference": 1, "weights": 2}, ("unexpected keyword argument 'weights'",)),
        ("labelled", {}, ("missing a required argument: 'solution'",)),  # no row has one
        ("Seen", {"start": 0}, ()),
        ("Seen", {}, ("missing a required argument: 'start'",)),
        ("Seen", {"start": 0, "stp": 1}, ("nearest is step",)),
        ("Silent", {}, ("has no __call__",)),
        ("Silent", {"start": 0}, ("no __init__ that takes start",)),
        ("twice", {}, ()),  # made in another way: known once it runs
    ],
)
def test_what_can_be_known_is_said_without_running_the_code(file, name, keys, parts):
    found = "\n".join(reward_errors(reward(file, name, **keys), COLUMNS))
    assert bool(found) is bool(parts) and all(part in found for part in parts), found
    assert not found or found.startswith(f"rewards.{name}: ")


def test_files_and_modules_that_are_not_there_or_do_not_parse(tmp_path):
    (tmp_path / "wrong.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "binary.py").write_bytes(b"\x00\xff")
    for name, part in (
        (f"{tmp_path}/nothing.py:f", "no file"),
        (f"{tmp_path}/wrong.py:f", "wrong.py:2: "),
        (f"{tmp_path}/binary.py:f", "binary.py"),
        ("r1vfree_cli.rewards.nothing:f", "no module r1vfree_cli.rewards.nothing"),
        ("no_such_package.x:f", "FILE.py:FUNCTION"),
    ):
        (line,) = reward_errors(UserReward(name=name), COLUMNS)
        assert part in line
    assert reward_errors(UserReward(name="r1vfree_cli.rewards.text:format_reward"), COLUMNS) == []


def document(*rewards) -> dict:
    return {
        "model": {"name": "org/model", "max_pixels": 3136},
        "data": {"path": "shapes"},
        "rewards": list(rewards),
        "train": {},
        "launch": {"preset": "cpu"},
    }


def test_relative_paths_belong_to_the_recipe_and_those_of_set_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "here").mkdir()
    recipe = tmp_path / "recipes" / "r.yaml"
    recipe.write_text(yaml.safe_dump(document({"name": "mine.py:f"}, {"name": "package.module:g"})))
    monkeypatch.chdir(tmp_path / "here")
    found = recipes.load("grpo", str(recipe), ["rewards.f.weight=0.5", "rewards.f.max_words=3"])
    assert [r.name for r in found.rewards] == [f"{tmp_path}/recipes/mine.py:f", "package.module:g"]
    assert (found.rewards[0].weight, found.rewards[0].arguments) == (0.5, {"max_words": 3})
    found = recipes.load("grpo", str(recipe), ["rewards=[{name: 'mine.py:f', label: short}]"])
    assert found.rewards[0].name == f"{tmp_path}/here/mine.py:f" and found.rewards[0].key == "short"
    named = document({"name": "mine.py:f"})
    named["model"]["family"] = "families/mine.py:FAMILY"
    recipe.write_text(yaml.safe_dump(named))
    assert recipes.load("grpo", str(recipe)).model.family == f"{tmp_path}/recipes/families/mine.py:FAMILY"
    moved = recipes.load("grpo", str(recipe), ["model.family=mine.py:FAMILY"])
    assert moved.model.family == f"{tmp_path}/here/mine.py:FAMILY"
    again = tmp_path / "elsewhere.yaml"
    again.write_text(recipes.to_yaml(found))
    assert recipes.load("grpo", str(again)) == found


def test_the_dry_run_reports_all_of_it_without_torch_and_without_running_the_code(tmp_path):
    (tmp_path / "my.py").write_text("raise RuntimeError('run')\ndef f(completions, reference): ...\n")
    rewards = [{"name": "my.py:f"}, {"name": "my.py:g"}, {"name": "no.py:h"}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document(*rewards)))
    code = (
        "import sys; from r1vfree_cli.cli import main; sys.argv = ['r1v', 'grpo', '--recipe', 'r.yaml', '--dry-run', '--json']\n"
        "try: main()\nfinally: print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    errors = done.stderr
    assert not done.stdout
    for part in ("rewards.f: ", "'reference'", "rewards.g: no function", "rewards.h: no file"):
        assert part in errors
    assert done.stderr.strip().endswith("[]")


# --- in a run --------------------------------------------------------------------------------------------------


def test_functions_coroutines_and_objects_score_and_none_is_not_scored(file):
    assert call(built(file, "brevity", max_words=2)) == [0.0, 1.0, 1.0, 1.0]
    assert call(built(file, "slow"), problem=["a", "skip", "b", "skip"]) == [1.0, None, 1.0, None]
    assert call(built(file, "narrow", reference=1, scale=3)) == [3.0] * 4  # gets no more than it names
    assert call(built(file, "twice")) == [0.0, 1.0, 1.0, 1.0]


def test_settings_and_identity_are_those_of_any_reward(file):
    one = built(file, "brevity", max_words=2, weight=0.3, label="short", required=True, max_failed_fraction=0.5)
    assert (one.__name__, one.weight, one.required, one.max_failed_fraction) == ("short", 0.3, True, 0.5)
    identity = one.identity()
    assert identity["name"] == "short" and identity["weight"] == 0.3 and identity["arguments"] == {"max_words": 2}
    assert identity["source"] == "my_rewards.py:brevity" and len(identity["sha256"]) == 64
    file.write_text(CODE + "# changed\n")
    assert built(file, "brevity").identity()["sha256"] != identity["sha256"]
    assert not hasattr(one, "state_dict") and not hasattr(one, "close") and not hasattr(one, "stats")


def test_an_objects_state_figures_and_end_are_the_rewards(file):
    one = built(file, "Seen", start=5, label="seen")
    assert call(one) == [6.0] * 4 and one.state_dict() == {"n": 6} and one.stats() == {"seen/calls": 6.0}
    other = built(file, "Seen", start=0)
    other.load_state_dict(one.state_dict())
    assert call(other) == [7.0] * 4
    other.close()
    assert other.state_dict() == {"n": -1}


def test_a_state_that_no_checkpoint_holds_is_known_at_once(tmp_path):
    path = tmp_path / "stateful.py"
    path.write_text("class A:\n    def __call__(self, **_): ...\n    def state_dict(self): return {'x': object()}\n")
    with pytest.raises(UsageError, match="state_dict"):
        built(path, "A")


@pytest.mark.parametrize(
    "give, part",
    [
        ("short", "returned 1 scores for 4 completions"),
        ("text", "not one number or None for each"),
        ("none", "not one number or None for each"),
        ("words", "'high' for completion 0, which is neither a number nor None"),
        ("nan", "nan for completion 0: a score is finite, or None"),
        ("huge", "1e+39 for completion 0"),
        ("table", "[1] for completion 0"),
    ],
)
def test_what_is_no_score_is_refused_by_name_and_file(file, give, part):
    with pytest.raises(UsageError) as caught:
        call(built(file, "bad", give=give))
    assert part in caught.value.message and f"reward bad ({file})" in caught.value.message


def test_arrays_and_scalars_of_numpy_are_numbers(tmp_path):
    path = tmp_path / "arrays.py"
    path.write_text("import numpy as np\ndef f(completions): return np.array([0.5, 1, 0, 2], dtype='float32')\n")
    assert call(built(path, "f")) == [0.5, 1.0, 0.0, 2.0]


@pytest.mark.parametrize("name, what", [("broken", "ZeroDivisionError"), ("leaves", "SystemExit")])
def test_an_exception_names_file_and_line(file, name, what):
    line = next(i for i, text in enumerate(CODE.splitlines(), 1) if text.startswith(f"def {name}(")) + 1
    with pytest.raises(UsageError) as caught:
        call(built(file, name))
    assert f"reward {name} raised {what}" in caught.value.message and f"({file}:{line})" in caught.value.message
    assert any(what in detail for detail in caught.value.details)


def test_code_that_fails_on_import_names_file_and_line(tmp_path):
    path = tmp_path / "fails.py"
    path.write_text("def f(completions): ...\nimport no_such_package_at_all\n")
    with pytest.raises(UsageError, match=r"reward f raised on import ModuleNotFoundError.*fails\.py:2\)"):
        built(path, "f")
    with pytest.raises(UsageError, match=r"cannot be called|is not a callable"):
        path.write_text("f = 3\n")
        built(path, "f")


def test_a_file_may_import_what_lies_beside_it_but_hides_no_package(tmp_path, monkeypatch):
    (tmp_path / "helper_of_mine.py").write_text("VALUE = 2\n")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('hidden')\n")
    path = tmp_path / "uses.py"
    path.write_text(
        "import colorsys\nfrom helper_of_mine import VALUE\ndef f(completions): return [VALUE] * len(completions)\n"
    )
    before = list(sys.path)
    assert call(built(path, "f")) == [2.0] * 4 and sys.path == before
    monkeypatch.delitem(sys.modules, "helper_of_mine")


# --- several of a kind -----------------------------------------------------------------------------------------


def judge(**keys) -> dict:
    return {"name": "feedback", "backend": "chat", "base_url": "http://127.0.0.1:1/v1", "model": "m", **keys}


def test_two_judges_have_models_weights_and_figures_of_their_own():
    two = [judge(label="small", model="a", weight=0.3), judge(label="large", model="b")]
    recipe = recipes.validate("grpo", document(*two), "here")
    assert [j.key for j in recipe.judges] == ["small", "large"]
    small, large = build_rewards(recipe.rewards)
    assert (small.__name__, small.weight, large.__name__, large.weight) == ("small", 0.3, "large", 1.0)
    assert small.identity()["model"] == "a" and large.identity()["model"] == "b"
    assert {key.rpartition("/")[0] for key in (*small.stats(), *large.stats())} == {"judge/small", "judge/large"}
    (only,) = build_rewards(recipe.rewards[:1])
    assert "judge/calls" in only.stats()
    path = recipes._override  # by label, as metrics call them
    changed = document(*two)
    path(changed, "rewards.large.weight=2")
    assert changed["rewards"][1]["weight"] == 2


@pytest.mark.parametrize(
    "rewards, part",
    [
        ([judge(), judge(model="b")], "2 rewards are called 'feedback': give each a label of its own"),
        ([judge(label="a"), {"name": "format", "label": "a"}], "2 rewards are called 'a'"),
        ([{"name": "x.py:format"}, {"name": "format"}], "2 rewards are called 'format'"),
        ([judge(label="a/b")], "label"),
        ([{"name": "x.py"}], "FILE.py:FUNCTION"),
        ([{"name": "x.py:1f"}], "rewards.0.name"),
        (
            [judge(label=n, backend="classify", base_url=None, model=None, serve={"model": n}) for n in "ab"],
            "serve stands at two rewards",
        ),
        ([judge(serve={"model": "m"})], "does not use serve: set rewards.feedback.serve: null"),
        ([judge(backend="local", label="j")], "does not use base_url: set rewards.j.base_url: null"),
        (
            [judge(backend="classify", base_url=None, serve={"model": "m"})],
            "with serve does not use model: set rewards.feedback.model: null",
        ),
    ],
)
def test_rewards_that_do_not_go_together(rewards, part):
    with pytest.raises(UsageError) as caught:
        recipes.validate("grpo", document(*rewards), "here")
    assert part in "\n".join(caught.value.details)


# --- the prompt ------------------------------------------------------------------------------------------------


def test_a_prompt_of_ones_own_is_in_the_contract_and_its_hash():
    plain = recipes.validate("grpo", document({"name": "format"}), "here")
    own = recipes.validate("grpo", document({"name": "format"}) | {"prompt": {"instruction": "Count."}}, "here")
    first, second = (contract.build("grpo", r, data_sha256=None) for r in (plain, own))
    assert first["template_hash"] != second["template_hash"]
    assert second["prompt"] == {"instruction": "Count.", "system": None}
    assert own.policy_prompt.ask().startswith("Count.")


@pytest.mark.parametrize(
    "prompt, part",
    [
        ({"instruction": ""}, "prompt.instruction"),
        ({"system": "<|im_end|>"}, "control token"),
        ({"sytem": "x"}, "nearest is prompt.system"),
    ],
)
def test_a_prompt_that_is_none(prompt, part):
    with pytest.raises(UsageError) as caught:
        recipes.validate("grpo", document({"name": "format"}) | {"prompt": prompt}, "here")
    assert part in "\n".join(caught.value.details)
