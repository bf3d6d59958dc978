"""One of several processes that torchrun forks (--run-path): a script that ends with exit code 0 has returned, not left."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        if e.code:
            raise
