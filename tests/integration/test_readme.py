"""What the READMEs tell a reader to type: each command runs, in order, in a folder that holds what the text names.

Models of the hub are tiny ones of the same class, and what needs 8 GPUs is resolved and not started.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from judge_servers import JudgeServer, chat_reply, reply
from report_dirs import make_run
from test_hallusion import judged_file, prediction_file, records
from tiny_models import draw, save_tiny

from r1vfree_cli.config import recipes
from r1vfree_cli.core.files import write_json
from r1vfree_cli.data.prepare import prepare
from r1vfree_cli.eval.options import EvalOptions
from r1vfree_cli.eval.runner import evaluate
from r1vfree_cli.launch import vllm

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", *(ROOT / "r1vfree_cli" / room / "README.md" for room in ("rewards", "training", "eval"))]


def blocks(file: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The words of every r1v command of the READMEs but the quick start's, which `.ci/run` and a test of its own run."""
    found = []
    for file in READMES:
        for block in blocks(file, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if "r1v " not in line:
                    continue
                words = shlex.split(line, comments=True)
                if "bash" in words:  # srun bash -c '...'
                    line = words[-1].replace("$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)", "node0")
                    words = shlex.split(re.sub(r"\$SLURM_NNODES", "2", line).replace("$SLURM_NODEID", "0"))
                words = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), words))
                if words[:1] == ["r1v"]:
                    found.append(words[1:])
    return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """What the texts name: photographs and rows, the benchmark's files, a run, an evaluation of its base."""
    at = tmp_path_factory.mktemp("desk")
    (at / "photos").mkdir()
    draw(0, (256, 192)).save(at / "photos" / "cat.png")
    (sheet,) = blocks(READMES[0], "csv")
    (at / "rows.csv").write_text(sheet)
    (at / "my_bench.py").write_text("".join(blocks(READMES[3], "python")))
    question = re.search(r"JSON Lines of\n`(.*)`:$", READMES[3].read_text(encoding="utf-8"), re.MULTILINE)
    (at / "questions.jsonl").write_text(question[1] + "\n")
    write_json(at / "HallusionBench.json", records())
    for i, name in enumerate(sorted({r["filename"] for r in records()} - {None})):
        file = at / "figures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(i).save(file)
    shutil.make_archive(str(at / "hallusion_bench"), "zip", at / "figures")
    judged_file(at / "result.json")
    make_run(at / "runs" / "qwen25vl-3b-rlhfv")
    final = at / "runs" / "qwen25vl-3b-rlhfv" / "final"
    contract = json.loads((final / "r1v.json").read_text()) if (final / "r1v.json").is_file() else None
    shutil.rmtree(final, ignore_errors=True)
    save_tiny(final)
    if contract:
        write_json(final / "r1v.json", contract | {"min_pixels": None, "max_pixels": None})
    save_tiny(at / "runs" / "mine")
    for part, split in (("start", "train"), ("judge", "train"), ("train", "train"), ("test", "test")):  # of tiny-vqa
        prepare("shapes", at / "data" / part, split=split, limit=4)
    for name in ("tiny-vqa-start", "tiny-vqa-judge"):
        save_tiny(at / "runs" / name / "final")
    made = prediction_file(at / "base.json")
    questions = str(at / "HallusionBench.json")
    evaluate(EvalOptions(predictions=made, questions=questions, images=at / "figures", out=at / "evals" / "base"))
    return at


def run(argv: list[str], at: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"R1V_CACHE": str(at / "cache"), "JUDGE_KEY": "k", "PYTHONPATH": str(ROOT)}
    argv = list(itertools.chain.from_iterable(sorted(map(str, at.glob(a))) if "*" in a else [a] for a in argv))
    return subprocess.run(
        [sys.executable, "-m", "r1vfree_cli", *argv], cwd=at, env=env, capture_output=True, text=True, timeout=300
    )


def ends_well(argv: list[str], at: Path, done: subprocess.CompletedProcess) -> None:
    """As the text around the command says it ends, here."""
    told = f"r1v {shlex.join(argv)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    if argv[0] == "doctor":  # this machine is not ready for it, and that is all
        assert done.returncode in (0, 2) and "GPU" in done.stdout, told
    elif "--fail-under" in argv:  # an untrained model
        assert done.returncode == 4 and "aAcc" in done.stderr, told
    else:
        assert done.returncode == 0, told
    made = argv[argv.index("--out") + 1] if "--out" in argv else None
    assert made is None or (at / made).is_dir(), told
    if "--dry-run" in argv:
        assert "accelerate" in done.stdout, told


def test_each_command_runs(desk):
    given = commands()
    names = [argv[0] for argv in given]
    expected = {"doctor", "grpo", "eval", "eval-hallusion", "report", "prepare-data", "recipes", "serve-reward", "sft"}
    assert set(names) == expected
    with JudgeServer(lambda handler, body: reply(handler, chat_reply("<think>I see it.</think><answer>sleeping</answer>"))) as teacher:  # fmt: skip
        for argv in given:
            if argv[0] in ("grpo", "sft") and argv != ["grpo", "--recipe", "tiny"]:
                argv = [*argv, "--dry-run"]
            elif argv[0] == "grpo":
                continue
            elif argv[0] == "serve-reward":  # it goes on until it is stopped: a model that is not there ends it
                done = run([*argv, "--port", "8109"], desk)
                assert done.returncode in (2, 3) and "No such option" not in done.stderr, done.stderr
                continue
            elif "--endpoint" in argv:
                argv[argv.index("--endpoint") + 1] = f"{teacher.url}"
            ends_well(argv, desk, run(argv, desk))
    assert (desk / "report" / "report.html").is_file() and (desk / "mine.yaml").is_file()
    text = "".join(file.read_text(encoding="utf-8") for file in READMES)
    told = set(re.findall(r"evals/runs-[\w-]+", text))
    assert len(told) == 2 and all((desk / name / "scores.json").is_file() for name in told)


def test_each_yaml_and_python_example_is_a_recipe(tmp_path):
    """The reward and the rewards of one's own, the judge's recipe, the evaluations while training."""
    rewards = READMES[1]
    (tmp_path / "my_rewards.py").write_text("".join(blocks(rewards, "python")))
    given = [(file, block) for file in READMES for block in blocks(file, "yaml")]
    assert len(given) == 4
    for _, block in given:
        document = yaml.safe_load(block.replace("...", "named"))
        stage = "sft" if document.get("role") == "judge" else "grpo"
        if stage == "grpo":
            document = yaml.safe_load(recipes.find("grpo", "own-data").read_text()) | document
            document["data"]["heldout"] = {"path": "data/test"}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
        recipes.load(stage, str(tmp_path / "recipe.yaml"), [])


def test_the_vllm_command_of_a_judge_is_what_r1v_starts(tmp_path):
    (line,) = [b for b in blocks(READMES[1], "bash") if "vllm serve" in b]
    words = shlex.split(line)
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "tie_word_embeddings": False}
    write_json(tmp_path / "config.json", config)
    started = vllm.judge_arguments(str(tmp_path), None)
    told, ours = (json.loads(argv[argv.index("--hf-overrides") + 1]) for argv in (words, started))
    assert told == ours and words[words.index("--runner") + 1] == started[started.index("--runner") + 1]
