"""The engine that computes a group's prompt once: generation, reference and policy passes. Imports core."""
