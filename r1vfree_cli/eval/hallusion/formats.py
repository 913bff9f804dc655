"""HallusionBench's records as other tools write them, in the form of the official result file."""

import math
import re
from typing import Any

from ...core.errors import DataError
from ..records import found_in

ACCEPTED = (
    "accepted: a list of records with category, subcategory, visual_input, set_id, figure_id, question_id, question "
    "(HallusionBench.json, the official script's result files, judged.json)",
    "accepted: VLMEvalKit's questions and predictions: index (VD_figure_1_0_0_0), prediction (.xlsx, .tsv, .csv, .json)",
    "accepted: lmms-eval's sample logs (samples_hallusion_bench_image.jsonl, or a .json with logs)",
)
_INDEX = re.compile(r"(?:.*_)?(VD|VS)_([^_]+)_(\d+)_([^_]+)_([^_]+)_([^_]+)$")
_FAILED = "Failed to obtain answer via API."  # VLMEvalKit's reply where there is none
_METRICS = ("aAcc", "qAcc", "fAcc")  # lmms-eval keeps the question and its reply once for each


def official(record: dict, where: str) -> dict:
    """The record in the official result format; what its tool did not write is left out.
    Raises DataError: it fits no layout that is known; says what it has and what is accepted."""
    logged = next((record[m] for m in _METRICS if isinstance(record.get(m), dict)), None)
    if logged is not None and "category" in logged:
        return logged
    if isinstance(record.get("doc"), dict) and "category" in record["doc"]:
        reply = _first(record.get("filtered_resps", record.get("resps")))
        return record["doc"] | ({} if reply is None else {"model_prediction": reply})
    if "set_id" in record and "figure_id" in record:
        return {"model_prediction": record["prediction"]} | record if "prediction" in record else record
    if "index" in record:
        return _of_vlmevalkit(record, where)
    raise DataError(f"{where}: no question of HallusionBench; {found_in(record)}", details=list(ACCEPTED))


def _first(value: Any) -> Any:
    while isinstance(value, list):
        value = value[0] if value else None
    return value


def _of_vlmevalkit(record: dict, where: str) -> dict:
    match = _INDEX.match(str(record["index"]))
    if not match:
        what = f"{where}: index is {record['index']!r}, wanted like VD_figure_1_0_0_0"
        raise DataError(what, details=[found_in(record), *ACCEPTED])
    names = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")
    found: dict[str, Any] = dict(zip(names, match.groups()))
    found |= {"question": record.get("question"), "gt_answer": record.get("answer") or record.get("gt_answer")}
    found |= {"filename": record.get("filename") or record.get("image_path")}
    found |= {"gt_answer_details": record.get("gt_answer_details")}
    if "prediction" in record:
        # An empty cell is an empty reply, which is counted; VLMEvalKit reads it as "nan" and finds no answer either.
        reply = record["prediction"]
        empty = reply is None or (isinstance(reply, float) and math.isnan(reply)) or str(reply).startswith(_FAILED)
        found["model_prediction"] = "" if empty else str(reply)
    return {key: value for key, value in found.items() if value is not None}
