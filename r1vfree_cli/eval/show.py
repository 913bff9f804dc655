"""A result for people: tables on stdout."""

from __future__ import annotations

from ..core import console
from .hallusion.score import METRICS


def print_scores(doc: dict) -> None:
    """Print what `evaluate` returned: scores, or what a stage alone made, or an estimate."""
    if "estimate" in doc:
        _estimate(doc["estimate"])
    elif "stage" in doc:
        console.emit(f"{doc['stage']}: {doc['n_questions']} questions in {doc['out']}")
    else:
        _scores(doc)


def _scores(doc: dict) -> None:
    settings = doc["settings"]
    console.emit_table(
        f"HallusionBench, protocol {doc['protocol']}: {settings.get('model')}",
        ["", *METRICS],
        [
            ["right / total", *(f"{right}/{total}" for right, total in doc["counts"].values())],
            ["percent", *(_percent(doc["metrics"][m]) for m in METRICS)],
            ["95 % interval", *(_interval(doc["intervals"][m]) for m in METRICS)],
            *(
                [name.replace("_", "-"), *(_percent(base["metrics"][m]) for m in METRICS)]
                for name, base in doc["baselines"].items()
            ),
        ],
    )
    console.emit_table(
        "By category",
        ["", *(m.removesuffix("_aAcc") for m in METRICS), "language", "illusion", "mixed"],
        [
            [
                name,
                *(_percent(part["metrics"][m]) for m in METRICS),
                *(part["diagnostics"][k] for k in ("language_hallucination", "visual_illusion", "mixed")),
            ]
            for name, part in {**doc["by_category"], **doc["by_subcategory"], "all": doc}.items()
        ],
    )
    for line in _notes(doc):
        console.emit(line)
    if "comparison" in doc:
        _comparison(doc["comparison"])
    for warning in doc["warnings"]:
        console.warn(warning)


def _notes(doc: dict) -> list[str]:
    d = doc["diagnostics"]
    c = d["consistency"]
    fp = "none wrong" if d["fp_ratio"] is None else f"{d['fp_ratio']:.3f}"
    lines = [
        "easy and hard are per (set, question) pair, as in the official leaderboard",
        f"figures: {c['correct']} correct, {c['inconsistent']} inconsistent, {c['wrong']} wrong",
        f"yes/no bias: pct diff {d['yes_pct_diff']:+.3f}, fp ratio {fp}",
    ]
    judge = doc["settings"].get("judge") or {}
    who = " ".join(str(judge[k]) for k in ("kind", "model") if judge.get(k))
    lines.append(f"judge: {who}" + (f", shown the {judge['judge_input']}" if judge.get("judge_input") else ""))
    if f := doc.get("answer_format"):
        cut = "not known" if f["cut_at_length"] is None else f["cut_at_length"]
        lines.append(
            f"replies: {f['no_answer_tags']} of {f['n']} without an answer in tags, cut at the length limit: {cut}, "
            f"no yes or no readable: {f['unreadable']}"
        )
    if (a := doc.get("judge_agreement")) and judge.get("kind") != "rule":
        lines.append(
            f"judge and rule agree on {a['agree']} of {a['n']} questions "
            f"({a['agree_readable']} of the {a['readable']} with a readable yes or no)"
        )
    if "max_pixels" in doc["settings"]:
        s = doc["settings"]
        lines.append(
            f"asked with {s['min_pixels']} to {s['max_pixels']} pixels, at most {s['max_new_tokens']} new tokens, "
            f"temperature {s['temperature']:g}"
        )
    return lines


def _comparison(c: dict) -> None:
    console.emit_table(
        f"Compared with {c['with']} (paired; {c['sets']} sets, {c['draws']} draws)",
        ["", *METRICS],
        [
            ["difference", *(_signed(c["metrics"][m]["difference"]) for m in METRICS)],
            ["95 % interval", *(_interval(c["metrics"][m]["interval"]) for m in METRICS)],
            ["p (swapping sets)", *(_p(c["metrics"][m]["p_swap"]) for m in METRICS)],
        ],
    )
    m = c["mcnemar"]
    console.emit(f"questions gained {m['gained']}, lost {m['lost']}; McNemar p {_p(m['p'])} (it ignores sets)")


def _estimate(e: dict) -> None:
    console.emit(f"{e['n_questions']} questions")
    for stage in ("generate", "judge"):
        if stage in e:
            console.emit(f"{stage}: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in e[stage].items()))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _interval(bounds: list[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.1f} to {bounds[1]:.1f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
