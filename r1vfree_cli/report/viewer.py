"""`r1v view RUN_DIR...`: a local page of a run's rollouts, step by step. Read-only, loopback only, follows a running run.

The page asks for one step, one question or one page of hits at a time; each is read from that step's parquet file, so
thousands of steps open as quickly as one.
"""

import os
import socket
import sys
import webbrowser
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq

from ..core import console
from ..core.errors import DataError, UsageError
from ..run.run_dir import RunDir
from ..training.recorder import rollout_file
from .gallery import row_images
from .load import clean, labels, read_run
from .rollouts import read_groups

PAGE = 40  # groups in one reply of a search
_SCREENS = {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"}


class Rollouts:
    """The rollouts of one run dir, read when asked for. Raises DataError: the folder holds no GRPO run."""

    def __init__(self, path: Path, label: str):
        self.files, self.label, self._run = RunDir(path), label, read_run(path, label)
        if self._run.stage != "grpo":
            what = "is no run of r1v grpo: there are no rollouts to view" if path.exists() else "does not exist"
            raise DataError(f"{path} {what}", hint="give a run dir")
        # Of a step. Raises DataError: no such step, or its file is damaged.
        self.groups = lru_cache(64)(lambda n: read_groups(rollout_file(self.files, n), n, self._run.recipe))

    def about(self) -> dict:
        """What the page's head shows; read again each time, the run may be going on."""
        status = clean(self.files.status)
        return {"label": self.label, **{k: status.get(k) for k in ("state", "reason")}, "steps": self.steps()}

    def steps(self) -> list[int]:
        """The steps that have a file now, ascending."""
        return list(self.files.rollout_files)

    def _groups_of(self, step: int, columns: list[str], test: Callable[[str], bool]) -> list[dict]:
        """A step's groups where a value of the columns passes; else none of it is read but these."""
        rows = pq.read_table(rollout_file(self.files, step), columns=columns)
        return self.groups(step) if any(test(str(v)) for c in rows.columns for v in c.to_pylist()) else []

    def question(self, row_id: str) -> list[dict]:
        """Every group of one row, by step."""
        found = (g for step in self.steps() for g in self._groups_of(step, ["id"], lambda v: v == row_id))
        return [g for g in found if g["id"] == row_id]

    def search(self, text: str, start: int) -> dict:
        """Groups with `text` in a question or completion, from step `start` on: at most `PAGE`, and where to go on."""
        wanted, hits = text.casefold(), []
        for step in (s for s in self.steps() if s >= start):
            found = self._groups_of(step, ["prompt", "completion"], lambda v: wanted in v.casefold())
            hits += [g for g in found if any(wanted in t.casefold() for t in _texts(g))]
            if len(hits) >= PAGE:
                return {"groups": hits, "next": step + 1}
        return {"groups": hits, "next": None}

    def image(self, row_id: str) -> bytes | None:
        """The row's first image, encoded as in the data; None where the data are not on this machine."""
        return row_images(self._run.recipe, {row_id})[0].get(row_id)


def _texts(group: dict) -> list[str]:
    return [group["question"], *(s["completion"] for s in group["samples"])]


def app(runs: list[Rollouts]):
    """The Starlette application: `/` the page, `/api/...` JSON, `/image` a row's picture. Nothing writes."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    page = files("r1vfree_cli.report").joinpath("templates/view.html").read_text(encoding="utf-8")
    inline = "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    policy = f"default-src 'none'; img-src 'self'; connect-src 'self'; {inline}"

    def run_of(request: Request) -> Rollouts:
        index = text(request, "run") or "0"
        if index not in map(str, range(len(runs))):
            raise DataError(f"there is no run {index}")
        return runs[int(index)]

    def answer(read):
        return lambda request: JSONResponse(read(request))

    def refuse(_: Request, e: Exception) -> Response:
        return JSONResponse({"error": str(e)}, status_code=404)

    def image(request: Request) -> Response:
        data = run_of(request).image(text(request, "id"))
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
    return Starlette(routes=routes, middleware=[hosts], exception_handlers={DataError: refuse, ValueError: refuse})


def view(dirs: list[Path], *, port: int | None, open_browser: bool) -> None:
    """Serve the page until Ctrl-C. Raises DataError: a folder holds no GRPO run. UsageError: the port is taken."""
    import uvicorn

    runs = [Rollouts(path, label) for path, label in zip(dirs, labels(dirs), strict=True)]
    try:
        listening = socket.create_server(("127.0.0.1", port or 0))
    except OSError as e:
        hint = "leave it out to take a free one"
        raise UsageError(f"--port {port} cannot be used: {e.strerror}", hint=hint) from None
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    console.log(f"rollouts of {', '.join(run.label for run in runs)}: {url} (Ctrl-C ends it)")
    if open_browser and (sys.platform != "linux" or os.environ.keys() & _SCREENS):  # a text browser would not return
        webbrowser.open(url)
    uvicorn.Server(uvicorn.Config(app(runs), log_level="warning")).run(sockets=[listening])
