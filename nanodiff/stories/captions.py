"""caption.py's stories of texts: going on with one, varying captions, drawing them, splitting them."""

import sys
import time
from pathlib import Path

import torch

from nanodiff import pipeline
from nanodiff.commandline import as_dict
from nanodiff.config import UserError, printable
from nanodiff.data import captionset, tables
from nanodiff.data.promptset import names_in
from nanodiff.device import choice, dist, quantize
from nanodiff.files import apart, out_dir
from nanodiff.models import layers
from nanodiff.output.record import Record
from nanodiff.pipeline import sources
from nanodiff.stories import gallery
from nanodiff.text import textgen
from nanodiff.training import loader
from nanodiff.training.options import parse_size
from nanodiff.weights import hub


def begin(cfg):
    """(device, Record) of a stage, joined with the other processes if there are any."""
    device = choice.pick_device(cfg.device)
    if hasattr(cfg, "dist_timeout"):
        dist.start(device, cfg.dist_timeout)
        dist.agree(as_dict(cfg), "configuration")
    layers.use_kernels(cfg.kernels)
    return device, Record(cfg, device)


def end(record):
    record.write()
    dist.finish()


def language_dtype(cfg, device, quantized=None):
    """torch dtype of a language model: bf16 on a GPU by itself, and for what reads quantized weights."""
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" or quantized else torch.float32
    return choice.pick_dtype(cfg.dtype, device)


def language(cfg, device):
    """(CausalLM, TextTokenizer) of --model."""
    folder = dist.on_main(hub.one, cfg.model, cfg.hf_token)
    net, tokenizer = dist.together(sources.load_language, folder, language_dtype(cfg, device, cfg.quantize), device)
    if cfg.quantize:
        quantized(net, cfg.quantize)
    return net, tokenizer


def quantized(net, kind):
    """Keep a CausalLM's weights in `kind`, and say what that costs."""
    error = dist.together(quantize.language, net, kind)
    dist.say(f"quantized to {kind}: the weights are {100 * error:.2g} % off (RMS)")


def complete(cfg):
    """The stage `complete`: see the module docstring."""
    for name in ("model", "prompt"):
        if not getattr(cfg, name):
            raise UserError(f"--{name} is required")
    chance = textgen.Chance(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty)
    device, record = begin(cfg)
    with record.timed("load"):
        net, tokenizer = language(cfg, device)
    if cfg.chat and not net.cfg.gemma:
        raise UserError("--chat is Gemma's form, which this model has not learned")
    text = textgen.chat([{"role": "user", "content": cfg.prompt}]) if cfg.chat else cfg.prompt
    ids = tokenizer.ids(text, begin=not cfg.chat)
    times = []
    with record.timed("write"):
        (written,) = textgen.generate(net, [ids], cfg.max_new_tokens, chance, net.cfg.eos_token_id, [cfg.seed], cfg.beams,
                                      on_step=lambda i, seconds: times.append(seconds))  # fmt: skip
    record.data["results"] = {"prompt_ids": ids, "ids": written.ids, "ended": written.ended}
    if len(times) > 1:
        rate = (len(times) - 1) / sum(times[1:])
        record.data["results"]["tokens_per_s"] = rate
        print(f"{len(ids)} tokens read in {times[0]:.2f} s, then {rate:.1f} tokens/s", file=sys.stderr)
    record.write()
    print(tokenizer.rest(ids, written.ids))


REQUEST = ('Write {n} different variations of this caption of a picture: "{caption}". Keep the kind of thing, and change its ingredients, its '
           "style or how it is made. Each variation has {low} to {high} words and stands on a line of its own. Write the variations alone.")  # fmt: skip
EXAMPLE = ("Caption: Grilled Salmon with Lemon\nVariations:\n- Smoked salmon with dill and lemon\n- Salmon tartare on rye toast\n- Baked salmon "
           "in a herb crust\n\nCaption: Iced Tea\nVariations:\n- Peach iced tea with mint\n- Green tea over ice with honey\n- Sparkling "
           "hibiscus iced tea\n\nCaption: {caption}\nVariations:\n-")  # fmt: skip
JOURNAL = "augmented"


def augment(cfg):
    """The stage `augment`: new captions for each of a CSV's, by a language model; the same for any number of processes."""
    if cfg.max_words < cfg.min_words:
        raise UserError(f"--max-words {cfg.max_words} is less than --min-words {cfg.min_words}")
    chance = textgen.Chance(cfg.temperature, cfg.top_k, cfg.top_p, 0.0, cfg.repetition_penalty)
    apart({"data_csv": cfg.data_csv}, captionset.Journal.tables(cfg.output_dir, JOURNAL))
    device, record = begin(cfg)
    rows = dist.on_main(captionset.read, cfg.data_csv, cfg.clean, cfg.skip_bad)
    if cfg.start_idx >= len(rows):
        raise UserError(f"--start-idx {cfg.start_idx}: {cfg.data_csv} has {len(rows)} captions")
    template = template_of(cfg)
    with record.timed("load"):
        writer = Writer(cfg, chance, template, rows, *language(cfg, device))
    settings = {k: getattr(cfg, k) for k in ("model", "variations", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens",
                                             "min_words", "max_words", "attempts", "clean", "seed")}  # fmt: skip
    dtype = str(writer.net.output.dtype).removeprefix("torch.")
    settings |= {"template": writer.template, "chat": writer.chat, "dtype": dtype}
    settings |= {"model_sha256": loader.fingerprint(writer.net)}  # a path says little of what lies there
    settings |= {"quantize": cfg.quantize} if cfg.quantize else {}
    work = captionset.Journal(record.out, JOURNAL, rows, settings, cfg.overwrite_output_dir)
    some = range(cfg.start_idx, min(len(rows), cfg.start_idx + (cfg.max_samples or len(rows))))
    groups = [list(some[i : i + cfg.batch_size]) for i in range(0, len(some), cfg.batch_size)]
    todo = [g for g in groups if any(i not in work.done for i in g)]
    if len(todo) < len(groups):
        dist.say(f"{record.out}: {sum(i in work.done for i in some)} of {len(some)} captions are varied already")
    mine = todo[dist.world().rank :: dist.world().size]

    def run():
        for group in dist.progress(mine, len(mine), "captions (batches)"):
            for i, (found, replies) in writer.vary(group).items():
                work.add(i, found, replies)

    with record.timed("write"):
        dist.together(run)
    counts = work.finish(cfg.variations)
    if writer.seconds:
        rate = writer.tokens / writer.seconds
        dist.say(f"{writer.tokens} tokens in {writer.seconds:.1f} s: {rate:.1f} tokens/s in a process")
        record.data["results"]["tokens_per_s"] = rate
    for name, value in counts.items():
        record.result(name, value)
    if counts["captions_with_fewer"]:
        dist.say(
            f"warning: {counts['captions_with_fewer']} of {counts['captions']} captions have fewer than {cfg.variations} variations "
            f"after {cfg.attempts if cfg.temperature else 1} replies; {work.shortfall} names them"
        )
    record.file(work.csv)
    end(record)


class Writer:
    """A language model that is asked for variations of captions. template: the request, None: the model's own kind of it (a chat's
    REQUEST, or for a model that only goes on with a text EXAMPLE)."""

    def __init__(self, cfg, chance, template, rows, net, tokenizer):
        self.cfg, self.chance, self.rows, self.net, self.tokenizer = cfg, chance, rows, net, tokenizer
        if cfg.chat == "yes" and not net.cfg.gemma:
            raise UserError(
                "--chat yes is Gemma's form, which this model has not learned; it is shown examples instead"
            )
        self.chat = cfg.chat != "no" and net.cfg.gemma
        self.template = template or (REQUEST if self.chat else EXAMPLE)
        self.tokens, self.seconds = 0, 0.0  # written, and how long that took

    def vary(self, group):
        """{row: (variations, replies)} of a group, whose rows ask again until they have enough."""
        cfg, got = self.cfg, {i: ([], 0) for i in group}
        for attempt in range(cfg.attempts if cfg.temperature else 1):  # the likeliest reply is always the same
            lacking = [i for i in group if len(got[i][0]) < cfg.variations]
            if not lacking:
                break
            wanted = [cfg.variations - len(got[i][0]) for i in lacking]
            for i, (reply, whole) in zip(lacking, self.replies(lacking, wanted, attempt), strict=True):
                known, own = got[i][0], self.rows[i].captions
                fresh = captionset.variations(reply, own[0], cfg.min_words, cfg.max_words, (*known, *own), not whole)
                fresh = [captionset.cleaned(t) for t in fresh] if cfg.clean else fresh
                got[i] = ([*known, *fresh][: cfg.variations], attempt + 1)
        return got

    def replies(self, some, wanted, attempt):
        """[(reply, was it written to its end?)] for each row of `some`."""
        cfg, tokenizer = self.cfg, self.tokenizer
        texts = [asked(cfg, self.template, self.rows[i], n) for i, n in zip(some, wanted, strict=True)]
        if self.chat:
            texts = [textgen.chat([{"role": "user", "content": t}]) for t in texts]
        ids = [tokenizer.ids(t, begin=not self.chat) for t in texts]
        seeds = [captionset.seed_of(cfg.seed, self.rows[i].name, attempt) for i in some]
        start = time.perf_counter()
        written = textgen.generate(self.net, ids, cfg.max_new_tokens, self.chance, self.net.cfg.eos_token_id, seeds,
                                   until=None if self.chat else self.enough)  # fmt: skip
        self.tokens += sum(len(w.ids) for w in written)
        self.seconds += time.perf_counter() - start
        return [self.read(i, tokenizer.rest(p, w.ids), w.ended) for i, p, w in zip(some, ids, written, strict=True)]

    def enough(self, ids):
        """Has a reply said what is read of it?"""
        return ("\n" if "{first}" in self.template else "\n\n") in self.tokenizer.decode(ids)

    def read(self, i, text, ended):
        """(what of the text is the reply for row i, is its last line whole?)"""
        reply = text
        if "{first}" in self.template:  # the request ends with the caption's first word
            reply = self.rows[i].captions[0].split()[0] + text.split("\n")[0]
        elif not self.chat:
            reply = text.split("\n\n")[0]
        # what was cut off at a line's end left whole lines
        return reply, ended or reply.count("\n") != text.count("\n")


def template_of(cfg):
    """The request's text, or None. Raises UserError for one that does not name the caption."""
    if cfg.template is None:
        return None
    path = Path(cfg.template)
    if path.suffix.lower() == ".txt" and "{" not in cfg.template and not path.is_file():
        raise UserError(f"--template {cfg.template}: no such file")
    text = tables.text_of(path) if path.suffix.lower() == ".txt" and path.is_file() else cfg.template
    names = names_in(text)
    if strange := [n for n in names if n not in ("caption", "n", "low", "high", "first")]:
        raise UserError(
            f"--template: {{{printable(strange[0])}}} is none of {{caption}}, {{n}}, {{low}}, {{high}}, {{first}}"
        )
    if not {"caption", "first"} & set(names):
        raise UserError("--template names neither {caption} nor {first}, so all captions would get the same variations")
    return text


def asked(cfg, template, row, n):
    """The request for one caption."""
    caption = row.captions[0]
    for name, value in (
        ("n", n),
        ("low", cfg.min_words),
        ("high", cfg.max_words),
        ("first", caption.split()[0]),
        ("caption", caption),
    ):
        template = template.replace(f"{{{name}}}", str(value))
    return template


def synthesize(cfg):
    """The stage `synthesize`: a picture for each caption; the same for any number of processes."""
    if "{caption}" not in cfg.template:
        raise UserError("--template does not name {caption}, so all pictures would be of the same words")
    size = parse_size(cfg.resize, otherwise=", or none") if cfg.resize != "none" else None
    apart({"data_csv": cfg.data_csv}, [Path(cfg.output_dir) / "synthetic_captions.csv"])
    device, record = begin(cfg)
    source = cfg.data_csv or record.out / "augmented_captions.csv"
    rows = dist.on_main(captionset.read, source, False, cfg.skip_bad)
    with record.timed("load"):
        dtype = choice.pick_dtype(cfg.dtype, device)
        sd = dist.together(pipeline.load, cfg.model, dtype, device, token=cfg.hf_token)
        sd = sd.with_scheduler((None if sd.schedule.flow else "ddpm") if cfg.scheduler == "auto" else cfg.scheduler)
    negative, scale = cfg.negative_prompt or None, cfg.guidance_scale
    given = getattr(cfg, "given", frozenset())
    if sd.turbo and "guidance_scale" not in given:
        scale = None
    how = gallery.settings(
        sd, cfg.model, None if sd.turbo and "steps" not in given else cfg.steps, scale, cfg.height, cfg.width
    )
    if negative and how["guidance_scale"] <= 1:
        dist.say(f"warning: guidance is off at {how['guidance_scale']:g}; the negative prompt is not used")
        negative = None
    how |= {"negative_prompt": negative, "resize": size, "template": cfg.template}
    jobs = [
        gallery.Job(
            f"{row.name}.{cfg.format}",
            cfg.template.replace("{caption}", row.captions[0]),
            captionset.seed_of(cfg.seed, row.name),
        )
        for row in rows
    ]
    folder, listing = record.out / "images", record.out / "synthetic_captions.csv"
    by_name = {job.name: row for job, row in zip(jobs, rows, strict=True)}
    columns = {captionset.SOURCE: lambda row: row.source}
    dist.on_main(lambda: listing.exists() or captionset.append(listing, captionset.table([], columns)))
    with record.timed("draw"):
        failed = gallery.draw(sd, jobs, folder, how, cfg.batch_size, cfg.overwrite_output_dir, exact=True, on_saved=lambda job: captionset.append(
            listing, captionset.line(by_name[job.name], columns)))  # fmt: skip
    drawn = [row for job, row in zip(jobs, rows, strict=True) if job.name not in failed]
    dist.on_main(captionset.write, listing, drawn, columns)
    record.result("pictures", len(drawn))
    record.result("failed", len(failed))
    for job in jobs:
        if job.name not in failed:
            record.file(folder / job.name, prompt=job.prompt, seed=job.seed)
    record.file(listing)
    end(record)


def split(cfg):
    """The stage `split`: see captionset.split()."""
    for name in ("val_share", "test_share"):
        if not 0 < getattr(cfg, name) < 0.5:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name):g} must be above 0 and below 0.5")
    record = Record(cfg, choice.pick_device("cpu"))
    targets = {n: Path(getattr(cfg, f"{n}_csv_path") or record.out / f"{n}.csv") for n in ("train", "val", "test")}
    taken = {Path(path).resolve(): f"what --{flag} names" for flag, paths in
             (("original-csv", [cfg.original_csv]), ("synthetic-csv", cfg.synthetic_csv)) for path in paths}  # fmt: skip
    for name, path in targets.items():
        if (other := taken.setdefault(path.resolve(), f"the {name} part")) != f"the {name} part":
            raise UserError(
                f"{path}: the {name} part would replace {other}; take another --output-dir or --{name}-csv-path"
            )

    def rows_of(path):
        beside = Path(path).parent / "images"
        folders = cfg.image_path or ([beside] if beside.is_dir() else ["data/images"])
        return captionset.located(captionset.read(path, cfg.clean, cfg.skip_bad), folders, cfg.skip_bad)

    with record.timed("read"):
        original, synthetic = rows_of(cfg.original_csv), []
        for path in cfg.synthetic_csv:
            synthetic += rows_of(path)
    with record.timed("split"):
        shares = (1 - cfg.val_share - cfg.test_share, cfg.val_share, cfg.test_share)
        parts, counts = captionset.split(original, synthetic, cfg.seed, shares, cfg.apart, cfg.skip_bad)
    for name, rows in parts.items():
        path, made = targets[name], captionset.table(rows)
        out_dir(path.parent)
        if path.is_file() and path.read_bytes() != made:
            dist.say(
                f"warning: {path}: replaces another split; what was trained on that one may know pictures of this one's test part"
            )
        captionset.write(path, rows)
        record.file(path)
    for name, value in counts.items():
        record.result(name.replace(" ", "_"), value)
    record.write()
