"""What a secret looks like: by the key it stands under, or by itself."""

import re

# `api_key_env` (a variable's name) and `max_prompt_tokens` are no secrets.
SECRET_KEY = re.compile(
    r"(?i)^(.*(api[-_]?key|password|passwd|secret|authorization|credentials?|cookie)"
    r"|(.*[-_])?(access|auth|hf|hub|bearer|secret)[-_]?token)$"
)
SECRET_TEXT = re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}")
BEARER = re.compile(r"(?i)\bbearer\s+[A-Za-z0-9._~+/=-]{12,}")
URL_LOGIN = re.compile(r"(?<=://)[^/\s@:]*:?[^/\s@]*@")


def secrets_in(value: object, key: str = "") -> list[str]:
    """Where a document holds secrets, as dotted keys; the secrets themselves are never shown."""
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        return [place for k, v in inside for place in secrets_in(v, f"{key}.{k}" if key else str(k))]
    name = key.rpartition(".")[2]
    if not isinstance(value, str) or not value:
        return []
    is_name = re.fullmatch(r"[A-Za-z_]\w*", value)
    if SECRET_KEY.match(name) or (name == "api_key_env" and not is_name):
        return [key]
    return [key] if any(p.search(value) for p in (SECRET_TEXT, BEARER, URL_LOGIN)) else []


def without_key(text: str, key: str | None) -> str:
    """`text` with `key` as `***`: a server or a gateway may show the request that it got. Do it before cutting `text`."""
    return text.replace(key, "***") if key else text
