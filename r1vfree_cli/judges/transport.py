"""What lies below the one HTTP client: bodies under a limit, proxies, this machine's own addresses, Retry-After."""

import functools
import ipaddress
import math
import socket
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..core.redact import URL_LOGIN
from .protocol import Failure
from .replies import MAX_REPLY_BYTES, unpacked

PASSED = (b"retry-after", b"location")


@functools.cache
def bounded_client() -> type:
    """The HTTP client below the openai package: it reads a reply's body under `MAX_REPLY_BYTES`, packed and unpacked.

    Of the headers only those pass that are asked for: others can make a library decode a body in ways of its own.
    """
    import httpx2

    class Bounded(httpx2.AsyncClient):
        async def send(self, request, *, stream=False, **more):
            response = await super().send(request, stream=True, **more)
            data = bytearray()
            try:
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > MAX_REPLY_BYTES:
                        raise Failure("too_large", f"a reply above {MAX_REPLY_BYTES} bytes")
            finally:
                await response.aclose()
            packing = response.headers.get("content-encoding", "identity").strip().lower()
            if packing in ("gzip", "deflate", "x-gzip"):
                data = bytearray(unpacked(bytes(data)))
            elif packing not in ("identity", ""):
                raise Failure("unparsable", f"a reply packed as {packing!r}, which was not asked for")
            headers = [(name, value) for name, value in response.headers.raw if name.lower() in PASSED]
            return httpx2.Response(response.status_code, headers=headers, content=bytes(data), request=request)

    return Bounded


def on_loopback(url: str) -> bool:
    """Whether it is on this machine: it is not asked through a proxy, which would not find it and would see the key."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        # inet_aton reads 127.1 and 0x7f000001 as connecting does.
        known = ipaddress.ip_address(host if ":" in host else socket.inet_aton(host))
    except (ValueError, OSError):
        return False
    known = getattr(known, "ipv4_mapped", None) or known
    return known.is_loopback or known.is_unspecified


def retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a Retry-After header in seconds or as a date; None when it says nothing."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def proxy_before(url: str) -> str:
    """The environment's proxy that stands before a server, for a message; else ""."""
    parts, known = urlsplit(url), getproxies()
    proxy = known.get(parts.scheme) or known.get("all")
    if not proxy or on_loopback(url) or proxy_bypass(parts.hostname or ""):
        return ""
    return f" (through the proxy {URL_LOGIN.sub('***@', proxy)} of the environment; NO_PROXY goes past it)"
