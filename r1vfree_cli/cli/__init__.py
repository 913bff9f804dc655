"""The Typer app. A command parses, calls one function, prints; logic and heavy imports live behind it."""

import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import Interrupted, R1VError, UsageError
from . import evaluate, recipes
from .options import DryRun, Json, Overwrite, RecipeName, Resume, RunDir, Set, option, put, recipe_names, with_options

app = typer.Typer(
    name="r1v",
    help="Train vision-language models on open-ended questions, without labels: GRPO with AI feedback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evaluate.app)
app.add_typer(recipes.app, name="recipes")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Tracebacks and every failed call. Works at any place.")
    ] = False,
) -> None:
    if version:
        from .. import __version__
        from ..core import console

        console.emit(f"r1v {__version__}")
        raise typer.Exit()


_ROWS: dict[str, tuple] = {
    "input": (str, "A file or folder, or a local copy of a known data set."),
    "images": (list[Path], "A folder that image paths are looked for in; repeatable."),
    "columns": (str, "Other names of columns: problem=question,image=img."),
    "split": (str, "One split of the source. Default: all it has."),
    "limit": (int, "At most so many rows a split.", {"min": 1}),
    "seed": (int, "Which rows --limit keeps; what shapes draws. Default: 0."),
}
_DISTILL: dict[str, tuple] = {
    "endpoint": (str, "distill: the OpenAI-compatible base URL of the teacher."),
    "model": (str, "distill: the teacher's name there."),
    "api_key_env": (str, "distill: the variable with the endpoint's key. Default: R1V_ENDPOINT_KEY."),
    "max_tokens": (int, "distill: of a reply. Default: 2048.", {"min": 1}),
    "concurrency": (int, "distill: requests at a time. Default: 16.", {"min": 1}),
    "price": (str, "distill: IN,OUT of a million tokens, as 0.15,0.6."),
    "max_cost": (float, "distill: ask no more beyond it.", {"min": 0}),
    "estimate": (bool, "distill: print calls and tokens, ask nothing."),
}


@app.command("prepare-data")
@with_options(option(name, *told) for name, told in (_ROWS | _DISTILL).items())
def prepare_data(
    source: Annotated[
        str,
        typer.Argument(
            help="files (jsonl and parquet are the same), shapes, distill (a teacher's answers), or a known data set: "
            "rlhf-v, r1v-free, clevr-count, clevr-complex, geoqa, clevr-r1, hallusionbench."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    overwrite: Overwrite = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Turn a source into rows; what is dropped is counted.

    Files are parquet, JSON, CSV or saved by `datasets`, in the layout of r1v, LLaVA, OpenAI, ms-swift, VLM-R1 or verl.
    Images are checked, rotated and RGB; every drop has a reason. `distill` asks a teacher the questions of --input and
    keeps the replies that can be learnt from.
    """
    from ..core import console
    from ..data.prepare import prepare
    from ..rewards.distill import distill

    given = {name: value for name, value in options.items() if value not in (None, [])}
    if source == "distill":
        if given.keys() & {"images", "columns"}:
            raise UsageError("distill takes rows", hint="r1v prepare-data files makes them of your files first")
        given.pop("seed", None)
        summary = distill(out, overwrite=overwrite, **given)
        head = [[k.replace("_", " "), v] for k, v in summary.items() if k not in ("dropped", "data") and v is not None]
    elif others := given.keys() & _DISTILL:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in _DISTILL if name in others)
        raise UsageError(f"of distill, not of {source}: {named}")
    else:
        summary = prepare(source, out, overwrite=overwrite, **given)
        head = [["read as", summary["layout"]]]
        head += [[f"rows, {name}", part["rows"]] for name, part in summary["splits"].items()]
    rows = [*head, *([f"dropped, {reason}", count] for reason, count in summary.get("dropped", {}).items())]
    title, columns = "estimate" if "estimate" in given else str(out), ["", "rows" * (source != "distill")]
    put(summary, json, lambda: console.emit_table(title, columns, rows))


def _train(
    stage: str,
    recipe: RecipeName,
    set: Set = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    from ..core import console
    from ..launch import job as jobs
    from ..launch import watch
    from ..run.checkpoint import is_adapter

    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    result = jobs.train(stage, recipe, set or [], path=run_dir, resume=resume, overwrite=overwrite, dry_run=dry_run)
    if dry_run:
        watch.show_dry_run(recipe, result, json)
    elif json:
        console.emit_json(result)
    elif "node" in result:
        console.log(f"node {result['node']} is done; node 0 holds the results in {result['run_dir']}")
    else:
        console.emit_table(f"{recipe}: {result['run_dir']}", ["", "before", "after"], watch.summary_rows(result))
        where, best = result["run_dir"], (result.get("evaluation") or {}).get("best")
        console.emit(watch.last_lines(stage, where, is_adapter(Path(where) / "final"), best))


_TRAIN_OPTIONS = list(signature(_train).parameters.values())[1:]


@app.command()
@with_options(_TRAIN_OPTIONS)
def sft(**options: Any) -> None:
    """Supervised warm start.

    The loss is on the assistant's tokens only.
    """
    _train("sft", **options)


@app.command()
@with_options(_TRAIN_OPTIONS)
def grpo(**options: Any) -> None:
    """The main job: GRPO with the recipe's rewards. `r1v grpo --recipe tiny` runs on a laptop."""
    _train("grpo", **options)


@app.command()
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="A LoRA adapter, a run dir, or a checkpoint with ZeRO shards.")],
    out: Annotated[Path, typer.Option("--out", help="The model folder to write.")],
    base: Annotated[str | None, typer.Option("--base", help="The base of a LoRA adapter, when it moved.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="bfloat16, float16 or float32; else the base's.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge an adapter or shards into one verified model.

    What was written is loaded again and compared with the unmerged model on an image.
    """
    from ..core import console
    from ..launch import job as jobs

    result = jobs.merge(checkpoint, out, base=base, dtype=dtype, overwrite=overwrite)
    rows = [[key, result[key]] for key in ("kind", "source", "base", "dtype") if result[key] is not None]
    difference = f"{result['max_logit_difference']:.2g} (allowed {result['tolerance']:.2g})"
    rows.append(["largest logit difference", difference])
    put(result, json, lambda: console.emit_table(str(out), ["", ""], rows))


@app.command()
def doctor(
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Check this recipe too.", autocompletion=recipe_names)
    ] = None,
    set: Set = None,
    step: Annotated[
        bool, typer.Option("--step", help="Also run one step, on the longest rows and at full length.")
    ] = False,
    json: Json = False,
) -> None:
    """Is this machine, and this recipe, ready?

    Exit 2 when something would stop the run.
    """
    from ..doctor.checks import diagnose, show

    result = diagnose(recipe, set or [], step=step)
    put(result, json, lambda: show(result))
    if not result["ready"]:
        raise UsageError("not ready", hint="see the lines that say error")


@app.command()
def report(
    dirs: Annotated[list[Path], typer.Argument(help="Run dirs and eval dirs.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write the report into.")] = Path("report"),
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Runs and evaluations in one report.

    Markdown, one self-contained HTML page, pictures.
    """
    from ..report import report as write_report

    put(write_report(dirs, out, overwrite=overwrite), json, f"{out / 'report.html'}\n{out / 'report.md'}")


@app.command()
def view(
    dirs: Annotated[list[Path], typer.Argument(help="Run dirs of r1v grpo; two are shown side by side.")],
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Default: one that is free.")] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Look at a run's rollouts, step by step.

    A local page, read-only; it follows a run that goes on.
    """
    from ..report.viewer import view as serve

    serve(dirs, port=port, open_browser=open_browser)


_SERVER: dict[str, tuple] = {
    "revision": (str, "The hub revision."),
    "host": (str, "The address to bind. Default: 127.0.0.1, loopback."),
    "port": (int, "Default: 8100.", {"min": 1, "max": 65535}),
    "devices": (str, "GPU indices, as 6,7. Default: all that are visible."),
    "api_key_env": (str, "The environment variable that holds the key clients must send."),
    "min_pixels": (int, "Of an image after resizing: as the policy's model.min_pixels. Default: 3136."),
    "max_pixels": (int, "The same, model.max_pixels. Default: 401408."),
    "max_tokens": (int, "Longest prompt. Default: the model's length, at most 8192.", {"min": 1}),
}


@app.command("serve-reward")
@with_options(option(name, *told) for name, told in _SERVER.items())
def serve_reward(
    model: Annotated[str, typer.Option("--model", help="A reward model or any VLM: folder or hub name.")],
    **options: Any,
) -> None:
    """One reward model for all ranks and hosts, over HTTP.

    It speaks the shape of vLLM's /classify.
    """
    from ..launch import job as jobs

    jobs.serve_reward(model, **options)


@contextmanager
def _hinting() -> Iterator[None]:
    """After click's own word on a wrong argument, what r1v would have taken: habits from other trainers."""
    try:
        yield
    except SystemExit as e:
        stage = next((a for a in sys.argv[1:] if a in ("grpo", "sft")), None)
        if e.code == 2 and stage and (hint := _hint(stage, sys.argv[sys.argv.index(stage) + 1 :])):
            print(f"hint: {hint}", file=sys.stderr)
        raise


def _hint(stage: str, given: list[str]) -> str | None:
    from ..config.trl_keys import trl_keys

    name = given[0] if given and not given[0].startswith("-") else "NAME"
    if "--config" in given or (name != "NAME" and "=" not in name):
        return f"r1v {stage} --recipe {name} runs a recipe: a shipped name or the path of a YAML file"
    for word in given:
        key = word.lstrip("-").partition("=")[0].replace("-", "_").removeprefix("train.")
        known = key in trl_keys("grpo") or key in trl_keys("sft") or ("=" in word and not word.startswith("--"))
        if known and re.fullmatch(r"[a-z_.]+", key):
            return f"a key of the recipe is set by --set train.{key}=VALUE"
    return None


def main() -> None:
    """The entry point: every `R1VError` becomes its message and exit code; a traceback only with --debug."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's ends a command as Ctrl-C does
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    if debug:
        from ..core import console

        console.debugging = True
    else:
        warnings.simplefilter("ignore", FutureWarning)  # of a library to its callers: nothing that a user can change
    try:
        with _hinting():
            app()
    except R1VError as e:
        if debug:
            raise
        _end(e)
    except KeyboardInterrupt:
        _end(Interrupted("interrupted"))
    except BrokenPipeError:
        # The reader of our stdout went away (r1v ... | head): not an error.
        sys.stderr.close()
        sys.exit(0)
    except Exception as e:
        if debug:
            raise
        from ..core.machine import refused

        _end(refused(e) or R1VError(f"{type(e).__name__}: {e}", hint="this is a bug in r1v; --debug shows where"))


def _end(error: R1VError) -> None:
    """Show it and exit, also where there is no memory to show it nicely, and no disk below stdout."""
    try:
        from ..core import console

        console.error(error)
    except Exception:
        print(f"error: {error.message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python, at its end, would exit with a code of its own
    sys.exit(error.exit_code)
