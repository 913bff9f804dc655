"""Benchmarks: generate, judge, score, compare. A benchmark is one room in here. Imports models, judges and below."""
