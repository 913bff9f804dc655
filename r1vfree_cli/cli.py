"""The Typer app. A command parses, calls one function, prints; logic and heavy imports live behind it."""

import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .core.errors import R1VError, UsageError

app = typer.Typer(
    name="r1v",
    help="Train vision-language models on open-ended questions, without labels: GRPO with AI feedback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="What recipes there are, resolved and checked.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A shipped recipe's name or the path of a YAML file.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: a.b=value, the value is YAML. Repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
RunDirPath = Annotated[Path | None, typer.Option("--run-dir", help="Where the run goes. Default: runs/RECIPE.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last whole checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete what is there first.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Resolve, check, print the exact launch; start nothing.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. Works at any place.")] = False,
) -> None:
    if version:
        from . import __version__
        from .core import console

        console.emit(f"r1v {__version__}")
        raise typer.Exit()


@app.command("prepare-data")
def prepare_data(
    source: Annotated[
        str,
        typer.Argument(
            help="files (jsonl and parquet are the same), shapes, or a known data set: rlhf-v, r1v-free, clevr-count, "
            "clevr-complex, geoqa, clevr-r1, hallusionbench."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    input: Annotated[
        str | None, typer.Option("--input", help="A file or folder, or a local copy of a known data set.")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", help="A folder that image paths are looked for in; repeatable."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="Other names of columns: problem=question,image=img.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="One split of the source. Default: all it has.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many rows a split.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which rows --limit keeps; what shapes draws.")] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Turn a source into rows; what is dropped is counted.

    Files are parquet, JSON, CSV or saved by `datasets`, in the layout of r1v, LLaVA, OpenAI, ms-swift, VLM-R1 or verl.
    Images are checked, rotated and RGB; every drop has a reason.
    """
    from .core import console
    from .data.prepare import prepare

    summary = prepare(
        source,
        out,
        input=input,
        images=images or (),
        columns=columns,
        split=split,
        limit=limit,
        seed=seed,
        overwrite=overwrite,
    )
    if json:
        console.emit_json(summary)
        return
    rows: list[list] = [["read as", summary["layout"]]]
    rows += [[f"rows, {name}", part["rows"]] for name, part in summary["splits"].items()]
    rows += [[f"dropped, {reason}", count] for reason, count in summary["dropped"].items()]
    console.emit_table(str(out), ["", "rows"], rows)


@app.command()
def sft(
    recipe: RecipeName,
    set: Set = None,
    run_dir: RunDirPath = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Supervised warm start.

    The loss is on the assistant's tokens only.
    """
    _train("sft", recipe, set, run_dir, resume, overwrite, dry_run, json)


@app.command()
def grpo(
    recipe: RecipeName,
    set: Set = None,
    run_dir: RunDirPath = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """The main job: GRPO with the recipe's rewards. `r1v grpo --recipe tiny` runs on a laptop."""
    _train("grpo", recipe, set, run_dir, resume, overwrite, dry_run, json)


def _train(
    stage: str,
    recipe: str,
    overrides: list[str] | None,
    run_dir: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    json: bool,
) -> None:
    from .core import console
    from .launch import job as jobs
    from .launch import watch

    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    result = jobs.train(
        stage, recipe, overrides or [], path=run_dir, resume=resume, overwrite=overwrite, dry_run=dry_run
    )
    if json:
        console.emit_json(result)
    elif dry_run:
        watch.show_dry_run(result)
    elif "node" in result:
        console.log(f"node {result['node']} is done; node 0 holds the results in {result['run_dir']}")
    else:
        console.emit_table(f"{recipe}: {result['run_dir']}", ["", "before", "after"], watch.summary_rows(result))


@app.command()
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="A LoRA adapter, a run dir, or a checkpoint with ZeRO shards.")],
    out: Annotated[Path, typer.Option("--out", help="The model folder to write.")],
    base: Annotated[str | None, typer.Option("--base", help="The base of a LoRA adapter, when it moved.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bfloat16, float16 or float32. Default: the base's.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge an adapter or shards into one verified model.

    What was written is loaded again and compared with the unmerged model on an image.
    """
    from .core import console
    from .launch import job as jobs

    result = jobs.merge(checkpoint, out, base=base, dtype=dtype, overwrite=overwrite)
    if json:
        console.emit_json(result)
    else:
        shown = {key: result[key] for key in ("kind", "source", "base", "dtype") if result[key] is not None}
        shown["largest logit difference"] = f"{result['max_logit_difference']:.2g} (allowed {result['tolerance']:.2g})"
        console.emit_table(str(out), ["", ""], [[key, value] for key, value in shown.items()])


def _eval_options(
    checkpoint: Annotated[
        str | None, typer.Argument(help="A model folder, a run dir, a hub name or a LoRA folder.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Options from recipes/eval/ or a YAML file; those given win.")
    ] = None,
    set: Set = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="Base URL of an OpenAI-compatible server instead.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model's name at the endpoint.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="The base of a LoRA folder, when it moved.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="The hub revision of the checkpoint.")] = None,
    questions: Annotated[
        str | None, typer.Option("--questions", help="The question file, a folder, or (hallusion) a hub name.")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Folder (or hallusion: zip) of the figures.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The eval dir. Default: evals/NAME.")] = None,
    stage: Annotated[
        Literal["generate", "judge", "score", "all"] | None, typer.Option("--stage", help="Default: all.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Judge and score these outputs; no model needed.")
    ] = None,
    judged: Annotated[
        Path | None, typer.Option("--judged", help="Score a file of verdicts (judged.json); nothing else needed.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help="hallusion: official (1129 questions, default) or vlmevalkit (951)."),
    ] = None,
    judge: Annotated[
        Literal["rule", "chat"] | None, typer.Option("--judge", help="rule (offline, default) or chat.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option("--judge-model")] = None,
    judge_base_url: Annotated[
        str | None, typer.Option("--judge-base-url", help="Default: the openai client's.")
    ] = None,
    judge_prompt: Annotated[Path | None, typer.Option("--judge-prompt", help="Another wording for the judge.")] = None,
    judge_input: Annotated[
        Literal["answer", "reply"] | None,
        typer.Option("--judge-input", help="answer (extracted, default) or reply (whole)."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", help="Variable with the --endpoint's key. Default: OPENAI_API_KEY.")
    ] = None,
    judge_api_key_env: Annotated[
        str | None, typer.Option("--judge-api-key-env", help="Variable with the judge's. Default: OPENAI_API_KEY.")
    ] = None,
    allow_unjudged: Annotated[
        bool | None, typer.Option("--allow-unjudged", help="Score although judge calls failed.")
    ] = None,
    count_unanswered_wrong: Annotated[
        bool | None,
        typer.Option("--count-unanswered-wrong", help="Questions that the endpoint refuses count as not right."),
    ] = None,
    max_empty: Annotated[
        float | None, typer.Option("--max-empty", min=0, max=100, help="Percent of empty replies. Default: 10.")
    ] = None,
    fail_under: Annotated[
        list[str] | None, typer.Option("--fail-under", help="METRIC=PERCENT, exit 4 below it. Repeatable.")
    ] = None,
    compare_to: Annotated[
        Path | None, typer.Option("--compare-to", help="An eval dir to compare with, question by question.")
    ] = None,
    estimate: Annotated[bool | None, typer.Option("--estimate", help="Print calls and tokens, ask nothing.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first questions; for a try.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Default: 32.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Default: 1024.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="Default: 0, which is greedy.")
    ] = None,
    min_pixels: Annotated[int | None, typer.Option("--min-pixels", min=784, help="Default: as trained.")] = None,
    max_pixels: Annotated[int | None, typer.Option("--max-pixels", min=784, help="Default: as trained.")] = None,
    max_image_bytes: Annotated[
        int | None, typer.Option("--max-image-bytes", min=1000, help="Larger images go to the endpoint as JPEG.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto (default), cpu or cuda.")] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"] | None,
        typer.Option("--dtype", help="Default: float32 on the CPU, bfloat16 on a GPU."),
    ] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", min=1, help="Default: 16.")] = None,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", help="Seconds a request may take. Default: 60.")
    ] = None,
    max_retries: Annotated[int | None, typer.Option("--max-retries", min=0, help="Default: 4.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of sampling and of the bootstrap. Default: 0.")] = None,
    json: Json = False,
) -> None:
    """The options that both eval commands have. None is not given: the recipe's value counts, else the default."""


def _with_eval_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, its `**options` written out for Typer."""
    own = [p for p in signature(command).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    shared = signature(_eval_options).parameters.values()
    command.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
    return command


@app.command("eval")
@_with_eval_options
def eval_benchmark(
    benchmark: Annotated[
        str, typer.Argument(help="hallusion, pope, counting, geoqa, or your own: my_bench.py:BENCHMARK.")
    ],
    **options: Any,
) -> None:
    """A benchmark: generate, judge, score.

    Each stage resumes where it stopped.
    """
    _evaluate(benchmark, **options)


@app.command("eval-hallusion")
@_with_eval_options
def eval_hallusion(**options: Any) -> None:
    """HallusionBench: `r1v eval hallusion`.

    Each stage resumes where it stopped.
    """
    _evaluate("hallusion", **options)


def _evaluate(benchmark: str, recipe: str | None, set: list[str] | None, json: bool, **options: Any) -> None:
    from .core import console
    from .eval.options import check_gates, load
    from .eval.runner import evaluate
    from .eval.show import print_scores

    given = {key: value for key, value in ({"benchmark": benchmark} | options).items() if value not in (None, [])}
    asked = load(recipe, set or [], given)
    result = evaluate(asked)
    if json:
        console.emit_json(result)
    else:
        print_scores(result)
    if "metrics" in result:
        check_gates(result, asked.fail_under)


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Check this recipe too.")] = None,
    set: Set = None,
    step: Annotated[bool, typer.Option("--step", help="Also run one step on the longest rows.")] = False,
    json: Json = False,
) -> None:
    """Is this machine, and this recipe, ready?

    Exit 2 when something would stop the run.
    """
    from .core import console
    from .doctor.checks import diagnose, show

    result = diagnose(recipe, set or [], step=step)
    if json:
        console.emit_json(result)
    else:
        show(result)
    if not result["ready"]:
        raise UsageError("not ready", hint="see the lines that say error")


@app.command()
def report(
    dirs: Annotated[list[Path], typer.Argument(help="Run dirs and eval dirs.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write report.md and report.html into.")] = Path(
        "report"
    ),
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Runs and evaluations in one report.

    Markdown, one self-contained HTML page, pictures.
    """
    from .core import console
    from .report import report as write_report

    result = write_report(dirs, out, overwrite=overwrite)
    if json:
        console.emit_json(result)
    else:
        console.emit(f"{out / 'report.html'}\n{out / 'report.md'}")


@app.command()
def view(
    dirs: Annotated[list[Path], typer.Argument(help="Run dirs of r1v grpo; two are shown side by side.")],
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Default: one that is free.")] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Look at a run's rollouts, step by step.

    A local page, read-only; it follows a run that goes on.
    """
    from .report.viewer import view as serve

    serve(dirs, port=port, open_browser=open_browser)


@app.command("serve-reward")
def serve_reward(
    model: Annotated[
        str, typer.Option("--model", help="A reward model or any vision-language model: folder or hub name.")
    ],
    revision: Annotated[str | None, typer.Option("--revision", help="The hub revision.")] = None,
    host: Annotated[
        str, typer.Option("--host", help="The address to bind; loopback unless told otherwise.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8100,
    devices: Annotated[
        str | None, typer.Option("--devices", help="GPU indices, as 6,7. Default: all that are visible.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", help="The environment variable that holds the key clients must send.")
    ] = None,
) -> None:
    """One reward model for all ranks and hosts, over HTTP.

    It speaks the shape of vLLM's /classify.
    """
    from .launch import job as jobs

    jobs.serve_reward(model, revision=revision, host=host, port=port, devices=devices, api_key_env=api_key_env)


@recipes_app.command("list")
def recipes_list(json: Json = False) -> None:
    """All shipped recipes: purpose, GPUs, and whether this machine has them."""
    from .config import recipes
    from .core import console
    from .core.process import gpu_count

    here = gpu_count()
    rows = [recipes.summary(name, path) for name, path in recipes.shipped().items()]
    rows = [row | {"fits": row["gpus"] is None or row["gpus"] <= here} for row in rows]
    if json:
        console.emit_json(rows)
        return
    console.log(f"this machine has {here} GPU{'s' * (here != 1)}; * marks the recipes that it can run")
    console.emit(f"  {'recipe':<26} {'GPUs':>4}  purpose")
    for row in rows:
        head = f"{'*' if row['fits'] else ' '} {row['recipe']:<26} {row['gpus'] or 'CPU':>4}  "
        console.emit(textwrap.fill(head + row["purpose"], 80, subsequent_indent=" " * 35))


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name, as grpo/tiny.")],
    file: Annotated[Path, typer.Argument(help="The YAML file to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a shipped recipe to a file of your own, comments kept."""
    from .config import recipes
    from .core import console
    from .core.files import write_bytes

    kind, name = recipes.stage_and_name(name, None)
    if file.exists() and not overwrite:
        raise UsageError(f"{file} exists already", hint="name another file, or give --overwrite")
    write_bytes(file, recipes.find(kind, name).read_bytes())
    console.log(f"{file}: run it with r1v {kind}{' NAME CKPT' if kind == 'eval' else ''} --recipe {file}")


def _load_recipe(kind: str, name: str, overrides: list[str]) -> Any:
    from .config import recipes
    from .eval import options

    return options.load(name, overrides, {}) if kind == "eval" else recipes.load(kind, name, overrides)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="A recipe's name, as grpo/tiny, or a path.")],
    set: Set = None,
    stage: Annotated[str | None, typer.Option("--stage", help="grpo or sft; needed for a path.")] = None,
    json: Json = False,
) -> None:
    """A recipe, fully resolved."""
    from .config import recipes
    from .core import console

    recipe = _load_recipe(*recipes.stage_and_name(name, stage), set or [])
    if json:
        console.emit_json(recipe.model_dump(mode="json"))
    else:
        console.emit(recipes.to_yaml(recipe))


@recipes_app.command("validate")
def recipes_validate(
    name: Annotated[str, typer.Argument(help="A recipe's name, as grpo/tiny, or a path.")],
    set: Set = None,
    stage: Annotated[str | None, typer.Option("--stage", help="grpo or sft; needed for a path.")] = None,
    json: Json = False,
) -> None:
    """Check a recipe; all errors at once."""
    from .config import recipes
    from .core import console

    kind, name = recipes.stage_and_name(name, stage)
    _load_recipe(kind, name, set or [])
    if json:
        console.emit_json({"recipe": name, "stage": kind, "valid": True})
    else:
        console.emit(f"{name}: a valid {kind} recipe")


@contextmanager
def _hinting() -> Iterator[None]:
    """After click's own word on a wrong argument, what r1v would have taken: habits from other trainers."""
    try:
        yield
    except SystemExit as e:
        stage = next((a for a in sys.argv[1:] if a in ("grpo", "sft")), None)
        if e.code != 2 or stage is None:
            raise
        given = sys.argv[sys.argv.index(stage) + 1 :]
        if "--config" in given or (given and not given[0].startswith("-") and "=" not in given[0]):
            name = given[0] if not given[0].startswith("-") else "NAME"
            hint = f"r1v {stage} --recipe {name} runs a recipe: a shipped name or the path of a YAML file"
        elif key := next((a for a in given if re.fullmatch(r"(--)?[a-z_.-]+(=.*)?", a) and _is_key(a)), None):
            hint = f"a key of the recipe is set by --set train.{key.lstrip('-').partition('=')[0].replace('-', '_').removeprefix('train.')}=VALUE"
        else:
            raise
        print(f"hint: {hint}", file=sys.stderr)
        raise


def _is_key(word: str) -> bool:
    name = word.lstrip("-").partition("=")[0]
    return ("=" in word and not word.startswith("--")) or name.replace("-", "_").removeprefix("train.") in _trl_names()


def _trl_names() -> set[str]:
    from .config.trl_keys import trl_keys

    return {*trl_keys("grpo"), *trl_keys("sft")}


def main() -> None:
    """The entry point: every `R1VError` becomes its message and exit code; a traceback only with --debug."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's ends a command as Ctrl-C does
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    try:
        with _hinting():
            app()
    except R1VError as e:
        if debug:
            raise
        from .core import console

        console.error(e)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our stdout went away (r1v ... | head): not an error.
        sys.stderr.close()
        sys.exit(0)
    except Exception as e:
        if debug:
            raise
        from .core import console
        from .core.files import disk_full, no_space

        if no_space(e):
            full = disk_full(getattr(e, "filename", None) or "its results")
            console.error(full)
            sys.exit(full.exit_code)
        bug = R1VError(f"{type(e).__name__}: {e}", hint="this is a bug in r1v; --debug shows where")
        console.error(bug)
        sys.exit(bug.exit_code)
