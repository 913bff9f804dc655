"""Workers that `accelerate launch` starts, one process a rank. Nothing imports a worker."""
