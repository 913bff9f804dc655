"""A user's own code (rewards, a model family, a benchmark): `FILE.py:NAME` or `package.module:NAME`."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UsageError


def load_source(source: str) -> ModuleType:
    """The module of `FILE.py` or `package.module`; what its code raises passes. A file is imported once."""
    if not source.endswith(".py"):
        return importlib.import_module(source)
    file = Path(source)
    name = f"r1v_user_{file.stem}"
    if getattr(sys.modules.get(name), "__file__", None) == source:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    # Last, so that no file beside it hides an installed package; taken away again, so that none is found by chance.
    sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(file.parent))
    return module


def load_named(spec: str, what: str) -> Any:
    """The object that `spec` names. Raises UsageError, which calls it `what`: there is none, or its code fails."""
    source, _, name = spec.rpartition(":")
    try:
        return getattr(load_source(source), name)
    except Exception as e:  # a user's code fails as it likes
        raise UsageError(f"{what} {spec} cannot be loaded: {type(e).__name__}: {e}") from e
