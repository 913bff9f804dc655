"""Options that several commands share, and options from a table."""

from collections.abc import Callable, Iterable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer


def recipe_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Shell completion of `--recipe`: shipped names, the command's own without its stage, and YAML files."""
    from ..config.recipes import STAGES, shipped

    stage = ctx.info_name if ctx.info_name in STAGES else "eval" if str(ctx.info_name).startswith("eval") else None
    names = [name.removeprefix(f"{stage}/") for name in shipped(stage)]
    here = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    files = [f"{p}/" if p.is_dir() else str(p) for p in here.glob("*") if p.is_dir() or p.suffix in (".yaml", ".yml")]
    return [name for name in [*names, *sorted(files)] if name.startswith(incomplete)]


_RECIPE = "A shipped recipe's name or the path of a YAML file."
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help=_RECIPE, autocompletion=recipe_names)]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: a.b=value, the value is YAML. Repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Where the run goes. Default: runs/RECIPE.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete what is there first.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Resolve, check, print the exact launch; start nothing.")]


def with_options(parameters: Iterable[Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: these parameters written out for Typer, in place of the command's `**options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in signature(command).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        found = [*own, *parameters]
        command.__signature__ = Signature(found)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in found}
        return command

    return decorate


def option(name: str, kind: Any, text: str | None, more: dict | None = None) -> Parameter:
    """A keyword that is None unless its flag is given."""
    flag = "--" + name.removesuffix("_s").replace("_", "-")
    annotation = Annotated[kind | None, typer.Option(flag, help=text, **(more or {}))]  # type: ignore[valid-type]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def put(result: Any, json: bool, text: str | Callable[[], Any]) -> None:
    """With --json the one document on stdout; else the text, or what `text` prints."""
    from ..core import console

    if json:
        console.emit_json(result)
    elif isinstance(text, str):
        console.emit(text)
    else:
        text()
