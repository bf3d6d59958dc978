"""A student of half the depth: a pipeline whose MMDiT has every other block of another's.

    python -m assets.world.halve --output-dir out/half

The first and the last block stay, since they are unlike the others: what Kim et al. 2023 (arXiv 2305.15798) do to a UNet and Sanh et al. 2019
(arXiv 1910.01108) to BERT. The rest of the pipeline is the teacher's, so that it shares latents, words and schedule with it. It draws nothing
any more; `make world-transfer` teaches it again.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

from nanodiff import pipeline
from nanodiff.commandline import tool
from nanodiff.config import UserError
from nanodiff.files import apart, out_dir


def halved(net):
    """An MMDiT with half of the blocks of `net`, rounded up, evenly taken with the first and the last."""
    kept = np.linspace(0, net.cfg.num_layers - 1, -(-net.cfg.num_layers // 2)).astype(int).tolist()
    small = type(net)(dataclasses.replace(net.cfg, num_layers=len(kept)))
    place = {f"transformer_blocks.{i}.": f"transformer_blocks.{k}." for k, i in enumerate(kept)}
    states = {}
    for name, value in net.state_dict().items():
        block = ".".join(name.split(".")[:2]) + "."
        if block in place:
            states[place[block] + name[len(block) :]] = value
        elif not name.startswith("transformer_blocks."):
            states[name] = value
    small.load_state_dict(states)
    return small


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent), help="default: the embedded one")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()

    def run():
        apart({"model": args.model}, [args.output_dir])
        sd = pipeline.load(args.model)
        if not hasattr(sd.net, "transformer_blocks"):
            raise UserError(f"{args.model}: is no MMDiT, it has no blocks of one kind to leave out")
        if sd.net.cfg.num_layers < 3:
            raise UserError(f"{args.model}: has {sd.net.cfg.num_layers} blocks, of which the first and the last stay")
        sd.net = halved(sd.net)
        sd.save(out_dir(args.output_dir))
        print(
            f"{sd.net.cfg.num_layers} blocks, {sum(p.numel() for p in sd.net.parameters()) / 1e6:.2f} M parameters: {args.output_dir}"
        )

    return tool(run)


if __name__ == "__main__":
    sys.exit(main())
