"""The book's exercises.      make exercise N=3, make solution N=3, or: python -m docs.book.exercise 3 [--solution]

The first time a skeleton is put into exercises/ch03.py; from then on the functions there are tested, by the tests that the project's own pass.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from docs.book import markdown
from nanodiff.commandline import tool
from nanodiff.config import UserError
from nanodiff.files import out_dir, write_bytes

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def chapters():
    """{number: skeleton}"""
    return {int(p.stem.removeprefix("ch")): p for p in sorted((FOLDER / "exercises").glob("ch*.py"))}


def run(args):
    known = chapters()
    if args.chapter not in known:
        raise UserError(f"chapter {args.chapter} has no exercises; those that have: {', '.join(map(str, known))}")
    if args.solution:
        from docs.book.solutions import SOLUTIONS

        for name, (_, where) in SOLUTIONS[args.chapter].items():
            path, _, function = where.partition(": ")
            print(f"{name}: {path}:{markdown.source_of(ROOT / path, function)[0]}, {function}")
        return 0
    skeleton = known[args.chapter]
    mine = args.folder / skeleton.name
    if not mine.exists():
        write_bytes(out_dir(args.folder) / skeleton.name, skeleton.read_bytes())
        print(f"a skeleton is in {mine}: fill in its functions, and run this again")
        return 0
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--durations=0", "--durations-min=60",
         f"tests/docs/exercises/test_{skeleton.name}"], cwd=ROOT, env=os.environ | {"EXERCISES": str(args.folder.resolve()), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    print("all of them right" if done.returncode == 0 else f"not yet; {mine} is what was tested")
    return 1 if done.returncode else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapter", type=int)
    parser.add_argument("--solution", action="store_true", help="say where the project has its own functions")
    parser.add_argument("--folder", type=Path, default=Path("exercises"), help="where the reader's files are")
    args = parser.parse_args()
    return tool(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
