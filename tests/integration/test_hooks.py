"""`hooks` against what is installed: each entry is as it says, and nothing that r1v uses is left out."""

import ast
import inspect
import pkgutil
import re
from pathlib import Path

import hooks
import pytest

import r1vfree_cli
from r1vfree_cli.training.resume import EpochSampler
from r1vfree_cli.training.sft import R1VSFTTrainer
from r1vfree_cli.training.trainer import R1VGRPOTrainer
from r1vfree_cli.training.vllm_sampler import VLLMSampler

LIBRARIES = ("trl", "transformers", "accelerate", "deepspeed")
KNOWN = [*hooks.OVERRIDES, *hooks.PRIVATES]


def theirs(cls: type) -> list[type]:
    return [c for c in cls.__mro__ if c.__module__.split(".")[0] in LIBRARIES]


def source_of(cls: type) -> str:
    return "".join(inspect.getsource(c) for c in theirs(cls))


@pytest.mark.parametrize("hook", KNOWN, ids=lambda h: h.name.split(":")[1])
def test_each_is_as_the_list_says(hook):
    if hook.parameters is None:
        owner, _, name = hook.name.rpartition("." if "." in hook.name.split(":")[1] else ":")
        place = pkgutil.resolve_name(owner)
        assigned = inspect.isclass(place) and re.search(rf"self\.{name}\b[^\n]*=", source_of(place))
        assert assigned or hasattr(place, name)
        return
    function = pkgutil.resolve_name(hook.name)
    wanted = hook.parameters.split()
    parameters = list(inspect.signature(function.__init__ if inspect.isclass(function) else function).parameters)
    if wanted[-1:] == ["..."]:
        wanted, parameters = wanted[:-1], parameters[: len(wanted) - 1]
    assert parameters == wanted


@pytest.mark.parametrize("cls", [R1VGRPOTrainer, R1VSFTTrainer, EpochSampler, VLLMSampler])
def test_every_override_is_in_the_list(cls):
    listed = {h.name.rpartition(".")[2] for h in hooks.OVERRIDES}
    for ours in cls.__mro__:
        if ours.__module__.startswith("r1vfree_cli"):
            overridden = {n for n in vars(ours) if not n.startswith("__") and any(n in vars(c) for c in theirs(cls))}
            assert overridden <= listed, ours


def test_every_override_in_the_list_is_one():
    ours = {n for c in (R1VGRPOTrainer, R1VSFTTrainer, EpochSampler, VLLMSampler)
            for k in c.__mro__ for n in vars(k)
            if k.__module__.startswith("r1vfree_cli")}  # fmt: skip
    assert {h.name.rpartition(".")[2] for h in hooks.OVERRIDES} <= ours


def test_every_private_of_theirs_is_in_the_list():
    listed = {re.split(r"[.:]", h.name)[-1] for h in KNOWN}
    trainers = source_of(R1VGRPOTrainer) + source_of(R1VSFTTrainer) + source_of(VLLMSampler)
    of_trainers = set(re.findall(r"self\.(_\w+)\b[^\n=]*=[^=]", trainers)) | set(re.findall(r"def (_\w+)\(", trainers))
    used, own = set(), {"_exit"}  # os._exit
    for file in Path(r1vfree_cli.__file__).parent.rglob("*.py"):
        in_trainer = file.parent.name in ("training", "shared_prefix")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
                used.add((node.attr, in_trainer))
            if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    private = {name for name, in_trainer in used if name not in own or (in_trainer and name in of_trainers)}
    assert private - listed - {"_fingerprint"} == set()  # datasets' own, and the name of a function of r1v's
