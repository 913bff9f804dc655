"""Checkpoints that are complete or not there: a staging directory, an atomic rename; a run resumes at the newest."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_model
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..core import console
from ..core.errors import DataError, R1VError, UsageError, first_line
from ..core.files import sync, write_json
from ..core.machine import disk_full, no_memory, no_space
from ..models.adapter import base_signature
from ..run import contract
from ..run.attempt import Attempt
from ..run.checkpoint import checkpoints, lacking, seal
from .worker import on_main

_Trainer: Any = object  # for type checkers: the attributes are Trainer's
STAGING = ".writing"


class AtomicCheckpoints(_Trainer):
    """Mixin before a `transformers.Trainer`: a checkpoint folder appears under its name only when it is complete.

    Set `contract` (the run contract) to have it written into every checkpoint. `save_total_limit` counts complete
    checkpoints; an old one is renamed before it is deleted, so a killed deletion leaves no half of one either.
    """

    contract: dict | None = None
    kept: str | None = None  # name of a checkpoint that `save_total_limit` does not delete
    _staging: Path | None = None

    def _get_output_dir(self, trial):
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, folder):
        if self._staging is None:  # else it is called again below, with the checkpoint in its place
            super()._push_from_checkpoint(folder)

    def _save_checkpoint(self, model, trial):
        folder = Path(str(self.args.output_dir))
        staging = folder / STAGING
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            console.log(f"saving {name}")
            clean(folder)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save and self.contract is not None:
                contract.write(staging / name, self.contract)
        except Exception as e:
            if no_space(e):
                clean(folder)  # room for the reason to be written down
                raise disk_full(folder / name) from e
            raise
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.process_index == 0:
            seal(staging / name)
            _move(staging / name, folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and (staging / name).is_dir():  # a node with a file system of its own
            _move(staging / name, folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            clean(folder)
            limit = self.args.save_total_limit or 0  # 0: all are kept
            for old in [path for _, path in checkpoints(folder) if not lacking(path, verify=False)][:-limit]:
                if old.name != self.kept:
                    _remove(old)

    def _save(self, output_dir=None, state_dict=None):
        # Loading under ZeRO-3 records renamings that were not needed as if they had been, and saving reverts them:
        # `model.model.embed_tokens`, which other readers of the file do not know. None means the published names.
        if is_deepspeed_zero3_enabled() and isinstance(self.model, PreTrainedModel):
            self.model.__dict__["_weight_conversions"] = None
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # recipe.yaml has the arguments, and a pickle can hold a hub token
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepare = super()._prepare_for_training
        if not (resume_from_checkpoint and self.is_deepspeed_enabled):
            return prepare(max_steps, train_dataloader, resume_from_checkpoint)
        try:
            with tensors_only():
                return prepare(max_steps, train_dataloader, resume_from_checkpoint)
        except (pickle.UnpicklingError, EOFError) as e:
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
        model = self.model if model is None else model
        with _readable(resume_from_checkpoint):
            if not isinstance(model, PreTrainedModel):  # an adapter
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            # Files keep the names that published checkpoints have, which for vision-language models are not the
            # module's. Trainer reads them as they are and only warns that nothing fits; from_pretrained translates.
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype, use_safetensors=True)
            model.load_state_dict(saved.state_dict(), strict=True)


def try_final_save(trainer) -> None:
    """Write now, to a temporary folder, all that the end of a run writes but for the weights. Every rank calls it.

    A generation config that `save_pretrained` would refuse is mended first; an adapter's contract gets a signature of
    its base. Raises DataError: something cannot be saved. UsageError: the disk has no room for the trained weights.
    """
    run = Path(trainer.args.output_dir).parent
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mend_generation_config(base)
    adapted = getattr(model, "peft_config", {})
    if adapted and (signature := base_signature(base)):
        trainer.contract = trainer.contract | {"base_signature": signature}
    saved = [p for p in model.parameters() if p.requires_grad or not adapted]
    needed = 2 * sum(getattr(p, "ds_numel", p.numel()) for p in saved)  # bytes: at least 16 bits each

    def save() -> None:
        free = shutil.disk_usage(run).free
        if free < needed:
            raise UsageError(
                f"the disk of {run} has {free / 1e9:.1f} GB free; the trained model alone takes {needed / 1e9:.1f} GB",
                hint="free some space, or choose another --run-dir",
            )
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=run) as folder:
            try:
                for config in (base.config, base.generation_config, *adapted.values()):
                    config.save_pretrained(folder)
                trainer.processing_class.save_pretrained(folder)
                write_json(Path(folder) / contract.FILE, trainer.contract)
            except Exception as e:  # configs and processors of any class
                if no_space(e):
                    raise disk_full(folder) from e
                raise DataError(f"the model's settings cannot be saved, nor could the trained model: {e}") from e

    on_main(save)


def mend_generation_config(model) -> None:
    """Reset what `save_pretrained` refuses, as a temperature beside `do_sample: false` in published checkpoints.

    Such a field has no effect on generation; each one that is reset is named in a warning.
    """
    given = getattr(model, "generation_config", None)
    if given is None:
        return
    kept, refused = GenerationConfig(), []
    fields = given.to_diff_dict()
    fields.pop("transformers_version", None)
    for key in sorted(fields, key=lambda k: k not in ("do_sample", "num_beams")):  # what others depend on first
        trial = copy.deepcopy(kept)
        setattr(trial, key, fields[key])
        try:
            trial.validate(strict=True)
            kept = trial
        except ValueError:
            refused.append(f"{key}={fields[key]}")
    if refused:
        left_out = f"left out of what is saved: {', '.join(refused)}"
        console.warn(f"the base's generation config contradicts itself; {left_out}")
        model.generation_config = kept


def save_final(trainer, folder: Path) -> None:
    """Write the trained model (or its adapter), processor and run contract to `folder`, complete or not at all.

    Every rank calls it. An earlier folder of the same run is replaced. Raises DataError: says where the weights are.
    """
    staging = folder.with_name(f".{folder.name}-writing")
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.model.config.use_cache = True  # Trainer turned it off for training
    try:
        trainer.save_model(str(staging), _internal_call=True)
        if trainer.args.should_save:
            contract.write(staging, trainer.contract)
            seal(staging)
    except Exception as e:
        if no_space(e):
            shutil.rmtree(staging, ignore_errors=True)  # cut files
        raise _unsaved(trainer, folder, staging, e) from e
    if trainer.args.should_save:
        _move(staging, folder)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        try:
            trainer.push_to_hub()
        except Exception as e:  # a network or a token that has gone since the start costs no run
            upload = f"hf upload {trainer.args.hub_model_id or folder.parent.name} {folder}"
            console.warn(f"the push to the hub failed: {first_line(e)}; once it is reached: {upload}")


def _unsaved(trainer, folder: Path, staging: Path, error: Exception) -> DataError:
    """The error of a final save that failed; the weights are kept, by a write of them alone if need be."""
    kept = list(staging.glob("*.safetensors"))
    for place in (staging, Path(tempfile.gettempdir()) / f"r1v-{folder.parent.name}-{os.getpid()}"):
        if kept or not trainer.args.should_save or is_deepspeed_zero3_enabled():  # the last: sharded over the ranks
            break
        with suppress(Exception):  # no room there either, read-only
            place.mkdir(exist_ok=True)
            save_model(trainer.accelerator.unwrap_model(trainer.model), str(place / "weights.safetensors"))
            kept = [place / "weights.safetensors"]
    places = [str(p) for p in kept]
    places += [str(p) for _, p in checkpoints(folder.parent / "checkpoints")[-1:] if not lacking(p)]
    hint = f"the weights are in {' and in '.join(places)}" if places else "there is no checkpoint either"
    return DataError(f"the trained model could not be saved to {folder}: {first_line(error)}", hint=hint)


def _damaged(checkpoint: Path | str, error: BaseException) -> DataError:
    hint = "another model needs another --run-dir; a damaged checkpoint can be deleted, the one before it is then used"
    return DataError(f"cannot resume from {checkpoint}: {first_line(error)}", hint=hint)


@contextmanager
def _readable(checkpoint: Path | str | None) -> Iterator[None]:
    """What reading a damaged file raises, as an error that names its checkpoint."""
    try:
        yield
    except R1VError:
        raise
    except Exception as e:  # damaged files raise anything
        if no_memory(e):
            raise
        raise _damaged(checkpoint or "the checkpoint", e) from e


def resume_point(attempt: Attempt) -> Path | None:
    """The newest complete checkpoint to go on from, for rank 0 alone; incomplete and damaged ones are skipped with a word.

    None where this attempt is no resume, or the run was killed before its first checkpoint. Raises UsageError: the
    checkpoints have no optimizer state.
    """
    if not attempt.resume:
        return None
    run = attempt.run
    if (run.checkpoints / STAGING).exists():
        console.log("a checkpoint that was being written when the run ended is skipped")
    clean(run.checkpoints)
    for step, path in reversed(checkpoints(run.checkpoints)):
        if lacks := lacking(path):
            some = ", ".join(lacks[:3]) + (" ..." if len(lacks) > 3 else "")
            console.warn(f"{path.name} is not complete ({some}), it is skipped")
            continue
        if not (path / "optimizer.pt").is_file() and not any(path.glob("global_step*")):
            raise UsageError(
                f"{path} holds no optimizer state: the run was started with train.save_only_model",
                hint="such a run cannot be resumed; --overwrite starts it again",
            )
        console.log(f"resuming from step {step}: {path}")
        return path
    console.log("no complete checkpoint yet: starting from step 0")
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

    plain = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
    with patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"), torch.serialization.safe_globals(plain):
        yield


def clean(folder: Path) -> None:
    """Remove what a killed save or deletion left behind."""
    for path in (folder / STAGING, *folder.glob(".old-*")):
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
    sync(target.parent)


def _remove(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(f".old-{checkpoint.name}")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
