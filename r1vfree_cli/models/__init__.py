"""Models: families, loading, checkpoints, sampling, prompt lengths. Imports config, run and below."""
