"""A run dir: names, the guard against overwriting, attempts, status."""

import shutil
import time
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UsageError
from ..core.files import read_object, write_json, write_text

SAID = "said.jsonl"  # in an attempt's logs: what rank 0 says to people, for r1v to repeat

STATES = ("finished", "running", "starting", "failed", "interrupted", "stopped")
FINISHED, RUNNING, STARTING, FAILED, INTERRUPTED, STOPPED = STATES


class RunDir:
    """Paths and small state of one run. `attempt` counts its starts from 1; each has its own `logs/attempt-N/`."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.launch = self.path / "launch.json"
        self.status_file = self.path / "status.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.rollouts = self.path / "rollouts"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"

    @property
    def status(self) -> dict:
        """`status.json`, or {} when there is none. Raises DataError: it is damaged."""
        hint = "deleted, it costs nothing but the count of attempts: --resume goes on from the newest checkpoint"
        try:
            found = read_object(self.status_file) if self.status_file.is_file() else {}
        except DataError as e:
            raise DataError(e.message, hint=hint) from None
        if found and found.get("state") not in STATES:
            raise DataError(f"{self.status_file}: state is {str(found.get('state'))[:40]!r}", hint=hint)
        for key, limit in (("attempt", 10**6), ("step", 10**12)):
            number = found.get(key, 0)
            if type(number) is not int or not 0 <= number < limit:
                raise DataError(f"{self.status_file}: {key} is {str(number)[:40]!r}, not a count", hint=hint)
        return found

    @property
    def attempt(self) -> int:
        return self.status.get("attempt", 0)

    @property
    def logs(self) -> Path:
        """The folder of the current attempt's logs."""
        return self.path / "logs" / f"attempt-{self.attempt}"

    @property
    def rollout_files(self) -> dict[int, Path]:
        """Step -> the file of its rollouts, ascending."""
        return {int(f.stem.removeprefix("step-")): f for f in sorted(self.rollouts.glob("step-*.parquet"))}

    @property
    def holds_run(self) -> bool:
        return self.recipe.exists() or self.status_file.exists()

    def set_status(self, state: str, **fields: Any) -> None:
        """Replace `status.json`, keeping what is not named: state, step, attempt, reason, time (s, epoch)."""
        write_json(self.status_file, self.status | {"state": state, "time": round(time.time(), 3)} | fields)

    def _own(self) -> list[Path]:
        """What is in the folder, but for what nodes above 0, which may be faster, have put there for themselves."""
        return [child for child in self.path.iterdir() if child.name != "nodes"]

    def begin(self, recipe_yaml: str, *, resume: bool = False, overwrite: bool = False) -> None:
        """Claim the folder for a new attempt, of this recipe from now on. Killed at any moment, it leaves a run dir
        that the next call accepts.

        Raises UsageError: it holds a run and neither resume nor overwrite was asked; or it holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, not a folder", hint="choose another --run-dir")
        if self.holds_run and overwrite:
            for child in sorted(self._own(), key=lambda c: c == self.recipe):  # what says "a run dir" goes last
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        for half in (*self.path.glob(".*.tmp"), *self.rollouts.glob(".*.tmp")):  # of a killed writer
            half.unlink(missing_ok=True)
        if self.holds_run and not resume:
            state = self.status.get("state", "unknown state")
            hint = "--resume continues it, --run-dir names another folder, --overwrite deletes it first"
            raise UsageError(f"{self.path} holds a run already ({state})", hint=hint)
        if resume and not self.holds_run:
            raise UsageError(f"{self.path} holds no run to resume", hint="leave out --resume to start one")
        if not self.holds_run and self.path.is_dir() and self._own():
            raise UsageError(f"{self.path} is not empty and is no run dir", hint="choose another --run-dir")
        attempt = self.attempt + 1
        write_text(self.recipe, recipe_yaml)
        (self.path / "logs" / f"attempt-{attempt}").mkdir(parents=True, exist_ok=True)
        self.set_status(STARTING, attempt=attempt, reason=None)
