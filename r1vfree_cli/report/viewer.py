"""`r1v view RUN_DIR...`: a local page of a run's rollouts, step by step. Read-only, loopback only, follows a running run.

The page asks for one step, one question or one page of hits at a time; each is read from that step's parquet file, so
thousands of steps open as quickly as one.
"""

from __future__ import annotations

import re
import socket
import webbrowser
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..core import console
from ..core.errors import DataError, UsageError
from ..core.prompts import parse
from ..run.run_dir import RunDir
from .gallery import row_images
from .load import Run, clean, labels, number, read_run, table
from .training import question

PAGE = 40  # groups in one reply of a search
_STEP = re.compile(r"step-(\d+)\.parquet")


class Rollouts:
    """The rollouts of one run dir, read when asked for.

    Raises:
        DataError: the folder holds no GRPO run.
    """

    def __init__(self, path: Path, label: str):
        self.files = RunDir(path)
        self.label = label
        self._run: Run = read_run(path, label)
        if self._run.stage != "grpo":
            raise DataError(f"{path} is no run of r1v grpo: there are no rollouts to view", hint="give a run dir")
        self._groups: dict[int, list[dict]] = {}

    def steps(self) -> list[int]:
        """The steps that have a file now, ascending."""
        return sorted(int(m[1]) for f in self.files.rollouts.glob("step-*.parquet") if (m := _STEP.fullmatch(f.name)))

    def about(self) -> dict:
        """What the page's head shows; read again each time, the run may be going on."""
        status = table(clean(self.files.status))
        return {
            "label": self.label,
            "state": status.get("state"),
            "reason": status.get("reason"),
            "steps": self.steps(),
        }

    def groups(self, step: int) -> list[dict]:
        """The groups of a step: question, samples, spread of advantages, disagreement of judges.

        Raises:
            DataError: no such step, or its file is damaged.
        """
        if step not in self._groups:
            file = self.files.rollouts / f"step-{step:08d}.parquet"
            try:
                rows = pq.read_table(file).to_pylist()
            except FileNotFoundError:
                raise DataError(f"step {step} has no rollouts") from None
            except (pa.ArrowException, OSError) as e:
                raise DataError(f"{file.name} cannot be read: {e}") from None
            if len(self._groups) > 64:
                self._groups.pop(next(iter(self._groups)))
            self._groups[step] = _groups(rows, step)
        return self._groups[step]

    def question(self, row_id: str) -> list[dict]:
        """Every group of one row, by step."""
        return [g for step in self._holding(row_id) for g in self.groups(step) if g["id"] == row_id]

    def _holding(self, row_id: str) -> list[int]:
        found = []
        for step in self.steps():
            ids = pq.read_table(self.files.rollouts / f"step-{step:08d}.parquet", columns=["id"])["id"]
            if row_id in set(ids.to_pylist()):
                found.append(step)
        return found

    def search(self, text: str, start: int) -> dict:
        """Groups with `text` in a question or completion, from step `start` on: at most `PAGE`, and where to go on."""
        wanted, hits = text.casefold(), []
        for step in (s for s in self.steps() if s >= start):
            rows = pq.read_table(self.files.rollouts / f"step-{step:08d}.parquet", columns=["prompt", "completion"])
            if any(wanted in str(v).casefold() for column in rows.columns for v in column.to_pylist()):
                hits += [g for g in self.groups(step) if _mentions(g, wanted)]
            if len(hits) >= PAGE:
                return {"groups": hits, "next": step + 1}
        return {"groups": hits, "next": None}

    def image(self, row_id: str) -> bytes | None:
        """The row's first image, encoded as in the data; None where the data are not on this machine."""
        seed = number(table(self._run.recipe.get("train")).get("seed"))
        images, _ = row_images(table(self._run.recipe.get("data")), {row_id}, seed=42 if seed is None else int(seed))
        return images.get(row_id)


def _groups(rows: list[dict], step: int) -> list[dict]:
    by_group: dict[Any, list[dict]] = {}
    for row in rows:
        by_group.setdefault((row.get("group"), row.get("id")), []).append(row)
    return [_group(step, int(g or 0), str(i), members) for (g, i), members in by_group.items()]


def _group(step: int, group: int, row_id: str, members: list[dict]) -> dict:
    repeats = Counter(str(m.get("completion")) for m in members)
    answers = Counter(parse(str(m.get("completion"))).answer for m in members)
    samples = []
    for m in members:
        text = str(m.get("completion"))
        parsed = parse(text)
        samples.append(
            {
                "completion": clean(text),
                "answer": None if parsed.answer is None else clean(parsed.answer),
                "format": parsed.problem,
                "rewards": {
                    clean(k.removeprefix("rewards/")): number(v) for k, v in m.items() if k.startswith("rewards/")
                },
                "verdicts": {clean(k.removeprefix("verdicts/")): v for k, v in m.items() if k.startswith("verdicts/")},
                "reward": number(m.get("reward")),
                "advantage": number(m.get("advantage")),
                "tokens": number(m.get("tokens")),
                "clipped": bool(m.get("clipped")),
                "duplicate": repeats[text] > 1,
                # Most of a group gives one answer: it may be a template that pleases the judge.
                "template": len(members) > 3 and answers[parsed.answer] > 0.75 * len(members),
            }
        )
    known = [s["advantage"] for s in samples if s["advantage"] is not None]
    return {
        "step": step,
        "group": group,
        "id": clean(row_id),
        "question": question(members[0].get("prompt")),
        "samples": samples,
        "spread": max(known) - min(known) if known else 0.0,
        "disagreement": max((_range(s["rewards"]) for s in samples), default=0.0),
    }


def _range(rewards: dict[str, float | None]) -> float:
    """Largest distance between the judges of one sample; text rewards have no opinion to differ with."""
    known = [v for k, v in rewards.items() if v is not None and k not in ("format", "accuracy")]
    return max(known) - min(known) if len(known) > 1 else 0.0


def _mentions(group: dict, wanted: str) -> bool:
    return any(wanted in t.casefold() for t in (group["question"], *(s["completion"] for s in group["samples"])))


# --- the page --------------------------------------------------------------------------------------------------


def app(runs: list[Rollouts]):
    """The Starlette application: `/` the page, `/api/...` JSON, `/image` a row's picture. Nothing writes."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    page = files("r1vfree_cli.report").joinpath("templates/view.html").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )

    def run_of(request: Request) -> Rollouts:
        index = int(request.query_params.get("run", 0))
        if not 0 <= index < len(runs):
            raise DataError(f"there is no run {index}")
        return runs[index]

    def answer(read):
        def endpoint(request: Request) -> Response:
            try:
                return JSONResponse(read(request))
            except (DataError, ValueError) as e:
                return JSONResponse({"error": str(e)}, status_code=404)

        return endpoint

    def image(request: Request) -> Response:
        data = run_of(request).image(request.query_params.get("id", ""))
        kind = "image/png" if data and data[:4] == b"\x89PNG" else "image/jpeg"
        return Response(data, media_type=kind) if data else Response(status_code=404)

    def text(request: Request, name: str) -> str:
        return request.query_params.get(name, "")

    routes = [
        Route("/", lambda _: HTMLResponse(page, headers={"Content-Security-Policy": policy})),
        Route("/api/runs", answer(lambda _: [run.about() for run in runs])),
        Route("/api/step", answer(lambda r: run_of(r).groups(int(text(r, "step"))))),
        Route("/api/question", answer(lambda r: run_of(r).question(text(r, "id")))),
        Route("/api/search", answer(lambda r: run_of(r).search(text(r, "text"), int(text(r, "start") or 0)))),
        Route("/image", image),
    ]
    # A page elsewhere that resolves its name to this machine must not read along.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    return Starlette(routes=routes, middleware=[hosts])


def view(dirs: list[Path], *, port: int | None, open_browser: bool) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        DataError: a folder holds no GRPO run.
        UsageError: the port is taken.
    """
    import uvicorn

    runs = [Rollouts(path, label) for path, label in zip(dirs, labels(dirs), strict=True)]
    try:
        listening = socket.create_server(("127.0.0.1", port or 0))
    except OSError as e:
        raise UsageError(
            f"--port {port} cannot be used: {e.strerror}", hint="leave it out to take a free one"
        ) from None
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    console.log(f"rollouts of {', '.join(run.label for run in runs)}: {url} (Ctrl-C ends it)")
    if open_browser:
        webbrowser.open(url)
    uvicorn.Server(uvicorn.Config(app(runs), log_level="warning")).run(sockets=[listening])
