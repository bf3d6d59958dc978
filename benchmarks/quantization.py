"""What 8 and 4 bits cost in exactness:   python benchmarks/quantization.py MODEL_FOLDER [--size 32]

Relative root-mean-square error of one call of the denoiser (and of T5, where the model has it) against the same weights in
fp32, for bf16 and for int8 and nf4 weights computing in bf16; bytes a weight beside it. Inputs are random.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from nanodiff import pipeline, weights
from nanodiff.device import memory, quantize


def error(got, want):
    return ((got.double() - want.double()).pow(2).mean() / want.double().pow(2).mean()).sqrt().item()


def call(name, net, size):
    """One forward pass on random inputs, the same for every variant."""
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(shape, generator=g).to(memory.dtype_of(net))  # noqa: E731
    if name == "text_encoder_3":
        return net(torch.randint(0, net.cfg.vocab_size, (1, 77), generator=g))
    x = r(1, net.cfg.in_channels, size, size)
    if name == "transformer":
        return net(x, 500.0, r(1, 77, net.cfg.joint_attention_dim), r(1, net.cfg.pooled_projection_dim))
    added = None
    if net.cfg.addition_embed_type:
        pooled = net.cfg.projection_class_embeddings_input_dim - 6 * net.cfg.addition_time_embed_dim
        added = r(1, pooled), torch.full((1, 6), 512.0)
    return net(x, 500, r(1, 77, net.cfg.cross_attention_dim), added)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    args = parser.parse_args()
    for name in ("unet", "transformer", "text_encoder_3"):
        if not (args.model / name).is_dir():
            continue
        cls = pipeline.BUILDERS[name]
        want = call(name, weights.load(cls, args.model / name, torch.float32), args.size)
        for kind in ("bf16", *quantize.KINDS):
            net = weights.load(cls, args.model / name, torch.bfloat16)
            if kind != "bf16":
                quantize.apply(net, kind)
            size = sum(t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers()])
            print(
                f"{name:16s}{kind:6s}error {error(call(name, net, args.size), want):.4f}, {size / memory.count(net):.2f} bytes a weight",
                flush=True,
            )


if __name__ == "__main__":
    main()
