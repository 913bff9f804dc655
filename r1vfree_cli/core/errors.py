"""The one error tree. Every error a user can cause carries its exit code and, where there is one, the fix."""


class R1VError(Exception):
    """Base of all expected errors: one message, optional detail lines, an optional hint, an exit code."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, details: list[str] | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details or []

    @property
    def line(self) -> str:
        """Message and hint as one line of a list."""
        return self.message + (f" ({self.hint})" if self.hint else "")

    def to_dict(self) -> dict:
        """A JSON form; workers leave it in the run dir so that the launcher can show the cause."""
        kept = ("exit_code", "message", "details", "hint")
        return {"error": type(self).__name__} | {name: getattr(self, name) for name in kept}


class UsageError(R1VError):
    """Wrong usage, recipe or environment."""

    exit_code = 2


class DataError(R1VError):
    """Bad data, predictions or checkpoint."""

    exit_code = 3


class GateError(R1VError):
    """A gate (`--fail-under`) is not met."""

    exit_code = 4


class GuardStop(R1VError):
    """Training stopped by its own guard: collapsed, NaN, or the judge failed too often."""

    exit_code = 5


class Interrupted(R1VError):
    """SIGINT or SIGTERM."""

    exit_code = 130


_BY_NAME = {c.__name__: c for c in (R1VError, UsageError, DataError, GateError, GuardStop, Interrupted)}


def from_dict(doc: dict) -> R1VError:
    """The inverse of `R1VError.to_dict`; an unknown class becomes the base class with the same exit code."""
    cls = _BY_NAME.get(doc.get("error", ""), R1VError)
    error = cls(doc.get("message", "unknown error"), hint=doc.get("hint"), details=doc.get("details"))
    error.exit_code = doc.get("exit_code", cls.exit_code)
    return error


def nearest(name: str, allowed) -> str | None:
    """The allowed name most like `name`, or None when nothing is close."""
    import difflib

    return next(iter(difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.6)), None)


def did_you_mean(name: str, allowed, otherwise: str | None = None) -> str | None:
    """A hint: the nearest of the allowed names, else `otherwise`."""
    near = nearest(name, allowed)
    return f"did you mean {near}?" if near else otherwise


def brief(value: object) -> str:
    """What was found, for an error: its `repr`, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def first_line(error: BaseException) -> str:
    """The first line of its message, its class's name where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def counted(n: int, one: str, many: str = "") -> str:
    """`1 process`, `2 processes`; with a verb: `counted(n, "gate is", "gates are")`."""
    return f"{n} {one if n == 1 else many or one + ('es' if one.endswith('s') else 's')}"
