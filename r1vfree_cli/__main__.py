"""`python -m r1vfree_cli` is `r1v`."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working directory: a folder yaml/ or torch/ in it is no module

from .cli import main

main()
