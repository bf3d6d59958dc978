"""A student of half the width: a pipeline whose MMDiT has half of another's channels, heads and hidden units, fitted to say what it said.

    python -m assets.world.narrow --output-dir out/narrow

Which channels stay is chosen so that they tell most of the others; then layer after layer, in the order in which they are computed, gets the
weights with which it says of the student's own input what the teacher's says of its own (least squares: He et al. 2017, arXiv 1707.06168 §3, do
that to convolutions). So each layer makes good what those before it have lost, and nothing has to be learned by gradients. The rest of the
pipeline is the teacher's; `make world-narrow` teaches the student further.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from assets.world import scenes
from assets.world.graft import fit, read
from nanodiff import pipeline
from nanodiff.commandline import at_least, tool
from nanodiff.config import UserError
from nanodiff.files import apart, out_dir
from nanodiff.output import images

SEED = 3_000_000  # of the first scene to fit by; score.py and prefer.py have others
PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def telling(x, n):
    """The n columns of x [N, D] from which the others are best told, one after the other (a pivoted Cholesky decomposition of the second moments
    that takes the column which explains most of all that is left), in their order, and the share of the mean square that they leave."""
    square = x.double().T @ x.double()
    whole, kept = square.trace(), []
    for _ in range(n):
        explained = square.pow(2).sum(0) / square.diagonal().clamp_min(1e-12 * whole)
        explained[kept] = -1
        kept.append(int(explained.argmax()))
        column = square[:, kept[-1]]
        square = square - torch.outer(column, column) / column[kept[-1]].clamp_min(1e-12 * whole)
    return sorted(kept), (square.trace() / whole).item()


@torch.no_grad()
def heard(net, given, modules):
    """{name: (inputs, output)} of some of the modules of `net` as it computes `given`."""
    got, hooks = {}, []
    for name, module in net.named_modules():
        if name in modules:
            # a layer that is listened to is called for itself (layers._plain)
            note = lambda _, x, y, name=name: got.update({name: (x, y)})  # noqa: E731
            hooks.append(module.register_forward_hook(note))
    try:
        net(*given)
    finally:
        for hook in hooks:
            hook.remove()
    return got


def rows_of(chunks, dim, kept):
    """Rows of a layer that makes `chunks` vectors of `dim` side by side: of each the kept ones."""
    return [i * dim + j for i in range(chunks) for j in kept]


def narrowed(net, given):
    """(An MMDiT with half of the width of `net`, {layer: share of the variance that is left}). given: what net takes, (x, t, text, pooled), to fit by."""
    cfg = net.cfg
    D, N, K = cfg.width, cfg.num_attention_heads, cfg.attention_head_dim
    d, n = D // 2, N // 2
    small = type(net)(dataclasses.replace(cfg, num_attention_heads=n, caption_projection_dim=d)).eval()
    layers = dict(small.named_modules())
    blocks = [f"transformer_blocks.{i}" for i in range(cfg.num_layers)]
    linear = {name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    teacher, left = heard(net, given, {*linear, *blocks}), {}

    def fitted(name, kept):
        _, said = teacher[name]
        ((x,), _) = heard(small, given, {name})[name]
        left[name] = fit(layers[name], x, said[..., kept])

    def copied(name, kept):
        layers[name].weight.data.copy_(net.get_submodule(name).weight[kept])
        layers[name].bias.data.copy_(net.get_submodule(name).bias[kept])

    # each stream has channels of its own; what is read of them has been through a norm
    image, text = (
        telling(torch.cat([F.layer_norm(teacher[b][0][i], (D,)).flatten(0, 1) for b in blocks]), d)[0] for i in (0, 1)
    )
    embedders = ("time_text_embed.timestep_embedder", "time_text_embed.text_embedder")
    condition = telling(F.silu(sum(teacher[f"{e}.linear_2"][1] for e in embedders)), d)[0]
    copied("pos_embed.proj", image)
    small.pos_embed.pos_embed.copy_(net.pos_embed.pos_embed[..., image])
    copied("context_embedder", text)
    for e in embedders:
        copied(f"{e}.linear_1", telling(F.silu(teacher[f"{e}.linear_1"][1]), d)[0])
        fitted(f"{e}.linear_2", condition)
    for name in tqdm(blocks, desc="fitting blocks", disable=None):
        block = net.get_submodule(name)
        for norm, kept in (("norm1", image), ("norm1_context", text)):
            fitted(f"{name}.{norm}.linear", rows_of(getattr(block, norm).n, D, kept))
        # the heads that add most, and in the feed-forward the units that do
        out = teacher[f"{name}.attn.to_out.0"][0][0].unflatten(-1, (N, K))
        weight = block.attn.to_out[0].weight.unflatten(-1, (N, K))
        adds = torch.stack([(out[:, :, h] @ weight[:, h].T).pow(2).mean() for h in range(N)])
        heads = adds.topk(n).indices.sort().values.tolist()
        for part in PROJECTIONS:
            fitted(f"{name}.attn.{part}", [h * K + k for h in heads for k in range(K)])
        for part, module in block.attn.named_children():
            if part.startswith("norm_"):
                layers[f"{name}.attn.{part}"].load_state_dict(module.state_dict())
        fitted(f"{name}.attn.to_out.0", image)
        if hasattr(block.attn, "to_add_out"):
            fitted(f"{name}.attn.to_add_out", text)
        for part, kept in (("ff", image), ("ff_context", text)):
            if hasattr(block, part):
                last = getattr(block, part).net[2].weight
                adds = teacher[f"{name}.{part}.net.2"][0][0].flatten(0, 1).pow(2).mean(0) * last.pow(2).sum(0)
                fitted(f"{name}.{part}.net.0.proj", adds.topk(4 * d).indices.sort().values)
                fitted(f"{name}.{part}.net.2", kept)
    fitted("norm_out.linear", rows_of(net.norm_out.n, D, image))
    fitted("proj_out", slice(None))
    return small, left


def given_of(sd, n):
    """What a pipeline's denoiser takes of n scenes that training may see, with noise of logit-normal times with mean 1 (as graft.py)."""
    some = [scenes.random_scene(np.random.default_rng((SEED, i))) for i in range(n)]
    drawn = torch.Generator().manual_seed(0)
    noise = lambda shape: torch.randn(shape, generator=drawn)  # noqa: E731
    with torch.no_grad():
        pixels = torch.stack([images.to_pixels(s.picture()) for s in some])
        latents = sd.encode_pixels(pixels, noise)
        t = torch.sigmoid(1 + torch.randn(n, generator=drawn)) * sd.schedule.T
        told = read(sd, torch.tensor(sd.tokenizer([s.caption for s in some])))
        return sd.schedule.add_noise(latents, noise(latents.shape), t), t, *told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent), help="default: the embedded one")
    parser.add_argument("--scenes", type=at_least(1), default=400, help="to fit by")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    return tool(lambda: run(args))


def run(args):
    apart({"model": args.model}, [args.output_dir])
    sd = pipeline.load(args.model)
    if not isinstance(sd, pipeline.Joint) or len(sd.encoders) != 1:
        raise UserError(f"--model {args.model}: is no model of the small world (an MMDiT with one text encoder)")
    cfg = sd.net.cfg
    if cfg.num_attention_heads % 2 or cfg.dual_attention_layers:
        raise UserError(
            f"--model {args.model}: a network with an odd number of heads, or with a second attention, is not halved in width"
        )
    sd.net, left = narrowed(sd.net, given_of(sd, args.scenes))
    sd.save(out_dir(args.output_dir))
    print(
        f"width {sd.net.cfg.width}, {sum(p.numel() for p in sd.net.parameters()) / 1e6:.2f} M parameters; "
        f"of the variance of its last layer {left['proj_out']:.3f} is left: {args.output_dir}"
    )


if __name__ == "__main__":
    sys.exit(main())
