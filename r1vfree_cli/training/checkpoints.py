"""Checkpoints that are whole or not there: written aside and renamed; the newest whole one is where a run resumes."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..core import console
from ..core.errors import DataError, R1VError, UsageError, first_line
from ..core.files import disk_full, no_space, read_object, write_json
from ..run import contract
from ..run.run_dir import RunDir

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

ASIDE = ".writing"
FILES = "r1v_files.json"  # name -> bytes of every file of a checkpoint, written when all ranks have written theirs
_NAME = re.compile(r"checkpoint-(\d+)")


class WholeCheckpoints(_Trainer):
    """Mixin before a `transformers.Trainer`: a checkpoint folder appears under its name only when it is complete.

    Set `contract` (the run contract) to have it written into every checkpoint. `save_total_limit` counts whole
    checkpoints; an old one is renamed before it is deleted, so a killed deletion leaves no half of one either.
    """

    contract: dict | None = None
    _aside: Path | None = None

    def _get_output_dir(self, trial):
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, folder):
        if self._aside is None:  # else it is called again below, with the checkpoint in its place
            super()._push_from_checkpoint(folder)

    def _save_checkpoint(self, model, trial):
        folder = Path(str(self.args.output_dir))
        aside = folder / ASIDE
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clean(folder)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                strip_pickles(aside / name)
                if self.contract is not None:
                    contract.write(aside / name, self.contract)
        except Exception as e:
            if no_space(e):
                clean(folder)  # room for the reason to be written down
                raise disk_full(folder / name) from e
            raise
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        if self.args.process_index == 0:
            write_json(aside / name / FILES, _sizes(aside / name))
            _move(aside / name, folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and (aside / name).is_dir():  # a node with a file system of its own
            _move(aside / name, folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            clean(folder)
            limit = self.args.save_total_limit or 0  # 0: all are kept
            for old in [path for _, path in checkpoints(folder) if is_whole(path)][:-limit]:
                _remove(old)

    def _save(self, output_dir=None, state_dict=None):
        # Loading under ZeRO-3 records renamings that were not needed as if they had been, and saving reverts them:
        # `model.model.embed_tokens`, which other readers of the file do not know. None means the published names.
        if is_deepspeed_zero3_enabled() and isinstance(self.model, PreTrainedModel):
            vars(self.model)["_weight_conversions"] = None
        super()._save(output_dir, state_dict)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        sharded = resume_from_checkpoint and self.is_deepspeed_enabled
        with tensors_only() if sharded else nullcontext():
            try:
                return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            except (pickle.UnpicklingError, EOFError) as e:
                if not sharded:
                    raise
                raise _damaged(resume_from_checkpoint, e) from e

    def _run_epoch(self, *args, **kwargs):
        # Trainer tells the samplers it can reach; behind the wrapper that skips batches on a resume it reaches none.
        layer = kwargs["train_dataloader"]
        while layer := getattr(layer, "batch_sampler", None) or getattr(layer, "sampler", None):
            if hasattr(layer, "set_epoch"):
                layer.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint):
        with _readable(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with _readable(resume_from_checkpoint):
            self._load_weights(resume_from_checkpoint, model)

    def _load_weights(self, resume_from_checkpoint, model):
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel):  # an adapter
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # Files keep the names that published checkpoints have, which for vision-language models are not the
        # module's. Trainer reads them as they are and only warns that nothing fits; from_pretrained translates.
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype, use_safetensors=True)
        model.load_state_dict(saved.state_dict(), strict=True)


def save_final(trainer, folder: Path) -> None:
    """Write the trained model (or its adapter), processor and run contract to `folder`, whole or not at all.

    Every rank calls it. An earlier folder of the same run is replaced.
    """
    aside = folder.with_name(f".{folder.name}-writing")
    if trainer.args.should_save:
        shutil.rmtree(aside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.model.config.use_cache = True  # Trainer turned it off for training
    try:
        trainer.save_model(str(aside), _internal_call=True)
        if trainer.args.should_save:
            strip_pickles(aside)
            contract.write(aside, trainer.contract)
    except Exception as e:
        if no_space(e):
            shutil.rmtree(aside, ignore_errors=True)
            raise disk_full(folder) from e
        raise
    if trainer.args.should_save:
        _move(aside, folder)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of what is named like a checkpoint, oldest step first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return sorted(found)


def is_whole(checkpoint: Path) -> bool:
    """Whether all that was written into it is there, in its full length."""
    return not lacking(checkpoint)


def lacking(checkpoint: Path) -> list[str]:
    """What of a checkpoint is not there, or not in its full length; [] when it is whole."""
    weights = any(checkpoint.glob("*.safetensors")) or any(checkpoint.glob("global_step*/*_states.pt"))
    found = [] if weights else ["weights"]
    files: dict = {"trainer_state.json": None}
    if (checkpoint / FILES).is_file():
        try:
            files |= read_object(checkpoint / FILES)
        except DataError:
            return [FILES]
    for name, size in files.items():
        path = os.path.join(checkpoint, name)
        if not os.path.isfile(path) or (size is not None and os.path.getsize(path) != size):
            found.append(name)
    return found


def _sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _damaged(checkpoint: Path | str, error: BaseException) -> DataError:
    hint = "another model needs another --run-dir; a damaged checkpoint can be deleted, the one before it is then used"
    return DataError(f"cannot resume from {checkpoint}: {first_line(error)}", hint=hint)


@contextmanager
def _readable(checkpoint: Path | str | None) -> Iterator[None]:
    """What reading a damaged file raises, as an error that names its checkpoint."""
    try:
        yield
    except (R1VError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # damaged files raise anything
        raise _damaged(checkpoint or "the checkpoint", e) from e


def resume_point(run: RunDir) -> Path | None:
    """The newest whole checkpoint to go on from when this attempt is a resume (`R1V_RESUME=1`), else None.

    For rank 0 alone: the others are told. Half-written ones are skipped with a word. None also where the run was killed
    before its first checkpoint.

    Raises:
        UsageError: the checkpoints were saved without optimizer state (`train.save_only_model`).
    """
    if os.environ.get("R1V_RESUME") != "1":
        return None
    if (run.checkpoints / ASIDE).exists():
        console.log("a checkpoint that was being written when the run ended is skipped")
    clean(run.checkpoints)
    for step, path in reversed(checkpoints(run.checkpoints)):
        if lacks := lacking(path):
            some = ", ".join(lacks[:3]) + (" ..." if len(lacks) > 3 else "")
            console.warn(f"{path.name} is not whole ({some} missing or cut), it is skipped")
            continue
        if not (path / "optimizer.pt").is_file() and not any(path.glob("global_step*")):
            raise UsageError(
                f"{path} holds no optimizer state: the run was started with train.save_only_model",
                hint="such a run cannot be resumed; --overwrite starts it again",
            )
        console.log(f"resuming from step {step}: {path}")
        return path
    console.log("no whole checkpoint yet: starting from step 0")
    return None


@contextmanager
def tensors_only() -> Iterator[None]:
    """While active, DeepSpeed's files are read without running what a pickle could hold.

    DeepSpeed asks torch for full unpickling; torch lets the environment overrule that. Beside tensors only the three
    plain classes that its ZeRO files are made of are let in.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]):
            yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def strip_pickles(folder: Path) -> None:
    """Delete Trainer's pickled arguments: recipe.yaml has them, and a pickle can hold a hub token."""
    (folder / "training_args.bin").unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Remove what a killed save or deletion left behind."""
    for path in (folder / ASIDE, *folder.glob(".old-*")):
        shutil.rmtree(path, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Give a folder its name, in place of one that has it already. Where `source` is gone, another node was first."""
    try:
        os.replace(source, target)
    except FileNotFoundError:
        if not target.is_dir():
            raise DataError(f"checkpoint {source} was removed while it was being written") from None
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _remove(target)
        os.replace(source, target)


def _remove(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(f".old-{checkpoint.name}")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
