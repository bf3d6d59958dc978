"""What is done with LoRA files as a whole: translating, merging, extracting, comparing.

Which module a key stands for is known from the model: the one that is named, or the released model whose layers all fit.

Explained in the book (docs/book): chapter 12.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from nanodiff import pipeline, weights
from nanodiff.commandline import flagged
from nanodiff.config import UserError, printable
from nanodiff.lora import format, reading, running
from nanodiff.lora.writing import NETWORKS, family_of, form_for, write
from nanodiff.pipeline import families, sources
from nanodiff.pipeline.single import Known

# ---------------------------------------------------------------------------------------------------------
# Which model


def skeletons(model: str | Path) -> dict[str, torch.nn.Module]:
    """{component: module without weights} of a model's networks, by name, folder or file."""
    src = sources.configs(model)
    return {n: weights.skeleton(src.builder(n), src.config(n)) for n in NETWORKS if n in src.parts}


def models_for(
    path: str | Path, model: str | None = None, allow_partial: bool = False
) -> tuple[dict[str, torch.nn.Module], format.Lora]:
    """({component: module without weights}, Lora) of a file. Without a model, the released one whose layers all fit it."""
    if model:
        models = skeletons(model)
        return models, reading.read(path, models, allow_partial, words=True)
    if allow_partial:
        raise UserError("`allow_partial` goes on without what a model lacks: name it with `model`")
    reasons = {}
    for family in families.KNOWN:
        known = Known(family, pipeline.BUILDERS)
        models = {n: weights.skeleton(known.builder(n), known.config(n)) for n in NETWORKS if n in known.parts}
        try:
            return models, reading.read(path, models, words=True)
        except UserError as e:
            reasons[family] = str(e)
    if len(set(reasons.values())) == 1:  # the file itself is at fault
        raise UserError(next(iter(reasons.values())))
    raise UserError(
        f"{path}: fits none of {', '.join(reasons)}; name its model with `model` (for {next(iter(reasons))}: {next(iter(reasons.values()))})"
    )


# ---------------------------------------------------------------------------------------------------------
# Tools


def inspect(path: str | Path, model: str | None = None) -> None:
    """Print every layer with its shapes, rank and alpha, and how strong other programs take the file to be."""
    words, groups, strange = {}, {}, []
    for file in reading.files_of(path):
        tensors = weights.load_weights(file)
        words |= reading.bundled_words(tensors, file)
        more, unknown = reading.grouped(tensors, file)
        of = f"{file.parent.name}: " if file.parent != Path(path) and file != Path(path) else ""
        groups |= {of + name: parts for name, parts in more.items()}
        strange += [of + key for key in unknown]
    for name, parts in groups.items():
        facts = [f"{k} {list(parts[k].shape)}" for k in (format.DOWN, format.UP) if k in parts]
        if "alpha" in parts:
            facts += [f"alpha {', '.join(f'{v:g}' for v in parts['alpha'].flatten().tolist()) or 'without a number'}"]
        print(printable(name), ", ".join(facts))
    for word, vectors in words.items():
        print(
            f"learned word: {printable(word)}, " + ", ".join(f"{k} {list(v.shape)}".strip() for k, v in vectors.items())
        )
    for key in strange:
        print(f"unknown: {printable(key)}")
    try:
        models, found = models_for(path, model)
    except UserError as e:
        if model:
            raise
        return print(f"{len(groups)} layers; {flagged(e)}")
    ranks = sorted({d.down.shape[0] for d in found.deltas})
    strengths = sorted({round(d.scale, 9) for d in found.deltas})
    shown = lambda values: ", ".join(f"{v:g}" for v in values[:6]) + (" …" if len(values) > 6 else "")  # noqa: E731
    print(f"{family_of(models)}: {len(found.deltas)} layers of {', '.join(dict.fromkeys(d.component for d in found.deltas))}; rank {shown(ranks)}; "
          f"strength {shown(strengths)}")  # fmt: skip
    if any("alpha" not in parts for parts in groups.values()) and strengths != [1.0]:
        print("note: without alpha tensors ComfyUI and A1111 take strength 1; `convert --to kohya` writes them")
    return None


def convert(
    source: str | Path, target: str | Path, form: str, model: str | None = None, allow_partial: bool = False
) -> None:
    """Translate a file. Names change, numbers do not. Raises UserError for a target that is the source."""
    if Path(source).resolve() == Path(target).resolve():
        raise UserError(f"{target}: is what is converted; take another name")
    models, found = models_for(source, model, allow_partial)
    if found.words:
        raise UserError(
            f"{source}: carries the learned words {', '.join(map(printable, found.words))}, which no other form has a place for"
        )
    kept = weights.metadata(reading.files_of(source)[0])
    facts = {
        k.removeprefix("ss_"): v
        for k, v in kept.items()
        if k.removeprefix("ss_") in ("steps", "epoch", "seed", "learning_rate", "num_train_images", "clip_skip")
    }
    facts |= {"title": kept["ss_output_name"]} if "ss_output_name" in kept else {}
    facts |= {"resolution": kept["modelspec.resolution"]} if "modelspec.resolution" in kept else {}
    written = write(target, found, models, form, facts)
    print(f"{written}: {len(found.deltas)} layers, {form}, {family_of(models)}")


def merge(
    model: str,
    loras: Sequence[str],
    target: str | Path,
    allow_partial: bool = False,
    components: str | None = None,
    allow_pickle: bool = False,
    no_t5: bool = False,
) -> None:
    """Add LoRAs into a model's weights for good, and write it as a Hub folder, in the types that it was stored in."""
    if Path(target).exists() and (not Path(target).is_dir() or any(Path(target).iterdir())):
        raise UserError(f"{target}: exists and is not an empty folder")
    sd = pipeline.load(model, None, components=components, allow_pickle=allow_pickle, no_t5=no_t5)
    for text in loras:
        path, scale = reading.parse(text)
        found = reading.read(path, sd.models(), allow_partial, words=True)
        for word, vectors in found.words.items():
            print(f"learned word: {printable(sd.learn_word(word, vectors, path))}")
        running.fuse(sd.models(), found, scale, keep=False)
        print(f"{found.name}: {len(found.deltas)} layers, scale {scale:g}")
    sd.save(target)
    print(target)


def extract(model: str, tuned: str, rank: int, target: str | Path, form: str = "auto") -> None:
    """The LoRA that comes nearest to tuned - model: the largest singular values of each layer's difference (Eckart and Young 1936)."""
    if rank < 1:
        raise UserError(f"`rank` {rank} must be at least 1")
    a, b = pipeline.source(model), pipeline.source(tuned)
    deltas, models, left_out, lost, whole = [], {}, [], 0.0, 0.0
    for component in (n for n in NETWORKS if n in a.parts and n in b.parts):
        base, other = (s.module(component, None, "cpu") for s in (a, b))
        models[component] = base
        mine, theirs = base.state_dict(), other.state_dict()
        for key in [k for k in mine if k not in theirs or mine[k].shape != theirs[k].shape]:
            raise UserError(
                f"{tuned}: {component}.{printable(key)}: is not of this shape in {model}; it is for another family"
            )
        layers = {f"{n}.weight" for n, m in base.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
        for key in tqdm(mine, desc=component, disable=None):
            difference = theirs[key].float() - mine[key].float()
            if not difference.isfinite().all():
                raise UserError(f"{tuned}: {component}.{printable(key)}: is not finite, or is not in {model}")
            if not difference.any():
                continue
            if key not in layers:
                left_out.append(f"{component}.{key}")
                continue
            delta = _nearest(component, key.removesuffix(".weight"), difference, rank)
            deltas.append(delta)
            whole += difference.square().sum().item()
            lost += (difference - delta.matrix(difference.shape)).square().sum().item()
    if not deltas:
        raise UserError(f"{tuned}: no layer differs from {model}")
    if left_out:
        print(
            f"note: {len(left_out)} tensors that are no layer's weight differ too, and are left out, such as {printable(left_out[0])}"
        )
    written = write(target, format.Lora("extracted", deltas, []), models, form_for(form, models))
    print(f"{written}: {len(deltas)} layers, {100 * (1 - lost / whole):.2f} % of the squared difference")


def _nearest(component, module, difference, rank):
    u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    r = min(rank, int((s > s[0] * 1e-7).sum()))
    root = s[:r].sqrt()
    up, down = u[:, :r] * root, root[:, None] * v[:r]
    if difference.dim() == 4:
        up, down = up[:, :, None, None], down.view(r, *difference.shape[1:])
    return format.Delta(component, module, down.contiguous(), up.contiguous(), 1.0)


def verify(a: str | Path, b: str | Path, model: str | None = None, tolerance: float = 1e-06) -> int:
    """Compare what two files add to each layer. Prints the largest relative difference; the exit code is 1 above the tolerance."""
    models, first = models_for(a, model)
    changes = [_changes(found) for found in (first, reading.read(b, models, words=True))]
    worst, where = 0.0, None
    for target in dict.fromkeys(k for c in changes for k in c):
        x, y = (c.get(target) for c in changes)
        x, y = (torch.zeros_like(other) if one is None else one for one, other in ((x, y), (y, x)))
        error = ((x - y).norm() / torch.maximum(x.norm(), y.norm()).clamp(min=1e-30)).item()
        if error > worst or where is None:
            worst, where = error, target
    print(
        f"largest relative difference {worst:.3g}, in {'.'.join(where)}, of {len(changes[0])} and {len(changes[1])} layers"
    )
    return int(worst > tolerance)


def _changes(found):
    """{(component, module): what is added to the weight [out, …]} in fp64, and {("learned word", word, encoder): vectors}."""
    out = {("learned word", w, k): v.double() for w, vectors in found.words.items() for k, v in vectors.items()}
    for d in found.deltas:
        change = (d.up.double().flatten(1) @ d.down.double().flatten(1)) * d.scale
        out[d[:2]] = out[d[:2]] + change if d[:2] in out else change
    return out
