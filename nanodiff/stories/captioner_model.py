"""A captioner: what a ViT sees, projected, stands as a soft prompt before a language model, which goes on with the caption.

    beginning · "Image:" · one token for the class and each patch · "." · "The description of the given image is: " · caption · end

    net = load("out/captioner/checkpoints/best_model")
    net.describe([images.open_image("dish.jpg")])             # ["a bowl of …"]

Between them are three linear layers (ClipCap, Mokady et al. 2021, arXiv 2111.09734, has a deeper map; LLaVA, Liu et al. 2023, arXiv
2304.08485, one layer). The language model learns by low-rank adapters, its base and the ViT are frozen, in half precision where that computes; or
everything learns (small models from a random start). The loss is that of the caption's tokens and the end token alone.

A captioner on disk is a folder: `captioner.json` (the settings), `projector.safetensors`, and beside the bases' names `llm_adapter/` and
`vit_adapter/` in PEFT's form; where everything was trained, `llm/` and `vit/` in Hub form.

Explained in the book (docs/book): chapter 15.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff import lora, weights
from nanodiff.config import UserError, printable, read_json
from nanodiff.device import dist, onednn
from nanodiff.files import write_json
from nanodiff.models.llm import CausalLM
from nanodiff.models.llm import Config as LLMConfig
from nanodiff.models.vit import Config as ViTConfig
from nanodiff.models.vit import ViT
from nanodiff.pipeline import sources
from nanodiff.text import textgen
from nanodiff.text.tokenizer import TextTokenizer
from nanodiff.training import loader
from nanodiff.weights import hub

BEFORE, BETWEEN, AFTER = "Image:", ".", "The description of the given image is: "
LLM_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VIT_TARGETS = ("dense",)
NO_LABEL = -100
RECORD = "captioner.json"
DONE = {  # what preprocessor_config.json may say is done, and what is
    "do_convert_rgb": (True, False, None), "do_resize": (True,), "do_center_crop": (False, None), "do_rescale": (True,), "do_normalize": (True,),
    "rescale_factor": (1 / 255, 0.003921568859368563),  # in fp64 and fp32
}  # fmt: skip
RESAMPLING = {2: "bilinear", 1: "lanczos"}  # PIL's numbers, as preprocessor_config.json has them
SIZES = {  # of models trained from scratch: (ViT, LLaMA)
    "tiny": ({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
             {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "nano": ({"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 16},
             {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "world": ({"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 8},
              {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
}  # fmt: skip


@dataclass
class Settings:
    """What captioner.json holds beside the weights."""

    vision_model: str = ""  # "": the folder's own vit/
    language_model: str = ""  # "": the folder's own llm/
    before: str = BEFORE
    between: str = BETWEEN
    after: str = AFTER
    hidden: int = 0  # width of the projector; 0: the language model's
    dropout: float = 0.1  # in the projector, while training
    adapters: list = dataclasses.field(default_factory=list)  # of "llm" and "vit", those that have some beside them


class Projector(nn.Module):
    """x [B, T, Dv] -> [B, T, D]: three linear layers, dropout between, no activation."""

    def __init__(self, d_in, hidden, d_out, dropout):
        super().__init__()
        self.first = nn.Linear(d_in, hidden)
        self.hidden, self.last = nn.Linear(hidden, hidden), nn.Linear(hidden, d_out)
        self.dropout = dropout

    def forward(self, x):
        drop = lambda y: F.dropout(y, self.dropout, self.training)  # noqa: E731
        return self.last(drop(self.hidden(drop(self.first(x)))))


class Captioner(nn.Module):
    """See the module docstring. pictures: a Pictures, how they are brought to the ViT's size."""

    def __init__(self, vit, llm, tokenizer, pictures, settings):
        super().__init__()
        self.vit, self.llm, self.tokenizer, self.pictures, self.settings = vit, llm, tokenizer, pictures, settings
        self.projector = Projector(
            vit.cfg.hidden_size, settings.hidden or llm.cfg.hidden_size, llm.cfg.hidden_size, settings.dropout
        )
        if not llm.cfg.eos_token_id:
            raise UserError(
                f"{settings.language_model}: config.json names no end token (eos_token_id), so no caption could end"
            )
        self.before = tokenizer.ids(settings.before)
        self.after = tokenizer.ids(settings.between, begin=False) + tokenizer.ids(settings.after, begin=False)
        # the picture's places hold an id that is not read
        self.prompt = [*self.before, *[self.before[0]] * vit.cfg.tokens, *self.after]
        if self.room < 2:
            raise UserError(
                f"a picture takes {len(self.prompt)} tokens, the language model reads {llm.cfg.max_position_embeddings}"
            )

    @property
    def room(self):
        """Tokens that a caption may have, the end included."""
        return self.llm.cfg.max_position_embeddings - len(self.prompt)

    def caption_ids(self, text, limit=None):
        """Ids of a caption with the end token, at most `limit` of them, and as many as the model has room for. Raises UserError for an empty
        one."""
        ids = self.tokenizer.ids(text.strip(), begin=False)
        if not ids:
            raise UserError("a caption is empty")
        return [*ids[: min(limit or self.room, self.room) - 1], self.llm.cfg.eos_token_id[0]]

    def see(self, pixels):
        """pixels [B, 3, R, R] in [-1, 1] -> the prompt's embeddings [B, P, D]."""
        weight = self.llm.output
        seen = self.projector(self.vit(self.pictures.normalised(pixels)).to(self.projector.first.weight.dtype))
        words = [self.llm.embed(torch.tensor([ids], device=weight.device)) for ids in (self.before, self.after)]
        first, last = (w.expand(len(pixels), -1, -1) for w in words)
        return torch.cat([first, seen.to(first.dtype), last], 1)

    def forward(self, pixels, ids):
        """The sum of the captions' cross-entropies, in nats: pixels [B, 3, R, R], ids [B, T] with the end token, then NO_LABEL.

        Padding stands on the right, where no token before it sees it, so that no mask is needed; only the captions' places reach the
        output layer, and their logits are never stored."""
        prompt = self.see(pixels)
        words = self.llm.embed(ids[:, :-1].clamp(min=0)).to(prompt.dtype)
        states = self.llm(embeds=torch.cat([prompt, words], 1))[:, prompt.shape[1] - 1 :]
        kept = ids != NO_LABEL
        return self.llm.cross_entropy(states[kept], ids[kept], reduction="sum")

    @torch.inference_mode()
    def describe(self, pictures, new_tokens=120, beams=1, on_step=None):
        """Captions of PIL pictures, or of pixels [B, 3, R, R] in [-1, 1]; on_step: see textgen.generate()."""
        pixels = pictures if isinstance(pictures, torch.Tensor) else self.pictures.batch(pictures)
        embeds = self.see(pixels.to(self.projector.first.weight.device))
        rows = textgen.generate(self.llm, [self.prompt] * len(pixels), min(new_tokens, self.room), eos=self.llm.cfg.eos_token_id,
                                beams=beams, on_step=on_step, embeds=embeds)  # fmt: skip
        return [self.tokenizer.decode(row.ids).strip() for row in rows]


@dataclass
class Pictures:
    """How a ViT's pictures are prepared: brought to size × size, each side for itself, then (x - mean) / std of values in [0, 1]."""

    size: int
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    resample: str = "bilinear"

    @classmethod
    def read(cls, folder, size):
        """From a folder's preprocessor_config.json (without one: ViT's own values). Raises UserError for another size than the model's."""
        path = Path(folder) / "preprocessor_config.json"
        if not path.is_file():
            return cls(size)
        raw = read_json(path)
        for key, done in DONE.items():
            if key in raw and raw[key] not in done:
                raise UserError(f"{path}: {key} = {raw[key]!r} is not supported (only {' and '.join(map(str, done))})")
        stated = raw.get("size", size)
        sides = set(stated.values()) if isinstance(stated, dict) else {stated}
        if sides != {size}:
            raise UserError(f"{path}: size {stated!r} is not the model's {size}x{size}")
        kind = raw.get("resample", 2)
        if kind not in RESAMPLING:
            raise UserError(f"{path}: resample = {kind!r} is not supported (only 1, lanczos, and 2, bilinear)")
        try:
            values = [tuple(map(float, raw.get(k, (0.5,) * 3))) for k in ("image_mean", "image_std")]
        except (TypeError, ValueError):
            values = [(), ()]
        if any(len(v) != 3 for v in values) or not all(values[1]):
            raise UserError(f"{path}: image_mean and image_std must be three numbers each, and no std 0")
        return cls(size, *values, RESAMPLING[kind])

    def to_json(self):
        number = {v: k for k, v in RESAMPLING.items()}[self.resample]
        return {"do_normalize": True, "do_resize": True, "image_mean": list(self.mean), "image_std": list(self.std), "resample": number,
                "size": {"height": self.size, "width": self.size}}  # fmt: skip

    @property
    def transform(self):
        """As the loader applies it."""
        return loader.Transform(self.size, interpolation=self.resample, squash=True)

    def batch(self, pictures):
        """RGB PIL pictures -> pixels [B, 3, R, R] in [-1, 1]."""
        arrays = [torch.from_numpy(self.transform(p, (self.size, self.size), None)) for p in pictures]
        return torch.stack(arrays).float() / 127.5 - 1

    def normalised(self, pixels):
        """[-1, 1] -> what the ViT sees."""
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels / 2 + 0.5 - mean) / std


# ---------------------------------------------------------------------------------------------------------
# From pretrained models, or from scratch


def base(settings, dtype, device, token=None, folder=None):
    """A Captioner of the settings' models, with a projector from scratch; "" in their place: the folder's own."""
    found = []
    for name, own in ((settings.vision_model, "vit"), (settings.language_model, "llm")):
        found.append(dist.on_main(hub.one, name, token) if name else folder / own)
    vit_folder, llm_folder = found
    cfg = ViTConfig.from_json(read_json(vit_folder / "config.json"), str(vit_folder / "config.json"))
    if cfg.num_channels != 3:
        raise UserError(
            f"{vit_folder}/config.json: num_channels = {cfg.num_channels}, but pictures are shown in three colours"
        )
    vit = onednn.widen(weights.load(ViT, vit_folder, dtype, device, cfg=cfg))
    llm, tokenizer = sources.load_language(llm_folder, dtype, device)
    net = Captioner(vit, llm, tokenizer, Pictures.read(vit_folder, cfg.image_size), settings)
    net.projector.to(device)
    return net


def fresh(size, captions, settings, vocab_size, context=256):
    """A Captioner from scratch, in fp32, with a vocabulary learned from `captions`; weights are drawn from torch's generator."""
    vision, language = SIZES[size]
    texts = [*captions, settings.before, settings.between, settings.after]
    tokenizer, end = TextTokenizer.learned(texts, vocab_size)
    words = len(tokenizer.backend.get_vocab(with_added_tokens=True))
    cfg = LLMConfig(**language, head_dim=language["hidden_size"] // language["num_attention_heads"], vocab_size=words,
                    max_position_embeddings=context, bos_token_id=tokenizer.begin, eos_token_id=(end,), pad_token_id=end)  # fmt: skip
    vit, llm = ViT(ViTConfig(**vision)), CausalLM(cfg)
    for model, blocks in ((vit, vision["num_hidden_layers"]), (llm, language["num_hidden_layers"])):
        # variance is kept from layer to layer; what is added to the stream is small at first
        for name, m in model.named_modules():
            if isinstance(m, nn.Linear | nn.Conv2d):
                added = name.endswith(("o_proj", "down_proj", "output.dense"))
                nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5 * ((2 * blocks) ** -0.5 if added else 1))
            elif isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)
            if getattr(m, "bias", None) is not None and not isinstance(m, nn.LayerNorm):
                nn.init.zeros_(m.bias)
    return Captioner(vit, llm, tokenizer, Pictures(vision["image_size"]), settings)


@dataclass
class Adapters:
    """Of one of the two models; rank 0: it is frozen."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple


def adapt(net, language, vision):
    """Freeze both models and put Adapters beside their layers; the projector learns."""
    for part, model, how in (("llm", net.llm, language), ("vit", net.vit, vision)):
        model.requires_grad_(False)
        if how.rank:
            linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
            if idle := [t for t in how.targets if not any(lora.matches(name, t) for name in linear)]:
                ends = sorted({name.rpartition(".")[2] for name in linear})
                raise UserError(
                    f"`lora_targets` {','.join(idle)}: no layer of the {part} has such a name; it has {', '.join(ends)}"
                )
            lora.adapt(model, how.rank, how.alpha, how.targets, component=part, dropout=how.dropout)
    net.projector.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------
# Files


def save(net, folder, state, whole, facts):
    """Write a captioner's folder in the place of an older one; a kill at any moment leaves one of the two (see _restored()). state: {name: tensor} of what was trained, whole: everything was; facts: JSON
    values for captioner.json, such as the epoch and its loss."""
    folder = _restored(Path(folder))
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    mine = lambda name: {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}  # noqa: E731
    settings = dataclasses.replace(net.settings, adapters=[])
    weights.save_tensors(part / "projector.safetensors", {k: v.detach().cpu() for k, v in mine("projector").items()})
    if whole:
        settings = dataclasses.replace(settings, vision_model="", language_model="")
        weights.save(net.llm, part / "llm", state=mine("llm"))
        net.tokenizer.save(part / "llm")
        weights.save(net.vit, part / "vit", state=mine("vit"))
        write_json(part / "vit" / "preprocessor_config.json", net.pictures.to_json())
    for name, model in (("llm", net.llm), ("vit", net.vit)) if not whole else ():
        if any(hasattr(m, "lora_scale") for m in model.modules()):
            made = lora.trained({name: model}, {name: model.state_dict() | mine(name)})
            about = {"base_model": settings.language_model if name == "llm" else settings.vision_model}
            lora.write(part / f"{name}_adapter", made, {name: model}, "peft", about)
            settings.adapters.append(name)
    write_json(part / RECORD, dataclasses.asdict(settings) | {"training": facts})
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _restored(folder):
    """The folder, after giving it back what a kill between two renames left as .NAME.old."""
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    return folder


def load(path, dtype, device, language=None, vision=None, token=None, fused=False):
    """The Captioner of a folder that save() wrote (`X.pt` means the folder X), for inference. language, vision: models in place of those
    that it names. fused: the language model's adapters are added into its weights, which then may be quantized. Raises UserError naming
    what is missing or does not fit."""
    folder = hub.trained(path)
    folder = _restored(folder.with_suffix("") if folder.suffix == ".pt" and not folder.exists() else folder)
    if not (folder / RECORD).is_file():
        kind = "is no captioner's folder (it has no captioner.json)" if folder.exists() else "is not there"
        raise UserError(
            f"--model-file {path}: {kind}; caption.py train writes checkpoints/best_model and checkpoints/last_checkpoint"
        )
    raw = read_json(folder / RECORD)
    raw.pop("training", None)
    known = {f.name for f in dataclasses.fields(Settings)}
    if strange := [k for k in raw if k not in known]:
        raise UserError(f"{folder / RECORD}: unknown key {printable(strange[0])!r}")
    settings = Settings(**raw)
    if not set(settings.adapters) <= {"llm", "vit"}:
        raise UserError(f"{folder / RECORD}: adapters of {settings.adapters!r} are not known")
    if settings.language_model:
        settings.language_model = language or settings.language_model
    if settings.vision_model:
        settings.vision_model = vision or settings.vision_model
    net = base(settings, dtype, device, token, folder)
    tensors = weights.load_weights(folder / "projector.safetensors")
    shapes = {k: tuple(v.shape) for k, v in net.projector.state_dict().items()}
    try:
        weights.check_names(shapes, {k: tuple(v.shape) for k, v in tensors.items()}, folder / "projector.safetensors")
    except UserError as e:
        raise UserError(f"{e}; is it a captioner of another language model or ViT?") from None
    net.projector.load_state_dict(tensors)
    for name in settings.adapters:
        models = {name: getattr(net, name)}
        if not (folder / f"{name}_adapter").is_dir():
            raise UserError(f"{folder}: {name}_adapter is missing; was it copied as a whole?")
        adapters = lora.read(folder / f"{name}_adapter", models)
        if fused and name == "llm":
            lora.fuse(models, adapters, keep=False)
        else:
            lora.attach(models, adapters)
            onednn.widen(models[name])
    return net.to(device).eval().requires_grad_(False)
