"""What a resumed GRPO run needs beside Trainer's own state, so that it goes on as if it had never ended.

Trainer keeps weights, optimizer, schedule, random numbers and the step. Lost were: the order of the rows after the
first epoch, the generated batch between two steps that share it (`num_iterations`, `steps_per_generation`), figures
since the last logged step, what the guard and the judge count, and a reference policy that moves (`sync_ref_model`).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful
from trl.trainer.utils import RepeatSampler

from ..core import console

_Trainer: Any = object  # for type checkers: the attributes are GRPOTrainer's


class EpochSampler(RepeatSampler):
    """TRL's sampler, but the order of an epoch depends on the seed and the epoch's number alone.

    TRL's goes on from what it drew before, so that a resume in the second epoch walked through the first one again.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed or 0)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


class ExactResumeMixin(_Trainer):
    """Mixin before a `trl.GRPOTrainer`: each rank writes what Trainer leaves out beside its random state.

    `carried`: name -> what else has a state to keep on this rank (plain numbers, strings, lists and dicts, which
    `torch.load` reads without a pickle); filled before `train()`.
    """

    carried: dict[str, Stateful]
    _at_step_begin: dict[str, Any] | None = None

    def _get_train_sampler(self, dataset=None):
        trl: Any = super()._get_train_sampler(dataset)
        return EpochSampler(
            trl.data_source, trl.mini_repeat_count, trl.batch_size, trl.repeat_count, trl.shuffle, trl.seed
        )

    def training_step(self, *args, **kwargs):
        if self._at_step_begin is None or self._at_step_begin["global_step"] != self.state.global_step:
            self._at_step_begin = self._position()
        return super().training_step(*args, **kwargs)

    def _position(self) -> dict[str, Any]:
        shared = (self.args.steps_per_generation or 1) * self.num_iterations  # micro-steps on one generated batch
        return {
            "global_step": self.state.global_step,
            "world_size": self.args.world_size,
            "micro_step": self._step,
            "batch": self._buffered_inputs if self._step % shared else None,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "loss_sum": self._tr_loss.clone(),
            "last_logged": self._globalstep_last_logged,
        }

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # A step that was stopped half-way is done again from its beginning.
        begun = self._at_step_begin
        half_way = begun is not None and begun["global_step"] == self.state.global_step
        position = begun if half_way else self._position()
        carried = {name: each.state_dict() for name, each in self.carried.items()}
        torch.save({"position": position, "carried": carried}, self._file(output_dir, "state"))
        if self.args.sync_ref_model and (self._reference_sharded or self.args.process_index == 0):
            parts = [part.detach().cpu().clone() for part in self._reference_parts()]
            torch.save(parts, self._file(output_dir, "reference"))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file = self._file(checkpoint, "state")
        own = self.args.device
        device = "cpu" if own.type == "cpu" else own  # torch.load refuses cpu:0, as it is with several processes
        saved = torch.load(file, map_location=device, weights_only=True) if file.is_file() else {}
        position = saved.get("position", {})
        if position.get("world_size") != self.args.world_size:
            console.warn("the checkpoint was written by another number of processes: the resume is not exact")
            return
        self._step = position["micro_step"]
        self._buffered_inputs = position["batch"]
        self._metrics["train"] = defaultdict(list, position["metrics"])
        self._tr_loss = position["loss_sum"]
        self._globalstep_last_logged = position["last_logged"]
        for name, state in saved["carried"].items():
            if name in self.carried:
                self.carried[name].load_state_dict(state)
        if self.args.sync_ref_model:
            parts = torch.load(self._file(checkpoint, "reference"), map_location="cpu", weights_only=True)
            with torch.no_grad():
                for own, part in zip(self._reference_parts(), parts, strict=True):
                    own.copy_(part)

    def _reference_parts(self) -> list[torch.Tensor]:
        """What this rank holds of a reference policy that moves with the trained one: under ZeRO-3 its shards."""
        return [getattr(p, "ds_tensor", p.data) for p in self.ref_model.parameters()]

    @property
    def _reference_sharded(self) -> bool:
        return any(hasattr(p, "ds_tensor") for p in self.ref_model.parameters())

    def _file(self, checkpoint: str, what: str) -> Path:
        """This rank's, or rank 0's for all where every rank would write the same."""
        own = what == "state" or self._reference_sharded
        return Path(checkpoint) / f"r1v_{what}_{self.args.process_index if own else 0}.pt"
