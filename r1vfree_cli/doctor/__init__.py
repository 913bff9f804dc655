"""Is this machine, and this recipe, ready? Imports launch, training and below."""
