"""What a checkpoint argument means: which folder, of what kind, complete or not, trained how; without torch."""

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import xxhash

from ..config.embedded import resolve_model
from ..config.recipes import read_yaml
from ..core.errors import DataError, UsageError, did_you_mean
from ..core.files import read_object, sync, write_json
from . import contract
from .run_dir import RunDir

Kind = Literal["model", "adapter", "shards", "hub"]

FILES = "r1v_files.json"  # name -> {bytes, xxh3_128} of every file of a folder that r1v wrote; written last
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A model to load. `path` is its folder, or its name on the hub; `contract` is {} when nothing tells its training.

    kind: a loadable `model`, a LoRA `adapter`, ZeRO `shards` that must be merged first, or something on the `hub`.
    """

    name: str
    path: str
    kind: Kind = "hub"
    contract: dict = field(default_factory=dict)
    fingerprint: str | None = None


def resolve(name: str, seed: int = 0, *, verify: bool = True, shards: bool = False) -> Checkpoint:
    """Resolve a model folder, run dir (its `final/`), `checkpoint-N`, hub name, LoRA folder or embedded name.

    `verify`: compare the bytes of what r1v wrote with its file list, not the sizes alone (0.3 s a GB). `shards`: accept
    ZeRO shards, which only merge can read.

    Raises DataError: no such place, a folder without a model, a run without a final one, or damaged files.
    """
    path = Path(os.path.expanduser(resolve_model(name, seed)))
    if not os.path.exists(path):  # False also for a name that cannot be one
        hint: str | None = "give a model folder, a run dir, or a hub name like org/model"
        if _HUB.fullmatch(name):
            if not any(path.parent.glob("*/recipe.yaml")):  # runs/NAME, mistyped, is no name on the hub
                return Checkpoint(name, name)
            hint = did_you_mean(name, map(str, path.parent.iterdir()), hint)
        raise DataError(f"no checkpoint at {name}", hint=hint)
    if not path.is_dir():
        raise DataError(f"{name} is a file; a model is a folder or a hub name")
    run = RunDir(path)
    if not _is_model(path) and run.holds_run:
        path = run.final
        if not _is_model(path):
            complete = [place for _, place in checkpoints(run.checkpoints) if not lacking(place, verify=False)]
            last = (
                f"its last complete checkpoint is {complete[-1]}" if complete else "it has no complete checkpoint yet"
            )
            raise DataError(f"the run {name} has no final/ model", hint=f"it is not finished; {last}")
    kind = kind_of(path)
    if kind == "shards" and not shards:
        raise DataError(f"{path} holds ZeRO shards, not a loadable model", hint=f"first: {merge_command(path)}")
    if damaged := damage(path, verify=verify):
        hint = f"copy it again, or use another checkpoint; after a change on purpose delete {path / FILES}"
        raise DataError(f"{path} is damaged: {', '.join(damaged[:3])}{' ...' * (len(damaged) > 3)}", hint=hint)
    return Checkpoint(name, str(path), kind, _contract(path), fingerprint(path))


def merge_command(path: Path | str) -> str:
    """The command that makes one model of an adapter or shards."""
    return f"r1v merge {path} --out {str(path).rstrip('/')}-merged"


def is_adapter(path: Path | str) -> bool:
    """Whether the folder holds a LoRA adapter instead of a complete model."""
    return (Path(path) / ADAPTER).is_file()


def adapter_settings(folder: Path | str) -> dict:
    """What `adapter_config.json` says. Raises DataError: it cannot be read, or describes no LoRA adapter."""
    settings = read_object(Path(folder) / ADAPTER)
    if settings.get("peft_type") != "LORA":
        raise DataError(f"{folder}/{ADAPTER} does not describe a LoRA adapter")
    return settings


def adapter_base(folder: Path | str, given: str | None = None) -> str:
    """The base model of a LoRA folder: the one that is given with --base, else the one that it names.

    Raises DataError: it is no LoRA adapter, names no base, or the base is not where it was.
    """
    base = given or adapter_settings(folder).get("base_model_name_or_path")
    if not base:
        raise DataError(f"the adapter in {folder} does not name its base model", hint="give it with --base")
    if not _HUB.fullmatch(str(base)) and not Path(base).is_dir():
        raise DataError(f"the adapter's base model: no model folder {base}", hint="give its place with --base")
    return str(base)


def kind_of(folder: Path) -> Kind:
    """What the files of a folder are. Raises DataError: no model; says what is there."""
    if is_adapter(folder):
        if not (folder / ADAPTER_WEIGHTS).is_file():  # PEFT would take a pickle instead
            pickled = [file.name for file in folder.glob("adapter_model.[bp]*")]
            hint = (
                f"{pickled[0]} is a pickle, which is not loaded: save the adapter again with PEFT" if pickled else None
            )
            raise DataError(f"{folder} is an adapter without its weights: {ADAPTER_WEIGHTS} is missing", hint=hint)
        return "adapter"
    if (folder / "config.json").is_file():
        if any(folder.glob("*.safetensors")):
            return "model"
        if (folder / "latest").is_file() or any(folder.glob("global_step*")):
            return "shards"
    there = sorted(p.name for p in folder.iterdir())[:12]
    hint = f"a model folder has config.json and *.safetensors, an adapter {ADAPTER}"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in there):
        hint = "weights in pickle files are not loaded: convert them to safetensors first"
    raise DataError(f"{folder} holds no model; it holds {', '.join(there) or 'nothing'}", hint=hint)


def fingerprint(folder: Path) -> str:
    """Changes when a weight or configuration file does: names, sizes and modification times."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".bin", ".jinja"))
    lines = [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two folders hold equal weight files, whatever their names."""
    if a.resolve() == b.resolve():
        return True
    files = [sorted(folder.glob("*.safetensors")) for folder in (a, b)]
    sizes = [sorted(f.stat().st_size for f in group) for group in files]
    return sizes[0] == sizes[1] and sorted(_hashes(files[0])) == sorted(_hashes(files[1]))


def _is_model(path: Path) -> bool:
    return any((path / mark).is_file() for mark in ("config.json", ADAPTER))


def _contract(path: Path) -> dict:
    """The folder's own contract, else what the recipe of the run says for one of its `checkpoints/`."""
    own = contract.read(path)
    if own is not None:
        return own
    recipe = path.resolve().parent.parent / "recipe.yaml"
    if path.resolve().parent.name != "checkpoints" or not recipe.is_file():
        return {}
    try:
        model = read_yaml(recipe.read_text(encoding="utf-8"), str(recipe))["model"]
        return {key: int(model[key]) for key in ("min_pixels", "max_pixels") if key in model}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, UsageError) as e:
        raise DataError(f"cannot read {recipe}: {e}") from None


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of what is named like a checkpoint, oldest step first."""
    named = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return sorted(named)


def lacking(checkpoint: Path, *, verify: bool = True) -> list[str]:
    """What is wrong with a checkpoint that training writes, a line for each file; [] when it is complete."""
    weights = any(checkpoint.glob("*.safetensors")) or any(checkpoint.glob("global_step*/*_states.pt"))
    missing = [] if weights else ["weights missing"]
    missing += [] if (checkpoint / "trainer_state.json").is_file() else ["trainer_state.json missing"]
    return list(dict.fromkeys(missing + damage(checkpoint, verify=verify)))


def damage(folder: Path, *, verify: bool = True) -> list[str]:
    """How the folder differs from its file list, a line for each file; [] for none, and where there is no list.

    Lists of earlier versions hold sizes alone. With `verify` the bytes are compared where the list has their hash.
    """
    if not (folder / FILES).is_file():
        return []
    try:
        read = read_object(folder / FILES).items()
        listed = {name: entry if isinstance(entry, dict) else {"bytes": int(entry)} for name, entry in read}
    except (DataError, TypeError, ValueError, OverflowError):
        return [f"{FILES} cannot be read"]
    lines, same_size = [], {}
    for name, entry in listed.items():
        path = folder / name
        if not os.path.isfile(path):  # False also for a name that cannot be one
            lines.append(f"{name} missing")
        elif path.stat().st_size != entry.get("bytes"):
            lines.append(f"{name} cut")
        elif verify and "xxh3_128" in entry:
            same_size[name] = entry["xxh3_128"]
    found = zip(same_size, _hashes(folder / name for name in same_size), strict=True)
    return lines + [f"{name} has other bytes" for name, hash_ in found if hash_ != same_size[name]]


def seal(folder: Path) -> None:
    """Finish a folder before it gets its name: file modes as usual, all bytes on the disk, and their list."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != FILES)
    umask = os.umask(0)
    os.umask(umask)
    for path in files:
        path.chmod(0o666 & ~umask)  # safetensors writes 0600
    entries = [{"bytes": p.stat().st_size, "xxh3_128": hash_} for p, hash_ in zip(files, _hashes(files), strict=True)]
    names = [str(p.relative_to(folder)) for p in files]
    write_json(folder / FILES, dict(zip(names, entries, strict=True)))
    for path in [*files, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)


def _hashes(files: Iterable[Path]) -> list[str]:
    """XXH3 of each file, on several threads. It finds damage, it proves no origin: six times the speed of sha256."""

    def one(path: Path) -> str:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type] # has all it needs

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, files))
