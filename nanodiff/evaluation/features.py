"""From pictures to features: which network, which weights, which resize; computed once for each picture.

    net = inception("weights/", mode="torch-fidelity")           # Network: prepares a picture, encodes a batch
    rows = extract(net, dataset, cache="cache")                   # [N, D] float32, the order of the dataset

What a figure means depends on all three, so a Network carries them as `facts`, which stand beside every result. Weights are files of the
user's, found by their published names in --weights-dir (safetensors, or the pickle itself with --allow-pickle); nothing but a
CLIP that is asked for by name is downloaded, and where a file is absent the error says which one, from where, and its hash.

Resize rules of FID (`MODES`), each as its program does it:
  torch-fidelity   TensorFlow 1's bilinear: source = destination × scale, no half-pixel centres, no antialiasing; (x - 128) / 128
  pytorch-fid      bilinear with half-pixel centres, no antialiasing; 2 x / 255 - 1
  clean-fid        Pillow's bicubic (antialiased) of each channel in floats, cut to [0, 255]; (x - 128) / 128
  torchmetrics     bilinear, antialiased; (x - 128) / 128

Features are kept under the hash of the picture's file and of all that decides them (weights, settings, resize rule, Pillow's version,
kind of device), so they can never be stale; under torchrun the processes compute them in turns.
"""

import concurrent.futures
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image

from nanodiff import weights
from nanodiff.config import ASSETS, UserError, printable, read_json, typed
from nanodiff.device import dist
from nanodiff.files import sha256
from nanodiff.models import inception as inception_v3
from nanodiff.models import lpips
from nanodiff.models.clip import CLIPModel
from nanodiff.output import images
from nanodiff.output.images import as_uint8
from nanodiff.text.tokenizer import CLIPTokenizer
from nanodiff.training.loader import Cache
from nanodiff.weights import hub

VERSION = 1  # counted up when the same picture and weights would give other features
SIDE = 299
BATCH = 16
MODES = ("torch-fidelity", "pytorch-fid", "clean-fid", "torchmetrics")
RELEASES = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
PUBLISHED = {  # what: (file names that are looked for, beginning of the published file's SHA-256, where it is)
    "inception": (("pt_inception-2015-12-05-6726825d", "weights-inception-2015-12-05-6726825d"), "6726825d",
                  RELEASES + "pt_inception-2015-12-05-6726825d.pth"),
    "inception-torchvision": (("inception_v3_google-0cc3c7bd",), "0cc3c7bd",
                              "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth"),
    "vgg16": (("vgg16-397923af",), "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth"),
}  # fmt: skip
CLIPS = ("clip-vit-base-patch32", "clip-vit-base-patch16", "clip-vit-large-patch14")
LPIPS_HEADS = ASSETS / "lpips" / "vgg_lin_v0.1.safetensors"


class Absent(UserError):
    """Weights that are not there: the metrics that need them are left out, and said to be."""


@dataclass
class Network:
    """What turns pictures into features. prepare(PIL picture) -> tensor of one size; encode([B, …]) -> [B, D]."""

    name: str
    prepare: object
    encode: object
    facts: dict = field(default_factory=dict)  # provenance: weights, their hash, the resize rule
    logits: object = None  # features [N, D] -> [N, classes], where the network has classes
    texts: object = None  # [texts] -> [N, D], where it reads

    def key(self):
        """Stands for everything that decides a feature, but the picture."""
        return hashlib.sha256(
            repr((VERSION, PIL.__version__, self.name, sorted(self.facts.items()))).encode()
        ).hexdigest()


# ---------------------------------------------------------------------------------------------------------
# Weights


def find(what, folder, allow_pickle=False):
    """(tensors, facts) of published weights in a folder (or the file itself). Raises Absent, saying where they are from."""
    names, begins, url = PUBLISHED[what]
    folder = Path(folder) if folder else None
    if folder and not folder.exists():
        raise UserError(f"`weights_dir` {folder}: no such folder")
    found = [folder] if folder and folder.is_file() else []
    for name in names if folder and folder.is_dir() else ():
        found += [
            folder / f"{name}{suffix}"
            for suffix in (".safetensors", ".pth", ".pt")
            if (folder / f"{name}{suffix}").is_file()
        ]
    if not found:
        where = f"in {folder}" if folder else "without --weights-dir"
        raise Absent(f"{names[0]}.pth is not there {where}; get it from {url} (SHA-256 begins {begins})")
    path, pickled = found[0], weights.is_pickle(found[0])
    if pickled and not allow_pickle:
        raise UserError(
            f"{path}: a pickle; add `allow_pickle`, or `python -m nanodiff.weights convert {path.name} {path.stem}.safetensors `allow_pickle``"
        )
    digest = sha256(path)
    known = digest.startswith(begins) if pickled else None  # a converted file has a hash of its own
    if known is False:
        dist.say(
            f"warning: {path}: SHA-256 {digest[:8]}…, the published file's begins {begins}: other weights, other numbers"
        )
    tensors = weights.as_weights(weights.load_pickle(path) if pickled else weights.load_tensors(path), path)
    return tensors, {"weights": path.name, "weights_sha256": digest, "published": known}


def _filled(model, tensors, where, optional=("num_batches_tracked", "AuxLogits.")):
    """A model with a file's tensors, frozen, in eval mode. Raises UserError naming the first one that does not fit."""
    state = model.state_dict()
    wanted = {k: tuple(v.shape) for k, v in state.items() if not k.endswith(optional[0])}
    there = {
        k: v for k, v in tensors.items() if k in wanted or not (k.endswith(optional[0]) or k.startswith(optional[1]))
    }
    weights.check_names(wanted, {k: tuple(v.shape) for k, v in there.items()}, where)
    model.load_state_dict({k: v.float() for k, v in there.items()}, strict=False)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------
# Networks


def _planes(image):
    """uint8 [3, H, W] of a PIL picture."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def tf1_bilinear(x, side=SIDE):
    """[3, H, W] -> [3, side, side] as TensorFlow 1's resize_bilinear without align_corners."""
    for dim in (2, 1):
        n = x.shape[dim]
        at = torch.arange(side, dtype=torch.float32) * (n / side)
        low = at.long()
        part = (at - low).view(-1, *[1] * (2 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * part
    return x


def resized(image, mode):
    """A PIL picture as the network's input [3, 299, 299], by the rule of a program (see the module docstring)."""
    if mode == "clean-fid":
        channels = [np.asarray(c.convert("F").resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for c in image.split()]
        return (torch.from_numpy(np.stack(channels).clip(0, 255)) - 128) / 128
    x = _planes(image).float()
    if mode == "torch-fidelity":
        return (tf1_bilinear(x) - 128) / 128
    size = {"size": (SIDE, SIDE), "mode": "bilinear", "align_corners": False}
    if mode == "pytorch-fid":
        return F.interpolate(x[None] / 255, **size)[0] * 2 - 1
    return (F.interpolate(x[None], **size, antialias=True)[0] - 128) / 128


def inception(folder, mode="torch-fidelity", device="cpu", tap=2048, variant="fid", allow_pickle=False):
    """The Inception-v3 of FID, KID and IS. Raises Absent without weights."""
    what = "inception" if variant == "fid" else "inception-torchvision"
    tensors, facts = find(what, folder, allow_pickle)
    model = inception_v3.fold(_filled(inception_v3.InceptionV3(variant), tensors, facts["weights"])).to(device)
    model = model.to(memory_format=torch.channels_last)

    def encode(batch):
        return model(batch.to(device, memory_format=torch.channels_last), tap)

    facts |= {
        "network": f"Inception-v3 ({variant}), {tap} features",
        "resize": mode,
        "device": torch.device(device).type,
    }
    return Network(
        f"inception-{variant}-{tap}",
        lambda image: resized(image, mode),
        encode,
        facts,
        lambda f: model.logits(f.to(device)),
    )


# where it stands how pictures are prepared: by themselves, and beside the texts
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def clip(path, device="cpu"):
    """A whole CLIP from a Hub folder or id: pictures and texts as unit vectors."""
    folder = _clip_folder(path)
    model = weights.load(CLIPModel, folder, torch.float32, device)
    tokenizer = CLIPTokenizer.load(folder, model.cfg.text.max_position_embeddings)
    side = model.cfg.vision.image_size
    mean, std = _preprocessing(folder, side)

    def prepare(image):
        return images.clip_pixels(image, side, mean, std)

    def texts(lines):
        length = min(tokenizer.length, model.cfg.text.max_position_embeddings)
        if cut := sum(bool(tokenizer.overflow(line, length)) for line in lines):
            dist.say(f"warning: CLIP reads {length} tokens: {cut} of {len(lines)} prompts are longer, and cut")
        ids = torch.tensor(tokenizer(lines, length))
        parts = [model.text(ids[i : i + 64].to(device)).cpu() for i in range(0, len(ids), 64)]
        return torch.cat(parts).numpy()

    files = weights.find_files(folder)
    digests = [sha256(file) for file in files]
    settings = [f.read_bytes() for f in (folder / name for name in ("config.json", *PROCESSORS)) if f.exists()]
    facts = {
        "network": f"CLIP ({folder.name if Path(path).exists() else path}), {model.cfg.projection_dim} features",
        "weights": ", ".join(f.name for f in files), "weights_sha256": digests[0] if len(files) == 1 else digests,
        "settings_sha256": hashlib.sha256(b"".join(settings)).hexdigest(), "published": None, "device": torch.device(device).type,
        "resize": f"Pillow bicubic, shortest side to {side}, centre crop",
    }  # fmt: skip
    return Network("clip", prepare, lambda batch: model.image(batch.to(device)), facts, texts=torch.no_grad()(texts))


def _preprocessing(folder, side):
    """(mean, std) of a folder's preprocessor_config.json, or of the processor_config.json which transformers 5 writes in its place; CLIP's own without
    one. Raises UserError for one that asks for anything else to be done."""
    file = next((folder / name for name in PROCESSORS if (folder / name).exists()), None)
    settings = read_json(file) if file else {}
    if file and file.name == PROCESSORS[1]:
        settings = typed(settings.get("image_processor", {}), dict, f"{file}: image_processor")
    found = []
    for name, usual in (("image_mean", images.CLIP_MEAN), ("image_std", images.CLIP_STD)):
        value = settings.get(name, usual)
        if (
            not isinstance(value, list | tuple)
            or len(value) != 3
            or not all(isinstance(v, int | float) and v > 0 for v in value)
        ):
            raise UserError(f"{file}: {name} is {printable(value)}, expected three numbers")
        found.append(value)
    size, crop = settings.get("size", side), settings.get("crop_size", side)
    size = side if size == {"shortest_edge": side} else size  # height and width would squash what is not square
    crop = side if crop == {"height": side, "width": side} else crop
    done = {name: settings.get(name, True) for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")}
    for name, value, known in (
        ("size", size, (side,)),
        ("crop_size", crop, (side,)),
        ("resample", settings.get("resample", 3), (3,)),
        ("rescale_factor", settings.get("rescale_factor", 1 / 255), (1 / 255, 0.003921568859368563)),
        *((name, value, (True,)) for name, value in done.items()),
    ):
        if value not in known:
            raise UserError(f"{file}: {name} {printable(value)} is not supported, only {known[0]}")
    return found


def _clip_folder(path):
    """The folder of a CLIP: as named, or a Hub id of which the cache has it."""
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise UserError(f"{folder}: no CLIP here (config.json and its weights)")
    return hub.whole(path)


def colour_pixels(side=16):
    """No network at all: the picture at 16×16, in [-1, 1]. Needs no weights; says how alike pictures look from afar, and can be
    compared with figures of the same data set only."""

    def prepare(image):
        return (
            torch.from_numpy(np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32).copy()) / 127.5
            - 1
        )

    facts = {
        "network": f"none: {side}x{side} colour pixels",
        "resize": "Pillow box",
        "weights": None,
        "weights_sha256": None,
        "published": None,
    }
    return Network(f"pixels-{side}", prepare, lambda batch: batch.flatten(1), facts)


def perceptual(folder, device="cpu", allow_pickle=False):
    """(LPIPS model, facts). Raises Absent without VGG16's weights; the linear layers are the project's own file."""
    tensors, facts = find("vgg16", folder, allow_pickle)
    model = lpips.LPIPS()
    lpips.fill(model.vgg, {k: v for k, v in tensors.items() if k.startswith("features.")}, facts["weights"])
    heads = weights.load_tensors(LPIPS_HEADS)
    lpips.fill(model.lins, {f"{i}.weight": heads.get(f"lin{i}.model.1.weight") for i in range(5)}, LPIPS_HEADS)
    facts |= {
        "network": "VGG16 + LPIPS v0.1 heads",
        "heads_sha256": sha256(LPIPS_HEADS),
        "resize": "none",
        "device": torch.device(device).type,
    }
    return model.to(device), facts


# ---------------------------------------------------------------------------------------------------------
# Extraction


def extract(net, dataset, cache=None, batch_size=BATCH, workers=2, what=None):
    """[N, D] float32 features of a dataset's pictures, in its order. cache: folder that keeps them, or None: in memory.

    Every process must call it, and gets all rows. Equal pictures are computed once. Raises UserError for a picture that cannot be
    read, and for features that are not finite.
    """
    names = hashes(dataset)
    store = Cache(cache, f"features-{net.name}", net.key())
    wanted = dict(zip(names, range(len(dataset)), strict=True))

    @torch.inference_mode()
    def make(positions):
        rows = net.encode(torch.stack(each(net.prepare, dataset, positions, workers))).float().cpu()
        for position, row in zip(positions, rows, strict=True):
            if not torch.isfinite(row).all():
                raise UserError(
                    f"{printable(dataset.keys[position])}: its features by {net.facts['network']} are not finite"
                )
        return list(rows)

    store.fill(wanted, make, batch_size, what or f"features ({net.name})")
    return torch.stack([store.rows[n] for n in names]).numpy()


def each(f, dataset, positions, workers=2):
    """[f(PIL picture)] of positions, in order, by several threads (Pillow and torch let go of Python's lock)."""
    one = lambda i: f(dataset.image(i))  # noqa: E731
    if workers < 2 or len(positions) < 2:
        return [one(i) for i in positions]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, positions))


def shared(f, positions, what):
    """[f(i)] of positions, each process computing a part; all get all, or raise the first one's UserError."""
    rank, size = dist.world().rank, dist.world().size
    mine = positions[rank::size]
    parts = dist.gathered(dist.together(lambda: [f(i) for i in dist.progress(mine, len(mine), what)]))
    return [parts[i % size][i // size] for i in range(len(positions))]


def hashes(dataset):
    """The hash of each picture's file."""
    return shared(
        lambda i: hashlib.blake2b(dataset.data(i), digest_size=16).hexdigest(), range(len(dataset)), "reading pictures"
    )


def of_pixels(net, pixels, batch_size=BATCH):
    """[N, D] float32 features of pictures in memory: uint8, or floats in [0, 1]; arrays [N, H, W, 3] or tensors [N, 3, H, W].

    The same as those of a lossless file of each. Raises UserError for floats of another range."""
    rows = []
    with torch.inference_mode():
        for first in range(0, len(pixels), batch_size):
            batch = [net.prepare(Image.fromarray(as_uint8(p))) for p in pixels[first : first + batch_size]]
            rows.append(net.encode(torch.stack(batch)).float().cpu())
    return torch.cat(rows).numpy()
