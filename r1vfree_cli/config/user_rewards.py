"""Rewards from a user's own code, checked as far as that goes without running it: files, names, signatures.

`rewards.function` imports and calls them, in the workers.
"""

import ast
import importlib.util
import inspect
from collections.abc import Collection
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ..core.errors import UsageError, nearest
from .rewards import UserReward

# What TRL hands to every reward beside the row's columns.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def source_file(reward: UserReward) -> Path:
    """The file that holds the reward; nothing is imported. Raises UsageError: there is none."""
    if reward.source.endswith(".py"):
        path = Path(reward.source)
        if not path.is_file():
            raise UsageError(f"rewards.{reward.key}: no file {path}")
        return path
    top, *rest = reward.source.split(".")
    spec = importlib.util.find_spec(top)
    for i, _ in enumerate(rest, 2):
        inside = spec.submodule_search_locations if spec else None
        spec = PathFinder.find_spec(".".join([top, *rest][:i]), inside) if inside else None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        hint = "a file is given as FILE.py:FUNCTION"
        raise UsageError(f"rewards.{reward.key}: no module {reward.source} in this environment", hint=hint)
    return Path(spec.origin)


def reward_errors(reward: UserReward, columns: Collection[str]) -> list[str]:
    """A line for each thing that is wrong with a reward; `columns`: those of the rows that hold something."""
    where = f"rewards.{reward.key}: "
    try:
        path = source_file(reward)
        tree = ast.parse(path.read_bytes(), str(path))
    except UsageError as e:
        return [e.message + (f"; {e.hint}" if e.hint else "")]
    except SyntaxError as e:
        return [f"{where}{path}:{e.lineno}: {e.msg}"]
    except (OSError, ValueError) as e:
        return [f"{where}cannot read {reward.source}: {e}"]
    found = {node.name: node for node in tree.body if isinstance(node, _FUNCTION | ast.ClassDef)}
    node, given, arguments = found.get(reward.function), {*GIVEN, *columns}, set(reward.arguments)
    if node is None:
        # Made in another way (an import, functools.partial, under an `if`): known only once it runs.
        bound = {getattr(n, "id", None) or getattr(n, "asname", None) or getattr(n, "name", "") for n in ast.walk(tree)}
        near = nearest(reward.function, found)
        there = f"nearest is {near}" if near else f"it has {', '.join(found) or 'none'}"
        missing = f"{where}no function or class {reward.function} in {path}; {there}"
        return [] if bound & {reward.function, "*"} else [missing]
    where += f"{path}:{node.lineno}: "
    lines = [f"{key} is handed to every reward, it cannot be a key" for key in sorted(arguments & given)]
    if isinstance(node, _FUNCTION):
        lines += _mismatch(node, given, arguments)
    elif not node.bases and not node.decorator_list:
        methods = {n.name: n for n in node.body if isinstance(n, _FUNCTION)}
        if "__init__" in methods:
            lines += _mismatch(methods["__init__"], set(), arguments, None)
        elif arguments:
            lines.append(f"{reward.function} has no __init__ that takes {', '.join(sorted(arguments))}")
        lines += _mismatch(methods["__call__"], given, set(), None) if "__call__" in methods else ["it has no __call__"]
    return [where + line for line in lines]


def _mismatch(function: _FUNCTION, given: set[str], arguments: set[str], *own: Any) -> list[str]:
    """Why a call with `arguments` and what it wants of `given` would fail; `own`: None for `self`."""
    if function.decorator_list:
        return []
    spec = function.args
    scope: dict[str, Any] = {}
    for each in ast.walk(spec):
        if isinstance(each, ast.arg):
            each.annotation = None
    spec.defaults = [ast.Constant(None) for _ in spec.defaults]
    spec.kw_defaults = [each and ast.Constant(None) for each in spec.kw_defaults]
    exec(f"def stub({ast.unparse(spec)}): pass", scope)
    signature = inspect.signature(scope["stub"])
    names = set(signature.parameters)
    for key in sorted(arguments - names):  # **kwargs would take a misspelt key without a word
        if near := nearest(key, names - given):
            return [f"{function.name}{signature} has no parameter {key}; nearest is {near}"]
    try:
        signature.bind(*own, **dict.fromkeys((given if spec.kwarg else given & names) | arguments))
    except TypeError as e:
        return [f"{function.name}{signature}: {e}"]
    return []
