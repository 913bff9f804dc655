"""wandb, trackio, tensorboard and whatever else transformers reports to: none of them can stop a run or outlast it.

They get the figures of logged steps, held-out figures, sample rollouts and the recipe, and are closed when everything
else is on disk. What one of them raises is a warning, and it is not asked again.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

import yaml
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from ..core import console
from ..core.errors import UsageError, first_line
from ..core.prompts import parse
from ..run.run_dir import RunDir
from .recorder import Rollout, spread_over_groups
from .worker import is_main

CLOSE_S = 120.0  # an upload without a network would be tried for ever
SAMPLES = 8  # rollouts in a table, unless train.num_completions_to_print says otherwise


class Trackers(TrainerCallback):
    """Hands rank 0's events on to transformers' own callbacks, each guarded; leaving it tells them the end.

    Takes `report_to` and `log_completions` out of `args`: TRL would stop at a table whose cells are messages. Raises
    UsageError: `report_to` names what transformers does not know.
    """

    def __init__(self, args: Any, run: RunDir, recipe: Any):
        self.run, self.recipe = run, recipe.model_dump(mode="json")
        self.samples = 0
        if getattr(args, "log_completions", False):
            self.samples, args.log_completions = args.num_completions_to_print or SAMPLES, False
        if args.project == "huggingface":  # transformers' default
            args.project = "r1v"
        args.run_name = args.run_name or run.path.resolve().name
        try:
            classes = get_reporting_integration_callbacks(args.report_to)
        except ValueError as e:
            raise UsageError(f"train.report_to: {e}") from None
        args.report_to = []
        self._told: dict[str, Any] | None = None  # what every event gets, once training has begun
        self._live: dict[str, Any] = {c.__name__.removesuffix("Callback").lower(): c for c in classes if is_main()}
        self._each(lambda name, made: self._live.update({name: made()}))

    def on_train_begin(self, args, state, control, **kwargs):
        self._told = {"args": args, "state": state, "control": control, "model": kwargs.get("model")}
        self._each(self._begin)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """NaN and None are no figures: they are left out."""
        figures = {k: v for k, v in (logs or {}).items() if v is not None and v == v}
        self._each(lambda _, tracker: tracker.on_log(args, state, control, logs=dict(figures), **kwargs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.log({k.removeprefix("eval/"): v for k, v in (metrics or {}).items()})

    def on_save(self, args, state, control, **kwargs):
        self._each(lambda _, tracker: tracker.on_save(args, state, control, **kwargs))

    def log(self, figures: dict[str, float]) -> None:
        """Figures that no step logged: they show as `eval/NAME`, at the step that the run has reached."""
        if self._told is not None:
            self.on_log(**self._told, logs={f"eval_{k}": v for k, v in figures.items()})

    def table(self, step: int, rollouts: Sequence[Rollout], find_image: Callable[[str], Any]) -> None:
        """Some rollouts of a step as rows: question, reply, answer, scores, the image of the row with this id."""
        if not (self.samples and self._live):
            return
        rows, images = [], []
        for r in spread_over_groups(rollouts, self.samples):
            row = {
                "step": step,
                "question": r.prompt,
                "completion": r.completion,
                "answer": parse(r.completion).answer or "",
            }
            rows.append(row | r.rewards | {"advantage": r.advantage})
            images.append(find_image(r.id))
        if rows:
            self._each(lambda name, tracker: self._table(name, tracker, rows, images))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """End them, each within `CLOSE_S`."""

        def end(name: str, tracker: Any) -> None:
            if self._told is not None:
                tracker.on_train_end(**self._told)
            if name == "wandb" and tracker._wandb.run is not None:  # transformers leaves it to the interpreter's end
                tracker._wandb.finish(exit_code=int(kind is not None))

        for name, tracker in list(self._live.items()):
            run = contextvars.copy_context().run  # trackio keeps its run in a context variable
            thread = threading.Thread(target=run, args=(self._guarded, end, name, tracker), daemon=True)
            thread.start()
            thread.join(CLOSE_S)
            if thread.is_alive():
                console.warn(f"{name} did not end within {CLOSE_S:g} s and may lack the last figures")
        self._live = {}

    def _each(self, work: Callable[[str, Any], Any]) -> None:
        for name, tracker in list(self._live.items()):
            self._guarded(work, name, tracker)

    def _guarded(self, work: Callable[[str, Any], Any], name: str, tracker: Any) -> None:
        try:
            work(name, tracker)
        except Exception as e:
            self._live.pop(name, None)
            console.warn(f"the tracker {name} failed and is left out from here on: {type(e).__name__}: {first_line(e)}")

    def _begin(self, name: str, tracker: Any) -> None:
        told = self._told or {}
        args = told["args"]
        if name == "wandb" and tracker._wandb.run is None:
            where = None if os.environ.get("WANDB_DIR") else str(self.run.path)
            tracker._wandb.init(project=os.environ.get("WANDB_PROJECT", args.project), name=args.run_name, dir=where)
        elif name == "tensorboard":
            tracker.logging_dir = tracker.logging_dir or str(self.run.path / "tensorboard")
        tracker.on_init_end(args, told["state"], told["control"])
        tracker.on_train_begin(**told)
        if name == "wandb":
            run = tracker._wandb.run
            run.config.update({"recipe": self.recipe}, allow_val_change=True)
            console.log(f"wandb: {run.url or 'wandb sync ' + run.dir.removesuffix('/files')}")
        elif name == "trackio":
            tracker._trackio.config.update({"recipe": self.recipe}, allow_val_change=True)
            console.log(f"trackio: trackio show --project {args.project}")
        elif name == "tensorboard":
            tracker.tb_writer.add_text("recipe", _block(yaml.safe_dump(self.recipe, sort_keys=False)))
            console.log(f"tensorboard: tensorboard --logdir {tracker.logging_dir}")

    def _table(self, name: str, tracker: Any, rows: list[dict[str, Any]], images: list[Any]) -> None:
        step = rows[0]["step"]
        if name == "tensorboard":
            import numpy as np

            for i, (row, image) in enumerate(zip(rows, images, strict=True)):
                tracker.tb_writer.add_text(f"rollouts/{i}", _block(yaml.safe_dump(row, sort_keys=False)), step)
                if image is not None:
                    tracker.tb_writer.add_image(f"rollouts/{i}", np.asarray(image), step, dataformats="HWC")
        elif module := getattr(tracker, f"_{name}", None) if name in ("wandb", "trackio") else None:
            shown = [None if image is None else module.Image(image) for image in images]
            data = [[*row.values(), image] for row, image in zip(rows, shown, strict=True)]
            table = module.Table(columns=[*rows[0], "image"], data=data)
            module.log({"rollouts": table, "train/global_step": step})


def _block(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
