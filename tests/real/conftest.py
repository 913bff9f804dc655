"""tests/real/inside runs in the environment of environment.py only, started by test_vllm.py."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm") else ["inside"]
