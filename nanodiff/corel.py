"""`python -m nanodiff.corel …`: see data/corel.py."""

import sys

from nanodiff.data.corel import main

if __name__ == "__main__":
    sys.exit(main())
