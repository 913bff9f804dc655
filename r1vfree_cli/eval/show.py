"""A result for people: tables on stdout, what makes it mean little before them."""

from ..core import console
from ..core.errors import counted
from .result import causes

LARGE = 0.05  # share of unreadable replies that belongs above the table


def print_scores(doc: dict) -> None:
    """Print what `evaluate` returned: scores, or what a stage alone made, or an estimate."""
    if "estimate" in doc:
        console.emit(counted(doc["estimate"]["n_questions"], "question"))
        for stage in [key for key in ("generate", "judge") if key in doc["estimate"]]:
            told = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in doc["estimate"][stage].items())
            console.emit(f"{stage}: {told}")
    elif "stage" in doc:
        console.emit(f"{doc['stage']}: {counted(doc['n_questions'], 'question')} in {doc['out']}")
    else:
        _scores(doc)


def _scores(doc: dict) -> None:
    for line in _doubts(doc):
        console.emit(line)
    metrics, name = list(doc["metrics"]), doc["title"]
    protocol = f", protocol {doc['protocol']}" if "diagnostics" in doc else ""
    console.emit_table(
        f"{name}{protocol}: {doc['settings'].get('model')}",
        ["", *metrics],
        [
            ["count", *(f"{right}/{total}" for right, total in doc["counts"].values())],
            ["percent", *_percents(doc)],
            ["95 % interval", *map(_interval, doc["intervals"].values())],
            *([name.replace("_", "-"), *_percents(base)] for name, base in doc["baselines"].items()),
        ],
    )
    title, parts, kinds = "By part", doc.get("by_part", {}), {}
    if "diagnostics" in doc:
        title, parts = "By category", {**doc["by_category"], **doc["by_subcategory"], "all": doc}
        kinds = {"language": "language_hallucination", "illusion": "visual_illusion", "mixed": "mixed"}
    rows = [
        [name, *_percents(part), *(part["diagnostics"][k] for k in kinds.values())]
        for name, part in parts.items()
        if any(value is not None for value in part["metrics"].values())
    ]
    if rows:
        console.emit_table(title, ["", *(m.removesuffix("_aAcc") for m in metrics), *kinds], rows)
    for line in _notes(doc):
        console.emit(line)
    if "comparison" in doc:
        _comparison(doc["comparison"])
    for warning in doc["warnings"]:
        console.warn(warning)


def _doubts(doc: dict) -> list[str]:
    """The first lines: when the table below them means little."""
    found = []
    if (f := doc.get("answer_format")) and (f["unreadable_share"] or 0) > LARGE:
        found.append(f"{f['unreadable']} of {f['n']} replies unreadable: no answer could be found in them")
    if n := doc["unanswered"]["n"]:
        why = causes(doc["unanswered"])
        found.append(f"{n} of {doc['n_questions']} questions have no answer and count as not right: {why}")
    if n := doc.get("unclear_right"):
        right = doc["counts"]["aAcc"][0]
        found.append(f"{n} of {right} right answers are unclear replies, which text-only VS questions allow")
    if below := below_constant(doc):
        found.append("no better than always giving one answer: " + ", ".join(below))
    return found


def below_constant(doc: dict) -> list[str]:
    """Metrics in which a constant reply is at least as good; those that every constant reply fills are left out."""
    found = []
    for metric, value in doc["metrics"].items():
        constant = [c for base in doc["baselines"].values() if (c := base["metrics"][metric]) is not None]
        if value is not None and constant and value <= max(constant) and metric not in ("yes_rate", "recall"):
            found.append(metric)
    return found


def _notes(doc: dict) -> list[str]:
    lines = []
    if d := doc.get("diagnostics"):
        c, fp = d["consistency"], "none wrong" if d["fp_ratio"] is None else f"{d['fp_ratio']:.3f}"
        lines += [
            "easy and hard are per (set, question) pair, as in the official leaderboard",
            f"figures: {c['correct']} correct, {c['inconsistent']} inconsistent, {c['wrong']} wrong",
            f"yes/no bias: pct diff {d['yes_pct_diff']:+.3f}, fp ratio {fp}",
        ]
    if "mean" in doc:
        lines.append(f"mean of aAcc, fAcc and qAcc, as VLMEvalKit's leaderboard shows it: {_number(doc['mean'])}")
    s, judge = doc["settings"], doc["settings"].get("judge") or {}
    who = " ".join(str(judge[k]) for k in ("kind", "model") if judge.get(k))
    if judge.get("reader", "r1v") != "r1v":
        who += f", reading as {judge['reader']} does"
    lines.append(f"judge: {who}" + (f", shown the {judge['judge_input']}" if judge.get("judge_input") else ""))
    if f := doc.get("answer_format"):
        cut = "not known" if f["cut_at_length"] is None else f["cut_at_length"]
        unread = f"no answer readable: {f['unreadable']} ({_number(100 * (f['unreadable_share'] or 0))} %)"
        tags = f"replies: {f['no_answer_tags']} of {f['n']} without an answer in tags"
        lines.append(f"{tags}, cut at the length limit: {cut}, {unread}")
    if a := doc.get("judge_agreement"):
        readable = f"{a['agree_readable']} of the {a['readable']} with a readable answer"
        lines.append(f"judge and rule agree on {a['agree']} of {a['n']} questions ({readable})")
    if "max_pixels" in s:
        tokens = f"at most {s['max_new_tokens']} new tokens, temperature {s['temperature']:g}"
        lines.append(f"asked with {s['min_pixels']} to {s['max_pixels']} pixels, {tokens}")
    if n := s.get("jpeg_images"):
        why = f"their PNG is above {s['max_image_bytes']} bytes"
        lines.append(f"{n} images went as JPEG of quality {s['jpeg_quality']}: {why}")
    return [*lines, f"all of it: {doc['out']}"] if "out" in doc else lines


def _comparison(c: dict) -> None:
    found = c["metrics"].values()
    console.emit_table(
        f"Compared with {c['with']} (paired; {c['sets']} clusters, {c['draws']} draws)",
        ["", *c["metrics"]],
        [
            ["difference", *(_number(v["difference"], "+.2f") for v in found)],
            ["95 % interval", *(_interval(v["interval"]) for v in found)],
            ["p (swap test)", *(_p(v["p_swap"]) for v in found)],
        ],
    )
    m = c["mcnemar"]
    console.emit(f"questions gained {m['gained']}, lost {m['lost']}; McNemar p {_p(m['p'])} (it ignores clusters)")


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _percents(part: dict) -> list[str]:
    return [_number(value) for value in part["metrics"].values()]


def _interval(bounds: list[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.1f}, {bounds[1]:.1f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
