"""The five scripts from any folder: `nanodiff sample --prompt "red apple"`, or `python -m nanodiff sample …` in place."""

import runpy
import sys
from pathlib import Path

from nanodiff.config import nearest, printable

HERE = Path(__file__).parent
SCRIPTS = ("sample", "train", "distill", "caption", "eval")


def main():
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in SCRIPTS:
        if word in ("-h", "--help"):
            print(f"nanodiff {'|'.join(SCRIPTS)} …    (each has --help)")
            return 0
        print(
            f"error: the first word must be one of {', '.join(SCRIPTS)}, not {printable(word) or 'nothing'}{nearest(word, SCRIPTS)}",
            file=sys.stderr,
        )
        return 2
    path = next(p for p in (HERE / "_scripts" / f"{word}.py", HERE.parent / f"{word}.py") if p.exists())
    sys.argv = [str(path), *sys.argv[2:]]
    runpy.run_path(str(path), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
