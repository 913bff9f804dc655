"""attempt.json: all that r1v tells a worker beside recipe.yaml, in the folder that the worker is started with.

That is the run dir, or `nodes/N` in it on a node above 0.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from ..core.errors import DataError
from ..core.files import read_object, write_json
from .run_dir import RunDir

FILE = "attempt.json"


@dataclass(frozen=True)
class Attempt:
    """One start of a run, as a node's workers see it.

    logs: where this node's ranks log, and hold their pid files. launcher_pid: the r1v process; a rank that outlives it
    ends. git_commit: of the recipe's repository. reward_url: of the reward server of `serve`. trial: doctor's one step
    on what needs most memory. seconds: of the stages before this one. launched: `time.monotonic()` of the launch.
    """

    run_dir: str
    logs: str
    resume: bool = False
    launcher_pid: int | None = None
    git_commit: str | None = None
    reward_url: str | None = None
    trial: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    launched: float | None = None

    @property
    def run(self) -> RunDir:
        return RunDir(self.run_dir)

    def write(self, folder: Path) -> None:
        """Write it into the folder that holds the node's recipe.yaml."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What `write` wrote; a fresh attempt where there is none."""
        if not (folder / FILE).is_file():
            return cls.of(RunDir(folder))
        try:
            return cls(**read_object(folder / FILE))
        except TypeError as e:  # of another release of r1v, on another node
            raise DataError(f"{folder / FILE} is damaged: {e}") from None

    @classmethod
    def of(cls, run: RunDir, *, resume: bool = False) -> Self:
        """The attempt of a run dir that no launcher has started."""
        return cls(str(run.path), str(run.logs), resume=resume)

    def seconds_until_now(self, stage: str) -> dict[str, float]:
        """Seconds of what came before the ranks, and of `stage` since r1v launched it; {} where r1v did not."""
        if self.launched is None:
            return {}
        return {**self.seconds, stage: round(time.monotonic() - self.launched, 1)}
