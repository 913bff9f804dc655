"""The workers that accelerate starts, the trainers, checkpoints, resume, merge. Imports shared_prefix and below."""
