"""Where a pipeline's parts come from: a folder in Hub form, one component's folder, a single file, or nothing at all.

    src = source("path/or/hub-id")                          # names, configurations and classes are checked here
    unet = src.module("unet", torch.float16, "cpu")

What model_index.json names is data: only classes that we have are built, names are never paths, no code is run.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from nanodiff import weights
from nanodiff.config import ASSETS, UserError, printable, read_json, short, typed
from nanodiff.device import onednn
from nanodiff.models.clip import CLIPTextModel
from nanodiff.models.llm import CausalLM
from nanodiff.models.vae import AutoencoderKL
from nanodiff.pipeline.families import BUILDERS, CLASSES, FAMILIES, IGNORED, OWN, REFINER, RELEASED, SDXL
from nanodiff.pipeline.single import Known, Single
from nanodiff.pipeline.space import say
from nanodiff.text.tokenizer import CLIPTokenizer, LabelTokenizer, T5Tokenizer, TextTokenizer
from nanodiff.weights import hub

EMBEDDED = ASSETS / "nano"  # the model that comes with the program


def check_index(index, folder):
    """(pipeline class, component names) of a model_index.json, all of classes that we have. Names are data, never
    paths."""
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{folder}/model_index.json: pipeline {short(kind)} is not supported (only {', '.join(FAMILIES)})"
        )
    scheduler = index.get("scheduler")
    if scheduler is not None and not (
        isinstance(scheduler, list) and len(scheduler) == 2 and all(isinstance(v, str | None) for v in scheduler)
    ):
        raise UserError(f"{folder}/model_index.json: scheduler: {short(scheduler)} is no library and class")
    if index.get("requires_aesthetics_score") is True:
        if FAMILIES[kind] is not SDXL or index.get("text_encoder", [None, None]) != [None, None]:
            raise UserError(
                f"{folder}/model_index.json: requires_aesthetics_score is for SDXL's refiner alone, which has no text_encoder"
            )
        kind = REFINER.name
    present = set()
    for name, entry in index.items():
        if name.startswith("_") or name in IGNORED or (name not in CLASSES and not isinstance(entry, list)):
            continue
        if entry == [None, None]:
            continue
        if name not in CLASSES or not isinstance(entry, list) or len(entry) != 2 or entry[1] not in CLASSES[name]:
            raise UserError(f"{folder}/model_index.json: component {printable(name)}: {short(entry)} is not supported")
        present.add(name)
    for name in FAMILIES[kind].required:
        if name not in present:
            raise UserError(f"{folder}/model_index.json: has no {name}")
    return kind, present


class Folder:
    """A pipeline in Hub folder form: where its configs, weights and tokenizers come from."""

    def __init__(self, path, variant=None):
        self.path, self.variant = path, variant
        self.index = read_json(path / "model_index.json")
        self.kind, self.parts = check_index(self.index, path)
        for name in {"force_zeros_for_empty_prompt"} & set(self.index):  # null is false, as in Python
            self.index[name] = bool(typed(self.index[name], bool | None, f"{path}/model_index.json: {name}"))

    def folder(self, name: str) -> Path:
        return self.path / name

    def builder(self, name: str) -> type:
        """The class of a component."""
        entry = self.index.get(name)
        return OWN.get(entry[1] if isinstance(entry, list) else None, BUILDERS[name])

    def config(self, name: str) -> object:
        path = self.folder(name) / "config.json"
        raw, entry = read_json(path), self.index.get(name)
        # with or without a projection: the index says it
        if isinstance(entry, list) and str(entry[1]).startswith("CLIPTextModel"):
            typed(raw.get("architectures"), list | None, f"{path}: architectures")
            raw["architectures"] = [entry[1]]
        return self.builder(name).Config.from_json(raw, str(path))

    def check_there(self, name: str) -> None:
        """Raise UserError when a part that SD 3 could do without is missing."""
        if name.endswith("_3") and not self.folder(name).is_dir():
            raise UserError(f"{self.path}: {name} is missing; download it, or go without it with `no_t5`")

    def module(self, name: str, dtype: torch.dtype | None, device: str | torch.device) -> torch.nn.Module:
        self.check_there(name)
        cfg = self.config(name) if name.startswith("text_encoder") else None
        unwanted = () if getattr(cfg, "with_projection", True) else ("text_projection",)
        return weights.load(
            self.builder(name), self.folder(name), dtype, device, self.variant, cfg=cfg, without=unwanted
        )

    def tokenizer(self, name: str) -> object:
        self.check_there(name)
        if self.index[name][1] == "LabelTokenizer":
            return LabelTokenizer.load(self.path / name)
        if name == "tokenizer_3":
            return T5Tokenizer.load(self.path / name)
        encoder = self.config(name.replace("tokenizer", "text_encoder"))
        return CLIPTokenizer.load(self.path / name, encoder.max_position_embeddings)

    def scheduler(self) -> tuple[dict, str]:
        """(scheduler_config.json as a dict, where it is from). The class is the one that model_index.json names, as in diffusers."""
        path = self.path / "scheduler" / "scheduler_config.json"
        raw, entry = read_json(path), self.index.get("scheduler")
        kind, own = entry[1] if entry else None, typed(raw.get("_class_name"), str | None, f"{path}: _class_name")
        if kind is None or kind == own:
            return raw, str(path)
        if own is not None:
            say(
                f"note: {self.path}: model_index.json names {printable(kind)}, which is taken; scheduler_config.json is of {short(own)}"
            )
        return raw | {"_class_name": kind}, str(path)


class Exchanged(Folder):
    """A pipeline's folder of which one part comes from elsewhere: `own`."""

    def __init__(self, own, part, rest, variant=None):
        super().__init__(rest.path, variant)
        if part not in self.parts:
            raise UserError(f"{own}: is a {part}, but {rest.path} has none")
        self.part, self.own = part, own


class Component(Exchanged):
    """One component's folder in place of a pipeline's own, such as a UNet that was trained alone."""

    def __init__(self, path, rest, variant=None):
        kind = read_json(path / "config.json").get("_class_name")
        part = next((n for n in ("unet", "transformer", "vae") if kind in CLASSES[n]), None)
        if part is None:
            raise UserError(
                f"{path}: {kind!r} is no model that can stand in place of another (a UNet, transformer or VAE)"
            )
        if rest is None:
            raise UserError(
                f"{path}: one component ({part}), not a pipeline; name a pipeline for the rest with `components`"
            )
        super().__init__(path, part, rest, variant)

    def folder(self, name):
        return self.own if name == self.part else self.path / name


class Denoiser(Exchanged):
    """A denoiser alone, in a file with a Hub folder's names but without its config.json (as distilled UNets are published), in place of a pipeline's own."""

    def __init__(self, path, part, rest, variant=None):
        if rest is None:
            raise UserError(
                f"{path}: a {part} alone, not a pipeline; name the pipeline that it is for with `components`"
            )
        super().__init__(path, part, rest, variant)

    def module(self, name, dtype, device):
        if name != self.part:
            return super().module(name, dtype, device)
        return weights.load(self.builder(name), self.own, dtype, device, cfg=self.config(name))


def denoiser_in(path):
    """ "unet" or "transformer", where a safetensors file holds one alone by its tensors' names in a Hub folder; else None."""
    if weights.is_pickle(path):
        return None
    first = {"unet": ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "conv_out.weight", "up_blocks.0.resnets.0.time_emb_proj.weight"),
             "transformer": ("pos_embed.proj.weight", "transformer_blocks.0.attn.to_q.weight", "proj_out.weight")}  # fmt: skip
    names = weights.header([path])
    return next((part for part, some in first.items() if all(name in names for name in some)), None)


def source(
    model: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    components: str | None = None,
    prediction_type: str | None = None,
    allow_pickle: bool = False,
    no_t5: bool = False,
    without: Sequence[str] = (),
) -> Folder | Single:
    """The Folder, Component, Denoiser or single.Single that `model` names. components: what a single file or a component
    lacks comes from here. without: components whose weights are not wanted, so not downloaded."""
    skip = (*without, *(("text_encoder_3", "tokenizer_3") if no_t5 else ()))
    path = hub.resolve(model, revision, token, variant, skip)
    rest = None
    if components:  # the denoiser is what the file brings
        skip = (*skip, "unet", "transformer")
        rest = Folder(hub.resolve(components, None, token, variant, skip), variant)
    if not path.is_file():
        if prediction_type:
            raise UserError(f"`prediction_type` is for single-file checkpoints; {path} is a folder")
        if (path / "model_index.json").exists() and rest:
            raise UserError(f"`components` is for single files and single components; {path} is a whole pipeline")
        return Component(path, rest, variant) if not (path / "model_index.json").exists() else Folder(path, variant)
    if part := denoiser_in(path):
        if prediction_type:
            raise UserError(f"`prediction_type` is for single-file checkpoints; {path} is a {part} alone")
        return Denoiser(path, part, rest, variant)
    return Single(path, BUILDERS, rest, prediction_type, allow_pickle)


def vae_folder(path):
    """The component folder that `path` is, or that is the `vae` of a pipeline's folder. Raises UserError."""
    path = hub.trained(path)
    path = path / "vae" if (path / "vae" / "config.json").is_file() else path
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path}: VAE checkpoint not found (a folder with config.json and its weights); train it first: train.py vae"
        )
    return path


def load_vae(path, dtype, device):
    """The VAE in a component folder (or in the `vae` of a pipeline's folder), of whichever class its config.json names."""
    path = vae_folder(path)
    kind = read_json(path / "config.json").get("_class_name", "AutoencoderKL")
    if kind not in CLASSES["vae"]:
        raise UserError(f"{path}: {kind!r} is no VAE (only {', '.join(CLASSES['vae'])})")
    return weights.load(OWN.get(kind, AutoencoderKL), path, dtype, device)


def text_config(path, projection=False):
    """(folder, CLIPTextModel.Config) of a CLIP text encoder, see load_text()."""
    folder = Path(path) / "text_encoder"
    folder = folder if folder.is_dir() else Path(path)
    raw, where = read_json(folder / "config.json"), str(folder / "config.json")
    if isinstance(raw.get("text_config"), dict):  # both towers in one file
        inner = {k: v for k, v in raw["text_config"].items() if k in CLIPTextModel.Config.__dataclass_fields__}
        raw = inner | {"projection_dim": raw.get("projection_dim", 512)}
        raw |= {"architectures": ["CLIPTextModelWithProjection"]} if projection else {}
    cfg = CLIPTextModel.Config.from_json(raw, where)
    if projection and not cfg.with_projection:
        raise UserError(f"{folder}: has no text_projection, which an MMDiT needs")
    return folder, cfg


def load_text(path, dtype, device, projection=False):
    """(encoder, tokenizer) of a CLIP text encoder: a whole CLIP's folder, a pipeline's, or the encoder's own. Raises UserError
    when a projection is wanted and not there."""
    path, (folder, cfg) = Path(path), text_config(path, projection)
    tokenizer = CLIPTokenizer.load(path if folder == path else path / "tokenizer", cfg.max_position_embeddings)
    unwanted = () if cfg.with_projection else ("text_projection",)
    return weights.load(CLIPTextModel, folder, dtype, device, cfg=cfg, without=unwanted), tokenizer


def load_language(path, dtype, device):
    """(CausalLM, TextTokenizer) of a Hub folder. An output layer beside a tied embedding is the embedding, and left. A reply ends with the
    tokens of config.json and those of generation_config.json: a chat model's config.json may know the end of a document alone."""
    raw, where = read_json(Path(path) / "config.json"), str(Path(path) / "config.json")
    generation = Path(path) / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.is_file() else None
    cfg = CausalLM.Config.from_json(raw, where)
    for end in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if not isinstance(end, int) or isinstance(end, bool):
            raise UserError(f"{generation}: eos_token_id has {short(end)}, which is no token")
        cfg.eos_token_id = tuple(dict.fromkeys([*cfg.eos_token_id, end]))
    tokenizer = TextTokenizer.load(path, cfg)
    for name, ids in (("bos", (cfg.bos_token_id,)), ("eos", cfg.eos_token_id), ("pad", (cfg.pad_token_id,))):
        if beyond := [token for token in ids if token is not None and token >= cfg.vocab_size]:
            raise UserError(
                f"{where}: {name}_token_id {beyond[0]} is beyond the model's vocabulary of {cfg.vocab_size}"
            )
    tied = ("lm_head",) if cfg.tie_word_embeddings else ()
    return onednn.widen(weights.load(CausalLM, path, dtype, device, cfg=cfg, without=tied)), tokenizer


def configs(model, *args, **options):
    """What `model` names as a source of configurations, as source() takes it: weights need not be there nor are they
    downloaded, and the released models are known without any file."""
    name = hub.ALIASES.get(str(model), str(model))
    if name in RELEASED and not Path(model).exists():
        return Known(RELEASED[name], BUILDERS)
    return source(model, *args, **options, without=hub.COMPONENTS)
