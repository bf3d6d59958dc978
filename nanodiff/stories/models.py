"""The models that the options of a picture name: its pipeline, LoRAs, learned words, ControlNets, adapters, a refiner, small decoders."""

import concurrent.futures
import sys
from pathlib import Path

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError, printable
from nanodiff.device import choice, memory, onednn
from nanodiff.diffusion import samplers
from nanodiff.models import layers, taesd
from nanodiff.models.clip import CLIPVisionModel
from nanodiff.pipeline import control, pictures, single, sources
from nanodiff.pipeline.sources import EMBEDDED
from nanodiff.weights import hub

LARGE = 1024  # channels of a denoiser from which --dtype auto takes bf16 on a CPU that computes in it
# Settings that need the model to be loaded again when they change within a study.
LOADING = ("lora_dir", "model", "variant", "revision", "vae_checkpoint", "components", "prediction_type", "allow_pickle", "t5", "dtype",
           "offload", "quantize", "embedding", "lora", "lora_fuse", "allow_partial", "compile", "cuda_graph", "kernels", "fast_vae", "control", "refiner", "ip_adapter", "image_encoder")  # fmt: skip


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
        if cfg.vae_checkpoint:
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
        for path in cfg.embedding:
            print(f"learned word: {printable(sd.learn(path, cfg.allow_pickle))}")
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
        sd.model_hash = hashed(cfg)
        sd.refiner = load_refiner(cfg, sd, dtype, device) if cfg.refiner else None
        sd.adapters = [load_adapter(text, cfg, dtype, device) for text in cfg.ip_adapter]
        sd.controls = [load_control(text, cfg, sd, dtype, device) for text in cfg.control]
        sd.decoder = tiny_decoder(cfg.fast_vae, sd, device) if cfg.fast_vae else None
        sd.preview = tiny_decoder(cfg.preview, sd, device) if cfg.preview else None
    moves = cfg.offload != "none" or cfg.quantize  # weights that come and go, or are made again at every call
    sd.replays = {"on": True, "off": False, "auto": False if moves else "auto"}[cfg.cuda_graph]
    sd.packs = True  # nothing but pictures is asked of this pipeline
    if cfg.compile:
        sd.net.compile()
    return sd


def hashed(cfg):
    """f() -> the hash of the single file that --model is, as A1111 writes it: ten digits. It is computed beside the drawing. None for what is no
    file, and where nothing is written into the pictures."""
    if not (cfg.model and cfg.metadata and hub.trained(cfg.model).is_file()):
        return None
    made = concurrent.futures.ThreadPoolExecutor(1).submit(weights.file_hash, hub.trained(cfg.model))
    return lambda: made.result()[:10]


def hashes(path):
    """{name: hash} of a LoRA's file as A1111 writes it: the SHA-256 of its tensors' bytes, 12 digits; nothing for what is no safetensors file."""
    path = Path(path)
    return {path.stem: weights.tensor_hash(path)[:12]} if path.suffix == ".safetensors" and path.is_file() else {}


def load_refiner(cfg, sd, dtype, device):
    """The model of --refiner, under the base model's sampler, where and as it computes."""
    src = pipeline.source(cfg.refiner, cfg.variant, None, cfg.token, None, None, cfg.allow_pickle)
    if pipeline.FAMILIES[src.kind].family is not pipeline.families.REFINER:
        raise UserError(
            f"--refiner {printable(cfg.refiner)}: is no refiner of SDXL, but a {pipeline.FAMILIES[src.kind].family.name} model"
        )
    found = pipeline.load(
        src,
        dtype,
        device,
        offload=cfg.offload,
        quantized=cfg.quantize,
        scheduler=samplers.name_of(sd.schedule),
        name=cfg.refiner,
    )
    if cfg.vae_checkpoint:
        found.vae = sd.vae
    print(f"refiner: {printable(cfg.refiner)}, from {cfg.refiner_start:g} of the noise on")
    return found


def load_adapter(text, cfg, dtype, device):
    """(IPAdapter, vision tower) of an --ip-adapter, where and as the denoiser computes; with --offload the tower stays in host memory."""
    adapter, path = pictures.load(pictures.parse(text)[0], dtype, device, cfg.token, cfg.allow_pickle)
    folder = pictures.encoder_folder(cfg.image_encoder, path, adapter.cfg, cfg.token)
    tower = weights.load(CLIPVisionModel, folder, dtype, device if cfg.offload == "none" else "cpu")
    print(f"image prompt: {printable(text)}, {memory.count(adapter) / 1e6:g} M parameters, seen by {printable(folder)}")
    return adapter, tower


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


def under(cfg, base):
    """The loaded pipeline under the sampler and LoRA scale that cfg asks for."""
    sd = base.with_scheduler(cfg.scheduler, cfg.sigmas)
    for attached, scale in base.loras:
        if attached.scale != scale * cfg.lora_scale:
            attached.scale = scale * cfg.lora_scale
            base.kept.clear()  # the text encoders may have changed
    for name in ("loras", "hashes", "decoder", "preview", "controls", "refiner", "adapters", "model_hash"):
        setattr(sd, name, getattr(base, name))
    if sd.refiner:
        sd.refiner = base.refiner.with_scheduler(samplers.name_of(sd.schedule), cfg.sigmas)
        sd.refiner.replays, sd.refiner.packs = sd.replays, sd.packs
    return sd
