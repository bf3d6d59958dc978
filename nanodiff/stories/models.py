"""The models that the options of a picture name: its pipeline, LoRAs, learned words, ControlNets, adapters, a refiner, small decoders."""

import concurrent.futures
import sys
from pathlib import Path

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError, printable
from nanodiff.device import choice, memory, onednn
from nanodiff.diffusion import samplers
from nanodiff.models import layers, taesd
from nanodiff.output import foreign, images
from nanodiff.pipeline import control, pictures, single, sources
from nanodiff.pipeline.sources import EMBEDDED
from nanodiff.weights import hub

LARGE = 1024  # channels of a denoiser from which --dtype auto takes bf16 on a CPU that computes in it
# Settings that need the model to be loaded again when they change within a study.
LOADING = ("lora_dir", "model", "variant", "revision", "vae_checkpoint", "components", "prediction_type", "allow_pickle", "t5", "dtype",
           "offload", "quantize", "embedding", "lora", "lora_fuse", "allow_partial", "compile", "cuda_graph", "kernels", "fast_vae", "control", "refiner", "ip_adapter", "ip_adapter_image", "image_encoder")  # fmt: skip


def load(cfg, record, device, src=None):
    """The pipeline that cfg asks for, LoRAs and learned words included."""
    layers.use_kernels(cfg.kernels)
    if cfg.cuda_graph == "on" and device.type != "cuda":
        raise UserError("--cuda-graph needs a CUDA device")
    with record.timed("load"):
        src = src or pipeline.source(
            cfg.model or EMBEDDED, cfg.variant, cfg.revision, cfg.token, cfg.components, cfg.prediction_type,
            cfg.allow_pickle, not cfg.t5,
        )  # fmt: skip
        scheduler = src.scheduler()
        told(cfg, scheduler)
        dtype = pick_dtype(cfg, device, src)
        sd = pipeline.load(
            src,
            dtype,
            device,
            offload=cfg.offload,
            quantized=cfg.quantize,
            no_t5=not cfg.t5,
            scheduler=cfg.scheduler,
            name=cfg.model or EMBEDDED,
        )
        sd.filed = scheduler
        if cfg.vae_checkpoint:
            exchange_vae(cfg, sd, dtype, device)
        for path in cfg.embedding:
            print(f"learned word: {printable(sd.learn(path, cfg.allow_pickle))}")
        add_loras(cfg, sd)
        sd.model_hash = hashed(cfg)
        sd.refiner = load_refiner(cfg, src, sd, dtype, device) if cfg.refiner else None
        sd.pictures = load_pictures(cfg, dtype, device)
        sd.controls = [load_control(text, cfg, sd, dtype, device) for text in cfg.control]
        sd.decoder = tiny_decoder(cfg.fast_vae, sd, device) if cfg.fast_vae else None
        sd.preview = tiny_decoder(cfg.preview, sd, device) if cfg.preview else None
    moves = cfg.offload != "none" or cfg.quantize  # weights that come and go, or are made again at every call
    sd.replays = {"on": True, "off": False, "auto": False if moves else "auto"}[cfg.cuda_graph]
    sd.packs = True  # nothing but pictures is asked of this pipeline
    for part in (sd, sd.refiner):
        if cfg.compile and part:
            part.net.compile()
    return sd


def exchange_vae(cfg, sd, dtype, device):
    """The VAE of --vae-checkpoint in place of the model's own."""
    path, cls = hub.trained(cfg.vae_checkpoint), pipeline.BUILDERS["vae"]
    if sd.vae is None:
        raise UserError(f"--vae-checkpoint {path}: this model works in pixels and has no VAE")
    home = (dtype, device) if cfg.offload == "none" else (None, "cpu")
    if path.is_file():
        sd.vae = single.load_vae(path, sd.vae.cfg, cls, *home)
    else:
        sd.vae = sources.load_vae(path, *home)
    if cfg.offload != "none":
        memory.Resident(sd.vae, dtype, device)
    sd.check_fit()


def add_loras(cfg, sd):
    """Every --lora with the words it brings: attached (sd.loras: [(attached, scale)]), or with --lora-fuse added into the weights."""
    sd.loras, sd.hashes = [], {}
    for text in cfg.lora:
        path, scale = lora.parse(text)
        sd.hashes |= hashes(path)
        found = lora.read(path, sd.models(), cfg.allow_partial, words=True)
        for word, vectors in found.words.items():
            print(f"learned word: {printable(sd.learn_word(word, vectors, path))}")
        if cfg.lora_fuse:
            lora.fuse(sd.models(), found, scale * cfg.lora_scale, keep=False)
        else:
            sd.loras.append((lora.attach(sd.models(), found, scale), scale))
        print(f"lora: {found.name}, {len(found.deltas)} layers, scale {scale:g}")


def told(cfg, scheduler):
    """ComfyUI calls a flow's samplers by the names of the others: which one a picture of its means is told by the model's scheduler (dict, name of the file)."""
    flow = str(scheduler[0].get("_class_name", "")).startswith("FlowMatch")
    if getattr(cfg, "adopted", False) and flow:
        cfg.scheduler = foreign.FLOWS.get(cfg.scheduler, cfg.scheduler)
        given = getattr(cfg, "given", ())  # what was typed is not theirs
        cfg.timestep_spacing = cfg.timestep_spacing if "timestep_spacing" in given else None
        theirs = {"normal": None, "beta_times": "beta"} if "sigmas" not in given else {}
        cfg.sigmas = theirs.get(cfg.sigmas, cfg.sigmas)  # a flow's own grid is their "normal"


def hashed(cfg):
    """f() -> the hash of the single file that --model is, as A1111 writes it: ten digits. It is computed beside the drawing. None for what is no
    file, and where nothing is written into the pictures."""
    if not (cfg.model and cfg.metadata and hub.trained(cfg.model).is_file()):
        return None
    made = concurrent.futures.ThreadPoolExecutor(1).submit(weights.model_hash, hub.trained(cfg.model))
    return made.result


def hashes(path):
    """{name: hash} of a LoRA's file as A1111 writes it: the SHA-256 of its tensors' bytes, 12 digits; nothing for what is no safetensors file."""
    path = Path(path)
    return {path.stem: weights.tensor_hash(path)[:12]} if path.suffix == ".safetensors" and path.is_file() else {}


def refiner_source(cfg, src, source=pipeline.source):
    """The source of --refiner's model, for a base model from `src`. Raises UserError where they are not SDXL's."""
    family = lambda s: pipeline.FAMILIES[s.kind].family  # noqa: E731
    found = source(cfg.refiner, cfg.variant, None, cfg.token, None, None, cfg.allow_pickle)
    if family(found) is not pipeline.families.REFINER:
        raise UserError(f"--refiner {printable(cfg.refiner)}: is no refiner of SDXL, but a {family(found).name} model")
    if family(src) is not pipeline.families.SDXL or src.config("unet").in_channels != found.config("unet").in_channels:
        raise UserError("--refiner goes on where a base model of SDXL stops, this model is another")
    return found


def load_refiner(cfg, src, sd, dtype, device):
    """The model of --refiner, where and as the base model from `src` computes."""
    src, sampler = refiner_source(cfg, src), samplers.name_of(sd.schedule)
    small = {"offload": cfg.offload, "quantized": cfg.quantize}
    found = pipeline.load(src, dtype, device, scheduler=sampler, name=cfg.refiner, **small)
    if cfg.vae_checkpoint:
        found.vae = sd.vae
    print(
        f"refiner: {printable(cfg.refiner)}, from {cfg.refiner_start:g} of the timesteps on, by the base model's sampler ({sampler}) and grid"
    )
    if cfg.lora or cfg.lora_dir or cfg.embedding:
        print("note: LoRAs and learned words are the base model's; the refiner has none", file=sys.stderr)
    return found


def load_pictures(cfg, dtype, device):
    """The pictures of --ip-adapter-image as prompts: all of them for one --ip-adapter, else one for each. The vision towers, which may be larger than the
    denoiser, look now and are let go."""
    opened = [images.open_image(path) for path in cfg.ip_adapter_image]
    shown = [opened] if len(cfg.ip_adapter) == 1 else [[picture] for picture in opened]
    towers, found = {}, []
    for text, mine in zip(cfg.ip_adapter, shown, strict=True):
        name, scale = pictures.parse(text)
        adapter, path = pictures.load(name, dtype, device, cfg.token, cfg.allow_pickle)
        folder = pictures.encoder_folder(cfg.image_encoder, path, adapter.cfg, cfg.token)
        if folder not in towers:
            towers[folder] = pictures.load_tower(folder, dtype, device)
        print(
            f"image prompt: {printable(text)}, {memory.count(adapter) / 1e6:g} M parameters, seen by {printable(folder)}"
        )
        found.append(pictures.ImagePrompt(adapter, *pictures.look(adapter, towers[folder], mine), scale))
    return tuple(found)


def load_control(text, cfg, sd, dtype, device):
    """The ControlNet that a --control names, where and as the denoiser computes."""
    stays = cfg.offload == "none"
    net = control.load(
        control.parse(text)[0],
        sd.net.cfg,
        dtype if stays else None,
        device if stays else "cpu",
        cfg.token,
        cfg.allow_pickle,
    )
    if not stays:
        memory.Resident(net, dtype, device, blocks=cfg.offload == "sequential")
    print(f"control: {printable(text)}, {memory.count(net) / 1e6:g} M parameters")
    return net


def pick_dtype(cfg, device, src):
    """The torch dtype of --dtype for a source of a model."""
    family = pipeline.FAMILIES[src.kind]
    if cfg.dtype == "auto" and device.type == "cuda":
        return family.half
    if cfg.dtype == "auto" and device.type == "cpu" and onednn.computes_bf16():
        net = src.config(family.denoiser_name)
        widest = net.width if hasattr(net, "width") else max(net.block_out_channels)
        if widest >= LARGE:
            print("note: computing in bf16, which is twice as fast here; --dtype fp32 is exact", file=sys.stderr)
            return choice.DTYPES["bf16"]
    return choice.pick_dtype(cfg.dtype, device)


def tiny_decoder(path, sd, device):
    """f(latents) -> pixels of a TAESD decoder for this model's latents."""
    path = Path(path)
    file = weights.find_files(path)[0] if path.is_dir() else path
    model = taesd.from_state(weights.load_weights(file), "decoder", file)
    channels, wanted = model[1].in_channels, sd.channels
    if channels != wanted:
        raise UserError(f"{file}: TAESD for latents of {channels} channels, this model's have {wanted}")
    model = model.to(device).float()
    return lambda latents: model(latents.float()) * 2 - 1


def attributed(sd, base):
    """`sd` with what load() added to `base`."""
    for name in ("loras", "hashes", "decoder", "preview", "controls", "refiner", "pictures", "model_hash", "filed"):
        setattr(sd, name, getattr(base, name))
    return sd


def under(cfg, base):
    """The loaded pipeline under the sampler and LoRA scale that cfg asks for."""
    if cfg.scheduler is None:  # the model's own, whatever an earlier cell of a study was loaded with
        base = attributed(base.with_schedule(samplers.schedule_of(*base.filed)), base)
    fields = {"timestep_spacing": cfg.timestep_spacing} if cfg.timestep_spacing else {}
    if fields and base.schedule.flow:
        raise UserError("--timestep-spacing is for models of a noise schedule; this one is a flow")
    given = "timestep_spacing" in getattr(cfg, "given", ())
    if fields and not given and not samplers.rescheduled(base.schedule, cfg.scheduler).knows("timestep_spacing"):
        fields = {}  # of a preset, or of a picture that is drawn again under another sampler
    if fields and given:
        made = [
            base.with_scheduler(cfg.scheduler, cfg.sigmas, timestep_spacing=s).schedule
            for s in ("linspace", "leading", "trailing")
        ]
        if len({tuple(samplers.times(s, 10)) for s in made}) == 1:
            beside = f" with --sigmas {cfg.sigmas}" if cfg.sigmas else ""
            raise UserError(
                f"--timestep-spacing does nothing to {samplers.name_of(made[0])}{beside}, whose grid is another one"
            )
    sd = base.with_scheduler(cfg.scheduler, cfg.sigmas, **fields)
    for attached, scale in base.loras:
        if attached.scale != scale * cfg.lora_scale:
            attached.scale = scale * cfg.lora_scale
            base.kept.clear()  # the text encoders may have changed
    sd = attributed(sd, base)
    if sd.refiner:
        # the same steps: all of the base model's schedule but what the network predicts
        same, own = sd.schedule, {"prediction_type": base.refiner.schedule.prediction}
        sd.refiner = base.refiner.with_schedule(type(same)(same.kind, same.cfg | own, same.raw | own))
        sd.refiner.replays, sd.refiner.packs = sd.replays, sd.packs
    return sd
