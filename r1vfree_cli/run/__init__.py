"""A run dir: its files, its contract, what a worker is told. No torch. Imports core and config."""
