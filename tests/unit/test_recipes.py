"""Recipes: shipped ones load, overrides, and every error of a recipe at once."""

import math

import pytest
import yaml

from r1vfree_cli.config import recipes
from r1vfree_cli.core.errors import UsageError

GOOD = {
    "model": {"name": "org/model"},
    "data": {"path": "shapes"},
    "rewards": [{"name": "format"}, {"name": "feedback", "backend": "local", "model": "org/judge"}],
    "train": {"learning_rate": 1e-6},
}


SLOW = {"name": "feedback", "base_url": "http://127.0.0.1:1", "step_deadline_s": 2000}


def write(tmp_path, document):
    path = tmp_path / "recipe.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return str(path)


def errors_of(tmp_path, document, overrides=(), stage="grpo"):
    with pytest.raises(UsageError) as e:
        recipes.load(stage, write(tmp_path, document), list(overrides))
    assert e.value.exit_code == 2
    return "\n".join([e.value.message, *e.value.details])


@pytest.mark.parametrize("name", [n for n in recipes.shipped() if not n.startswith("eval/")])
def test_every_shipped_recipe_loads_and_reads_back_equal(name, tmp_path):
    stage = name.split("/")[0]
    recipe = recipes.load(stage, name)
    again = recipes.load(stage, write(tmp_path, recipes.to_yaml(recipe)))
    assert again == recipe
    header = recipes.shipped()[name].read_text()
    short = name.split("/")[1]
    assert f"r1v {stage} --recipe {short}" in header and "Needs:" in header and "Hardware:" in header


@pytest.mark.parametrize(
    "name, model, data, processes, preset, epochs",
    [
        ("qwen2vl-2b-clevr", "Qwen/Qwen2-VL-2B-Instruct", "leonardPKU/clevr_cogen_a_train", 8, "zero3", 2),
        ("qwen2vl-7b-clevr", "Qwen/Qwen2-VL-7B-Instruct", "leonardPKU/clevr_cogen_a_train", 8, "zero3", 2),
        ("qwen2vl-2b-rlhfv", "Qwen/Qwen2-VL-2B-Instruct", "Exgc/R1V-Free_RLHFV", 6, "zero3", 10),
        ("qwen25vl-3b-rlhfv", "Qwen/Qwen2.5-VL-3B-Instruct", "Exgc/R1V-Free_RLHFV", 6, "zero3", 10),
        ("qwen25vl-7b-rlhfv", "Qwen/Qwen2.5-VL-7B-Instruct", "Exgc/R1V-Free_RLHFV", 6, "zero3", 10),
    ],
)
def test_the_readme_runs_are_what_they_say(name, model, data, processes, preset, epochs):
    recipe = recipes.load("grpo", name)
    train = recipe.train.model_extra
    assert (recipe.model.name, recipe.data.path) == (model, data)
    assert (recipe.launch.processes, recipe.launch.preset) == (processes, preset)
    assert train["num_train_epochs"] == epochs and train["beta"] == 0.04 and train["loss_type"] == "grpo"
    assert train["learning_rate"] == 1e-6 and train["max_completion_length"] == 512 and train["temperature"] == 1.0
    assert (recipe.model.min_pixels, recipe.model.max_pixels, recipe.data.max_prompt_tokens) == (3136, 401408, 512)
    assert (recipe.train.num_generations, recipe.train.prompts_per_device) == (8, 1)
    names = [r.name for r in recipe.rewards]
    assert names == (["accuracy", "format"] if "clevr" in name else ["format", "feedback"])
    if recipe.feedback:
        assert recipe.feedback.serve.devices == [6, 7]


def test_trap_1e_6_is_a_number_in_files_and_overrides(tmp_path):
    path = write(tmp_path, yaml.safe_dump(GOOD).replace("1.0e-06", "1e-6"))
    assert recipes.load("grpo", path).train.learning_rate == 1e-6
    assert recipes.load("grpo", path, ["train.learning_rate=3e-5"]).train.learning_rate == 3e-5


@pytest.mark.parametrize(
    "text, value",
    [("1e-6", 1e-6), ("1E5", 1e5), ("-2", -2), ("012", 12), (".5", 0.5), ("1.", 1.0), ("true", True), ("yes", "yes"),
     ("off", "off"), ("null", None), ("", None), ("1e", "1e"), ("2024-01-01", "2024-01-01"), ("1:30", "1:30"), (".inf", math.inf)],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = recipes.read_yaml(text, "here")
    assert found == value and type(found) is type(value)


def test_all_errors_at_once_with_key_found_allowed_and_nearest(tmp_path):
    text = errors_of(
        tmp_path,
        {
            "model": {"name": "m", "dtpe": "bf16", "min_pixels": "3"},
            "data": {"path": "y"},
            "rewards": [{"name": "fedback"}, {"name": "feedback", "backend": "clasify", "model": "x"}],
            "train": {"learning_rate": "abc", "bta": 0.1, "per_device_train_batch_size": 8, "eval_strategy": "steps"},
            "launch": {"preset": "zero-3"},
        },
    )
    for part in (
        "model.dtpe", "nearest is model.dtype", "model.min_pixels", "'3'", "unknown reward 'fedback'", "nearest is feedback",
        "nearest is classify", "train.learning_rate: must be float; found 'abc'", "nearest is train.beta",
        "use train.prompts_per_device", "nearest is zero3", "data.heldout is measured",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    "change, part",
    [
        ({"launch": {"processes": 3, "nodes": 2, "main_address": "a"}}, "multiple of nodes"),
        ({"launch": {"nodes": 2, "processes": 2}}, "main_address"),
        ({"launch": {"preset": "cpu", "processes": 2}}, "preset ddp with device cpu"),
        ({"launch": {"nodes": 2, "processes": 2, "main_address": "a", "node_rank": 2}}, "node_rank"),
        ({"train": {"generation_batch_size": 12}}, "multiple of"),
        ({"train": {"gradient_accumulation_steps": 0}}, "at least 1"),
        ({"model": {"name": "m", "min_pixels": 5000, "max_pixels": 4000}}, "min_pixels"),
        ({"rewards": [{"name": "format"}, {"name": "format"}]}, "listed 2 times"),
        ({"rewards": []}, "rewards"),
        ({"rewards": [{"name": "feedback", "backend": "chat"}]}, "needs base_url and model"),
        ({"rewards": [{"name": "feedback", "backend": "classify"}]}, "exactly one of base_url"),
        ({"launch": {"processes": 2}, "rewards": [SLOW]}, "must be below train.ddp_timeout (1800)"),
        ({"launch": {"processes": 2}, "rewards": [SLOW], "train": {"ddp_timeout": 1900}}, "ddp_timeout (1900)"),
        ({"train": None}, "train"),
        ({"train": [1]}, "train"),
        ({"data": {"path": ""}}, "data.path"),
        ({"extra": 1}, "extra: unknown key"),
    ],
)
def test_impossible_combinations(tmp_path, change, part):
    assert part in errors_of(tmp_path, GOOD | change)


@pytest.mark.parametrize(
    "text", ["a: [", "- 1", "", "x", "a: 1\na: 2", "1: 2", "a: !!python/object:os.system {}", "\x00", "&a [*a]"]
)
def test_not_a_recipe(tmp_path, text):
    errors_of(tmp_path, text)


def test_a_binary_file_is_no_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError):
        recipes.load("grpo", str(path))


def test_overrides_reach_lists_by_name_and_index(tmp_path):
    path = write(tmp_path, GOOD)
    recipe = recipes.load(
        "grpo", path, ["rewards.feedback.weight=0.5", "rewards.0.weight=2", "data.heldout={path: shapes}"]
    )
    assert [r.weight for r in recipe.rewards] == [2, 0.5] and recipe.data.heldout.split == "test"


@pytest.mark.parametrize(
    "item",
    ["x", "=1", "a..b=1", "rewards.7.weight=1", "rewards.nope.weight=1", "model.name.x=1", "train.a=[", "model=3"],
)
def test_bad_overrides(tmp_path, item):
    errors_of(tmp_path, GOOD, [item])


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UsageError) as e:
        recipes.find("grpo", "qwen25vl-3b-rlhv")
    assert "qwen25vl-3b-rlhfv" in e.value.hint
    with pytest.raises(UsageError, match="for `r1v sft`"):
        recipes.find("grpo", "sft/qwen2vl-2b-clevr")
