"""Model families through every stage, one more by a file outside the package, and models that compute NaN."""

from __future__ import annotations

import io
import threading

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import draw, draw_rows, save_tiny, write_rows

from r1vfree_cli.config import recipes
from r1vfree_cli.core.errors import DataError, GuardStop, UsageError
from r1vfree_cli.core.files import read_json
from r1vfree_cli.core.prompts import build_messages
from r1vfree_cli.eval.generate import Generator, Job
from r1vfree_cli.judges.local import LocalJudge
from r1vfree_cli.judges.protocol import Failure
from r1vfree_cli.models import family as families
from r1vfree_cli.models.sampling import LogitsWatch
from r1vfree_cli.run.attempt import Attempt
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training import grpo, merge, sft
from r1vfree_cli.training import worker as common

pytestmark = pytest.mark.xdist_group("families")
LIMITS = {"min_pixels": 784, "max_pixels": 84 * 84}
TRAIN = {"max_steps": 1, "logging_steps": 1, "save_steps": 9, "learning_rate": 1e-2, "gradient_checkpointing": False}


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "_stop", threading.Event())
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, draw_rows(4, seed=1), "test")
    return write_rows(folder, draw_rows(4))


def run(stage: str, where, model: dict, data, heldout: bool = False, **train) -> RunDir:
    """A step of `stage` in this process, from a recipe's file."""
    document: dict = {"model": {"dtype": "float32", **LIMITS, **model}, "data": {"path": str(data)}}
    document |= {"train": TRAIN | train, "launch": {"preset": "cpu"}}
    if heldout:
        document["data"]["heldout"] = {"path": str(data), "split": "test"}
    if stage == "grpo":
        document["rewards"] = [{"name": "format"}, {"name": "letters.py:letters"}]
        own = {"num_generations": 2, "prompts_per_device": 1, "max_completion_length": 4, "beta": 0.0}
        document["train"] = own | document["train"]
    where.mkdir()
    (where / "letters.py").write_text(
        "def letters(completions, **_):\n    return [float(len(set(c[0]['content']))) for c in completions]\n"
    )
    (where / "recipe.yaml").write_text(yaml.safe_dump(document))
    recipe = recipes.load(stage, str(where / "recipe.yaml"))
    made = RunDir(where / "run")
    made.begin(recipes.to_yaml(recipe), resume=False)
    {"grpo": grpo, "sft": sft}[stage].main(recipe, Attempt.of(made))
    return made


def ask(folder, **options) -> tuple[Generator, list]:
    """Replies of an evaluation to two questions about images."""
    generator = Generator(str(folder), max_new_tokens=4, device="cpu", **LIMITS, **options)
    jobs = []
    for i, size in enumerate([(56, 56), (84, 56)]):
        buffer = io.BytesIO()
        draw(i, size).save(buffer, "PNG")
        jobs.append(Job(str(i), build_messages("What colour is it?"), buffer.getvalue()))
    found: list = []
    generator.run(jobs, 2, lambda job, answer: found.append(answer))
    return generator, found


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_5", "internvl"])
def test_a_family_goes_through_every_stage(kind, data, tmp_path):
    model = save_tiny(tmp_path / "model", kind)
    warm = run("sft", tmp_path / "sft", {"name": str(model), "freeze_vision": True}, data)
    before, after = load_file(model / "model.safetensors"), load_file(warm.final / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tower = families._FAMILIES[kind].vision
    assert moved and not any(part in name for name in moved for part in tower)
    lora = {"name": str(warm.final), "freeze_vision": True, "lora": {"r": 2, "alpha": 4}}
    trained = run("grpo", tmp_path / "grpo", lora, data)
    adapted = load_file(trained.final / "adapter_model.safetensors")
    assert adapted and not any(part in name for name in adapted for part in tower)
    summary = merge.merge(trained.path, tmp_path / "merged")
    assert summary["kind"] == "adapter" and summary["max_logit_difference"] <= summary["tolerance"]
    replies = [[a.text for a in ask(folder)[1]] for folder in (trained.final, tmp_path / "merged")]
    assert replies[0] == replies[1] and len(replies[0]) == 2


def test_questions_without_an_image_are_answered_once_where_images_have_no_grid(tmp_path):
    """InternVL's inputs name no grid, so what has an image is told by the image."""
    generator, _ = ask(save_tiny(tmp_path / "model", "internvl"))
    jobs = []
    for i, question in enumerate(["What colour is it? " * 9, "What colour is it? " * 6, "Why?", "No?"]):
        buffer = io.BytesIO()
        draw(i).save(buffer, "PNG")
        image = buffer.getvalue() if i % 2 == 0 else None
        jobs.append(Job(str(i), build_messages(question, int(image is not None)), image))
    found: list[str] = []
    generator.run(jobs, 3, lambda job, answer: found.append(job.id))
    assert sorted(found) == ["0", "1", "2", "3"]


FAMILY = """
from r1vfree_cli.models.family import Family, edge_limits
MINE = Family("Mine", ("qwen2_5_vl",), ("visual",), end_tokens=("?",), set_pixel_limits=edge_limits)
"""


def test_one_file_adds_a_family(data, tmp_path):
    """One that ends its turns with a question mark and shares nothing, until the evaluation of what it trained."""
    model = save_tiny(tmp_path / "model")
    (tmp_path / "mine.py").write_text(FAMILY)
    trained = run("grpo", tmp_path / "here", {"name": str(model), "family": "../mine.py:MINE"}, data)
    contract = read_json(trained.final / "r1v.json")
    assert contract["family"] == f"{tmp_path}/mine.py:MINE"
    generator, _ = ask(trained.final, family=contract["family"])
    end = generator.processor.tokenizer.convert_tokens_to_ids("?")
    assert end in generator.settings.eos_token_id and end in contract["sampling"]["stop_token_ids"]
    assert not generator.reuse
    with pytest.raises(UsageError, match=r"model.family .*:OTHER cannot be loaded"):
        families.use(f"{tmp_path}/mine.py:OTHER")


# --- NaN -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """One NaN in the output layer of a model of the real class."""
    folder = save_tiny(tmp_path_factory.mktemp("nan") / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7, 3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_model_that_computes_nan_gets_no_answer(broken):
    with pytest.raises(DataError, match="computes NaN") as caught:
        ask(broken)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_rollouts_of_a_model_that_computes_nan_stop_the_run(broken, data, tmp_path, shared_prefix):
    with pytest.raises(GuardStop, match="computes NaN") as caught:
        run("grpo", tmp_path / "run", {"name": str(broken)}, data, shared_prefix=shared_prefix)
    assert caught.value.exit_code == 5


def test_held_out_rows_are_not_measured_with_nan(broken, data, tmp_path):
    with pytest.raises(GuardStop, match="computes NaN"):
        run("grpo", tmp_path / "run", {"name": str(broken)}, data, heldout=True)


def test_a_judge_that_computes_nan_scores_nothing(broken):
    judge = LocalJudge(str(broken))
    head = judge.model.get_output_embeddings().weight
    for row, bad in ((judge._yes, torch.nan), (judge._yes, torch.inf), (judge._no, torch.inf), (judge._no, -torch.inf)):
        whole = head[row].clone()
        head[row, 0] = bad
        scores = judge.score([([draw(i)], "Is it red?", "yes") for i in range(3)])
        assert [s.kind for s in scores] == ["out_of_range"] * 3, scores
        head[row] = whole


@pytest.mark.parametrize("place", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_state_that_overflows_is_no_answer(place, tmp_path):
    """Its norm makes zeros of it, and the head finite logits that are all alike: token 0 again and again."""
    folder = save_tiny(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.0.{place}.weight"][0, 0] = 3e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="all alike"):
        ask(folder)
    (score,) = LocalJudge(str(folder)).score([([draw(1)], "Is it red?", "yes")])
    assert isinstance(score, Failure)


def test_the_watch_does_not_wait_for_the_device():
    logits = torch.zeros(4, 9, device="meta")  # a tensor that nothing can be read from
    watch = LogitsWatch(logits.device)
    assert watch._look(None, None, logits).shape == logits.shape
    for bad, seen in ((torch.nan, False), (torch.inf, False), (-torch.inf, False), (0, False), (1e4, True)):
        watch = LogitsWatch(torch.device("cpu"))
        logits = torch.arange(10.0).view(2, 5)
        logits[1] = 0
        logits[1, 2] = bad
        assert torch.isfinite(watch._look(None, None, logits)).all() and watch.usable is seen
