"""LoRA files as a whole.

python -m nanodiff.lora inspect FILE
python -m nanodiff.lora convert IN OUT --to kohya|diffusers|peft
python -m nanodiff.lora merge --model FOLDER --lora FILE[:SCALE] OUT
python -m nanodiff.lora extract --model BASE --tuned FOLDER --rank 16 OUT
python -m nanodiff.lora verify A B
"""

import argparse
import sys

from nanodiff.commandline import tool
from nanodiff.lora.tools import convert, extract, inspect, merge, verify
from nanodiff.lora.writing import FORMS


def main():
    parser = argparse.ArgumentParser(prog="python -m nanodiff.lora", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = lambda name, help: commands.add_parser(name, help=help)  # noqa: E731
    one = add("inspect", "list the layers of a file, and its strength")
    one.add_argument("path")
    two = add("convert", "translate a file")
    two.add_argument("source")
    two.add_argument("target", help="a file; for peft a folder")
    two.add_argument("--to", choices=FORMS, required=True)
    three = add("merge", "add LoRAs into a model's weights")
    three.add_argument("--lora", action="append", required=True, help="FILE or FILE:SCALE; repeatable")
    three.add_argument("target", help="folder of the new model")
    four = add("extract", "the LoRA nearest to the difference of two models")
    four.add_argument("--tuned", required=True, help="the changed model")
    four.add_argument("--rank", type=int, default=16)
    four.add_argument("--to", choices=("auto", *FORMS), default="auto", help="auto: kohya, or diffusers for an MMDiT")
    four.add_argument("target")
    five = add("verify", "do two files change the same by the same?")
    five.add_argument("a")
    five.add_argument("b")
    five.add_argument("--tolerance", type=float, default=1e-6, help="of the relative difference of a layer's change")
    for command in (one, two, five):
        command.add_argument("--model", help="whose layers they are; default: the released model that they fit")
    for command in (three, four):
        command.add_argument("--model", required=True, help="the model to start from")
    for command in (two, three):
        command.add_argument("--allow-partial", action="store_true", help="go on without layers that the model lacks")
    three.add_argument("--components", help="folder for what a single file lacks")
    three.add_argument("--allow-pickle", action="store_true", help="read a model's pickle, with weights_only")
    three.add_argument("--no-t5", action="store_true", help="of a model whose third text encoder is not there")
    args = parser.parse_args()
    return tool(
        {
            "inspect": lambda: inspect(args.path, args.model),
            "convert": lambda: convert(args.source, args.target, args.to, args.model, args.allow_partial),
            "merge": lambda: merge(
                args.model, args.lora, args.target, args.allow_partial, args.components, args.allow_pickle, args.no_t5
            ),
            "extract": lambda: extract(args.model, args.tuned, args.rank, args.target, args.to),
            "verify": lambda: verify(args.a, args.b, args.model, args.tolerance),
        }[args.command]
    )


if __name__ == "__main__":
    sys.exit(main())
