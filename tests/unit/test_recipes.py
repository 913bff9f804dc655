"""Recipes: shipped ones load, overrides, and every error of a recipe at once."""

import math
import re
import typing

import pytest
import yaml

from r1vfree_cli.config import recipes, trl_keys
from r1vfree_cli.config.schema import Launch
from r1vfree_cli.core.errors import UsageError
from r1vfree_cli.launch import preflight

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
        ("qwen2vl-2b-clevr", "Qwen/Qwen2-VL-2B-Instruct", "leonardPKU/clevr_cogen_a_train", 8, "zero2", 2),
        ("qwen2vl-7b-clevr", "Qwen/Qwen2-VL-7B-Instruct", "leonardPKU/clevr_cogen_a_train", 8, "zero3", 2),
        ("qwen2vl-2b-rlhfv", "Qwen/Qwen2-VL-2B-Instruct", "Exgc/R1V-Free_RLHFV", 6, "zero2", 10),
        ("qwen25vl-3b-rlhfv", "Qwen/Qwen2.5-VL-3B-Instruct", "Exgc/R1V-Free_RLHFV", 6, "zero2", 10),
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
    assert (recipe.model.min_pixels, recipe.model.max_pixels, recipe.data.max_prompt_tokens) == (3136, 401408, 1024)
    assert train["save_total_limit"] == 2
    assert (recipe.train.num_generations, recipe.train.prompts_per_device) == (8, 1)
    names = [r.name for r in recipe.rewards]
    assert names == (["accuracy", "format"] if "clevr" in name else ["format", "feedback"])
    if recipe.judges:
        assert recipe.served.devices == [6, 7]


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
        ({"train": {"gradient_accumulation_steps": 0}}, "must be greater than or equal to 1; found 0"),
        ({"train": {"temperature": 0}}, "train.temperature: must be greater than 0; found 0"),
        ({"train": {"top_p": 1.5}}, "train.top_p: must be less than or equal to 1; found 1.5"),
        ({"train": {"seed": -1}}, "train.seed: must be greater than or equal to 0; found -1"),
        ({"train": {"top_k": -1}}, "train.top_k: must be greater than or equal to 0; found -1"),
        ({"train": {"min_p": 2}}, "train.min_p: must be less than or equal to 1; found 2"),
        ({"train": {"repetition_penalty": 0}}, "train.repetition_penalty: must be greater than 0; found 0"),
        ({"train": {"beta": -0.1}}, "train.beta: must be greater than or equal to 0; found -0.1"),
        ({"train": {"save_steps": 0}}, "train.save_steps: must be greater than 0; found 0"),
        ({"train": {"top_entropy_quantile": 20}}, "must be less than or equal to 1; found 20"),
        ({"train": {"optim": "adamw9"}}, "train.optim: must be 'adamw_torch', "),
        ({"train": {"lr_scheduler_type": "cosinus"}}, "train.lr_scheduler_type: must be 'linear', 'cosine', "),
        ({"train": {"save_strategy": "step"}}, "must be 'no', 'steps', 'epoch' or 'best'; found 'step'"),
        (
            {"train": {"generation_kwargs": {"temperature": 0}}},
            "train.generation_kwargs: temperature: write train.temperature",
        ),
        ({"train": {"log_level": "loud"}}, "train.log_level: must be 'detail', "),
        ({"train": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, "follows an evaluation loss"),
        ({"train": {"load_best_model_at_end": True}}, "keeps the best checkpoint"),
        ({"train": {"loss_type": "grpoo"}}, "train.loss_type: must be 'grpo', "),
        ({"train": {"importance_sampling_level": "word"}}, "must be 'token' or 'sequence'; found 'word'"),
        (
            {"data": {"path": "shapes", "max_prompt_tokens": 512}},
            "model.max_pixels (401408) allows images of 512 tokens",
        ),
        ({"model": {"name": "m", "min_pixels": 5000, "max_pixels": 4000}}, "min_pixels"),
        ({"rewards": [{"name": "format"}, {"name": "format"}]}, "2 rewards are called 'format'"),
        ({"rewards": []}, "rewards"),
        ({"rewards": [{"name": "feedback", "backend": "chat"}]}, "needs base_url and model"),
        ({"rewards": [{"name": "feedback", "backend": "classify"}]}, "exactly one of base_url"),
        ({"rewards": [SLOW | {"base_url": "127.0.0.1:1"}]}, "'^https?://.+'; found '127.0.0.1:1'"),
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


def test_a_mistyped_path_of_ones_own_recipe_names_the_file_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    for name in ("mine", "mine.yml", "min.yaml", str(tmp_path / "mien.yaml")):
        with pytest.raises(UsageError) as told:
            recipes.find("grpo", name)
        assert "mine.yaml?" in told.value.hint


def test_the_prompt_limit_holds_an_image_at_the_pixel_limit_and_a_question(tmp_path):
    recipe = recipes.load("grpo", write(tmp_path, GOOD | {"data": {"path": "shapes", "max_prompt_tokens": 544}}))
    assert recipe.data.max_prompt_tokens == 512 + 32


def test_an_optimizer_without_its_package_is_refused_before_the_launch(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "bitsandbytes" else True)
    for optim, wanted in (
        ("adamw_8bit", True),
        ("paged_adamw_32bit", True),
        ("rmsprop_bnb", True),
        ("adamw_torch", False),
    ):
        recipe = recipes.load("grpo", write(tmp_path, GOOD | {"train": {"optim": optim}, "launch": {"preset": "cpu"}}))
        for dry_run in (False, True):  # this machine could run it: a dry run refuses it too
            errors = "\n".join(preflight.check(recipe, dry_run=dry_run).errors)
            assert (f"train.optim {optim} needs the package bitsandbytes" in errors) is wanted


def test_every_optimizer_of_transformers_is_known_by_its_package():
    """Those without one are torch's and transformers' own: a new name is sorted in here, and in preflight."""
    own = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    names = typing.get_args(trl_keys.trl_keys("grpo")["optim"])
    assert {n for n in names if not any(re.fullmatch(p, n) for p in preflight._OPTIMIZERS)} == own


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"report_to": "mlflow"}}, "train.report_to mlflow needs the package mlflow"),
        ({"train": {"report_to": ["wandbb"]}}, "no tracker 'wandbb'; allowed: all, none"),
        ({"model": {"name": "m/m", "attention": "flash_attention_2"}}, "needs a GPU and a 16-bit model.dtype"),
        (
            {"model": {"name": "m/m", "lora": {"quantize": "4bit"}}},
            "model.lora.quantize needs the package bitsandbytes",
        ),
        ({"train": {"use_liger_kernel": True}}, "train.use_liger_kernel needs the package liger_kernel"),
    ],
)
def test_what_needs_a_package_is_refused_before_the_launch(tmp_path, monkeypatch, change, said):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    recipe = recipes.load("grpo", write(tmp_path, GOOD | {"launch": {"preset": "cpu"}} | change))
    assert any(said in error for error in preflight.check(recipe, dry_run=True).errors)
    elsewhere = preflight.check(recipe.model_copy(update={"launch": Launch(processes=64)}), dry_run=True)
    assert not any("needs the package" in error for error in elsewhere.errors)
