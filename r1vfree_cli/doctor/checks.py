"""`r1v doctor`: is this machine, and this recipe, ready? Each check is ok, a warning or an error with a hint."""

import os
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ..config import recipes
from ..config.schema import GrpoRecipe, SftRecipe
from ..core import console, files
from ..core.errors import R1VError, UsageError
from ..launch import job as jobs
from ..launch import preflight, vllm
from ..launch import processes as launch
from ..launch.plan import module_plan
from ..run import run_dir

OK, WARNING, ERROR = "ok", "warning", "error"
# (distribution, lowest version that is known to work, the extra that brings it where not every run needs it)
_PACKAGES = (
    ("torch", "2.11", None),
    ("transformers", "5.17", None),
    ("trl", "1.16", None),
    ("accelerate", "1.15", None),
    ("datasets", "5", None),
    ("deepspeed", "0.19", None),
    ("peft", "0.19", None),
    ("flash-attn", "2.8", "flash"),
    ("vllm", vllm.RELEASE, "vllm"),
    ("wandb", "0.20", "wandb"),
)


@dataclass
class Check:
    """What was looked at, its state, what was found (with evidence in further lines), how to mend it."""

    name: str
    state: str
    found: str
    hint: str | None = None


def diagnose(name: str | None = None, overrides: list[str] | None = None, *, step: bool = False) -> dict:
    """All checks; with a recipe's name (`grpo/NAME`, `sft/NAME` or a path), those of the recipe too.

    With `step`, one training step on the longest rows is run in a temporary folder.

    Returns:
        `{"ready": bool, "checks": [{"name", "state", "found", "hint"}]}`; ready means no error.
    """
    stage, recipe = None, None
    if name is not None:
        stage, name = recipes.stage_and_name(name, None) if "/" in name else _stage_of(name)
        recipe = recipes.load(stage, name, overrides or [])
    elif step or overrides:
        raise UsageError("--step and --set are of a recipe", hint="name it with --recipe")
    checks = [*_machine(recipe), *_disk()]

    def well() -> bool:
        return not any(c.state == ERROR for c in checks)

    if well():  # what follows writes files
        if stage and recipe:
            checks += _recipe(stage, recipe)
        checks += _torch(stage, recipe, judge=well())
        if step and stage and recipe and well():
            checks.append(_step(stage, recipe))
    return {"ready": well(), "checks": [asdict(c) for c in checks]}


def _stage_of(name: str) -> tuple[str, str]:
    """`--recipe NAME` without a stage means GRPO's where both exist: it is the main job."""
    return ("grpo", name) if f"grpo/{name}" in recipes.shipped("grpo") else recipes.stage_and_name(name, None)


def _machine(recipe: GrpoRecipe | SftRecipe | None) -> list[Check]:
    python = ".".join(map(str, sys.version_info[:3]))
    fits = sys.version_info >= (3, 11)
    checks = [Check("python", OK if fits else ERROR, python, None if fits else "r1v needs Python 3.11 or newer")]
    for package, lowest, extra in _PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            hint = f"pip install -e '.[{extra}]'" if extra else "pip install -e ."
            checks.append(Check(package, OK if extra else ERROR, "not installed", hint))
            continue
        hint = ""
        if package == "vllm" and _numbers(found)[:2] != _numbers(lowest):
            hint = (
                f"r1v was run with {lowest} and takes no other; TRL 1.16 names 0.22 to 0.31, and only warns of {lowest}"
            )
        elif _numbers(found) < _numbers(lowest):
            hint = f"tested from {lowest} on"
        checks.append(Check(package, WARNING if hint else OK, found, hint or None))
    if os.environ.get("R1V_VLLM"):
        checks.append(_vllm_command())
    gpus = preflight.gpu_count()
    checks.append(Check("gpus", OK, str(gpus) if gpus else "none: only recipes with launch.device cpu run here"))
    checks.append(_hub())
    if find_spec("wandb") is not None:
        known = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in _netrc()
        used = recipe is not None and "wandb" in str((recipe.train.model_extra or {}).get("report_to"))
        state = WARNING if used and not known else OK
        checks.append(Check("wandb login", state, "found" if known else "none", "wandb login"))
    return checks


def _vllm_command() -> Check:
    try:
        command = vllm.executable()
    except UsageError as e:
        return Check("vllm server", WARNING, e.message, e.hint)
    return Check("vllm server", OK, f"{vllm.release_of(command) or 'of unknown release'} ({command})")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())


def _netrc() -> str:
    try:
        return Path("~/.netrc").expanduser().read_text()
    except OSError:
        return ""


def _hub() -> Check:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Check("hub", OK, "HF_HUB_OFFLINE=1: only what is cached is used")
    where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(where, method="HEAD"), timeout=5):
            return Check("hub", OK, "reached")
    except urllib.error.HTTPError as e:
        return Check("hub", OK, f"reached ({e.code})")
    except (OSError, ValueError) as e:
        os.environ["HF_HUB_OFFLINE"] = "1"  # else each check that follows waits for it, for minutes
        return Check("hub", WARNING, f"not reached: {getattr(e, 'reason', e)}", "local folders and cached models work")


def _disk() -> list[Check]:
    checks = []
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    places = {"here": Path.cwd(), "cache": files.cache_dir(), "temporary": temporary}
    for title, path in places.items():
        while not path.exists():
            path = path.parent
        if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
            hint = {"cache": "R1V_CACHE names another place", "temporary": "TMPDIR names another place"}.get(title)
            checks.append(Check(f"disk, {title}", ERROR, f"{path} cannot be written", hint))
            continue
        free = files.disk_free(path) / 1e9
        state = ERROR if free < 1 else WARNING if free < 50 and title != "temporary" else OK
        hint = "a 3B run with optimizer states writes about 53 GB a checkpoint"
        if title == "temporary":
            hint = "TMPDIR can name another place"
        checks.append(Check(f"disk, {title}", state, f"{free:.3g} GB free on {path}", None if state == OK else hint))
    return checks


def _recipe(stage: str, recipe: GrpoRecipe | SftRecipe) -> list[Check]:
    found = preflight.check(recipe)
    checks = [Check("recipe", OK, f"a valid {stage} recipe")]
    checks += [Check("preflight", ERROR, line) for line in found.errors]
    checks += [Check("preflight", WARNING, line) for line in found.warnings]
    if not found.errors:
        try:
            jobs.prepare(recipe)
            checks.append(Check("model and data", OK, "reachable"))
        except R1VError as e:
            checks.append(_failed("model and data", e))
    return checks


def _torch(stage: str | None, recipe: GrpoRecipe | SftRecipe | None, *, judge: bool) -> list[Check]:
    """What needs torch: asked of a process of its own, so that a crash in CUDA is one line here.

    Where something is known to be wrong already, lengths and memory are still told, but no judge is started.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "probe.json"
        args = [str(out)]
        if recipe is not None and stage is not None:
            files.write_text(Path(folder) / "recipe.yaml", recipes.to_yaml(recipe))
            args += ["--stage", stage, "--recipe", str(Path(folder) / "recipe.yaml")]
            args += [] if judge else ["--without-judge"]
        failed = []
        try:
            plan = module_plan("r1vfree_cli.doctor.probe", *args)
            logs = Path(folder) / "logs"
            with ExitStack() as stack:
                server = stack.enter_context(launch.serving(recipe, logs)) if recipe and judge else None
                more = ["--reward-url", server.url] if server else []
                launch.execute(replace(plan, argv=[*plan.argv, *more]), logs)
        except R1VError as e:
            failed = [_failed("probe", e)]
        found = files.read_json(out) if out.is_file() else []
        return [*(Check(**line) for line in found), *failed]


def _failed(name: str, error: R1VError) -> Check:
    return Check(name, ERROR, "\n".join([error.message, *error.details[-3:]]), error.hint)


def _step(stage: str, recipe: GrpoRecipe | SftRecipe) -> Check:
    """One step on the rows with the longest prompts: what fits here fits later."""
    with tempfile.TemporaryDirectory() as folder:
        sets: dict[str, object] = {"max_steps": 1, "save_strategy": "no", "report_to": "none"}
        sets |= {"shuffle_dataset": False} if stage == "grpo" else {}
        trial = recipe.model_copy(deep=True)
        trial.data.heldout = None
        if isinstance(trial, GrpoRecipe):
            trial.eval = None
        for key, value in sets.items():
            setattr(trial.train, key, value)
        try:
            summary = jobs.run(stage, trial, run_dir.RunDir(Path(folder) / "run"), longest_first=True)
        except R1VError as e:
            return _failed("one step", e)
        return Check("one step", OK, f"{summary.get('seconds', {}).get(stage, 0):.0f} s, start included")


def show(result: dict) -> None:
    for check in result["checks"]:
        first, *more = check["found"].splitlines() or [""]
        console.emit(f"{check['state']:<8} {check['name']:<16} {first}")
        for line in more:
            console.emit(f"{'':<27} {line}")
        if check["hint"] and check["state"] != OK:
            console.emit(f"{'':<25} hint: {check['hint']}")
