"""Shared by all tests: two test processes share two cores, so each computes with one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """The longest files first, so that the other process has work while they run: `tests/real` after the unit tests,
    when its environment is made.
    """
    order = ("test_tiny_run", "tests/unit/", "tests/real/")
    items.sort(key=lambda item: next((i for i, name in enumerate(order) if name in item.nodeid), len(order)))
