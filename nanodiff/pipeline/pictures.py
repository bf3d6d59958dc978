"""Pictures as prompts: IP-Adapters from a file or the Hub, the vision tower that sees for them, and what they add at every step
(models/ipadapter.py)."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from nanodiff import weights
from nanodiff.config import UserError, nearest, printable, read_json, short
from nanodiff.device import memory
from nanodiff.models.clip import CLIPVisionModel
from nanodiff.models.ipadapter import Config, IPAdapter
from nanodiff.models.unet import UNet2DConditionModel
from nanodiff.output import images
from nanodiff.pipeline.single import placed
from nanodiff.weights import hub

ENCODERS = ("image_encoder", "../models/image_encoder")  # where the published adapters have theirs, beside the file


@dataclass(frozen=True)
class ImagePrompt:
    """Pictures that an adapter is shown, and how strongly it speaks."""

    adapter: IPAdapter
    shown: torch.Tensor  # what the vision tower says of n pictures: see look()
    nothing: torch.Tensor  # what it says of none
    scale: float = 1.0

    def kv(self, rows, groups):
        """Keys and values of every cross-attention, in the files' order, for `rows` of which with guidance (groups > 1) the first part is
        unconditional. The scale is in the values."""
        tokens = self.adapter.tokens(self.shown).expand(rows // groups * max(groups - 1, 1), -1, -1)
        if groups > 1:
            tokens = torch.cat([self.adapter.tokens(self.nothing).expand(rows // groups, -1, -1), tokens])
        return [(k, self.scale * v) for k, v in self.adapter.kv(tokens)]


def with_pictures(kvs, unet, prompts, rows, groups):
    """The text's keys and values (unet.text_kv()) with those of the ImagePrompts `prompts` behind them."""
    down, middle = unet.cross_attentions()[:2]
    for prompt in prompts:
        pairs = prompt.kv(rows, groups)
        # the files have the middle last, where forward() has it between the ways
        pairs = pairs[:down] + pairs[len(pairs) - middle :] + pairs[down : len(pairs) - middle]
        kvs = [(*text, *pair) for text, pair in zip(kvs, pairs, strict=True)]
    return kvs


def check_fit(adapter, net):
    """Raise UserError for an adapter that is not for a denoiser."""
    if not isinstance(net, UNet2DConditionModel):
        raise UserError("IP-Adapters are for UNets (SD 1.x, SD 2.x, SDXL), this model has a transformer")
    cfg, widths = adapter.cfg, net.context_widths()
    if cfg.context != net.cfg.cross_attention_dim or sorted(cfg.widths) != sorted(widths):
        raise UserError(
            f"an IP-Adapter for {len(cfg.widths)} cross-attentions to a text of width {cfg.context}, the UNet has "
            f"{len(widths)} of {net.cfg.cross_attention_dim}: they are not of one model"
        )


def check(prompt, sd):
    """Raise UserError for an adapter that is not for this model, or cannot be asked where its weights are."""
    if not isinstance(prompt, ImagePrompt):
        raise UserError(f"`pictures`: {short(prompt)}: expected an ImagePrompt")
    check_fit(prompt.adapter, sd.net)
    if not memory.whole(sd.net):
        raise UserError("an IP-Adapter needs the whole denoiser in one place: not block by block (offload sequential)")


def parse(text):
    """ "FILE_OR_ID[:SCALE]" of the command line -> (file or id, scale). Raises UserError."""
    match = re.fullmatch(r"(.+?):(-?\d*\.?\d+)", text)
    if Path(text).exists() or not match:
        if not Path(text).exists() and re.fullmatch(r".+\.\w+:[^/\\]*", text):
            raise UserError(
                f"`ip_adapter` {printable(text)}: use FILE or FILE:SCALE, such as ip-adapter.safetensors:0.6"
            )
        return text, 1.0
    return match[1], float(match[2])


def load(name, dtype, device, token=None, allow_pickle=False):
    """(IPAdapter, its file) of a file, or of a file in a Hub repository (org/name/path/in/it.safetensors). Raises UserError."""
    path = hub.file(name, token)
    shapes, get = weights.opened(path, allow_pickle, nested=True)
    model = weights.skeleton(IPAdapter, Config.from_shapes(shapes, path))
    state = {}
    for key, want in model.state_dict().items():
        if shapes.get(key) != tuple(want.shape):
            raise UserError(f"{path}: misses tensor {key} {list(want.shape)}{nearest(key, shapes)}")
        state[key] = placed(weights.as_weight(get(key), key, path), device, dtype)
    if odd := [k for k in shapes if k not in state]:
        raise UserError(f"{path}: has unknown tensor {printable(odd[0])}{nearest(odd[0], state)}")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False), path


def stages(i, name, net, shown, encoder, dtype, token=None, allow_pickle=False):
    """(memory.Stage of the vision tower of the i-th adapter, of the adapter beside the denoiser `net`) for `shown` pictures, predicted on the meta device,
    without weights. Raises UserError for one that does not fit."""
    path = hub.file(parse(name)[0], token)
    adapter = weights.skeleton(
        IPAdapter, Config.from_shapes(weights.opened(path, allow_pickle, nested=True)[0], path)
    ).to(dtype)
    check_fit(adapter, net)
    folder = encoder_folder(encoder, path, adapter.cfg, token)
    tower = weights.skeleton(CLIPVisionModel, tower_config(folder)).to(dtype)
    side = tower.cfg.image_size
    pixels = torch.empty(shown, tower.cfg.num_channels, side, side, dtype=dtype, device="meta")
    seen = tower.states(pixels) if adapter.plus else tower(pixels)
    return (
        memory.stage(f"image encoder {i}", tower, lambda: tower.states(pixels), dtype, {}),
        memory.stage(f"image prompt {i}", adapter, lambda: adapter.kv(adapter.tokens(seen)), dtype, {}),
    )


def encoder_folder(given, path, cfg, token=None):
    """The folder of the vision tower that an adapter's file `path` was made with: what is given (a folder or Hub id, of a tower or a whole CLIP), or one
    that lies where the published ones do. Raises UserError."""
    if given and Path(given).exists():
        return hub.component(given, token)
    if given:
        return hub.whole(given, token, wanted=("config.json", "model*.safetensors", "model*.index.json"))
    tried = [path.parent / place for place in ENCODERS]
    for folder in tried:
        if (folder / "config.json").is_file():
            tower = tower_config(folder)
            if cfg.seen == (tower.hidden_size if cfg.inner else tower.projection_dim):
                return folder
    raise UserError(
        f"{path}: needs a CLIP vision tower of width {cfg.seen}, which is not in {tried[0]}: name its folder with `image_encoder`"
    )


def tower_config(folder):
    """The Config of the vision tower in a folder, its own or a whole CLIP's."""
    raw, where = read_json(folder / "config.json"), str(folder / "config.json")
    if isinstance(raw.get("vision_config"), dict):
        raw = raw["vision_config"] | {"projection_dim": raw.get("projection_dim", 512)}
    return CLIPVisionModel.Config.from_json(raw, where)


def load_tower(folder, dtype, device):
    """The vision tower in a folder, its own or a whole CLIP's. Raises UserError."""
    other = ("text_model", "text_projection", "logit_scale")
    return weights.load(CLIPVisionModel, folder, dtype, device, cfg=tower_config(folder), without=other)


@torch.no_grad()
def look(adapter, tower, pictures):
    """(shown, nothing): what the vision tower says of PIL pictures, and of none, as the adapter takes it: vectors [n, E], the empty one of zeros; of
    "plus" the states [n, S, E] before the last layer, the empty ones those of a grey picture."""
    device, dtype = tower.device, tower.dtype
    pixels = torch.stack([images.clip_pixels(p, tower.cfg.image_size) for p in pictures]).to(device, dtype)
    given = tower.cfg.hidden_size if adapter.plus else tower.cfg.projection_dim
    if given != adapter.cfg.seen:
        raise UserError(
            f"`image_encoder`: gives vectors of width {given}, the IP-Adapter wants {adapter.cfg.seen}: they are not of one model"
        )
    if adapter.plus:
        return tower.states(pixels), tower.states(torch.zeros_like(pixels))
    shown = tower(pixels)
    return shown, torch.zeros_like(shown)
