"""Data sets from the command line.

python -m nanodiff.data check PATH                counts, sizes, missing captions, duplicates, unreadable files
python -m nanodiff.data pack PATH OUT.tar         any layout as one webdataset shard
python -m nanodiff.data prepare-corel …           the Corel layout (corel.py)
"""

import argparse
import sys

from nanodiff.commandline import tool
from nanodiff.data import corel
from nanodiff.data.tools import check, pack


def main():
    parser = argparse.ArgumentParser(
        prog="python -m nanodiff.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("check", "report on a data set"), ("pack", "write a data set as one webdataset shard")):
        command = commands.add_parser(name, help=text)
        command.add_argument("path")
        if name == "pack":
            command.add_argument("target")
        command.add_argument("--image-column", "--image_column")
        command.add_argument("--caption-column", "--caption_column")
    corel.arguments(commands.add_parser("prepare-corel", help="Corel's XXXX_YYYY.png as folders with captions"))
    args = parser.parse_args()

    def run():
        if args.command == "prepare-corel":
            return corel.prepare(args.data_dir, args.base_dir, args.output_dir, args.figs_dir, not args.no_visualize)
        if args.command == "pack":
            return pack(args.path, args.target, args.image_column, args.caption_column)
        report, bad = check(args.path, args.image_column, args.caption_column)
        print("\n".join(report))
        print(f"faults: {bad}")
        return 1 if bad else 0

    return tool(run)


if __name__ == "__main__":
    sys.exit(main())
