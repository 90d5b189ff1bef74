"""`python -m train`."""

import sys

from train.commands import main

if __name__ == "__main__":
    sys.exit(main())
