"""`r1v report`: run dirs and eval dirs -> report.md, one self-contained report.html, and pictures."""

from .render import report

__all__ = ["report"]
