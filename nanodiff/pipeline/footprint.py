"""The memory of a run, predicted on the meta device."""

import torch

from nanodiff import weights
from nanodiff.device import memory, quantize
from nanodiff.models.control_mmdit import SD3ControlNetModel
from nanodiff.pipeline.families import BUILDERS
from nanodiff.pipeline.loading import FAMILIES
from nanodiff.pipeline.sdxl import SDXL


def plan(src, dtype, height, width, batch, guided, quantized, with_t5, length, tiled, controls=()):
    """[memory.Stage] of a run, predicted on the meta device. controls: ControlNets, on the meta device too."""
    family, stages = FAMILIES[src.kind], []
    meta = {n: weights.skeleton(src.builder(n), src.config(n)) for n in BUILDERS if n in src.parts}
    if not with_t5:
        meta.pop("text_encoder_3", None)
    vae, net = meta.get("vae"), meta[family.denoiser_name]
    scale = vae.cfg.downscale if vae else 1
    side = net.cfg.sample_size or 64
    h, w = (side, side) if isinstance(side, int) else side
    h, w = (height or h * scale) // scale, (width or w * scale) // scale
    rows = batch * (2 if guided else 1)

    def empty(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    def run(name, model, own):
        if name == "text_encoder_3":
            return lambda: model(empty(rows, length, of=torch.long))
        if name.startswith("text_encoder"):
            return lambda: model(empty(rows, model.cfg.max_position_embeddings, of=torch.long))
        if name == "vae":
            size = (min(h, 64), min(w, 64)) if tiled else (h, w)
            return lambda: model.decode(empty(batch, model.cfg.latent_channels, *size, of=own))
        if name == "transformer":
            return lambda: model(*joint())
        x, t, text, added = inputs(model)
        return lambda: model(x, t, model.text_kv(text), added)

    def joint():
        """(x, t, text, pooled) of the transformer and of its ControlNets."""
        x, t = empty(rows, net.cfg.in_channels, h, w), empty(rows, of=torch.float32)
        text = empty(rows, 77 + length, net.cfg.joint_attention_dim)
        return x, t, text, empty(rows, net.cfg.pooled_projection_dim)

    def inputs(model):
        """(x, t, text, added) of a UNet or ControlNet."""
        x, t = empty(rows, model.cfg.in_channels, h, w), empty(rows, of=torch.float32)
        text, added = empty(rows, 77, model.cfg.cross_attention_dim), None
        if model.cfg.addition_embed_type:
            sizes = family.family.sizes
            pooled = model.cfg.projection_class_embeddings_input_dim - sizes * model.cfg.addition_time_embed_dim
            added = empty(rows, pooled), empty(rows, sizes, of=torch.float32)
        return x, t, text, added

    def looking(other):
        if isinstance(other, SD3ControlNetModel):
            x, t, text, pooled = joint()
            return lambda: other(x, t, text, other.look(x), pooled, net.pos_embed)
        x, t, text, added = inputs(other)
        picture = empty(rows, other.cfg.conditioning_channels, h * scale, w * scale)
        return lambda: other(x, t, other.text_kv(text), other.look(picture), added)

    for name in (*family.encoder_names, family.denoiser_name, "vae"):
        if model := meta.get(name):
            own = dtype
            if name == "vae" and issubclass(family, SDXL) and dtype == torch.float16 and model.cfg.force_upcast:
                own = torch.float32
            small = quantized if name in ("unet", "transformer", "text_encoder_3") else None
            sizes = quantize.sizes(model, small) if small else {}
            stage = memory.stage(name, model.to(own), run(name, model, own), own, sizes)
            stages.append(stage._replace(block=0.0) if name == "vae" else stage)  # it moves as a whole
    if controls:
        at = next(i for i, s in enumerate(stages) if s.name == family.denoiser_name)
        beside = [memory.stage(f"control {i}", c.to(dtype), looking(c), dtype, {}) for i, c in enumerate(controls, 1)]
        stages[at] = stages[at]._replace(beside=tuple(beside))
        stages[at + 1 : at + 1] = [
            s._replace(beside=(stages[at]._replace(beside=()), *(o for o in beside if o is not s))) for s in beside
        ]
    return stages
