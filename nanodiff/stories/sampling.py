"""sample.py's story: pictures and their sheet, a study of settings, a dry run."""

import dataclasses
import gc
import json
import re
import secrets
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from nanodiff import data, pipeline, weights
from nanodiff.commandline import as_dict, flagged, is_given, shipped_option
from nanodiff.config import ASSETS, UserError, printable
from nanodiff.device import choice, memory
from nanodiff.diffusion import samplers
from nanodiff.files import out_dir, write_bytes
from nanodiff.output import images, infotext
from nanodiff.output.record import Record
from nanodiff.pipeline import control, pictures, sources
from nanodiff.pipeline.conditions import GROUP
from nanodiff.pipeline.sources import EMBEDDED
from nanodiff.pipeline.spoken import texts_of
from nanodiff.stories import study as grid
from nanodiff.stories.drawing import (
    PATHS,
    SINGLE,
    Marks,
    Progress,
    begun,
    check_inputs,
    check_output,
    defaults,
    documented,
    file_name,
    keep_record,
    listed,
    named_files,
    options,
    prompts_of,
    rebase,
    strength_of,
    strip,
    unused,
    words,
)
from nanodiff.stories.inputs import against, canvas, check, draw, inputs, opened_mask, second_steps, sizing_of
from nanodiff.stories.models import LOADING, load, pick_dtype, refiner_source, told, under
from nanodiff.stories.recall import recall, remembered
from nanodiff.stories.wording import Tagged, batches_of, check_words, job, jobs_of, note_marks, worded
from nanodiff.training.options import parse_size

WITHOUT_MEMORY = {"scheduler", "steps", "ddim_steps", "guidance_scale", "guidance_rescale", "seed", "eta", "sigmas", "timestep_spacing", "strength", "clip_skip",
                  "lora_scale", "skip_layer_scale", "perturbed_scale", "freeu"}  # settings on which a plan does not hang  # fmt: skip
INDIVIDUAL = 16  # up to so many pictures, --output also writes them one by one


def main(cfg):
    if cfg.from_image:
        recall(cfg)
    if cfg.study is None:  # of a study it is the cells that are checked: what one option needs may be another's axis
        cfg.check()
    samplers.check_name(cfg.scheduler)
    rebase(cfg)

    device = choice.pick_device(cfg.device)
    resize = parse_size(cfg.resize) if cfg.resize else None
    if cfg.study is None:
        options(cfg)  # what cannot be shows now
    if cfg.dry_run:
        return dry_run(cfg, device)
    if cfg.study is not None:
        return study(cfg, device)
    prompts = prompts_of(cfg, optional=True)
    record = Record(cfg, device)
    out = record.out
    if cfg.output:
        check_output(cfg, out)
    check_inputs(cfg, out)
    (number, make_room), named = begun(cfg, out), cfg.named or documented(cfg)
    if cfg.seed is None:
        cfg.seed = secrets.randbelow(1 << 32)
        print(f"seed: {cfg.seed}")
    sd = under(cfg, load(cfg, record, device))
    check_prompts(cfg, sd)
    prompts = prompts or [""]
    if not cfg.model and not cfg.components:
        known_words(prompts)
    without_skips(cfg, sd)
    steps, scale, negative = defaults(cfg, sd)
    samplers.check_steps(sd.schedule, steps)
    settings = described(sd, steps, scale, negative)

    size, start, finished = inputs(cfg, sd)
    check(cfg, sd, steps, scale, size, start)
    settings |= second_pass(cfg, sd, steps)
    record.data["config"] = as_dict(cfg) | settings | size  # resolved
    check_words(cfg, sd, prompts, negative)
    jobs, tagged = jobs_of(cfg, prompts, negative), Tagged(cfg.lora_dir, cfg.allow_partial)
    batches = batches_of(jobs, cfg, sd, steps)
    for _, batch in batches:  # a file that is not there shows now
        tagged.obey(sd, batch[0].loras)
    if cfg.offload != "none" and not any(job.loras for job in jobs):
        with record.timed("encode"):  # the text encoders come once, for all prompts, and leave before the denoiser
            prepare(cfg, sd, jobs, steps, scale > 1 and not sd.is_told)
    facts = settings | size | ({"strength": start["strength"]} if "strength" in start else {})
    made = Pictures(cfg, sd, record, facts, finished, tagged, number, named, resize, make_room)
    passes = len(batches) * (2 if cfg.hires else 1)
    try:
        with Progress(passes, sd.preview and (sd.preview, out / "preview.png")) as progress:
            for first, batch in batches:
                tagged.obey(sd, batch[0].loras)
                with record.timed("sample"):
                    result = draw(cfg, sd, batch, steps, scale, size, start,
                                  keep_steps=cfg.progress_strip, on_step=progress.step)  # fmt: skip
                made.add(first, batch, result)
    finally:  # what was finished is kept and listed, also after Ctrl-C
        made.close()
    print(f"{made.count} pictures in {out}" + (f", sheet {cfg.output}" if cfg.output else ""))


def check_prompts(cfg, sd):
    """Raise UserError where no prompt is given and the model needs one."""
    if not (cfg.prompt or cfg.prompts_file or sd.unconditional or cfg.control_guess):
        raise UserError('--prompt is required, such as --prompt "red apple"')


def without_skips(cfg, sd):
    """Leave the web UI's Clip skip out where it has none."""
    if cfg.clip_skip and getattr(cfg, "adopted", False) and len(sd.encoder_names) > 1:
        print("note: not used: Clip skip, which the web UI has for one text encoder only", file=sys.stderr)
        cfg.clip_skip = 0


class Pictures:
    """The pictures of a run on their way to the disk: one by one with what they remember, strips and texts beside them, and at the end a sheet.

    facts: {setting: value} of all of them; finished(picture) -> the picture as it is written; resize: (width, height) or None; make_room(): called
    once there is one to write, for what stops a run before loses nothing of an older one.
    """

    def __init__(self, cfg, sd, record, facts, finished, tagged, number, named, resize, make_room):
        self.cfg, self.sd, self.record, self.facts = cfg, sd, record, facts
        self.finished, self.tagged = finished, tagged
        self.number, self.named, self.resize, self.make_room = number, named, resize, make_room
        self.sheet, self.latents, self.count, self.names = [], [], 0, set()
        self.earlier = listed(record.out)

    def add(self, first, batch, result):
        """Write the pictures of the Jobs `batch`, the first of which is the run's `first`-th."""
        if self.make_room:
            self.make_room()
            self.make_room = None
        if self.cfg.save_latents:
            self.latents.append(result.latents.cpu().float())
        for k, (one, picture) in enumerate(zip(batch, images.to_pil(result.pixels), strict=True)):
            picture = self.finished(picture)
            picture = picture.resize(self.resize, images.Image.Resampling.LANCZOS) if self.resize else picture
            self._write(first + k, one, picture)
            if self.cfg.progress_strip:
                beside = self.path.with_name(self.path.stem + "_steps.png")
                strip(self.cfg, self.sd, result.history, k, beside)
                self.record.file(beside, seed=one.seed, prompt=one.prompt)

    def _write(self, index, one, picture):
        cfg, out = self.cfg, self.record.out
        own = {"prompt": one.prompt, "negative_prompt": one.negative, "seed": one.seed}
        facts = self.facts | own | dict(one.others)
        name = file_name(cfg, facts, self.sd) if self.named else f"{self.number + index:05d}.png"
        self.path = unused(out / name, cfg.overwrite, self.names) if self.named else out / name
        if self.path.exists():  # what an earlier run put beside it tells of another picture
            for beside in (self.path.with_suffix(".txt"), self.path.with_name(self.path.stem + "_steps.png")):
                if beside.name in self.earlier:
                    beside.unlink(missing_ok=True)
        self.names.add(self.path.name)
        known = remembered(cfg, facts, self.sd, self.tagged.hashes_of(one))
        images.save_png(picture, self.path, known if cfg.metadata else None)
        self.record.file(self.path, seed=one.seed, prompt=one.prompt)
        if cfg.txt:
            write_bytes(self.path.with_suffix(".txt"), (infotext.written(known) + "\n").encode("utf-8", "replace"))
            self.record.file(self.path.with_suffix(".txt"))
        self.count += 1
        if cfg.output:
            self.sheet.append((picture, one.prompt))

    def close(self):
        """The sheet, the latents and run.json, if anything was drawn."""
        cfg, record = self.cfg, self.record
        if not self.count:
            return
        if self.sheet:
            pictures, labels = zip(*self.sheet, strict=True)
            if Path(cfg.output).exists():
                print(f"note: {cfg.output}: replaces what was there", file=sys.stderr)
            images.save_named(images.grid(pictures, cfg.nrow, labels if cfg.labels else None), cfg.output)
            record.file(cfg.output)
            if len(pictures) <= INDIVIDUAL:
                folder = out_dir(Path(cfg.output).with_suffix("").as_posix() + "_individual")
                for old in (there := [p for p in folder.iterdir() if SINGLE.fullmatch(p.name)]):
                    old.unlink()
                if there:
                    print(f"note: {folder}: {len(there)} pictures of an earlier sheet are replaced", file=sys.stderr)
                for i, picture in enumerate(pictures):
                    images.save_png(picture, folder / f"image_{i:03d}.png")
                    record.file(folder / f"image_{i:03d}.png")
        if self.latents:
            weights.save_tensors(record.out / "latents.safetensors", {"latents": torch.cat(self.latents)})
            record.file(record.out / "latents.safetensors")
        record.data["results"]["images"] = self.count
        for replayed in self.sd.recorded.values():
            graphs = {"recorded": len(replayed.recordings), "megabytes": replayed.memory() >> 20}
            record.data["results"]["cuda_graph"] = graphs
        record.write()


def known_words(prompts):
    """A line for each prompt of which the embedded model, which learned from 536 captions, knows no word."""
    pictures = ASSETS / "emoji" / "emoji.tar"
    if not pictures.is_file():  # an installation without them
        return
    captions = data.load(pictures).captions
    known = sorted({word for text in captions for word in re.findall(r"[a-z]{3,}", text.lower())})
    for prompt in dict.fromkeys(prompts):
        words = re.findall(r"\w{3,}", prompt.lower())
        if words and not set(words) & set(known):
            some = ", ".join(known[:: len(known) // 12][:12])
            print(f"note: the embedded model knows no word of {printable(prompt)!r}; it knows {len(known)}, such as {some} "
                  "(--model names another model)", file=sys.stderr)  # fmt: skip


def prepare(cfg, sd, jobs, steps, guided):
    """Encode all texts of the Jobs and keep them."""
    changing = cfg.prompt_syntax == "a1111"
    pairs = []
    for one in jobs:
        negatives = texts_of(one.negative, steps) if changing and one.negative is not None else [one.negative]
        pairs += [
            one._replace(text=t, negative=n)
            for t in (texts_of(one.text, steps) if changing else [one.text])
            for n in negatives
        ]
    pairs = list({(one.text, one.negative, one.others): one for one in pairs}.values())
    for i in range(0, len(pairs), GROUP):
        some = pairs[i : i + GROUP]
        sd.prepare([one.text for one in some], against(some), worded(words(cfg), some), guided=guided)


def described(sd, steps, scale, negative):
    """Print what the model is and how it will be sampled; returns the latter."""
    for part, millions in sd.parameters().items():
        print(f"{part}: {millions} M parameters")
    name = samplers.name_of(sd.schedule)
    settings = {"scheduler": name, "steps": steps, "guidance_scale": scale, "negative_prompt": negative}
    print("settings: " + ", ".join(f"{k}={printable(v)}" for k, v in settings.items()))
    return settings


def second_pass(cfg, sd, steps):
    """{hires_steps: as many as it takes}, which a record holds where nobody said how many and they are not the first pass's (a turbo's); else {}."""
    taken = second_steps(cfg, sd, steps) if cfg.hires else steps
    return {"hires_steps": taken} if taken != steps and not cfg.hires_steps else {}


def study(cfg, device):
    """Every combination of --study's settings on the same prompts and noise. See study.py."""
    for name in ("output", "from_image", "save_latents", "progress_strip", "named", "preview", "txt"):
        if getattr(cfg, name):
            raise UserError(f"--{name.replace('_', '-')} is not for --study, which writes its own sheet")
    axes, cells, variants = parsed(cfg)
    record = Record(cfg, device)
    for variant in variants:
        check_inputs(variant, record.out)
    alone = not (record.out / "study.json").is_file()  # what the folder holds is another run's
    finished = grid.Finished(record.out, cfg.seed, cfg.overwrite)
    if finished.seed is None:
        finished.seed = secrets.randbelow(1 << 32)
    print(f"seed: {finished.seed}")
    cfg.seed = finished.seed
    rows, base, loaded, skipped = {}, None, None, 0  # rows: {(cell, picture): row of study.csv}
    refused = {}  # {cell: why it cannot be drawn}
    marks = Marks(record.out)
    total = sum(len(shown_prompts(variant)) * cfg.num_images * (2 if variant.hires else 1) for variant in variants)
    try:
        with Progress(total) as progress:
            for at, cell, variant, prompt, seed, key in planned(cfg, cells, variants):
                files = marks.of(variant)
                row = finished.get(key, files)
                if row or at[0] in refused:
                    rows |= {at: row | cell} if row else {}
                    skipped += bool(row) and finished.is_old(key)
                    progress.skip(2 if variant.hires else 1)
                    continue
                wanted = [getattr(variant, k) for k in LOADING] + [variant.lora_scale] * variant.lora_fuse
                if loaded != wanted:
                    base = None  # the old one leaves before the new one comes
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                    base, loaded = load(variant, record, device), wanted
                    base.tagged = Tagged(variant.lora_dir, variant.allow_partial)
                path, began = record.out / finished.name(key), time.perf_counter()
                try:
                    with record.timed("sample"):
                        one_picture(variant, base, prompt, seed, path, progress)
                except UserError as e:  # a sampler that is not for this model: the others are
                    refused[at[0]] = flagged(e)
                    print(f"note: {grid.label(cell)}: not drawn: {refused[at[0]]}", file=sys.stderr)
                    progress.skip(2 if variant.hires else 1)
                    continue
                seconds = round(time.perf_counter() - began, 3)
                rows[at] = cell | {"file": path.name, "prompt": prompt, "seed": seed, "seconds": seconds}
                finished.add(key, rows[at] | ({"files": files} if files else {}))
    finally:  # what was finished is kept, listed and shown, also after Ctrl-C
        if rows:
            finished.write_csv(rows.values(), dict(axes))
            images.save_png(grid.sheet(rows, axes, record.out, cfg.nrow), record.out / "study.png")
        for row in rows.values():
            record.file(record.out / row["file"], seed=row["seed"], prompt=row["prompt"])
        record.data["results"] |= {"images": len(rows), "cells": len(cells), "taken_over": skipped}
        record.data["results"] |= (
            {"refused": {grid.label(cells[c]): why for c, why in refused.items()}} if refused else {}
        )
        if rows or not refused:
            if alone:
                keep_record(record.out, "a study is added")
            record.write()
    if refused and not rows:
        raise UserError(f"--study: none of {len(cells)} cells can be drawn: {refused[min(refused)]}")
    again = f" ({skipped} of them finished before)" if skipped else ""
    print(f"{len(rows)} pictures{again}, sheet {record.out / 'study.png'}, table {record.out / 'study.csv'}")
    if refused:
        raise UserError(
            f"--study: {len(refused)} of {len(cells)} cells cannot be drawn, such as {grid.label(cells[min(refused)])}: {refused[min(refused)]}"
        )


def parsed(cfg):
    """(axes, cells, the Config of each cell) of --study, all of them checked before any work."""
    axes = grid.parse(cfg.study, type(cfg))
    cells = grid.cells(axes)
    variants = [dataclasses.replace(cfg, **cell) for cell in cells]
    for cell, variant in zip(cells, variants, strict=True):
        vars(variant).update({k: v for k, v in vars(cfg).items() if k not in as_dict(cfg)})  # what was given, and how
        variant.given = frozenset(getattr(cfg, "given", ())) | set(cell)
    for cell, variant in zip(cells, variants, strict=True):
        rebase(variant, [name for name in PATHS if name in cell])
        for name in cell if variant.base_dir == "." else ():
            setattr(variant, name, shipped_option(name, getattr(variant, name)))
        reset_unneeded(variant, dict(axes))
    for variant in variants:
        variant.check()
        note_marks(variant, shown_prompts(variant), variant.negative_prompt)
        options(variant)
    return axes, cells, variants


def reset_unneeded(cfg, axes):
    """What an option needs that is an axis and off in this cell: the option is as if it had not been given. axes: their names."""
    if "control" in axes and not cfg.control:
        cfg.control_image, cfg.control_guess = [], False
    if "refiner" in axes and not cfg.refiner:
        cfg.aesthetic_score = cfg.negative_aesthetic_score = None
    if "prompt_syntax" in axes and cfg.prompt_syntax != "a1111":
        cfg.wildcards = cfg.lora_dir = None
    off = set(axes)  # and what is reset with them, for what needs that
    for field in dataclasses.fields(cfg):
        needs = field.metadata.get("needs") or ()
        needs = (needs,) if isinstance(needs, str) else needs
        if any(name in off for name in needs) and not any(is_given(cfg, name) for name in needs):
            setattr(cfg, field.name, [] if field.default is dataclasses.MISSING else field.default)
            off.add(field.name)


def shown_prompts(cfg):
    """The prompts of a cell; an empty one where there is none, for models (and ControlNets in guess mode) that draw without."""
    return prompts_of(cfg, optional=True) or [""]


def planned(cfg, cells, variants):
    """((cell, picture) by number, the cell's settings, its Config, prompt, seed, what the picture is known by) of a study's pictures."""
    for c, (cell, variant) in enumerate(zip(cells, variants, strict=True)):
        fixed = {k: v for k, v in as_dict(variant).items() if k not in grid.FIXED | (grid.SAME - set(cell))}
        prompts = [prompt for prompt in shown_prompts(variant) for _ in range(cfg.num_images)]
        for j, prompt in enumerate(prompts):
            seed = (cfg.seed if variant.seed is None else variant.seed) + j
            yield (
                (c, j),
                cell,
                variant,
                prompt,
                seed,
                json.dumps(fixed | {"prompt": prompt, "seed": seed}, sort_keys=True),
            )


def one_picture(cfg, base, prompt, seed, path, progress):
    """Make and write one picture of a study by the loaded pipeline `base`."""
    sd = under(cfg, base)
    sd.tagged = base.tagged
    check_prompts(cfg, sd)
    steps, scale, negative = defaults(cfg, sd)
    size, start, finished = inputs(cfg, sd)
    check(cfg, sd, steps, scale, size, start)
    check_words(cfg, sd, [prompt], negative)
    one = job(cfg, prompt, negative, seed)
    sd.tagged.obey(sd, one.loras)
    result = draw(cfg, sd, [one], steps, scale, size, start, on_step=progress.step)
    picture = finished(images.to_pil(result.pixels)[0])
    if cfg.resize:
        picture = picture.resize(parse_size(cfg.resize), images.Image.Resampling.LANCZOS)
    facts = {"scheduler": samplers.name_of(sd.schedule), "steps": steps, "guidance_scale": scale} | size
    facts |= second_pass(cfg, sd, steps)
    facts |= {"negative_prompt": one.negative, "prompt": one.prompt, "seed": seed} | dict(one.others)
    images.save_png(picture, path, remembered(cfg, facts, sd, sd.tagged.hashes_of(one)) if cfg.metadata else None)


def dry_run(cfg, device):
    """Print what a run would take, or of a study the cell that takes most, from configurations alone."""
    _, cells, variants = parsed(cfg) if cfg.study is not None else (None, [{}], [cfg])
    # known: {settings that memory hangs on: plan}; the others: {cell: plan, or why there is none}
    known, plans, refused = {}, {}, {}
    for i, variant in enumerate(variants):
        settings = {k: v for k, v in as_dict(variant).items() if k not in grid.FIXED | WITHOUT_MEMORY}
        settings["guided"] = variant.guidance_scale is None or variant.guidance_scale > 1
        key = json.dumps(settings, sort_keys=True)
        try:
            plans[i] = known[key] = planned_memory(variant, device, known.get(key))
        except UserError as e:
            if cfg.study is None:
                raise
            refused[i] = e
            print(f"note: {grid.label(cells[i])}: cannot be drawn: {e}", file=sys.stderr)
    if not plans:
        raise UserError(f"--study: none of {len(cells)} cells can be drawn: {refused[0]}")
    most = max(plans, key=lambda i: memory.peaks(plans[i])[variants[i].offload])
    if cfg.study is not None:
        print(f"of {len(cells)} cells the one that takes most: {grid.label(cells[most])}")
    for line in memory.table(plans[most], variants[most].offload):
        print(line)
    print("without what the libraries take for themselves (a CUDA context: about 0.5 GB)")
    if refused:
        first = min(refused)
        raise UserError(
            f"--study: {len(refused)} of {len(cells)} cells cannot be drawn, such as {grid.label(cells[first])}: {refused[first]}"
        )


def check_settings(cfg, src, net, scheduler, height, width):
    """Raise UserError for a sampler, and for settings of a run, that are not for the model of `src`: what a run refuses, known from its parts on the
    meta device. net: its denoiser there; scheduler: its file's (dict, name)."""
    family = pipeline.FAMILIES[src.kind]
    there = {
        n: weights.skeleton(src.builder(n), src.config(n)) for n in (*family.encoder_names, "vae") if n in src.parts
    }
    told(cfg, scheduler)
    (raw, where), name = scheduler, str(cfg.model or EMBEDDED)
    encoders = [there.get(n) for n in family.encoder_names]
    # which only say how many words they have
    none = SimpleNamespace(backend=SimpleNamespace(get_vocab_size=int))
    tokenizers = [none for encoder in encoders if encoder is not None]
    sd = family(net, there.get("vae"), encoders, tokenizers, samplers.schedule_of(raw, where, cfg.scheduler), name)
    sd.distilled, sd.index, sd.filed = pipeline.is_turbo(raw, name), getattr(src, "index", {}), (raw, where)
    sd.loras, sd.refiner = [], None
    for later in ("hashes", "decoder", "preview", "controls", "pictures", "model_hash"):
        setattr(sd, later, None)
    sd = under(cfg, sd)
    without_skips(cfg, sd)
    steps, scale, _ = defaults(cfg, sd)
    start = {}
    if cfg.init_image:
        start = {"image": torch.zeros(1, 3, height, width), "strength": strength_of(cfg, sd)}
        start |= {"mask": torch.ones(1, 1, height, width)} if cfg.mask else {}
    check(cfg, sd, steps, scale, {"height": height, "width": width}, start)


def planned_memory(cfg, device, known=None):
    """The stages of a run (memory.Stage), from configurations alone; `known`, if they are, once the settings were checked."""
    src = sources.configs(
        cfg.model or EMBEDDED, cfg.variant, cfg.revision, cfg.token, cfg.components, cfg.prediction_type,
        cfg.allow_pickle, not cfg.t5,
    )  # fmt: skip
    dtype = pick_dtype(cfg, device, src)
    scheduler = src.scheduler()
    turbo = pipeline.is_turbo(scheduler[0], str(cfg.model))
    guided = not turbo if cfg.guidance_scale is None else cfg.guidance_scale > 1
    prompts = len(prompts_of(cfg)) if cfg.prompt or cfg.prompts_file else 1
    part = pipeline.FAMILIES[src.kind].denoiser_name
    net, vae = weights.skeleton(src.builder(part), src.config(part)), src.config("vae") if "vae" in src.parts else None
    guided = guided and not getattr(net.cfg, "time_cond_proj_dim", None)
    scale, channels = (vae.downscale, vae.latent_channels) if vae else (1, net.cfg.out_channels)
    controls = [control.plan(control.parse(text)[0], net.cfg, cfg.token, cfg.allow_pickle) for text in cfg.control]
    for one in controls:
        control.check_fit(one, SimpleNamespace(net=net, channels=channels, downscale=scale))
    multiple = scale * getattr(net.cfg, "patch_size", 1)
    for name, side in (("height", cfg.height), ("width", cfg.width)):
        if side and side % multiple:
            raise UserError(f"--{name} {side} must be a positive multiple of {multiple}")
    for name, path in named_files(
        cfg, ("init_image", "mask", "lora", "embedding", "control_image", "ip_adapter_image")
    ):
        if not Path(path).exists():
            raise UserError(f"--{name.replace('_', '-')} {printable(path)}: no such file")
    side = net.cfg.sample_size or 64
    own = tuple(n * scale for n in ((side, side) if isinstance(side, int) else side))
    picture, sizing = sizing_of(cfg)
    opened_mask(cfg, picture)
    height, width = canvas(cfg, sizing, own, multiple, pipeline.FAMILIES[src.kind].family.keeps_size)
    check_settings(cfg, src, net, scheduler, height, width)
    if known:
        return known
    if cfg.hires:  # the second pass is the larger one
        height, width = (max(round(side * cfg.hires / multiple), 1) * multiple for side in (height, width))
    plan = pipeline.plan(
        src, dtype, height, width, min(cfg.batch_size, cfg.num_images * prompts), guided,
        cfg.quantize, cfg.t5, cfg.max_sequence_length or 256, cfg.vae_tiling, controls, device,
    )  # fmt: skip
    shown = len(cfg.ip_adapter_image) if len(cfg.ip_adapter) == 1 else 1
    for i, text in enumerate(cfg.ip_adapter, 1):
        tower, adapter = pictures.stages(i, text, net, shown, cfg.image_encoder, dtype, cfg.token, cfg.allow_pickle)
        plan = [s._replace(beside=(*s.beside, adapter)) if s.name == part else s for s in plan] + [tower, adapter]
    if cfg.refiner:
        other = refiner_source(cfg, src, sources.configs)
        rows = min(cfg.batch_size, cfg.num_images * prompts)
        more = pipeline.plan(
            other, dtype, height, width, rows, guided, cfg.quantize, cfg.t5, 256, cfg.vae_tiling, device=device
        )
        plan += [stage._replace(name=f"refiner {stage.name.removeprefix('text_')}") for stage in more]
    return plan
