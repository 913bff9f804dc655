"""Recipes whose data do not fit their judge, their held-out rows or their pixel limits: said before a run."""

import json

import pytest
from PIL import Image

from r1vfree_cli.config import recipes
from r1vfree_cli.data.prepare import prepare
from r1vfree_cli.launch import preflight

CHAT = "rewards.feedback={name: feedback, backend: chat, base_url: 'http://127.0.0.1:1/v1', model: m}"


@pytest.fixture
def photos(tmp_path):
    """Four photographs with a question and an answer each."""
    for i in range(4):
        Image.new("RGB", (640, 480), (60 * i, 80, 90)).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "problem": f"What is in photo {i}?", "solution": str(i)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare("files", tmp_path / "mine", input=str(tmp_path / "rows.jsonl"), images=tmp_path)
    return tmp_path / "mine"


def findings(*sets: str) -> preflight.Findings:
    return preflight.check(recipes.load("grpo", "tiny", list(sets)), dry_run=True)


def test_the_tiny_recipe_itself_means_something():
    found = findings()
    assert not found.errors and not found.warnings


def test_an_embedded_judge_is_refused_for_other_data(photos):
    (line,) = findings(f"data.path={photos}", "data.heldout=null").errors
    assert "embedded:tiny-judge knows drawn shapes alone" in line and "role: judge" in line
    served = "rewards.feedback={name: feedback, backend: classify, serve: {model: embedded:tiny-judge}}"
    assert findings(f"data.path={photos}", "data.heldout=null", served).errors == [line]


def test_heldout_rows_of_another_source(photos):
    assert any("data.heldout: null" in w for w in findings(f"data.path={photos}", CHAT).warnings)
    same = f"data.heldout={{path: {photos}, split: train}}"
    assert not any("data.heldout" in w for w in findings(f"data.path={photos}", CHAT, same).warnings)


@pytest.mark.parametrize("pixels, warned", [(3136, True), (640 * 480 // 16 - 1, True), (640 * 480 // 16, False)])
def test_images_of_which_nothing_is_left(photos, pixels, warned):
    found = findings(f"data.path={photos}", CHAT, "model.min_pixels=784", f"model.max_pixels={pixels}")
    lines = [w for w in found.warnings if "shrinks 4 of the first 4 images" in w]
    assert len(lines) == warned and all("640 x 480" in line and "max_prompt_tokens" in line for line in lines)
