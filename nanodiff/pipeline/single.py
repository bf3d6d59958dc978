"""A single-file checkpoint as a source of a pipeline's parts.

    single = Single("v1-5-pruned.safetensors", builders)       # family and parts, from the header alone
    unet = single.module("unet", torch.float16, "cpu")

What a file does not hold (tokenizers always, often text encoders and VAE) comes from a folder in Hub form, or where
possible from the configurations and the CLIP vocabulary that are built in.
"""

import dataclasses
import sys
from pathlib import Path

import torch

from nanodiff import weights
from nanodiff.config import UserError, nearest, printable
from nanodiff.pipeline.families import CLIP_LENGTH, FAMILIES, KNOWN, SAMPLING, TURBO_SCHEDULERS
from nanodiff.text.tokenizer import END, clip_from_merges
from nanodiff.weights.original_names import DENOISER, EMA, LEFT_OUT, family_of, original, ours, prefixes

V_STD = 0.09  # SD 2: the last attention's norm biases spread more than this in v-prediction models (seen by ComfyUI)


def by_name(family, path):
    """Does its name say that a file of this family is a turbo? (SD 3.5's files say it by name alone, see families.is_turbo)."""
    return "turbo" in path.name.lower() and family in TURBO_SCHEDULERS


def stated(family, path, prediction=None, ztsnr=False):
    """The scheduler_config.json that a single file stands for, as far as its family, its name and its marks say."""
    return KNOWN[family][2] | (_turbo(family) if by_name(family, path) else {}) | _marked(prediction, ztsnr)


def _turbo(family):
    """As sd-turbo and sdxl-turbo ship it."""
    return {"_class_name": TURBO_SCHEDULERS[family], "timestep_spacing": "trailing"}


def _marked(prediction, ztsnr):
    more = {"prediction_type": prediction} if prediction else {}
    return more | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if ztsnr else {})


class Known:
    """The configurations of a released model, without its files. family: a key of KNOWN, "SD 2 base", "SD 2 turbo" or "SDXL turbo", and
    " inpainting" behind it."""

    def __init__(self, family, builders):
        self.inpaints, family = family.endswith(" inpainting"), family.removesuffix(" inpainting")
        base = family.removesuffix(" base").removesuffix(" turbo")
        self.kind, self.configs, self.defaults = KNOWN[base]
        if family.endswith(" turbo"):
            self.defaults = self.defaults | _turbo(base)
        self.builders, self.parts = builders, set(self.configs)
        self.side = {"SD 2": 96, "SDXL turbo": 64}.get(family)

    def scheduler(self):
        return self.defaults, self.kind

    def config(self, name):
        raw = self.configs[name] | ({"sample_size": self.side} if self.side and name == "unet" else {})
        raw = raw | {"in_channels": 9} if self.inpaints and name == "unet" else raw
        return self.builders[name].Config.from_json(raw, name)

    def builder(self, name):
        return self.builders[name]


class Single:
    """A single-file checkpoint as a source of parts, like a Hub folder. `rest`: a source for what the file lacks."""

    def __init__(self, path, builders, rest=None, prediction_type=None, allow_pickle=False):
        self.path, self.builders, self.rest, self.builder = Path(path), builders, rest, builders.__getitem__
        self.state = None
        if weights.is_pickle(self.path):
            if not allow_pickle:
                raise UserError(f"{path}: reading a pickle can run code; if you trust it, add `allow_pickle`")
            self.state = weights.load_pickle(path)
            self.shapes = {k: tuple(v.shape) for k, v in self.state.items()}
        else:
            self.shapes = weights.header([self.path])
        self.family = family_of(self.shapes, self.path)
        self.kind, self.configs, self.defaults = KNOWN[self.family]
        theirs = getattr(rest, "index", {})
        self.index = FAMILIES[self.kind].flags | {
            k: v for k, v in theirs.items() if isinstance(v, bool) or k == SAMPLING
        }
        self.prefixes = prefixes(self.family)
        denoiser = next(iter(self.prefixes))
        bare = not any(k.startswith(DENOISER) for k in self.shapes)
        if bare:  # the denoiser alone, without its prefix
            self.prefixes = {denoiser: ""}
        for part, other in (
            ("vae", "vae."),
            ("text_encoder", "conditioner.embedders.0.model."),
        ):
            # other tools' re-saves
            here = any(k.startswith(self.prefixes.get(part, other)) for k in self.shapes)
            if not here and any(k.startswith(other) for k in self.shapes):
                self.prefixes[part] = other
        self.turbo = by_name(self.family, self.path)
        self.ema = sum(k.startswith(EMA) for k in self.shapes) > 100
        said = [f"{self.family} checkpoint"] + (["its EMA weights"] if self.ema else [])
        said += ["a turbo by its name"] if self.turbo else []
        here = {c for c, p in self.prefixes.items() if any(k.startswith(p) for k in self.shapes)}
        self.here = here
        self.prediction = self._prediction(prediction_type)
        if self.prediction:
            said.append(self.prediction)
        print(f"{self.path.name}: {', '.join(said)}", file=sys.stderr)
        self.parts = self._parts()
        self._check_leftovers()

    def _parts(self):
        """Names of all parts, from the file or from `rest`. Raises UserError for what neither has."""
        wanted = set(self.configs)
        missing = wanted - self.here
        if self.rest is not None:
            if FAMILIES[self.rest.kind] is not FAMILIES[self.kind]:
                raise UserError(f"`components`: {self.rest.kind}, but {self.path} is a {self.kind}")
            found = self.here | (missing & self.rest.parts)
            return found | {p for p in self.rest.parts if p.startswith("tokenizer")}
        lost = sorted(missing - {"text_encoder_3"})
        if lost:
            raise UserError(
                f"{self.path}: has no {', '.join(lost)}; give a folder or Hub id of the same family with `components`"
            )
        if "text_encoder_3" in wanted:
            reason = "is not in the file" if "text_encoder_3" in missing else "has no tokenizer here"
            print(f"note: T5 {reason}, going on without it (--components FOLDER supplies it)", file=sys.stderr)
        tokenizers = {p.replace("text_encoder", "tokenizer") for p in wanted if p in ("text_encoder", "text_encoder_2")}
        return (self.here - {"text_encoder_3"}) | tokenizers

    def _prediction(self, given):
        """What the network predicts, where the family leaves it open; None elsewhere."""
        if self.family.startswith("SD 3"):
            if given:
                raise UserError(f"`prediction_type`: {self.path} is a {self.family} model, which predicts a velocity")
            return None
        if given:
            return given
        if "v_pred" in self.shapes:
            return "v_prediction"
        stated = (
            "" if self.state is not None else weights.metadata(self.path).get("modelspec.prediction_type", "").lower()
        )
        if self.family != "SD 2":
            if stated in (
                "v",
                "v_prediction",
                "v-prediction",
                "velocity",
            ):
                # keys decide; where there is none, the header
                print(
                    f"note: {self.path.name}: v-prediction by its header's modelspec.prediction_type", file=sys.stderr
                )
                return "v_prediction"
            return None
        first = f"{DENOISER if DENOISER in self.prefixes.values() else ''}input_blocks.0.0.weight"
        if self.shapes.get(first, (0, 4))[1] == 9:  # no inpainting model of SD 2 predicts v (ComfyUI)
            return "epsilon"
        key = f"{DENOISER if DENOISER in self.prefixes.values() else ''}output_blocks.11.1.transformer_blocks.0.norm1.bias"
        if key not in self.shapes and self.rest is not None:
            return self.rest.scheduler()[0].get("prediction_type", "epsilon")
        if key not in self.shapes:
            raise UserError(
                f"{self.path}: ε or v? Nothing in this file says; give `prediction_type` epsilon or v_prediction"
            )
        return "v_prediction" if self._tensor(key).float().std(correction=0) > V_STD else "epsilon"

    def scheduler(self):
        """(scheduler_config.json as a dict, where it is from): of `rest`, or the family's own; given predictions win."""
        ztsnr = "ztsnr" in self.shapes
        if self.rest is not None:
            raw = self.rest.scheduler()[0] | _marked(self.prediction, ztsnr)
        else:
            raw = stated(self.family, self.path, self.prediction, ztsnr)
        return raw, str(self.path)

    def config(self, name):
        if self.rest is not None and name in self.rest.parts:
            cfg = self.rest.config(name)
            first = self._where("conv_in.weight", name, cfg)[0] if name == "unet" else None
            return dataclasses.replace(cfg, in_channels=self.shapes[first][1]) if first in self.shapes else cfg
        raw = self.configs[name]
        if name == "unet" and self.family == "SD 2" and self.prediction == "v_prediction":
            raw = raw | {"sample_size": 96}
        if name == "unet" and self.turbo:
            raw = raw | {"sample_size": 64}
        if name == "unet":  # 9 of an inpainting model
            first, _ = self._where("conv_in.weight", name, self.builders[name].Config.from_json(raw))
            raw = raw | {"in_channels": self.shapes[first][1]} if first in self.shapes else raw
        return self.builders[name].Config.from_json(raw, self.family)

    def tokenizer(self, name):
        if self.rest is not None and name in self.rest.parts:
            return self.rest.tokenizer(name)
        own = self.family == "SD 1" or (name == "tokenizer" and self.family != "SD 2")
        return clip_from_merges(END if own else "!", CLIP_LENGTH)

    def _where(self, name, component, cfg):
        """(key in this file, form) of our tensor."""
        key, form = original(name, component, self.family, cfg)
        full = self.prefixes[component] + key
        if component in ("unet", "transformer") and self.ema:
            return EMA + full.removeprefix("model.").replace(".", ""), form
        if full not in self.shapes and "text_model." in full:
            return full.replace("text_model.", "", 1), form  # old files
        return full, form

    def _tensor(self, key):
        if self.state is not None:
            return self.state[key]
        if not hasattr(self, "file"):
            self.file = weights.open_file(self.path)
        return self.file.get_tensor(key)

    def module(self, name, dtype, device):
        """A part as a module in eval mode; dtype None keeps the stored types."""
        if name not in self.here:
            return self.rest.module(name, dtype, device)
        cls, cfg = self.builders[name], self.config(name)
        model = weights.skeleton(cls, cfg)
        state = {}
        for key, want in model.state_dict().items():
            where, form = self._where(key, name, cfg)
            if where not in self.shapes and self.family.startswith("SD 3") and key == "text_projection.weight":
                print(f"note: {self.path.name}: {where} is absent, taken for the identity", file=sys.stderr)
                state[key] = placed(torch.eye(len(want)), device, dtype)
                continue
            if where not in self.shapes:
                raise UserError(f"{self.path}: misses tensor {where}{nearest(where, self.shapes)}")
            tensor = ours(weights.as_weight(self._tensor(where), where, self.path), form)
            if tensor.shape != want.shape:
                raise UserError(
                    f"{self.path}: {where} has shape {list(self.shapes[where])}, a {self.family} model has another "
                    f"({list(want.shape)}); if it is a model of another size, give its configs with `components`"
                )
            state[key] = placed(tensor, device, dtype)
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval().requires_grad_(False)

    def _check_leftovers(self):
        """Every key of the file must be somebody's. Raises UserError naming the first that is not."""
        known = set()
        for name in self.here & self.parts if self.here else ():
            cfg = self.config(name)
            for key in weights.skeleton(self.builders[name], cfg).state_dict():
                known.add(self._where(key, name, cfg)[0])
        unused = tuple(self.prefixes[n] for n in self.here - self.parts)
        denoiser = next(iter(self.prefixes.values()))
        for key in self.shapes:
            twin = self.ema and key.startswith(denoiser)
            if not (key in known or twin or LEFT_OUT.match(key) or (unused and key.startswith(unused))):
                raise UserError(f"{self.path}: has unknown tensor {printable(key)}{nearest(key, known)}")


def placed(tensor, device, dtype):
    """A weight where and in the type in which it computes (None: as stored); convolutions' channels last, where they are fastest."""
    tensor = tensor.to(device, dtype or tensor.dtype)
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)


def load_vae(path, cfg, cls, dtype, device):
    """A VAE from a file of its own, or the one in a whole checkpoint, in original names (with or without prefix) or in ours; cfg: its
    configuration. Raises UserError for what it lacks, and for what is nobody's."""
    shapes, file = weights.header([path]), weights.open_file(path)
    model = weights.skeleton(cls, cfg)
    prefix = next((p for p in ("first_stage_model.", "vae.") if any(k.startswith(p) for k in shapes)), "")
    state, used, names = {}, set(), {weights.renamed(k, "AutoencoderKL"): k for k in shapes}
    for key, want in model.state_dict().items():
        theirs, form = original(key, "vae", "", cfg)
        where = prefix + theirs if prefix + theirs in shapes else names.get(key)
        if where is None:
            raise UserError(
                f"{path}: misses tensor {prefix}{theirs}; it is no VAE of this model{nearest(theirs, shapes)}"
            )
        tensor = ours(weights.as_weight(file.get_tensor(where), where, path), form)
        if tensor.shape != want.shape:
            raise UserError(f"{path}: {where} has shape {list(shapes[where])}, this model's VAE has {list(want.shape)}")
        state[key] = placed(tensor, device, dtype)
        used.add(where)
    for where in shapes:
        if where.startswith(prefix) and where not in used and not LEFT_OUT.match(where):
            raise UserError(f"{path}: has unknown tensor {printable(where)}{nearest(where, used)}")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)
