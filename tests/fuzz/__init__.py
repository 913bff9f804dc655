"""Bad input: what cases there are, and what must hold after each."""
