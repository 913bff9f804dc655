"""`r1v recipes`: what there is, resolved and checked."""

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import UsageError, counted
from .options import Json, Overwrite, Set, put

app = typer.Typer(help="What recipes there are, resolved and checked.", no_args_is_help=True)

AnyRecipe = Annotated[str, typer.Argument(help="A recipe's name, as grpo/tiny, or a path.")]
Stage = Annotated[str | None, typer.Option("--stage", help="grpo or sft; needed for a path.")]


@app.command("list")
def recipes_list(json: Json = False) -> None:
    """All shipped recipes: purpose, GPUs and their memory, and whether this machine has them."""
    from ..config import recipes
    from ..core import console
    from ..core.process import gpu_count, gpu_gigabytes

    here = gpu_count()
    memory = gpu_gigabytes() if here else None
    rows = [recipes.summary(name, path) for name, path in recipes.shipped().items()]
    for row in rows:  # a card of 80 GB has a little less
        enough = row["gb"] is None or memory is None or memory >= 0.9 * row["gb"]
        row["fits"] = row["gpus"] is None or (row["gpus"] <= here and enough)
    if json:
        console.emit_json(rows)
        return
    of = f" of {memory} GB" if memory else ""
    console.log(f"this machine has {counted(here, 'GPU')}{of}; * marks the recipes that it can run")
    console.emit(f"  {'recipe':<27} {'GPUs':>9}  purpose")
    for row in rows:
        needs = f"{row['gpus']} x {row['gb']} GB" if row["gb"] else row["gpus"] or "any"
        head = f"{'*' if row['fits'] else ' '} {row['recipe']:<27} {needs:>9}  "
        console.emit(textwrap.fill(head + row["purpose"], 80, subsequent_indent=" " * 41))


@app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name, as grpo/tiny.")],
    file: Annotated[Path, typer.Argument(help="The YAML file to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a shipped recipe to a file of your own, comments kept."""
    from ..config import recipes
    from ..core import console
    from ..core.files import write_bytes

    kind, name = recipes.stage_and_name(name, None)
    if file.exists() and not overwrite:
        raise UsageError(f"{file} exists already", hint="name another file, or give --overwrite")
    write_bytes(file, recipes.find(kind, name).read_bytes())
    console.log(f"{file}: run it with r1v {kind}{' NAME CKPT' if kind == 'eval' else ''} --recipe {file}")


def _load(name: str, set: list[str] | None, stage: str | None) -> tuple[str, Any]:
    """(stage, recipe)"""
    from ..config import recipes
    from ..eval import options

    kind, name = recipes.stage_and_name(name, stage)
    return kind, options.load(name, set or [], {}) if kind == "eval" else recipes.load(kind, name, set or [])


@app.command("show")
def recipes_show(name: AnyRecipe, set: Set = None, stage: Stage = None, json: Json = False) -> None:
    """A recipe, fully resolved."""
    from ..config import recipes

    _, recipe = _load(name, set, stage)
    put(recipe.model_dump(mode="json"), json, recipes.to_yaml(recipe))


@app.command("validate")
def recipes_validate(name: AnyRecipe, set: Set = None, stage: Stage = None, json: Json = False) -> None:
    """Check a recipe; all errors at once."""
    kind, _ = _load(name, set, stage)
    put({"recipe": name, "stage": kind, "valid": True}, json, f"{name}: a valid {kind} recipe")
