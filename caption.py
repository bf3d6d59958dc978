"""Text from language models; the captioner's stages follow.

    python caption.py complete --model FOLDER_OR_HUB_ID --prompt "Once upon a time" --max-new-tokens 60 --temperature 0

complete: go on with a prompt, with LLaMA 3.2 or Gemma 3 (`--chat`: as an instruction-tuned Gemma is asked). The continuation alone is printed on
stdout; its token ids are in run.json.
"""

import sys
from dataclasses import dataclass

from nanodiff.config import UserError, arg, script

LESS_MEMORY = "try --dtype bf16, fewer --max-new-tokens, a smaller model"


@dataclass
class Complete:
    model: str = arg("", "folder or Hub id of a LLaMA 3.2 or Gemma 3 text model")
    prompt: str = arg("", "the text to go on with")
    chat: bool = arg(False, "the prompt is a request, in Gemma's chat form")
    max_new_tokens: int = arg(128, "at most so many new tokens")
    temperature: float = arg(1.0, "0: the likeliest token each time; larger: more chance")
    top_k: int = arg(0, "only the so many likeliest tokens; 0: all")
    top_p: float = arg(1.0, "only the likeliest tokens that together have this share")
    min_p: float = arg(0.0, "only tokens with at least this share of the likeliest's")
    repetition_penalty: float = arg(1.0, "above 1: tokens that were there are less likely")
    beams: int = arg(1, "texts that are searched at a time, with --temperature 0")
    seed: int = arg(0, "of the draws")
    output_dir: str = arg("out/complete", "run.json")
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = arg(
        "auto", "weights: auto is bf16 on a GPU and fp32 on a CPU", choices=("auto", "fp32", "fp16", "bf16")
    )
    kernels: str = arg("auto", "our Triton kernels on a GPU: auto falls back and says why, triton never falls back, torch uses none",
                       choices=("auto", "triton", "torch"))  # fmt: skip
    hub_token: str | None = arg(None, "Hub token (better: the variable HF_TOKEN)", "hf-token")


def complete(cfg):
    """The stage `complete`: see the module docstring."""
    import torch

    from nanodiff import engine, hub, sources, textgen
    from nanodiff.models import layers

    for name in ("model", "prompt"):
        if not getattr(cfg, name):
            raise UserError(f"--{name} is required")
    if cfg.max_new_tokens < 1 or cfg.beams < 1:
        raise UserError("--max-new-tokens and --beams must be at least 1")
    chance = textgen.Chance(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty)
    device = engine.pick_device(cfg.device)
    layers.use_kernels(cfg.kernels)
    record = engine.Record(cfg, device)
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    with record.timed("load"):
        folder = hub.resolve(cfg.model, None, cfg.hub_token)
        net, tokenizer = sources.load_language(
            folder, auto if cfg.dtype == "auto" else engine.pick_dtype(cfg.dtype, device), device
        )
    text = textgen.chat([{"role": "user", "content": cfg.prompt}]) if cfg.chat else cfg.prompt
    ids = tokenizer.ids(text, begin=not cfg.chat)
    times = []
    with record.timed("write"):
        (written,) = textgen.generate(net, [ids], cfg.max_new_tokens, chance, net.cfg.eos_token_id, [cfg.seed], cfg.beams,
                                      on_step=lambda i, seconds: times.append(seconds))  # fmt: skip
    record.data["results"] = {"prompt_ids": ids, "ids": written.ids, "ended": written.ended}
    if len(times) > 1:
        rate = (len(times) - 1) / sum(times[1:])
        record.data["results"]["tokens_per_s"] = rate
        print(f"{len(ids)} tokens read in {times[0]:.2f} s, then {rate:.1f} tokens/s", file=sys.stderr)
    record.write()
    print(tokenizer.rest(ids, written.ids))


STAGES = {"complete": (Complete, complete)}

if __name__ == "__main__":
    sys.exit(script(STAGES, __doc__, less_memory=LESS_MEMORY))
