"""What bounds the reward server: the time that a client may take to say something, and the memory of all that they said."""

import asyncio
import threading
from typing import Any, Self

from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from .wire import Refused

HEAD_BYTES = 32 << 10
MAX_BODY_BYTES = 64 << 20
MAX_HELD_BYTES = 1 << 30  # bodies and decoded images of all requests
MAX_CONNECTIONS = 2048
HEAD_S = 10.0  # for a request's head, from its first byte or from connecting
BODY_S = 60.0


class Room:
    """What one request holds of the memory that all in this process share, in bytes, until the block ends."""

    _all, _lock = 0, threading.Lock()

    def __init__(self) -> None:
        self._own = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.add(-self._own)

    def add(self, count: int) -> None:
        """Hold more; any thread may ask. Raises Refused: 429, there is no room now."""
        with Room._lock:
            if count > 0 and Room._all + count > MAX_HELD_BYTES:
                raise Refused(429, "the requests that wait hold all the memory there is for them")
            Room._all += count
            self._own += count


async def read_body(request: Request, held: Room) -> bytearray:
    """The body of a request.

    Raises Refused: it is too large, too slow, or there is no room for it now. ClientDisconnect: its client left.
    """
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit() and len(length) < 20) or int(length) > MAX_BODY_BYTES:
        raise Refused(413, f"a body of {length[:20]} bytes; at most {MAX_BODY_BYTES} are taken")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                held.add(len(part))
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise Refused(413, f"a body above {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise Refused(408, f"no complete body within {BODY_S:g} s") from None
    return body


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, patient for `HEAD_S`: it has a limit on idle connections, but none on heads that never end."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        """Count down from the first byte of a head until it is complete."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._patience is None:
            self._patience = self.loop.call_later(HEAD_S, self.timeout_keep_alive_handler)

    def _stop(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
