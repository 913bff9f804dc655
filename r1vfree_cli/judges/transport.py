"""What the one HTTP client asks of addresses and headers: loopback, proxies, Retry-After."""

import ipaddress
import math
import socket
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..core.redact import URL_LOGIN


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
