"""What of the tiny recipe's gain comes from its judge: `python -m tests.bench.tiny_controls [--seeds 0 1 2]`.

Runs the recipe beside the same GRPO with the format reward alone, with an untrained judge, and with a perfect judge
(the reference answers, as an upper bound), from the same warm start and on the same questions. Prints a table a seed,
the judge's area under the ROC curve by kind of question, and the time of each stage; `--json` gives all of it.
"""

from __future__ import annotations

import argparse
import io
import random
from pathlib import Path

from PIL import Image

from r1vfree_cli.config import embedded
from r1vfree_cli.core import console
from r1vfree_cli.data import shapes
from r1vfree_cli.launch import job as jobs
from r1vfree_cli.training.judging import area_under_roc

FORMAT = "{name: format, weight: 0.2}"
CONTROLS = {
    "recipe": [],
    "format alone": [f"rewards=[{FORMAT}]"],
    # It would fail its canaries, as it should.
    "untrained judge": ["rewards.feedback.model=embedded:tiny-judge?steps=0", "rewards.feedback.canaries=null"],
    "perfect judge": [f"rewards=[{FORMAT}, {{name: accuracy, weight: 1.0}}]"],
}
GAIN = 0.10  # of held-out accuracy, greedy and sampled, that the recipe must reach


def measure(seed: int, names: list[str], out: Path) -> dict:
    """{"runs": {control: {greedy, sampled: {before, after}, seconds}}, "judge": {kind: area}} of a seed."""
    runs = {}
    for name in names:
        where = out / f"seed{seed}-{name.replace(' ', '-')}"
        summary = jobs.train("grpo", "tiny", [f"train.seed={seed}", *CONTROLS[name]], path=where, overwrite=True)
        runs[name] = {**summary["heldout_accuracy"], "seconds": summary["seconds"]}
    return {"runs": runs, "judge": judge_areas(seed) if "recipe" in names else {}}


def judge_areas(seed: int) -> dict[str, float]:
    """The recipe's judge of this seed, on held-out images: {kind: area}, 0.5 is chance."""
    from r1vfree_cli.judges.local import LocalJudge

    judge = LocalJudge(embedded.resolve_model("embedded:tiny-judge", seed))
    return areas(judge, list(shapes.iter_shapes("test", seed)), seed)


def areas(judge, rows: list[dict], seed: int = 0) -> dict[str, float]:
    """How well `judge` (a `rewards.local.LocalJudge`) tells right from wrong answers: the area under the ROC curve.

    One wrong answer of the same kind is drawn for each row. Returns {kind: area} and `all`; 0.5 is chance.
    """
    rng = random.Random(f"areas/{seed}")
    scores: dict[str, tuple[list[float], list[float]]] = {kind: ([], []) for kind in (*shapes.KINDS, "all")}
    asked = [(kind, row) for row in rows if (kind := shapes.question_kind(row["problem"]))]
    items = []
    for kind, row in asked:
        image = [Image.open(io.BytesIO(row["images"][0]))]
        wrong = rng.choice([a for a in shapes.ANSWERS[kind] if a != row["solution"]])
        items += [(image, row["problem"], row["solution"]), (image, row["problem"], wrong)]
    found = judge.score(items)
    for (kind, _), right, wrong in zip(asked, found[::2], found[1::2]):
        for name in (kind, "all"):
            scores[name][0].append(right)
            scores[name][1].append(wrong)
    return {name: area_under_roc(*both) for name, both in scores.items() if both[0]}


def table(runs: dict) -> list[list[str]]:
    """A line a control: greedy before, after, gain, then sampled."""
    lines = []
    for name, run in runs.items():
        cells = [name]
        for how in ("greedy", "sampled"):
            before, after = run[how]["before"], run[how]["after"]
            cells += [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
        lines.append(cells)
    return lines


def reached(runs: dict) -> bool:
    """Whether the recipe gains what it must, and each control without a trained judge less than half of that."""

    def gain(name: str, how: str) -> float:
        return runs[name][how]["after"] - runs[name][how]["before"]

    hows = ("greedy", "sampled")
    controls = [name for name in ("format alone", "untrained judge") if name in runs]
    return all(gain("recipe", how) >= GAIN for how in hows) and all(
        gain(name, how) < gain("recipe", how) / 2 for name in controls for how in hows
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-controls"))
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of tables")
    given = parser.parse_args()
    found = {seed: measure(seed, given.controls, given.out) for seed in given.seeds}
    if given.json:
        console.emit_json(found)
        return
    columns = [
        "held-out accuracy",
        *(f"{how} {what}" for how in ("greedy", "sampled") for what in ("before", "after", "gain")),
    ]
    for seed, result in found.items():
        console.emit_table(f"seed {seed}", columns, table(result["runs"]))
        if result["judge"]:
            console.emit_table(
                "judge, area under ROC", ["kind", "area"], [[k, f"{v:.3f}"] for k, v in result["judge"].items()]
            )
            console.emit_table(
                "recipe, time",
                ["stage", "s"],
                [[k, f"{v:.0f}"] for k, v in result["runs"]["recipe"]["seconds"].items()],
            )
            console.emit(f"seed {seed}: {'reached' if reached(result['runs']) else 'NOT reached'}")


if __name__ == "__main__":
    main()
