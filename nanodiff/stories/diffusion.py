"""What train.py's diffusion loop needs beside the loop: sample sheets and the model that comes out."""

from pathlib import Path

import torch

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError
from nanodiff.data import tables
from nanodiff.device import choice, dist, onednn
from nanodiff.output import images
from nanodiff.pipeline import control, sources
from nanodiff.training import build, teach
from nanodiff.training.options import under


def sheet(run, sd, cfg, dataset, path, strip=False):
    """Sample pictures with the averaged weights and fixed noise. strip: x_t at some of the steps instead, a row a prompt."""
    if "controlnet" in run.net:
        return control_sheet(run, sd, cfg, dataset, path, 4 if strip else cfg.eval_batch_size)
    prompts = prompts_of(cfg, sd, dataset)[: 4 if strip else cfg.eval_batch_size]
    guidance = 1.0 if sd.unconditional else cfg.sample_guidance
    teach.sheet(
        run,
        sd,
        prompts,
        path,
        cfg.sample_steps,
        guidance,
        (cfg.resolution, cfg.resolution),
        strip,
        not sd.unconditional,
    )


def control_sheet(run, sd, cfg, dataset, path, count):
    """Pictures spread over the data: what the ControlNet is shown, and below it what is drawn to it and the picture's caption."""
    some = range(0, len(dataset), max(1, len(dataset) // count))[:count]
    side, net = cfg.resolution, run.net["controlnet"]
    real = torch.stack([images.to_pixels(images.fit(dataset.image(i), side, side)) for i in some])
    seen = build.shown(cfg.conditioning, real)
    prompts = [dataset.texts[i][0] for i in some]

    def draw():
        made = sd.generate(
            prompts, steps=cfg.sample_steps, guidance_scale=cfg.sample_guidance, height=side, width=side,
            controls=(control.Control(net, seen),),
        )  # fmt: skip
        for module in (*sd.models().values(), net):
            onednn.undo(module)  # training goes on with the layers it had
        images.save_grid(torch.cat([seen * 2 - 1, made.pixels.cpu()]), path, nrow=len(some))

    with run.averaged():
        dist.on_main(draw)
    if dist.is_main():
        run.watch.picture(run.step + 1, "samples", images.open_image(path))


def prompts_of(cfg, sd, dataset):
    """What the sample sheets show: the prompts given, or texts spread over the data."""
    if sd.unconditional:
        return [""] * cfg.eval_batch_size
    given = []
    for prompt in cfg.sample_prompts:
        if prompt.endswith(".txt"):
            path = Path(under(cfg.base_dir, prompt))
            if not path.is_file():
                raise UserError(f"--sample-prompts {prompt}: no such file")
            given += tables.lines(path)
        else:
            given.append(prompt)
    if cfg.condition == "labels":
        sd.tokenizer(given)
    texts = [group[0] for group in build.conditions(cfg, dataset)]
    spread = list(dict.fromkeys(texts))
    return given or spread[:: max(1, len(spread) // cfg.eval_batch_size)][: cfg.eval_batch_size]


def own_size(model):
    """Pixels along one side of the pictures that a model was made for, from its configurations. Says them."""
    src = sources.configs(model)
    net = src.config(pipeline.FAMILIES[src.kind].denoiser_name)
    side = (net.sample_size or 64) * (src.config("vae").downscale if "vae" in src.parts else 1)
    dist.say(f"resolution: {side}, the model's own")
    return side


def write_model(run, sd, cfg, name, updates):
    """The averaged model as a Hub folder; of adapters, their file alone, which says after how many updates."""
    with run.averaged():
        states = {k: dist.whole_state(m) for k, m in run.net.items()}
        kind = choice.DTYPES[cfg.save_dtype]
        if "controlnet" in run.net:
            dist.on_main(weights.save, run.net["controlnet"], run.out / name, kind, states["controlnet"])
        elif cfg.lora:
            form = lora.form_for(cfg.lora_format, sd.models())
            folder = run.out / name
            path = folder if form == "peft" else folder / lora.DIFFUSERS_NAME  # the name that diffusers looks for
            facts = {"title": run.out.resolve().name, "steps": updates, "seed": cfg.seed, "learning_rate": cfg.lr,
                     "resolution": f"{cfg.resolution}x{cfg.resolution}", "prediction_type": sd.schedule.prediction}  # fmt: skip
            dist.on_main(folder.mkdir, exist_ok=True)
            made = lora.trained(dict(run.net.items()), states, kind) if dist.is_main() else None
            dist.on_main(lora.write, path, made, sd.models(), form, facts)
        else:
            dist.on_main(sd.save, run.out / name, kind, states)
    run.link(name)
    run.record.file(run.out / name)
