"""`python -m r1vfree_cli` is `r1v`."""

from .cli import main

main()
