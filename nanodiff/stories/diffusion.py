"""What train.py's diffusion loop needs beside the loop: the model that is trained, sample sheets, the model that comes out."""

from pathlib import Path

import torch

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError
from nanodiff.data import tables
from nanodiff.device import choice, dist, memory, onednn
from nanodiff.diffusion import samplers
from nanodiff.files import write_folder
from nanodiff.models import controlnet, mmdit, unet
from nanodiff.models.clip import CLIPTextModel
from nanodiff.models.labels import Config as LabelConfig
from nanodiff.models.labels import LabelEncoder
from nanodiff.output import images
from nanodiff.pipeline import control, sources
from nanodiff.text.tokenizer import LabelTokenizer, train_bpe
from nanodiff.training import build, latents, loader, teach
from nanodiff.training.options import under
from nanodiff.weights import hub

NEW_ONLY = ("vae", "text_encoder", "text_config", "model_config", "model_size", "beta_schedule", "zero_snr", "ddpm_num_steps",
            "condition", "vocab_size", "max_length", "text_mask")  # fmt: skip


def make_model(cfg, dataset, device):
    """(pipeline, {name: module to train}): a new model, or --model's, whole or with adapters, or its ControlNet."""
    sd, nets = go_on(cfg) if cfg.model else begin(cfg, dataset, device)
    if cfg.resolution % sd.multiple:
        raise UserError(f"`resolution` {cfg.resolution} must be a multiple of {sd.multiple}")
    sd.check_size(cfg.resolution, cfg.resolution, "`resolution`")
    build.check_noise(cfg, sd.schedule, getattr(cfg, "given", ()))
    if cfg.sample_every or cfg.save_images_epochs:
        try:
            samplers.check_steps(sd.schedule, cfg.sample_steps)
        except UserError as e:
            raise UserError(str(e).replace("`steps`", "`sample_steps`")) from None
    for module in (sd.vae, sd.net, *sd.encoders):
        if module is not None and module not in nets.values():  # it is frozen
            onednn.learn(module.to(device, memory_format=torch.channels_last))  # gradients may pass through it
    return sd, nets


def frozen_weights(sd, nets):
    """SHA-256 of what a pipeline's networks hold and a training of `nets` leaves as it is: what a run that goes on must find again."""
    return loader.fingerprint(*(m for m in (sd.vae, sd.net, *sd.encoders) if m is not None), without=nets.values())


def go_on(cfg):
    """See make_model(): --model's weights, in fp32."""
    for name in NEW_ONLY:
        if name in getattr(cfg, "given", ()) and (name, cfg.condition) != ("condition", "text"):
            raise UserError(f"`{name}` is for new models; `model` brings its own")
    memory.keep_freed_memory()
    sd = pipeline.load(cfg.model, torch.float32, "cpu")
    sd.check_trainable()
    if cfg.condition != "text" and not isinstance(sd.tokenizer, LabelTokenizer):
        raise UserError(f"`condition` {cfg.condition}: {cfg.model} is told by captions what to draw (`condition` text)")
    if cfg.prediction_type not in (None, sd.schedule.prediction):
        raise UserError(f"`prediction_type` {cfg.prediction_type}: {cfg.model} predicts {sd.schedule.prediction}")
    if cfg.conditioning:
        return sd, {"controlnet": begin_control(cfg, sd)}
    nets = {sd.denoiser_name: sd.net}
    if cfg.train_text_encoder:
        check_one_encoder([e for e in sd.encoders if e is not None])
        nets["text_encoder"] = sd.text_encoder
    open_to_training(cfg, nets)
    return sd, nets


def check_one_encoder(encoders):
    """Raise UserError for --train-text-encoder of a model that has several."""
    if len(encoders) > 1:
        raise UserError("`train_text_encoder` is for models with one text encoder")


def open_to_training(cfg, nets):
    """Let the networks {component: module} learn: whole, or by adapters."""
    if not cfg.lora:
        for net in nets.values():
            net.requires_grad_(True)
        return
    settings = build.lora_settings(cfg)
    # the usual targets are in each of them
    shared = (
        dict.fromkeys(nets, settings)
        if settings["targets"] == lora.ATTENTION
        else teach.adapters_of(nets, settings, cfg.model)
    )
    if idle := [name for name in nets if name not in shared]:
        raise UserError(
            f"`lora_targets` {','.join(settings['targets'])}: none of them is in the {idle[0]}, which would learn nothing"
        )
    for name, mine in shared.items():
        lora.adapt(nets[name], component=name, **mine)


def begin_control(cfg, sd):
    """The ControlNet that is trained for a pipeline's UNet, which is frozen: --control's, or a copy of the UNet's way down.
    What it learns comes from the edges where a caption does not say it: half of the captions are left out (Zhang et al. 2023, arXiv 2302.05543 §3.3)."""
    if not isinstance(sd.net, unet.UNet2DConditionModel):
        raise UserError(f"`model` {cfg.model}: ControlNets are for UNets (SD 1.x, SD 2.x, SDXL)")
    sd.check_trainable()
    if cfg.control:
        net = control.load(cfg.control, sd.net.cfg, torch.float32, "cpu", cfg.hub_token)
        control.check_fit(net, sd)
        return net.requires_grad_(True)
    return controlnet.copy_of(sd.net, sd.downscale).requires_grad_(True)


def begin(cfg, dataset, device):
    """See make_model(): new weights."""
    check_new(cfg)
    vae = sources.load_vae(cfg.vae, torch.float32, device) if cfg.vae else None
    encoder, tokenizer, frozen = make_text(cfg, dataset, device)
    net = build.make_denoiser(cfg.model_size, cfg.resolution, encoder.cfg, vae, cfg.model_config)
    build.init(net, encoder if not frozen else None)
    family = pipeline.Joint if isinstance(net, mmdit.SD3Transformer2DModel) else pipeline.Pipeline
    schedule = build.make_schedule(cfg.prediction_type or "v_prediction", cfg.beta_schedule, cfg.ddpm_num_steps, cfg.zero_snr,
                                   cfg.timestep_shift or 1.0, pixels=not vae)  # fmt: skip
    sd = family(net, vae, encoder, tokenizer, schedule)
    guidance = 1.0 if cfg.condition == "none" else cfg.sample_guidance
    sd.index = {pipeline.SAMPLING: {"steps": min(cfg.sample_steps, cfg.ddpm_num_steps), "guidance_scale": guidance}}
    return sd, {sd.denoiser_name: net} | ({} if frozen else {"text_encoder": encoder})


def check_new(cfg):
    """Raise UserError for an option among those given that a new model has no use for."""
    if cfg.lora or cfg.train_text_encoder:
        raise UserError(f"`{'lora' if cfg.lora else 'train_text_encoder'}` needs a `model` to go on from")
    given, kind = getattr(cfg, "given", ()), cfg.prediction_type
    for name, asked in (("beta_schedule", True), ("zero_snr", cfg.zero_snr)):
        if name in given and asked and kind == "flow":
            raise UserError(f"`{name}`: a flow has no betas (`prediction_type` flow)")
    if "zero_snr" in given and cfg.zero_snr and kind == "epsilon":
        raise UserError(
            "`zero_snr`: at the last timestep nothing could be learned by `prediction_type` epsilon; take v_prediction or sample"
        )


def text_config(cfg, tokenizer=None):
    """The configuration of the text encoder that is trained along."""
    projected = build.denoiser_config(cfg.model_size, cfg.model_config)[0] == "mmdit"
    return build.text_config(cfg.model_size, cfg.max_length, cfg.text_config, tokenizer, projected, cfg.text_mask)


def frozen_text(cfg):
    """(folder, whether an MMDiT needs its projection) of --text-encoder."""
    kind, *_ = build.denoiser_config(cfg.model_size, cfg.model_config)
    return hub.one(cfg.text_encoder, cfg.hub_token), kind == "mmdit"


def make_text(cfg, dataset, device):
    """(encoder, tokenizer, frozen?) that tell a new denoiser what to draw."""
    if cfg.condition != "text":
        for name in ("text_mask", "text_encoder", "vocab_size", "max_length"):
            if name in getattr(cfg, "given", ()):
                raise UserError(f"`{name}` is for captions; `condition` {cfg.condition} has none")
        build.conditions(cfg.condition, dataset)
        labels = dataset.known_labels if cfg.condition == "labels" else []
        return LabelEncoder(LabelConfig(tuple(labels), text_config(cfg).hidden_size)), LabelTokenizer(labels), False
    if cfg.text_encoder:
        path, projected = frozen_text(cfg)
        own = sources.text_config(path, projected)[1]
        same = {"max_length": own.max_position_embeddings, "vocab_size": own.vocab_size}
        for name in ("max_length", "vocab_size", "text_config"):
            if name in getattr(cfg, "given", ()) and getattr(cfg, name) != same.get(name):
                said = f" ({same[name]})" if name in same else ""
                raise UserError(
                    f"`{name}` is for a text encoder that is trained along; `text_encoder` {cfg.text_encoder} has its own{said}"
                )
        encoder, tokenizer = sources.load_text(path, torch.float32, device, projected)
        encoder.cfg.use_attention_mask |= cfg.text_mask
        return encoder, tokenizer, True
    tokenizer = train_bpe([t for texts in dataset.texts for t in texts], cfg.vocab_size, cfg.max_length)
    return CLIPTextModel(text_config(cfg, tokenizer)), tokenizer, False


def encoded(cfg, run, sd, calls, dataset, feed, seed, dropout):
    """(latents.Latents, latents.Texts) of a data set: what the loss asks for a micro-batch. dropout: share of the captions left out."""
    kept = {"folder": cfg.cache_dir or run.out / "cache", "cached": cfg.cache}
    pictures = "controlnet" in calls  # which is shown each of them
    texts = build.conditions(cfg.condition, dataset)
    return (
        latents.Latents(sd.vae, feed, seed, run.device, **kept, pictures=pictures),
        latents.Texts(sd, texts, seed, run.device, dropout, calls.get("text_encoder"), dtype=run.precision or torch.float32,
                      **kept),
    )  # fmt: skip


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
    texts = [group[0] for group in build.conditions(cfg.condition, dataset)]
    spread = list(dict.fromkeys(texts))
    return given or spread[:: max(1, len(spread) // cfg.eval_batch_size)][: cfg.eval_batch_size]


def side_of(model):
    """Pixels along one side of the pictures that a model was made for, from its configurations."""
    src = sources.configs(model)
    net = src.config(pipeline.FAMILIES[src.kind].denoiser_name)
    return (net.sample_size or 64) * (src.config("vae").downscale if "vae" in src.parts else 1)


def own_size(model):
    """side_of(), said."""
    side = side_of(model)
    dist.say(f"resolution: {side}, the model's own")
    return side


def write_model(run, sd, cfg, name, updates):
    """The averaged model as a Hub folder; of adapters, their file alone, which says after how many updates."""
    with run.averaged():
        states = {k: dist.whole_state(m) for k, m in run.net.items()}
        kind = choice.DTYPES[cfg.save_dtype]
        if "controlnet" in run.net:
            save = lambda folder: weights.save(run.net["controlnet"], folder, kind, states["controlnet"])  # noqa: E731
            dist.on_main(write_folder, run.out / name, save)
        elif cfg.lora:
            form = lora.form_for(cfg.lora_format, sd.models())
            folder = run.out / name
            name_in = lambda folder: folder if form == "peft" else folder / lora.DIFFUSERS_NAME  # noqa: E731  the name that diffusers looks for
            facts = {"title": run.out.resolve().name, "steps": updates, "seed": cfg.seed, "learning_rate": cfg.lr,
                     "resolution": f"{cfg.resolution}x{cfg.resolution}", "prediction_type": sd.schedule.prediction}  # fmt: skip
            made = lora.trained(dict(run.net.items()), states, kind) if dist.is_main() else None

            def save(fresh):
                fresh.mkdir()
                lora.write(name_in(fresh), made, sd.models(), form, facts)

            dist.on_main(write_folder, folder, save)
        else:
            dist.on_main(write_folder, run.out / name, lambda folder: sd.save(folder, kind, states))
    run.link(name)
    run.record.file(run.out / name)
