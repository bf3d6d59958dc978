"""The weights of a model, as files.

python -m nanodiff.weights inspect FILE             tensors of a file, from its header alone
python -m nanodiff.weights convert IN OUT           a pickle (--allow-pickle) to safetensors;
                                                    a single-file checkpoint to a Hub folder, or a folder to a file
"""

import argparse
import re
import sys
from pathlib import Path

from nanodiff import pipeline
from nanodiff.commandline import tool
from nanodiff.config import UserError, printable
from nanodiff.weights.safetensors import PICKLES, find_files, header, is_pickle, load_pickle, save_tensors

# ---------------------------------------------------------------------------------------------------------
# Tool


def inspect(path):
    """Print name and shape of every tensor of a file, or of a component folder, from the headers alone."""
    path = Path(path)
    for key, shape in header([path] if path.is_file() else find_files(path)).items():
        print(printable(key), list(shape))


def convert(source, target, allow_pickle=False, components=None, prediction_type=None, no_t5=False):
    """A pickle of tensors to a safetensors file; a single-file checkpoint to a Hub folder or back.

    Raises UserError without allow_pickle: reading a pickle can run code.
    """
    if is_pickle(target):
        raise UserError(
            f"{target}: what is written is safetensors; take a name that ends in .safetensors, or a folder's"
        )
    if Path(source).is_dir() or Path(target).suffix.lower() != ".safetensors":
        # Whole models are the pipeline's business; this tool is only where people look for it.
        return pipeline.convert(source, target, allow_pickle, components, prediction_type, no_t5)
    if not is_pickle(source):
        raise UserError(f"{source}: expected a pickle ({', '.join(PICKLES)})")
    for name, value in (("components", components), ("prediction_type", prediction_type), ("no_t5", no_t5)):
        if value:
            raise UserError(f"`{name}` does nothing where a pickle becomes one file of the same names")
    if not allow_pickle:
        raise UserError(f"{source}: reading a pickle can run code; if you trust it, add --allow-pickle")
    tensors = load_pickle(source, nested=True)
    if "" in tensors or any(name.startswith("string_to_param.") for name in tensors):
        what = "a tensor without a name" if "" in tensors else "a learned word, which `embedding` takes as it is"
        raise UserError(f"{source}: holds {what}")
    if states := [name for name in tensors if re.match(r"(optimizer|optimizer_states?|lr_schedulers?)\.", name)]:
        raise UserError(
            f"{source}: holds an optimizer's state beside its weights ({printable(states[0])}); save the weights alone"
        )
    save_tensors(target, {k: v.clone() for k, v in tensors.items()})
    print(f"{target}: {len(tensors)} tensors")


def main():
    parser = argparse.ArgumentParser(prog="python -m nanodiff.weights", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("inspect", help="list the tensors of a file or component folder")
    one.add_argument("path")
    two = commands.add_parser("convert", help="pickle to safetensors; single file to Hub folder, and back")
    two.add_argument("source")
    two.add_argument("target")
    two.add_argument("--allow-pickle", action="store_true", help="read a pickle, with weights_only")
    two.add_argument("--components", help="folder for what a single file lacks")
    two.add_argument("--prediction-type", choices=("epsilon", "v_prediction", "sample"), help="of a single file")
    two.add_argument("--no-t5", action="store_true", help="of a model whose third text encoder is not there")
    args = parser.parse_args()
    if args.command == "inspect":
        return tool(lambda: inspect(args.path))
    more = args.allow_pickle, args.components, args.prediction_type, args.no_t5
    return tool(lambda: convert(args.source, args.target, *more))


if __name__ == "__main__":
    sys.exit(main())
