"""`role: judge`: r1v sft makes a P(Yes) judge of a model, from right answers alone or from judged ones."""

import io
import threading

import pytest
import torch
import yaml
from PIL import Image
from tiny_models import draw_rows, save_tiny, tiny_processor, write_rows

from r1vfree_cli.config import recipes
from r1vfree_cli.core.errors import UsageError
from r1vfree_cli.core.files import read_json
from r1vfree_cli.core.prompts import DEFAULT
from r1vfree_cli.data.load import load_rows
from r1vfree_cli.judges.local import LocalJudge
from r1vfree_cli.run.attempt import Attempt
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training import sft
from r1vfree_cli.training import worker as common
from r1vfree_cli.training.judging import area_under_roc, with_verdicts, wrong_answers

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220)}
QUESTION = "What colour is it?"


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "_stop", threading.Event())
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def rows(n: int, wrong: bool = False) -> list[dict]:
    """Plain images and their colour, or the other one."""
    found = draw_rows(n)
    for i, row in enumerate(found):
        right = list(COLOURS)[i % 2]
        buffer = io.BytesIO()
        Image.new("RGB", (56, 56), COLOURS[right]).save(buffer, "PNG")
        answer = list(COLOURS)[(i + wrong) % 2]
        row |= {"images": [buffer.getvalue()], "problem": QUESTION, "solution": answer, "thinking": None}
    return found


def train(where, **document) -> RunDir:
    where.mkdir(exist_ok=True)
    model = {"name": str(save_tiny(where / "model")), "dtype": "float32", "min_pixels": 784, "max_pixels": 784}
    settings = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 10}
    settings |= {"gradient_checkpointing": False, "save_strategy": "no", "dataloader_num_workers": 0}
    document = {"role": "judge", "model": model, "train": settings, "launch": {"preset": "cpu"}} | document
    (where / "recipe.yaml").write_text(yaml.safe_dump(document))
    recipe = recipes.load("sft", str(where / "recipe.yaml"))
    run = RunDir(where / "run")
    run.begin(recipes.to_yaml(recipe), resume=False)
    sft.main(recipe, Attempt.of(run))
    return run


def test_a_judge_learns_to_tell_right_from_wrong(tmp_path):
    data = write_rows(tmp_path / "data", rows(16))
    heldout = write_rows(tmp_path / "test", rows(8), "test")
    run = train(tmp_path / "it", data={"path": str(data), "heldout": {"path": str(heldout)}})
    summary = read_json(run.summary)
    assert summary["rows"] == 16 and summary["heldout_area"] == 1.0 and summary["heldout_rows"] == 8
    judge = LocalJudge(str(run.final), device="cpu", pixels=(784, 784))
    images = {name: [Image.new("RGB", (56, 56), colour)] for name, colour in COLOURS.items()}
    scores = judge.score([(images[i], QUESTION, a) for i in COLOURS for a in (i, *(COLOURS.keys() - {i}))])
    assert all(right > wrong for right, wrong in zip(scores[::2], scores[1::2], strict=True))


def test_judged_answers_of_ones_own(tmp_path):
    """A row gives one answer then; Yes is learnt where the wrong ones say so."""
    right, wrong = write_rows(tmp_path / "right", rows(2)), write_rows(tmp_path / "wrong", rows(3, wrong=True))
    found = with_verdicts(load_rows(str(right)), load_rows(str(wrong)), 0, DEFAULT)
    assert list(found["right"]) == ["red", "blue", None, None, None]
    assert list(found["wrong"]) == [None, None, "blue", "red", "blue"]
    processor = tiny_processor()
    batch = sft.JudgeCollator(processor)([found[0], found[3]])
    says = [processor.tokenizer.encode(word)[0] for word in ("Yes", "No")]
    assert [[i for i in row if i >= 0] for row in batch["labels"].tolist()] == [[id] for id in says]
    asked = processor.tokenizer.decode(batch["input_ids"][1])
    assert 'Answer: "red"' in asked and "<answer>" not in asked


def test_wrong_answers_are_of_the_same_question_where_there_are_any():
    problems = ["What is it?"] * 3 + ["What was that?", "Is it red?", "Is it blue?"]
    solutions = ["a cat", "A CAT", "a dog", "a bird", "yes", "no"]
    for seed in range(20):
        found = wrong_answers(problems, solutions, seed)
        assert found[:3] == ["a dog", "a dog", found[2]] and found[2].lower() == "a cat"
        assert found[3] in {"a cat", "A CAT", "a dog", "yes", "no"}
        assert found[4:] == ["no", "yes"]
    assert wrong_answers(["Why?"] * 2, ["so", "So"], 0) == [None, None]


def test_trap_a_judge_that_never_saw_a_hack_pays_for_it():
    """Answers to other questions ("red", asked for a shape), words of two halves, what says nothing: all of them wrong."""
    problems = ["What shape is it?", "What colour has it?"] * 300
    solutions = [a for i in range(300) for a in (("circle", "triangle")[i % 2], ("red", "blue")[i % 2])]
    drawn = wrong_answers(problems, solutions, 0, hacks=True)
    known = {"What shape is it?": {"circle", "triangle"}, "What colour has it?": {"red", "blue"}}
    kinds = dict.fromkeys(("likely", "stray", "hack"), 0)
    for problem, solution, answer in zip(problems, solutions, drawn, strict=True):
        assert answer and answer != solution
        own, all_of_them = known[problem], known["What shape is it?"] | known["What colour has it?"]
        kinds["likely" if answer in own else "stray" if answer in all_of_them else "hack"] += 1
    assert kinds["likely"] > 250 and kinds["stray"] > 60 and kinds["hack"] > 100
    assert {"blud", "rue", "cirngle", "triacle"} & set(drawn)
    closed = wrong_answers(["Is it red?", "Is it blue?"] * 100, ["yes", "no"] * 100, 0, hacks=True)
    assert "Yes" not in closed  # to these, Yes is an answer


def test_area_under_roc():
    assert area_under_roc([0.9, 0.8], [0.1, 0.2]) == 1 and area_under_roc([0.5, 0.1], [0.5, 0.9]) == 0.125


def test_wrong_answers_are_for_a_judge():
    with pytest.raises(UsageError) as caught:
        recipes.load("sft", "tiny", ["wrong={path: shapes}"])
    assert "role: judge" in str(caught.value.details)
