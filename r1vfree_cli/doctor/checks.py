"""`r1v doctor`: is this machine, and this recipe, ready? Each check is ok, a warning or an error with a hint."""

import os
import re
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from ..config import recipes
from ..config.schema import GrpoRecipe, SftRecipe
from ..core import console, files
from ..core.errors import R1VError, UsageError
from ..launch import job as jobs
from ..launch import preflight, vllm
from ..launch import processes as launch
from ..launch.plan import module_plan
from ..run.contract import installed
from ..run.run_dir import RunDir

OK, WARNING, ERROR = "ok", "warning", "error"
_PACKAGES: tuple[str, ...] = ("torch", "transformers", "trl", "accelerate", "datasets", "deepspeed", "peft")
_PACKAGES += ("flash-attn", "vllm", "wandb")


def check(name: str, state: str, found: str, hint: str | None = None) -> dict:
    """What was looked at, its state, what was found (with evidence in further lines), how to mend it."""
    return {"name": name, "state": state, "found": found, "hint": hint}


def failed(name: str, error: R1VError) -> dict:
    """The check that an error ended."""
    return check(name, ERROR, "\n".join([error.message, *error.details]), error.hint)


def diagnose(name: str | None = None, overrides: list[str] | None = None, *, step: bool = False) -> dict:
    """All checks, `{"ready": no error, "checks": [...]}`; with a recipe's name or path, those of the recipe too.

    With `step`, one training step on the longest rows, with completions of full length, is run in a temporary folder.
    """
    stage, recipe = None, None
    if name is not None:
        # NAME alone means GRPO's where both stages have one: it is the main job.
        main = f"grpo/{name}" in recipes.shipped("grpo")
        stage, name = ("grpo", name) if main else recipes.stage_and_name(name, None)
        recipe = recipes.load(stage, name, overrides or [])
    elif step or overrides:
        raise UsageError("--step and --set are of a recipe", hint="name it with --recipe")
    checks = [*_machine(recipe), *_disk()]

    def well() -> bool:
        return not any(c["state"] == ERROR for c in checks)

    if well():  # what follows writes files
        if stage and recipe:
            checks += _recipe(stage, recipe)
        checks += _torch(stage, recipe, judge=well())
        if step and stage and recipe and well():
            checks.append(_step(stage, recipe))
    return {"ready": well(), "checks": checks}


def _machine(recipe: GrpoRecipe | SftRecipe | None) -> list[dict]:
    checks = [check("python", OK, ".".join(map(str, sys.version_info[:3])))]
    asked: list[Requirement] = []
    try:
        asked = [r for r in map(Requirement, requires("r1vfree-cli") or ()) if 'extra == "test"' not in str(r.marker)]
    except PackageNotFoundError:  # run from a checkout: nothing says which versions it needs
        checks.append(check("packages", WARNING, "r1v is not installed: no version is checked", "pip install -e ."))
    for wanted in sorted((r for r in asked if r.name in _PACKAGES), key=lambda r: _PACKAGES.index(r.name)):
        found, extra = installed(wanted.name), re.search(r'extra == "(\w+)"', str(wanted.marker))
        if found is None:
            hint = f"pip install -e '.[{extra[1]}]'" if extra else "pip install -e ."
            hint = f"pip install {preflight.FLASH}" if wanted.name == "flash-attn" else hint
            checks.append(check(wanted.name, OK if extra else ERROR, "not installed", hint))
        else:
            fits = wanted.specifier.contains(found, prereleases=True)
            hint = f"r1v was tested with {wanted.name}{wanted.specifier}"
            checks.append(check(wanted.name, OK if fits else WARNING, found, None if fits else hint))
    if os.environ.get("R1V_VLLM"):
        try:
            command = vllm.executable()
            checks.append(check("vllm server", OK, f"{vllm.release_of(command) or 'of unknown release'} ({command})"))
        except UsageError as e:
            checks.append(check("vllm server", WARNING, e.message, e.hint))
    gpus = preflight.gpu_count()
    checks.append(check("gpus", OK, str(gpus) if gpus else "none: only recipes with launch.device cpu run here"))
    checks.append(_hub())
    if find_spec("wandb") is not None:
        login = bool(os.environ.get("WANDB_API_KEY"))
        with suppress(OSError, ValueError):  # not there, or not readable
            login = login or "api.wandb.ai" in Path("~/.netrc").expanduser().read_text()
        used = recipe is not None and "wandb" in str(recipe.trl.get("report_to"))
        state = WARNING if used and not login else OK
        checks.append(check("wandb login", state, "found" if login else "none", "wandb login"))
    return checks


def _hub() -> dict:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return check("hub", OK, "HF_HUB_OFFLINE=1: only what is cached is used")
    where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(where, method="HEAD"), timeout=5):
            return check("hub", OK, "reached")
    except urllib.error.HTTPError as e:
        return check("hub", OK, f"reached ({e.code})")
    except (OSError, ValueError) as e:
        os.environ["HF_HUB_OFFLINE"] = "1"  # else each check that follows waits for it, for minutes
        return check("hub", WARNING, f"not reached: {getattr(e, 'reason', e)}", "local folders and cached models work")


def _disk() -> list[dict]:
    checks = []
    places = {"here": Path.cwd(), "cache": files.cache_dir(), "temporary": Path(os.environ.get("TMPDIR", "/tmp"))}
    other = {"cache": "R1V_CACHE names another place", "temporary": "TMPDIR names another place"}
    for title, path in places.items():
        while not path.exists():
            path = path.parent
        if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
            checks.append(check(f"disk, {title}", ERROR, f"{path} cannot be written", other.get(title)))
            continue
        free = files.disk_free(path) / 1e9
        state = ERROR if free < 1 else WARNING if free < 50 and title != "temporary" else OK
        hint = "a 3B run with optimizer states writes about 53 GB a checkpoint"
        hint = other[title] if title == "temporary" else hint
        checks.append(check(f"disk, {title}", state, f"{free:.3g} GB free on {path}", None if state == OK else hint))
    return checks


def _recipe(stage: str, recipe: GrpoRecipe | SftRecipe) -> list[dict]:
    found = preflight.check(recipe)
    checks = [check("recipe", OK, f"a valid {stage} recipe")]
    checks += [check("preflight", ERROR, line) for line in found.errors]
    checks += [check("preflight", WARNING, line) for line in found.warnings]
    if not found.errors:
        try:
            jobs.prepare(recipe)
            checks.append(check("model and data", OK, "reachable"))
        except R1VError as e:
            checks.append(_short("model and data", e))
    return checks


def _torch(stage: str | None, recipe: GrpoRecipe | SftRecipe | None, *, judge: bool) -> list[dict]:
    """What needs torch: asked of a process of its own, so that a crash in CUDA is one line here.

    Where something is known to be wrong already, lengths and memory are still told, but no judge is started.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        out, logs, ended = folder / "probe.json", folder / "logs", []
        args = [str(out)]
        if recipe is not None and stage is not None:
            files.write_text(folder / "recipe.yaml", recipes.to_yaml(recipe))
            args += ["--stage", stage, "--recipe", str(folder / "recipe.yaml")]
            args += [] if judge else ["--without-judge"]
        try:
            server = stack.enter_context(launch.serving(recipe, logs)) if recipe and judge else None
            args += ["--reward-url", server.url] if server else []
            launch.execute(module_plan("r1vfree_cli.doctor.probe", *args), logs)
        except R1VError as e:
            ended = [_short("probe", e)]
        return (files.read_json(out) if out.is_file() else []) + ended


def _short(name: str, error: R1VError) -> dict:
    return failed(name, R1VError(error.message, hint=error.hint, details=error.details[-3:]))


def _step(stage: str, recipe: GrpoRecipe | SftRecipe) -> dict:
    """One step on the rows with the longest prompts and with completions of full length: what fits here fits later."""
    trial = recipe.model_copy(deep=True)
    trial.data.heldout = None
    sets: dict[str, object] = {"max_steps": 1, "save_strategy": "no", "report_to": "none"}
    if isinstance(trial, GrpoRecipe):
        trial.eval = None
        sets["shuffle_dataset"] = False
    for key, value in sets.items():
        setattr(trial.train, key, value)
    with tempfile.TemporaryDirectory() as folder:
        try:
            summary = jobs.run(stage, trial, RunDir(Path(folder) / "run"), trial=True)
        except R1VError as e:
            return _short("one step", e)
    return check("one step", OK, f"{summary.get('seconds', {}).get(stage, 0):.0f} s, start included")


def show(result: dict) -> None:
    """Print the checks, a hint below those that are not ok."""
    for found in result["checks"]:
        first, *more = found["found"].splitlines() or [""]
        console.emit(f"{found['state']:<8} {found['name']:<16} {first}")
        more = [f"  {line}" for line in more]
        more += [f"hint: {found['hint']}"] if found["hint"] and found["state"] != OK else []
        for line in more:
            console.emit(f"{'':<25} {line}")
