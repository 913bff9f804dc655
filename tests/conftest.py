"""Shared by all tests: two test processes share two cores, so each computes with one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """The longest test first, so that the other process has work while it runs."""
    items.sort(key=lambda item: "test_tiny_run" not in item.nodeid)
