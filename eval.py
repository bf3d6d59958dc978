"""Measure pictures and captions, and write a report that can be sent.

    python eval.py images --generated out/pictures --real PICTURES --weights-dir weights --output-dir out/eval
    python eval.py images --prompts prompts.txt --real PICTURES --features pixels --output-dir out/eval     # draws them first
    python eval.py compare --original A --finetuned B --teacher C --output-dir out/compare                  # or --a A --b B
    python eval.py captions --candidates mine.json --references theirs.json --output-dir out/captions
    python eval.py report --inputs out/eval --inputs out/compare --output-dir out/report

Every number says how it was made: network, hash of its weights, resize rule, number of pictures, seed, versions, command.
Weights are files of yours (--weights-dir); what is absent is named with its source and hash, and nothing stands in for it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from nanodiff.commandline import DEVICES, arg, script

# torch is imported inside the stages, so that --help answers at once.

LESS_MEMORY = "try a smaller --batch-size"
EMBEDDED = Path(__file__).parent / "assets" / "nano"


@dataclass
class Report:
    output_dir: str = arg(
        "out/eval", "folder of metrics.json, metrics.csv, report.md, report.html and figures", often=True
    )
    dist_timeout: int = arg(600, "seconds after which a process that does not answer is lost")


@dataclass
class Weights(Report):
    seed: int = arg(
        2020, "of subsets, splits and resamples", low=0, high=(1 << 32) - 1, group="where and how it computes"
    )
    batch_size: int = arg(16, "pictures at a time through a network", low=1)
    num_workers: int = arg(2, "threads that decode pictures", low=0)
    device: str = arg("auto", "where to compute", choices=DEVICES)
    kernels: str = arg("auto", "our Triton kernels on a GPU, for CLIP and for drawing; Inception and VGG are PyTorch's", choices=("auto", "triton", "torch"))  # fmt: skip
    weights_dir: str | None = arg(
        None, "folder with pt_inception-2015-12-05-6726825d, vgg16-397923af, clip-vit-base-patch32/ …", often=True
    )
    allow_pickle: bool = arg(False, "read .pth files, with weights_only")


@dataclass
class Images(Weights):
    generated: list[str] = arg(
        [], "folder or tar shards of generated pictures; repeatable: one set a generation", group="pictures", often=True
    )
    real: str | None = arg(
        None, "folder or tar shards of real pictures (memorisation: the training pictures)", often=True
    )
    prompts: str | None = arg(
        None,
        "the pictures' prompts: a line each, or captions by name (.json, .csv); default: what lies beside or inside the pictures",
        often=True,
    )
    model: str | None = arg(
        None,
        "draw the pictures first: folder, file or Hub id; default without --generated: the embedded model",
        group="drawing them first",
        often=True,
    )
    num_images: int | None = arg(None, "pictures per prompt to draw; default 1", low=1)
    steps: int | None = arg(None, "sampling steps; default: the model's own", low=1)
    guidance_scale: float | None = arg(None, "classifier-free guidance; default: the model's own", low=0, high=100)
    scheduler: str | None = arg(None, "sampler; default: the model's own")
    draw_seed: int | None = arg(None, "picture i is drawn from this seed + i; default 0")
    dtype: str | None = arg(None, "type of the model that draws; the networks that measure are always fp32", choices=("auto", "fp32", "fp16", "bf16"))  # fmt: skip
    across: str | None = arg(
        None, "numbers of the pictures in the sheet across several sets, comma-separated; default: 8 of them"
    )
    metrics: str | None = arg(None, "comma-separated: fid, kid, is, prdc, memorisation, diversity, clip_score, clip_fid, modality_gap, colours; default: all that can be had", group="what is measured", often=True)  # fmt: skip
    features: str = arg("inception", "spaces of fid, kid, prdc, memorisation and diversity, comma-separated: inception, clip, pixels (16x16 colours, no weights)", often=True)  # fmt: skip
    fid_mode: str = arg("torch-fidelity", "whose resize and scaling to repeat", choices=("torch-fidelity", "pytorch-fid", "clean-fid", "torchmetrics"))  # fmt: skip
    fid_dims: int = arg(2048, "Inception features: 64, 192, 768 or 2048")
    is_network: str = arg(
        "fid", "Inception Score by the FID network (torch-fidelity) or torchvision's", choices=("fid", "torchvision")
    )
    clip: str = arg("clip-vit-base-patch32", "CLIP: a name in --weights-dir, a folder, or a Hub id")
    nearest_k: int = arg(5, "neighbours of precision, recall, density and coverage", low=1)
    kid_subsets: int = arg(100, "subsets of KID", low=1, high=100_000)
    kid_subset_size: int = arg(1000, "pictures in each of them", low=2)
    is_splits: int = arg(10, "parts of the Inception Score", low=1)
    bootstrap: int | None = arg(
        None,
        "resamples of FID's interval; default 20 below 2048 pictures, else none",
        low=0,
        group="intervals and caches",
    )
    cache: bool = arg(True, "keep features in OUTPUT_DIR/cache")
    cache_dir: str | None = arg(None, "keep them here instead, to share them between runs")


@dataclass
class Compare(Weights):
    a: str | None = arg(None, "folder of pictures")
    b: str | None = arg(None, "folder with pictures of the same names")
    original: str | None = arg(None, "pictures before; with --finetuned, and perhaps --teacher")
    finetuned: str | None = arg(None, "pictures after")
    teacher: str | None = arg(None, "what they should become")
    metrics: str | None = arg(
        None, "comma-separated; default: all that can be had (lpips, fid and clip_score need weights)"
    )
    prompts: str | None = arg(
        None, "the pictures' prompts, for clip_score; default: captions beside one of the folders"
    )
    clip: str = arg("clip-vit-base-patch32", "CLIP: a name in --weights-dir, a folder, or a Hub id")
    fid_mode: str = arg("torch-fidelity", "whose resize and scaling to repeat", choices=("torch-fidelity", "pytorch-fid", "clean-fid", "torchmetrics"))  # fmt: skip
    panels: int = arg(12, "pairs of which panels and difference maps are drawn", low=0)


@dataclass
class Captions(Report):
    seed: int = arg(2020, "of the resamples", low=0, high=(1 << 32) - 1)
    candidates: str | None = arg(None, "JSON {id: caption}, COCO results, or CSV (Image_Name, Title)")
    references: str | None = arg(None, "JSON {id: [captions]}, COCO annotations, or CSV")
    tokenize: str = arg("ptb", "ptb: lower case, Penn Treebank words, no punctuation, as COCO; none: split at spaces", choices=("ptb", "none"))  # fmt: skip
    metrics: str | None = arg(None, "comma-separated: bleu1 … bleu4, rouge_l, rouge_l_f1, meteor, cider; default: all")
    bootstrap: int = arg(1000, "resamples of the intervals", low=0)
    wordnet: str | None = arg(
        None, "folder of WordNet's database (index.noun, data.noun, noun.exc, …): METEOR matches synonyms too"
    )


@dataclass
class Summary(Report):
    inputs: list[str] = arg([], "folders of earlier runs; repeatable")
    title: str = arg("Evaluation", "heading of the report")


STAGES = {
    "images": (Images, "nanodiff.stories.judging:images_of"),
    "compare": (Compare, "nanodiff.stories.judging:compare"),
    "captions": (Captions, "nanodiff.stories.judging:captions"),
    "report": (Summary, "nanodiff.stories.judging:summary"),
}

if __name__ == "__main__":
    sys.exit(script(STAGES, __doc__, less_memory=LESS_MEMORY))
