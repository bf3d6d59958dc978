"""What 8 and 4 bits cost in exactness:   python benchmarks/quantization.py MODEL_FOLDER [--size 32]

Relative root-mean-square error of one call of the denoiser (and of T5, where the model has it) against the same weights in
fp32, for bf16 and for int8 and nf4 weights computing in bf16. Inputs are random.

--pictures PROMPT …: whole pictures in 50 steps instead, how many levels of 255 their pixels are away (RMS) from fp32's.
--language: a small language model that learns this project's own texts for some minutes, and then its perplexity on what it has not read, in each
form, with each layer's error.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from tqdm import tqdm

from nanodiff import pipeline, weights
from nanodiff.commandline import at_least
from nanodiff.device import memory, quantize
from nanodiff.models.llm import CausalLM

ROOT = Path(__file__).parent.parent


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


def pictures(model, prompts):
    """Errors of whole pictures of a pipeline, from the same noise."""
    made = {}
    for kind in ("fp32", "bf16", *quantize.KINDS):
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        sd = pipeline.load(model, dtype, quantized=kind if kind in quantize.KINDS else None)
        made[kind] = sd.generate(prompts, steps=50, seeds=list(range(len(prompts)))).pixels.float()
        levels = (made[kind] - made["fp32"]).flatten(1).mul(127.5).pow(2).mean(1).sqrt()  # of each picture
        print(
            f"{kind:6s}RMS {levels.mean():.2f} levels of 255 (largest {levels.max():.2f}), {len(prompts)} pictures",
            flush=True,
        )


CFG = CausalLM.Config(vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                      bos_token_id=0, tie_word_embeddings=False)  # fmt: skip


def language(updates=400, length=128, rows=16):
    """Perplexity by the byte of a model that has learned nine tenths of the project's texts, on the last tenth of each."""
    texts = [p.read_bytes() for p in sorted(ROOT.glob("docs/**/*.md")) + sorted(ROOT.glob("nanodiff/**/*.py"))]
    cut = lambda a, b: torch.tensor(list(b"".join(t[len(t) * a // 10 : len(t) * b // 10] for t in texts)))  # noqa: E731
    seen, unseen = cut(0, 9), cut(9, 10)
    torch.manual_seed(0)
    net = CausalLM(CFG)
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, updates)
    for _ in tqdm(range(updates)):
        at = torch.randint(len(seen) - length, (rows, 1)) + torch.arange(length)
        loss = net.loss(net(seen[at]), seen[at])
        loss.backward()
        opt.step(), opt.zero_grad(), schedule.step()
    net.requires_grad_(False).eval()
    ids = unseen[: len(unseen) // length * length].view(-1, length)
    for kind in ("fp32", "bf16", "int8", "int4"):
        made = copy.deepcopy(net).to(torch.float32 if kind == "fp32" else torch.bfloat16)
        wrong = f", weights {quantize.language(made, kind):.4f} off" if kind.startswith("int") else ""
        nats = [
            F.cross_entropy(made.logits(made(part))[:, :-1].float().flatten(0, 1), part[:, 1:].flatten())
            for part in ids.split(32)
        ]
        print(
            f"{kind:6s}perplexity {torch.stack(nats).mean().exp():.4f} a byte, {ids.numel()} bytes{wrong}", flush=True
        )
        for name, layer in net.named_modules() if wrong else ():
            if isinstance(layer, torch.nn.Linear):
                x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
                print(
                    f"    {name:36s}{error(made.get_submodule('head' if name == 'lm_head' else name)(x.bfloat16()), layer(x)):.4f}"
                )


@torch.no_grad()
def denoisers(args):
    for name in ("unet", "transformer", "text_encoder_3"):
        if not (args.model / name).is_dir():
            continue
        cls = pipeline.BUILDERS[name]
        want = call(name, weights.load(cls, args.model / name, torch.float32), args.size)
        for kind in ("bf16", *quantize.KINDS):
            net = weights.load(cls, args.model / name, torch.bfloat16)
            if kind != "bf16":
                quantize.apply(net, kind)
                quantize.rest(net, torch.bfloat16, "cpu")
            print(f"{name:16s}{kind:6s}error {error(call(name, net, args.size), want):.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--size", type=at_least(1), default=32, help="side of the latents")
    parser.add_argument("--pictures", nargs="+")
    parser.add_argument("--language", action="store_true")
    args = parser.parse_args()
    if args.language:
        return language()
    if args.model is None or not args.model.is_dir():
        parser.error(f"{args.model}: no such folder; name a model's")
    if args.pictures:
        return pictures(args.model, args.pictures)
    return denoisers(args)


if __name__ == "__main__":
    main()
