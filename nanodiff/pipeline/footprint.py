"""The memory of a run, predicted on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanodiff import weights
from nanodiff.device import memory, quantize
from nanodiff.models.control_mmdit import SD3ControlNetModel
from nanodiff.pipeline.families import BUILDERS
from nanodiff.pipeline.loading import FAMILIES
from nanodiff.pipeline.sdxl import SDXL
from nanodiff.pipeline.single import Known, Single
from nanodiff.pipeline.sources import Folder


@dataclass
class Inputs:
    """What a run gives its models, as tensors of the meta device, which have a size and no memory.

    rows: pictures of a denoising step, with guidance twice the `batch`. height, width: in latents; scale: pixels of one. length: T5's
    tokens. tiled: is a tile decoded at a time? net: the denoiser."""

    net: torch.nn.Module
    family: type
    dtype: torch.dtype
    rows: int
    batch: int
    height: int
    width: int
    scale: int
    length: int
    tiled: bool

    def empty(self, *shape, of=None):
        return torch.empty(shape, dtype=of or self.dtype, device="meta")

    def of(self, name, model, own):
        """f() -> the output of a part of the model; own: the type it computes in."""
        if name == "text_encoder_3":
            return lambda: model(self.empty(self.rows, self.length, of=torch.long))
        if name.startswith("text_encoder"):
            return lambda: model(self.empty(self.rows, model.cfg.max_position_embeddings, of=torch.long))
        if name == "vae":
            size = (min(self.height, 64), min(self.width, 64)) if self.tiled else (self.height, self.width)
            return lambda: model.decode(self.empty(self.batch, model.cfg.latent_channels, *size, of=own))
        if name == "transformer":
            return lambda: model(*self.joint())
        x, t, text, added = self.unet(model)
        return lambda: model(x, t, model.text_kv(text), added)

    def joint(self):
        """(x, t, text, pooled) of the transformer and of its ControlNets."""
        cfg = self.net.cfg
        x = self.empty(self.rows, cfg.in_channels, self.height, self.width)
        t, text = (
            self.empty(self.rows, of=torch.float32),
            self.empty(self.rows, 77 + self.length, cfg.joint_attention_dim),
        )
        return x, t, text, self.empty(self.rows, cfg.pooled_projection_dim)

    def unet(self, model):
        """(x, t, text, added) of a UNet or ControlNet."""
        cfg, added = model.cfg, None
        x = self.empty(self.rows, cfg.in_channels, self.height, self.width)
        t, text = self.empty(self.rows, of=torch.float32), self.empty(self.rows, 77, cfg.cross_attention_dim)
        if cfg.addition_embed_type:
            sizes = self.family.family.sizes
            pooled = cfg.projection_class_embeddings_input_dim - sizes * cfg.addition_time_embed_dim
            added = self.empty(self.rows, pooled), self.empty(self.rows, sizes, of=torch.float32)
        return x, t, text, added

    def control(self, other):
        """f() -> what a ControlNet adds."""
        if isinstance(other, SD3ControlNetModel):
            x, t, text, pooled = self.joint()
            return lambda: other(x, t, text, other.look(x), pooled, self.net.pos_embed)
        x, t, text, added = self.unet(other)
        size = self.height * self.scale, self.width * self.scale
        picture = self.empty(self.rows, other.cfg.conditioning_channels, *size)
        return lambda: other(x, t, other.text_kv(text), other.look(picture), added)


def plan(
    src: Folder | Single | Known,
    dtype: torch.dtype,
    height: int | None,
    width: int | None,
    batch: int,
    guided: bool,
    quantized: str | None,
    with_t5: bool,
    length: int,
    tiled: bool,
    controls: Sequence[torch.nn.Module] = (),
    device: str | torch.device = "cuda",
) -> list[memory.Stage]:
    """[memory.Stage] of a run, predicted on the meta device. controls: ControlNets, on the meta device too; device: of the run, on which it
    hangs what int8 holds in 8 bits."""
    family, stages = FAMILIES[src.kind], []
    meta = {n: weights.skeleton(src.builder(n), src.config(n)) for n in BUILDERS if n in src.parts}
    if not with_t5:
        meta.pop("text_encoder_3", None)
    vae, net = meta.get("vae"), meta[family.denoiser_name]
    scale = vae.cfg.downscale if vae else 1
    side = net.cfg.sample_size or 64
    h, w = (side, side) if isinstance(side, int) else side
    h, w = (height or h * scale) // scale, (width or w * scale) // scale
    inputs = Inputs(net, family, dtype, batch * (2 if guided else 1), batch, h, w, scale, length, tiled)

    for name in (*family.encoder_names, family.denoiser_name, "vae"):
        if model := meta.get(name):
            own = dtype
            if name == "vae" and issubclass(family, SDXL) and dtype == torch.float16 and model.cfg.force_upcast:
                own = torch.float32
            small = quantized if name in ("unet", "transformer", "text_encoder_3") else None
            sizes = quantize.sizes(model, small, device) if small else {}
            stage = memory.stage(name, model.to(own), inputs.of(name, model, own), own, sizes)
            stages.append(stage._replace(block=0.0) if name == "vae" else stage)  # it moves as a whole
    if controls:
        at = next(i for i, s in enumerate(stages) if s.name == family.denoiser_name)
        beside = [
            memory.stage(f"control {i}", c.to(dtype), inputs.control(c), dtype, {}) for i, c in enumerate(controls, 1)
        ]
        stages[at] = stages[at]._replace(beside=tuple(beside))
        # each of them is at work while the denoiser and the others wait beside it
        stages[at + 1 : at + 1] = [
            s._replace(beside=(stages[at]._replace(beside=()), *(o for o in beside if o is not s))) for s in beside
        ]
    return stages
