"""Reasoning in a reply, under any of the names that models give it."""

import re

_THOUGHT = r"[\w:.-]{0,20}(?:think|thought|reason|rationale|reflect|analysis|analy[sz]e|scratchpad|monologue|\bcot)\w*"
_OPEN = rf"(?:<\|?(?:begin_of_)?{_THOUGHT}\b[^<>]{{0,40}}>|◁{_THOUGHT}▷|\[{_THOUGHT}\])"
_CLOSE = rf"(?:</{_THOUGHT}>|<\|(?:/|end_of_){_THOUGHT}\|>|◁/{_THOUGHT}▷|\[/{_THOUGHT}\])"
_THINKING = re.compile(
    rf"{_OPEN}.*?(?:{_CLOSE}|$)|<\|channel\|>(?:analysis|commentary)\b.*?(?:<\|end\|>|$)", re.S | re.I
)
_OPENED_BEFORE = re.compile(rf"^.*{_CLOSE}", re.S | re.I)  # where the chat template has opened it already


def without_thinking(text: str) -> str:
    """The reply without its reasoning: finished, unfinished, or opened by the chat template before the reply began."""
    return _OPENED_BEFORE.sub(" ", _THINKING.sub(" ", text))
