"""`python -m nanodiff.captionset …`: see data/captionset.py."""

import sys

from nanodiff.data.captionset import main

if __name__ == "__main__":
    sys.exit(main())
