"""ControlNets beside the denoiser: from a folder, a file or the Hub, and what they add at every step (models/controlnet.py)."""

import dataclasses
import re
import sys
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch

from nanodiff import weights
from nanodiff.config import UserError, nearest, printable, read_json, short
from nanodiff.device import memory
from nanodiff.models.control_mmdit import SD3ControlNetModel
from nanodiff.models.controlnet import Config, ControlNetModel, guessed
from nanodiff.models.mmdit import SD3Transformer2DModel
from nanodiff.models.unet import UNet2DConditionModel
from nanodiff.pipeline.single import placed
from nanodiff.weights import hub, original_names

# the first words of tensors by which files of other kinds are told; these are of a Stable Diffusion in original names
CHECKPOINT = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
OTHERS = (
    ("lora_controlnet", "a Control-LoRA"),
    ("lllite", "a ControlNet-LLLite"),
    ("task_embedding", "a ControlNet Union"),
    ("control_add_embedding", "a ControlNet Union"),
    ("adapter.", "a T2I-Adapter"),
    ("body.", "a T2I-Adapter"),
    ("transformer_blocks.", "a ControlNet for SD 3 without its config.json (give its folder)"),
)


@dataclass(frozen=True)
class Control:
    """A ControlNet at work: what it is shown, how strongly it speaks, and when."""

    net: ControlNetModel | SD3ControlNetModel
    picture: torch.Tensor  # [B or 1, 3, H, W] in [0, 1], as large as what is drawn
    scale: float = 1.0  # of what it adds
    start: float = 0.0  # the part of the steps after which it begins, and that at which it ends
    end: float = 1.0
    guess: bool = False  # as diffusers' guess_mode: for the prompt's pass alone, more at smaller sizes
    edges: bool = False  # the picture is edges that were found here
    latents: torch.Tensor | None = None  # the picture's, where the ControlNet is shown those: see shown()

    def active(self, i: int, n: int) -> bool:
        """Does it speak at call i of n?"""
        return self.start <= i / n and (i + 1) / n <= self.end


class Controls:
    """What `controls` add in a run of `steps` model calls: at(x, t) is asked once a call. count: which call it is.

    sd: the pipeline. text, extra, groups: as for its condition().
    """

    def __init__(self, sd, controls, steps, count, text, extra, groups):
        self.groups, self.steps, self.count, self.each = groups, steps, count, []
        for control in controls:
            net, alone = control.net, groups > 1 and (control.guess or control.net.cfg.global_pool_conditions)
            n = len(text.states) // groups
            mine = type(text)(*(None if part is None else part[n:] for part in text)) if alone else text
            # the prompt's pass alone has the sizes of the prompt, as a run without guidance has
            condition = sd.condition(mine, extra, 1 if alone else groups, net)
            self.each.append((control, alone, asking(sd, control, *condition)))

    def at(self, x, t):
        """Residuals for the UNet's batch at this call, or None where none speaks. x: [B, C, H, W], without its doubles."""
        i, n, said = next(self.count), self.steps, []
        for control, alone, ask in self.each:
            if control.scale == 0 or not control.active(i, n):
                continue
            rows = torch.cat([x] * (self.groups - alone))
            found = ask(rows, t)
            if control.guess and not control.net.cfg.global_pool_conditions:
                found = guessed(found)
            found = found.map(lambda r, scale=control.scale: scale * r)
            if alone:  # nothing for the unconditional pass
                found = found.map(lambda r: torch.cat([torch.zeros_like(r[: len(x)]), r]))
            said.append(found)
        return reduce(add, said) if said else None


def shown(control, sd):
    """The Control with its picture's latents, if its net is shown those. Before the denoiser is at work: the VAE may not fit beside it."""
    net = control.net
    if not isinstance(net, SD3ControlNetModel):
        return control
    picture = control.picture.to(sd.device, memory.dtype_of(net))
    # the cards of Stability's ControlNets for SD 3.5 large ask for edges in this range; all others take [-1, 1]
    odd = control.edges and net.cfg.joint_attention_dim is None
    pixels = picture * 127.5 + 0.5 if odd else 2 * picture - 1
    latents = sd.encode_pixels(pixels, lambda shape: torch.zeros(shape, device=sd.device))
    if net.cfg.force_zeros_for_pooled_projection:  # made with latents that are not shifted
        latents = latents + (sd.vae.cfg.shift_factor or 0.0) * sd.vae.cfg.scaling_factor
    return dataclasses.replace(control, latents=latents.to(picture.dtype))


def asking(sd, control, text, *added):
    """f(rows of latents, t) -> what a ControlNet says of them; it looks at its picture now, once."""
    net = control.net
    if control.latents is not None:
        seen, added = net.look(control.latents), (*added, sd.net.pos_embed)
    else:
        seen = net.look(control.picture.to(sd.device, memory.dtype_of(net)))
    return lambda rows, t: net(rows, t, text, seen.repeat(len(rows) // len(seen), *[1] * (seen.dim() - 1)), *added)


def check_fit(net, sd):
    """Raise UserError for a ControlNet that is not for a pipeline's denoiser."""
    flat = isinstance(net, SD3ControlNetModel)
    if flat != isinstance(sd.net, SD3Transformer2DModel):
        kinds = ("SD 3, this model has a UNet", "UNets (SD 1.x, SD 2.x, SDXL), this model has a transformer")
        raise UserError(f"a ControlNet for {kinds[not flat]}")
    unet, mine = sd.net.cfg, net.cfg
    if flat:
        pairs = [("width", mine.width, unet.width), ("latent channels", mine.in_channels, sd.channels)]
        pairs += [("patches of", mine.patch_size, unet.patch_size)]
        pairs += [("pooled text of width", mine.pooled_projection_dim, unet.pooled_projection_dim)]
        if mine.joint_attention_dim is not None:
            pairs += [("text of width", mine.joint_attention_dim, unet.joint_attention_dim)]
        for what, own, theirs in pairs:
            if own != theirs:
                raise UserError(
                    f"a ControlNet for {what} {own}, the transformer has {theirs}: they are not of one model"
                )
        return
    for what, own, theirs in (
        ("text of width", mine.cross_attention_dim, unet.cross_attention_dim),
        ("widths", net.widths, sd.net.widths),
        ("latent channels", mine.in_channels, sd.channels),
        (
            "an added condition of",
            mine.projection_class_embeddings_input_dim,
            unet.projection_class_embeddings_input_dim,
        ),
        ("pixels a latent", mine.downscale, sd.downscale),
    ):
        if own != theirs:
            raise UserError(f"a ControlNet for {what} {own}, the UNet has {theirs}: they are not of one model")


def check(control, sd, pictures, height, width):
    """Raise UserError for a ControlNet that is not for this model, and for what cannot be shown to it."""
    if not isinstance(control, Control):
        raise UserError(f"`controls`: {short(control)}: expected a Control(net, picture)")
    check_fit(control.net, sd)
    shown = control.picture
    if not isinstance(shown, torch.Tensor) or not shown.is_floating_point() or shown.dim() != 4:
        raise UserError("`controls`: a picture is a tensor of floats [B or 1, 3, H, W] in [0, 1]")
    least, most = shown.amin().item(), shown.amax().item()
    if not (least >= -0.01 and most <= 1.01):
        raise UserError(f"`controls`: a picture with values from {least:g} to {most:g}, expected [0, 1]")
    n, channels, *got = shown.shape
    if tuple(got) != (height, width):
        raise UserError(f"`controls`: a picture of {got[1]}x{got[0]} for one of {width}x{height}")
    if isinstance(control.net, SD3ControlNetModel):
        mine = control.net.cfg
        if control.guess:
            raise UserError("`controls`: SD 3's ControlNets have no guess mode")
        if mine.use_pos_embed and max(height, width) > mine.pos_embed_max_size * sd.multiple:
            most = mine.pos_embed_max_size * sd.multiple
            raise UserError(
                f"`height` and `width` can be at most {most} with this ControlNet: it has no positions for more"
            )
    if n not in (1, pictures) or channels != control.net.cfg.conditioning_channels:
        wanted = control.net.cfg.conditioning_channels
        raise UserError(
            f"`controls`: {n} pictures of {channels} channels for {pictures}: one for all, or one for each, of {wanted} channels"
        )
    if not 0 <= control.start < control.end <= 1:
        raise UserError(
            f"`controls`: from {control.start:g} to {control.end:g} of the steps is no part of them (0 to 1)"
        )
    if (own := memory.dtype_of(control.net)) != sd.dtype:
        raise UserError(f"`controls`: a ControlNet in {own} beside a denoiser in {sd.dtype}: load it in the same type")


def parse(text):
    """ "FILE_OR_ID[:SCALE[:START-END]]" of the command line -> (file or id, scale, start, end). Raises UserError."""
    number = r"\d*\.?\d+"
    match = re.fullmatch(rf"(.+?)(?::(-?{number})(?::({number})-({number}))?)?", text)
    name, scale, start, end = match.groups() if match and not Path(text).exists() else (text, None, None, None)
    if ":" in re.sub(r"^[A-Za-z]:[\\/]", "", name) and not Path(text).exists():
        raise UserError(
            f"`control` {printable(text)}: use FILE_OR_ID, FILE_OR_ID:SCALE or FILE_OR_ID:SCALE:START-END, such as canny:0.8:0-0.5"
        )
    return name, float(scale or 1), float(start or 0), float(end or 1)


def load(name, unet, dtype, device, token=None, allow_pickle=False):
    """The ControlNet in a folder, a file (diffusers' or the original names) or a Hub id. unet: the Config of the denoiser that it is for, which
    is also that of a file, which has none. Raises UserError."""
    path = hub.component(name, token)
    if path.is_dir():
        cls, cfg = _folder(path)
        return weights.load(cls, path, dtype, device, cfg=cfg)
    _check_file(path, unet)
    return from_file(path, unet, dtype, device, allow_pickle)


def plan(name, unet, token=None, allow_pickle=False):
    """The ControlNet of load() on the meta device, without weights."""
    path = hub.component(name, token)
    if path.is_dir():
        return weights.skeleton(*_folder(path))
    _check_file(path, unet)
    shapes, _ = weights.opened(path, allow_pickle)
    return weights.skeleton(ControlNetModel, _config(shapes, unet, _prefix(shapes, path)))


def _check_file(path, net):
    """Raise UserError for a single file where the denoiser with the Config `net` is no UNet."""
    if not isinstance(net, UNet2DConditionModel.Config):
        raise UserError(f"{path}: ControlNets for SD 3 come as folders with their config.json, not as single files")


def _folder(path):
    """(class, Config) of a folder's ControlNet."""
    raw, classes = read_json(path / "config.json"), (ControlNetModel, SD3ControlNetModel)
    kind = raw.get("_class_name", ControlNetModel.class_name)
    cls = next((cls for cls in classes if cls.class_name == kind), None)
    if cls is None:
        raise UserError(
            f"{path}: {printable(kind)} is no ControlNet (only {', '.join(cls.class_name for cls in classes)})"
        )
    return cls, cls.Config.from_json(raw, str(path / "config.json"))


def _prefix(shapes, path):
    """What stands before a file's original names; None where they are diffusers'. Raises UserError for what is no ControlNet."""
    prefix = next((p for p in ("control_model.", "") if f"{p}input_hint_block.0.weight" in shapes), None)
    first = "controlnet_cond_embedding.conv_in.weight"
    for word, what in OTHERS:
        if any(k.startswith(word) for k in shapes):
            raise UserError(f"{path}: is {what}, which is not supported (only ControlNets)")
    if prefix is None and first not in shapes:
        raise UserError(f"{path}: is no ControlNet (no {first} and no input_hint_block among {len(shapes)} tensors)")
    return prefix


def from_file(path, unet, dtype, device, allow_pickle=False):
    """load() of one file. Every tensor in it must be the ControlNet's."""
    shapes, get = weights.opened(path, allow_pickle)
    prefix = _prefix(shapes, path)
    model = weights.skeleton(ControlNetModel, _config(shapes, unet, prefix))
    state, known = {}, set()
    for key, want in model.state_dict().items():
        where = key if prefix is None else prefix + original_names.original(key, "controlnet", "", model.cfg)[0]
        if where not in shapes:
            raise UserError(
                f"{path}: misses tensor {where}{nearest(where, shapes)}; is it for another family of models?"
            )
        if shapes[where] != tuple(want.shape):
            raise UserError(
                f"{path}: {where} has shape {list(shapes[where])}, a ControlNet for this model has {list(want.shape)}: "
                "they are not of one model"
            )
        known.add(where)
        state[key] = placed(weights.as_weight(get(where), where, path), device, dtype)
    rest = [key for key in shapes if key not in known and not original_names.LEFT_OUT.match(key)]
    # the first releases hold the Stable Diffusion beside them
    whole = [key for key in rest if key.startswith(CHECKPOINT)] if prefix else []
    if strange := [key for key in rest if key not in whole]:
        raise UserError(f"{path}: has unknown tensor {printable(strange[0])}{nearest(strange[0], known)}")
    if whole:
        print(f"note: {path.name}: of this whole checkpoint the ControlNet alone is taken", file=sys.stderr)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _config(shapes, unet, prefix):
    """The Config of a file's ControlNet: its UNet's, and the widths of its own eye."""
    if prefix is None:
        eye = "controlnet_cond_embedding."
        names = [f"{eye}conv_in.weight", *(f"{eye}blocks.{i}.weight" for i in range(1, 99, 2))]
    else:
        names = [f"{prefix}input_hint_block.{i}.weight" for i in range(0, 99, 4)]
    found = [shapes[n] for n in names if n in shapes]
    first = shapes.get("conv_in.weight" if prefix is None else f"{prefix}input_blocks.0.0.weight")
    cfg = Config.of(
        unet, conditioning_channels=found[0][1], conditioning_embedding_out_channels=tuple(s[0] for s in found)
    )
    cfg = cfg if first is None else dataclasses.replace(cfg, in_channels=first[1])  # an inpainting UNet has more
    return cfg if prefix is not None else dataclasses.replace(cfg, **_smaller(shapes, unet))


def _smaller(shapes, unet):
    """The fields of a ControlNet in diffusers' names that attends at fewer places than its UNet (SDXL's "small" and "mid")."""
    types, layers = [], []
    for i, own in enumerate(unet.transformer_layers_per_block):
        blocks = {}  # {attention: the numbers of its blocks}: a number alone does not make a network deep
        for k in shapes:
            if m := re.match(rf"down_blocks\.{i}\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.", k):
                blocks.setdefault(int(m[1]), set()).add(m[2])
        depths = {j: len(numbers) for j, numbers in blocks.items()}
        types.append("CrossAttnDownBlock2D" if depths else "DownBlock2D")
        each = tuple(depths.get(j, 0) for j in range(unet.layers_per_block))
        layers.append((each if len(set(each)) > 1 else each[0]) if depths else own)
    middle = any(k.startswith("mid_block.attentions.") for k in shapes)
    return {"down_block_types": tuple(types), "transformer_layers_per_block": tuple(layers),
            "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"}  # fmt: skip
