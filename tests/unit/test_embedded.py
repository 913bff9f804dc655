"""Embedded models: what a name stands for, what makes a cached piece a new one, and builds that are whole or absent."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from r1vfree_cli.config import embedded, recipes
from r1vfree_cli.core import console
from r1vfree_cli.core.errors import DataError, UsageError
from r1vfree_cli.launch import job as jobs
from r1vfree_cli.launch import plan as plans


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path))
    return tmp_path


def build(stage: embedded.Stage) -> None:
    with embedded.building(stage) as folder:
        assert folder is not None
        (folder / "final").mkdir()
        (folder / "final" / "config.json").write_text("{}")


def test_policy_needs_its_random_start_first_and_each_piece_comes_once():
    names = ["embedded:tiny-policy", "embedded:tiny-judge", "embedded:tiny-policy", "org/hub-model"]
    found = [stage.name for stage in embedded.stages(names, 0)]
    assert found == ["embedded:tiny-init", "embedded:tiny-policy", "embedded:tiny-judge"]


def test_seed_and_steps_make_other_pieces():
    names = ["embedded:tiny-judge", "embedded:tiny-judge?steps=0", "embedded:tiny-policy", "embedded:tiny-init"]
    paths = {embedded.stages([name], seed)[-1].path for name in names for seed in (0, 1)}
    assert len(paths) == 8
    assert embedded.stages([names[0]], 0)[-1].path == embedded.stages([names[0]], 0)[-1].path


def test_seed_reaches_the_builders():
    init, policy, judge = embedded.stages(["embedded:tiny-policy", "embedded:tiny-judge?steps=0"], 7)
    assert init.args[-2:] == ("--seed", "7")
    assert policy.args == ("sft/tiny", "train.seed=7")
    assert judge.args[1:] == ("judge", "--seed", "7", "--steps", "0")


def test_a_changed_source_is_another_piece(monkeypatch):
    before = embedded.stages(["embedded:tiny-judge"], 0)[0].path
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + (b"#" if self.name == "shapes.py" else b""))
    assert embedded.stages(["embedded:tiny-judge"], 0)[0].path != before


def test_a_build_appears_whole_or_not_at_all():
    (stage,) = embedded.stages(["embedded:tiny-init"], 0)
    with pytest.raises(RuntimeError), embedded.building(stage) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not stage.ready
    with pytest.raises(DataError, match="no model"), embedded.building(stage):
        pass
    assert not stage.ready
    build(stage)
    assert stage.ready and (stage.path / "config.json").is_file()
    assert not (stage.folder / "half").exists(), "what an earlier try left is gone"


def test_a_finished_piece_is_not_built_again():
    (stage,) = embedded.stages(["embedded:tiny-init"], 0)
    build(stage)
    with embedded.building(stage) as folder:
        assert folder is None


def test_what_a_builder_says_about_its_progress_is_shown(monkeypatch):
    """Training the judge takes minutes, in a process that writes into a log."""
    (stage,) = embedded.stages(["embedded:tiny-judge"], 0)
    code = """
import pathlib, sys, time
for step in (2, 5, 9):
    print(f"judge: {step}/9 0:12<1:02:03 loss 0.5", file=sys.stderr)
    time.sleep(0.6)
pathlib.Path(sys.argv[1]).mkdir(parents=True)
pathlib.Path(sys.argv[1], "config.json").write_text("{}")
"""
    shown = []

    class Bar:
        def advance(self, n, note, total):
            shown.append((n, note, total))

    @contextmanager
    def bar(title):
        shown.append(title)
        yield Bar()

    monkeypatch.setattr(console, "progress", bar)
    monkeypatch.setattr(plans, "module_plan", lambda *args: plans.Plan([sys.executable, "-uc", code, args[-1]]))
    recipe = recipes.load("grpo", "tiny", ["model.name=org/model"])
    jobs._pieces(recipe, {})
    assert stage.ready
    assert shown == ["judge", (2, "loss 0.5", 9), (3, "loss 0.5", 9), (4, "loss 0.5", 9)]


def test_resolve_leaves_other_names_and_explains_what_is_missing():
    assert embedded.resolve_model("Qwen/Qwen2.5-VL-3B-Instruct", 0) == "Qwen/Qwen2.5-VL-3B-Instruct"
    with pytest.raises(DataError, match="not built"):
        embedded.resolve_model("embedded:tiny-init", 0)
    (stage,) = embedded.stages(["embedded:tiny-init"], 0)
    build(stage)
    assert embedded.resolve_model("embedded:tiny-init", 0) == str(stage.path)


@pytest.mark.parametrize("name", ["embedded:tiny-juge", "embedded:tiny-judge?step=0", "embedded:tiny-init?steps=0"])
def test_unknown_names_and_options_are_usage_errors(name):
    with pytest.raises(UsageError):
        embedded.stages([name], 0)


def test_the_nearest_name_is_offered():
    with pytest.raises(UsageError) as caught:
        embedded.stages(["embedded:tiny-juge"], 0)
    assert "tiny-judge" in caught.value.hint


def test_shapes_get_the_seed_of_the_run_unless_they_have_their_own():
    assert embedded.with_seed("shapes", 3) == "shapes?seed=3"
    assert embedded.with_seed("shapes?n=64", 3) == "shapes?n=64&seed=3"
    assert embedded.with_seed("shapes?seed=1&n=64", 3) == "shapes?seed=1&n=64"
    assert embedded.with_seed("some/folder", 3) == "some/folder"


def test_no_torch_is_imported():
    code = "import sys, r1vfree_cli.config.embedded; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'trl')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
