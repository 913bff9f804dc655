"""The disk that a run's checkpoints take, before the first is written. No torch here."""

import json
import math
from pathlib import Path

from ..config.schema import Recipe
from ..core.files import disk_free

GB = 1e9


def parameters(folder: Path) -> int:
    """Numbers in the *.safetensors of a folder, by their headers; 0 where there are none that can be read."""
    total = 0
    for file in folder.glob("*.safetensors"):
        try:
            with open(file, "rb") as f:
                header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            total += sum(math.prod(value["shape"]) for key, value in header.items() if key != "__metadata__")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError):
            return 0
    return total


def adapter_parameters(total: int, rank: int) -> int:
    """About as many as a LoRA of this rank on all linear layers trains."""
    return int(total * 0.01 * rank / 16)


def checkpoint_bytes(recipe: Recipe, total: int) -> int:
    """One checkpoint of a model of `total` parameters, of all ranks together: weights as they are held, the optimizer's
    two moments in 32 bits; with DeepSpeed its 32-bit weights too, and below stage 3 a second copy of the 16-bit ones.
    """
    held = 4 if recipe.weights_dtype == "float32" else 2
    preset = recipe.launch.preset
    if recipe.model.lora:
        total, held = adapter_parameters(total, recipe.model.lora.r), 4
    if recipe.trl.get("save_only_model"):
        return held * total
    copies = 2 if preset in ("zero1", "zero2") else 1
    return (copies * held + (12 if preset.startswith("zero") else 8)) * total


def checkpoints_at_once(recipe: Recipe) -> int | None:
    """Most checkpoints that there are at a time: an old one goes when the new one is complete. None: not known."""
    trl = recipe.trl
    strategy, steps, every = trl.get("save_strategy"), trl.get("max_steps", -1), trl.get("save_steps", 500)
    if strategy == "no":
        return 0
    counts = [limit + 1] if (limit := trl.get("save_total_limit")) else []
    if strategy == "epoch":
        counts.append(math.ceil(trl.get("num_train_epochs", 3)))
    elif steps > 0:
        counts.append(math.ceil(steps / (every if every >= 1 else math.ceil(every * steps))))
    return min(counts, default=None)


def shortage(recipe: Recipe, total: int, where: Path) -> tuple[str | None, str | None]:
    """(error, warning) where the checkpoints of a model of `total` parameters do not fit under `where`.

    Those of an earlier attempt count as free: they are among those that stay, or are deleted.
    """
    one, count, lora = checkpoint_bytes(recipe, total), checkpoints_at_once(recipe), recipe.model.lora
    wide = lora or recipe.weights_dtype == recipe.model.dtype == "float32"
    final = (4 if wide else 2) * (adapter_parameters(total, lora.r) if lora else total)
    free = disk_free(where) + sum(f.stat().st_size for f in where.glob("checkpoints/**/*") if f.is_file())
    size = f"a checkpoint is about {one / GB:.3g} GB"
    if count is None:
        return None, f"train.save_total_limit is not set: every checkpoint is kept; {size}, {free / GB:.3g} are free"
    need = count * one + final
    found = f"{size}, {count} of them and the final model {need / GB:.3g}; {where} has {free / GB:.3g} free"
    remedy = "train.save_total_limit, save_only_model or --run-dir on another disk"
    return (f"disk: {found}; {remedy}" if need > free else None), None
