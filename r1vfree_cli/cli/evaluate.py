"""`r1v eval` and `r1v eval-hallusion`: the same options, from one table."""

from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import Json, Set, option, put, recipe_names, with_options

app = typer.Typer()

_READERS, _JUDGES, _SHOWN = Literal["r1v", "vlmevalkit"], Literal["rule", "chat"], Literal["answer", "reply"]
_EVAL_STAGES = Literal["generate", "judge", "score", "all"]
_DTYPES = Literal["auto", "bfloat16", "float16", "float32"]
# name: (type, help, more of typer.Option). None is not given: the recipe's value counts, else the default.
_EVAL_OPTIONS: dict[str, tuple] = {
    "vllm": (bool, "Answer through a vLLM server, started for the checkpoint."),
    "endpoint": (str, "Base URL of an OpenAI-compatible server instead."),
    "model": (str, "The model's name at the endpoint."),
    "base": (str, "The base of a LoRA folder, when it moved."),
    "revision": (str, "The hub revision of the checkpoint."),
    "questions": (str, "The question file, a folder, or (hallusion) a hub name."),
    "images": (Path, "Folder (or hallusion: zip) of the figures."),
    "out": (Path, "The eval dir. Default: evals/NAME."),
    "stage": (_EVAL_STAGES, "Default: all."),
    "predictions": (list[Path], "Judge and score these outputs (r1v's, VLMEvalKit's, lmms-eval's). Repeatable."),
    "judged": (list[Path], "Score files of verdicts (judged.json, the official script's). Repeatable."),
    "protocol": (str, "hallusion: official (1129 questions, default) or vlmevalkit (951)."),
    "judge": (_JUDGES, "rule (offline, default) or chat."),
    "reader": (_READERS, "How the rule finds yes or no: r1v (default), or as VLMEvalKit, word by word."),
    "judge_model": (str, None),
    "judge_base_url": (str, "Default: the openai client's."),
    "judge_prompt": (Path, "Another wording for the judge."),
    "judge_input": (_SHOWN, "answer (extracted, default) or reply (whole)."),
    "api_key_env": (str, "Variable with the --endpoint's key. Default: R1V_ENDPOINT_KEY."),
    "judge_api_key_env": (str, "Variable with the judge's. Default: OPENAI_API_KEY."),
    "allow_unjudged": (bool, "Score although judge calls failed."),
    "count_unanswered_wrong": (bool, "Questions that the endpoint refuses for good count as not right."),
    "max_empty": (float, "Percent of empty replies. Default: 10.", {"min": 0, "max": 100}),
    "fail_under": (list[str], "METRIC=PERCENT, exit 4 below it. Repeatable."),
    "compare_to": (Path, "An eval dir to compare with, question by question."),
    "estimate": (bool, "Print calls and tokens, ask nothing."),
    "limit": (int, "Only the first questions; for a try.", {"min": 1}),
    "batch_size": (int, "Default: 32.", {"min": 1}),
    "max_new_tokens": (int, "Default: 1024.", {"min": 1}),
    "temperature": (float, "Default: 0, which is greedy.", {"min": 0}),
    "min_pixels": (int, "Default: as trained."),
    "max_pixels": (int, "Default: as trained."),
    "max_image_bytes": (int, "Larger images go to the endpoint as JPEG.", {"min": 1000}),
    "device": (str, "auto (default), cpu or cuda."),
    "dtype": (_DTYPES, "Default: float32 on the CPU, bfloat16 on a GPU."),
    "concurrency": (int, "Default: 16.", {"min": 1}),
    "timeout_s": (float, "Seconds a request may take. Default: 60."),
    "max_retries": (int, "Default: 4.", {"min": 0}),
    "seed": (int, "Of sampling and of the bootstrap. Default: 0."),
}


def _evaluate(
    benchmark: str,
    checkpoint: Annotated[str | None, typer.Argument(help="A model folder, run dir, hub name or LoRA folder.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="A recipe's options; those given here win.", autocompletion=recipe_names),
    ] = None,
    set: Set = None,
    json: Json = False,
    **options: Any,
) -> None:
    from ..eval.options import check_gates, load
    from ..eval.runner import evaluate
    from ..eval.show import print_scores

    given = {"benchmark": benchmark, "checkpoint": checkpoint} | options
    asked = load(recipe, set or [], {key: value for key, value in given.items() if value not in (None, [])})
    result = evaluate(asked)
    put(result, json, lambda: print_scores(result))
    if "metrics" in result:
        check_gates(result, asked.fail_under)


_EVAL_PARAMETERS = [
    *list(signature(_evaluate).parameters.values())[1:-1],
    *(option(k, *v) for k, v in _EVAL_OPTIONS.items()),
]


@app.command("eval")
@with_options(_EVAL_PARAMETERS)
def eval_benchmark(
    benchmark: Annotated[
        str, typer.Argument(help="hallusion, pope, counting, geoqa, or your own: my_bench.py:BENCHMARK.")
    ],
    **options: Any,
) -> None:
    """A benchmark: generate, judge, score.

    Each stage resumes where it stopped.
    """
    _evaluate(benchmark, **options)


@app.command("eval-hallusion")
@with_options(_EVAL_PARAMETERS)
def eval_hallusion(**options: Any) -> None:
    """HallusionBench: `r1v eval hallusion`.

    Each stage resumes where it stopped.
    """
    _evaluate("hallusion", **options)
