"""The models that r1v makes itself: names like `embedded:tiny-policy`, the cached folders they stand for, and how
each is built. No torch here: the launcher builds what is missing before it starts a worker."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlencode

from ..core.errors import DataError, UsageError, did_you_mean
from ..core.files import cache_dir, lock, staged
from . import recipes

PREFIX = "embedded:"
SFT_RECIPE = "sft/tiny"

_TEXTS = ("core/prompts.py", "data/shapes.py", "tiny/models.py")
# Of each piece: what to show, and what decides its content beside its seed and the libraries: a change rebuilds it.
_PIECES = {
    "tiny-init": ("make the tiny model and its processor", _TEXTS),
    "tiny-policy": ("warm-start the policy (SFT)", (*_TEXTS, "training/sft.py")),
    "tiny-judge": ("train the judge", (*_TEXTS, "tiny/judge.py")),
}
_LIBRARIES = ("torch", "transformers", "trl", "tokenizers", "pillow")


@dataclass(frozen=True)
class Stage:
    """One piece that may have to be built.

    name: `embedded:...` as in a recipe. title: what to show. folder: the cache folder; the model is in `path`. kind
    `module`: run `python -m MODULE *args OUT`; kind `recipe`: run the recipe `args[0]` with the overrides `args[1:]`,
    both into the folder that `building` yields, where `final` holds the model then.
    """

    name: str
    title: str
    kind: Literal["module", "recipe"]
    args: tuple[str, ...]
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "final"

    @property
    def ready(self) -> bool:
        # The folder appears complete, by an atomic rename.
        return self.folder.is_dir()


def is_embedded(name: str | None) -> bool:
    return bool(name) and str(name).startswith(PREFIX)


def with_seed(path: str, seed: int) -> str:
    """A data path as it is, but `shapes` without a seed of its own gets the run's: other seeds draw other data."""
    source, _, query = path.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if source != "shapes" or "seed" in options:
        return path
    return f"shapes?{urlencode(options | {'seed': str(seed)})}"


def resolve_model(name: str, seed: int) -> str:
    """A hub name or folder as it is; an embedded name as its folder.

    Raises UsageError: there is no such embedded model. DataError: it was not built yet.
    """
    if not is_embedded(name):
        return name
    stage = _stage(name, seed)
    if not stage.ready:
        hint = "r1v grpo --recipe tiny builds it"
        raise DataError(f"{name} with seed {seed} is not built yet ({stage.path})", hint=hint)
    return str(stage.path)


def stages(names: Sequence[str | None], seed: int) -> list[Stage]:
    """What stands behind the embedded ones of `names`, in an order in which it can be built; each piece once.

    Raises UsageError: there is no such embedded model.
    """
    wanted: list[str] = []
    for name in filter(is_embedded, names):
        # The policy is trained from tiny-init.
        wanted += [f"{PREFIX}tiny-init"] * (name == f"{PREFIX}tiny-policy") + [str(name)]
    return [_stage(piece, seed) for piece in dict.fromkeys(wanted)]


@contextmanager
def building(stage: Stage) -> Iterator[Path | None]:
    """Hold the piece's lock and yield an empty folder to build in, which becomes `stage.folder` by a rename.

    Yields None when it is there already: another process may have built it meanwhile. After an error the unfinished
    folder stays, for its logs, until the next try.

    Raises DataError: the body left no model in `final/`.
    """
    with lock(stage.folder, "embedded model", wait=True):
        if stage.ready:
            yield None
            return
        with staged(stage.folder, keep=True) as staging:
            yield staging
            if not (staging / "final" / "config.json").is_file():
                raise DataError(f"{stage.name}: the build left no model in {staging / 'final'}")


def _stage(name: str, seed: int) -> Stage:
    piece, _, query = name.removeprefix(PREFIX).partition("?")
    if piece not in _PIECES:
        known = [PREFIX + n for n in _PIECES]
        hint = did_you_mean(PREFIX + piece, known)
        raise UsageError(f"no embedded model {name!r}; there are {', '.join(known)}", hint=hint)
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if piece != "tiny-judge" or key != "steps" or not value.isdigit():
            hint = "embedded:tiny-judge?steps=N trains N steps, 0 none"
            raise UsageError(f"{name}: unknown option {key}={value}", hint=hint)
    title, sources = _PIECES[piece]
    digest = hashlib.sha256(repr((piece, sorted(options.items()), seed)).encode())  # all that decides its content
    recipe = [recipes.recipes_root() / f"{SFT_RECIPE}.yaml"] if piece == "tiny-policy" else []
    for file in [*(Path(__file__).parents[1] / source for source in sources), *recipe]:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    for library in _LIBRARIES:
        digest.update(f"{library}={version(library)}".encode())
    folder = cache_dir("embedded", f"{piece}-seed{seed}-{digest.hexdigest()[:16]}")
    if piece == "tiny-policy":
        return Stage(name, title, "recipe", (SFT_RECIPE, f"train.seed={seed}"), folder)
    module = ["r1vfree_cli.tiny.models", piece.removeprefix("tiny-"), "--seed", str(seed)]
    module += [part for key, value in options.items() for part in (f"--{key}", value)]
    return Stage(name, title, "module", tuple(module), folder)
