"""A clock that is set back an hour each time somebody looks at it, where `R1V_TEST_CLOCK` says `back`."""

import itertools
import os
import time


def apply() -> None:
    if os.environ.get("R1V_TEST_CLOCK") == "back":
        real, looks = time.time, itertools.count()
        time.time = lambda: real() - 3600 * next(looks)
