"""The engine that computes a group's prompt once: generation, reference and policy passes, judges, evaluation.

Imports core and models."""
