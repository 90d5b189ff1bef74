"""`python -m eval`."""

import sys

from eval.commands import main

if __name__ == "__main__":
    sys.exit(main())
