"""A pipeline as a Hub folder, as diffusers and transformers read it."""

from pathlib import Path

from nanodiff import weights
from nanodiff.device import onednn
from nanodiff.files import write_json
from nanodiff.pipeline import families
from nanodiff.text.tokenizer import LabelTokenizer, T5Tokenizer


def save(sd, folder, dtype=None, states=None):
    """Write a Hub pipeline folder: model_index.json, components, tokenizers, scheduler. states: {component: state_dict} in
    place of the components' own."""
    folder = Path(folder)
    kind = next(k for k in sd.family.kinds if "Inpaint" in k) if sd.inpaints else sd.class_name
    index = {"_class_name": kind, "_diffusers_version": "0.31.0", **sd.family.flags, **sd.index}
    if sd.family.name == "SD":
        index |= {
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "requires_safety_checker": False,
        }
    if sd.turbo != families.is_turbo(sd.schedule.to_json(), str(folder)) and not sd.sampling("steps"):
        steps, scale = sd.settings()  # neither the folder's name nor the scheduler will tell
        index[families.SAMPLING] = {"steps": steps, "guidance_scale": scale}
    index["scheduler"] = ["diffusers", sd.schedule.kind]
    for name in (sd.denoiser_name, "vae", *sd.encoder_names):
        module = sd.models().get(name)
        index[name] = [None, None]
        if module is not None:
            onednn.undo(module)
            library = "transformers" if name.startswith("text") else "diffusers"
            index[name] = [library, module.class_name]
            weights.save(module, folder / name, dtype, (states or {}).get(name))
    index |= {name: [None, None] for name in sd.tokenizer_names[len(sd.tokenizers) :]}
    for name, tokenizer in zip(sd.tokenizer_names, sd.tokenizers, strict=False):
        kind = {T5Tokenizer: "T5TokenizerFast", LabelTokenizer: "LabelTokenizer"}.get(type(tokenizer), "CLIPTokenizer")
        index[name] = ["transformers", kind]
        tokenizer.save(folder / name)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", sd.schedule.to_json())
    write_json(folder / "model_index.json", index)
