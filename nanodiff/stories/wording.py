"""The prompts of a run as they are drawn: choices made by each picture's seed, LoRAs' tags taken out and obeyed (text/syntax.py)."""

import dataclasses
import re
import sys
from typing import NamedTuple

from nanodiff import lora
from nanodiff.config import UserError, nearest, printable
from nanodiff.files import inside
from nanodiff.stories.models import hashes
from nanodiff.text import syntax


class Job(NamedTuple):
    """One picture."""

    prompt: str  # its choices made, its tags there: what it remembers
    text: str  # what is drawn
    seed: int
    loras: tuple = ()  # ((name, scale), …) of its tags
    negative: str | None = None
    others: tuple = ()  # ((name, text), …) of OTHERS that are given, their choices made


# the texts of the further text encoders, as settings of pipeline.Words
OTHERS = ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")
# ComfyUI's mark of a learned word
EMBEDDING = re.compile(r"\bembedding:(?:[\w.-]+[\\/])*([\w-]+(?:\.[\w-]+)*?)(?:\.(?:pt|bin|safetensors))?(?![\w-])")


def worded(words, batch):
    """pipeline.Words with the further texts of the Jobs `batch`, one for each."""
    names = [name for name, _ in batch[0].others]
    return dataclasses.replace(words, **{name: [dict(one.others)[name] for one in batch] for name in names})


def jobs_of(cfg, prompts, negative, first=0):
    """A Job for each of --num-images pictures of each prompt, the first with the seed --seed + first."""
    typed = [prompt for prompt in prompts for _ in range(cfg.num_images)]
    if typed and (last := cfg.seed + first + len(typed) - 1) >= 1 << 64:
        raise UserError(
            f"--seed {cfg.seed}: the last of {len(typed)} pictures would have the seed {last}, and 64 bits hold less"
        )
    note_marks(cfg, prompts, negative)
    return [job(cfg, prompt, negative, cfg.seed + first + i) for i, prompt in enumerate(typed)]


def check_words(cfg, sd, prompts, negative):
    """Raise UserError for an embedding:NAME of ComfyUI's that no file has taught the tokenizers: without its mark it would be a word like others."""
    known = {word for tokenizer in sd.tokenizers for word in getattr(tokenizer, "words", {})}
    texts = (
        (*prompts, negative or "", *(getattr(cfg, name) or "" for name in OTHERS))
        if cfg.prompt_syntax == "comfyui"
        else ()
    )
    for name in (name for text in texts for name in EMBEDDING.findall(text)):
        if name.casefold() not in {word.casefold() for word in known}:
            raise UserError(
                f"embedding:{printable(name)} in a prompt: no --embedding teaches this word{nearest(name, known)}"
            )


def note_marks(cfg, prompts, negative):
    """A line for each prompt with marks of other programs, where none are read."""
    if not cfg.prompt_syntax:
        for prompt in dict.fromkeys([*prompts, negative or ""]):
            if found := syntax.marks(prompt, cfg.prompt_weights):
                print(
                    f"note: {printable(prompt)!r} holds {found}, which is plain words without --prompt-syntax",
                    file=sys.stderr,
                )


def job(cfg, prompt, negative, seed):
    """The Job of one picture. Raises UserError for marks that cannot be obeyed."""
    others = tuple((name, getattr(cfg, name)) for name in OTHERS if getattr(cfg, name) is not None)
    if not cfg.prompt_syntax:
        return Job(prompt, prompt, seed, (), negative, others)
    folder = cfg.wildcards if cfg.prompt_syntax == "a1111" else None
    dynamic = cfg.prompt_syntax == "a1111"
    # another program's picture says what was chosen: braces in its texts are plain, not in typed ones
    theirs = getattr(cfg, "adopted", False)
    if not theirs or "prompt" in cfg.given:
        prompt = syntax.chosen(prompt, seed, folder, dynamic)
    if negative is not None and (not theirs or "negative_prompt" in cfg.given):
        negative = syntax.chosen(negative, seed, folder, dynamic)
    if cfg.prompt_syntax != "a1111":  # a learned word is used by its name here
        plain = lambda text: text and EMBEDDING.sub(r"\1", text)  # noqa: E731
        others = tuple((name, plain(syntax.chosen(text, seed, None, dynamic))) for name, text in others)
        return Job(plain(prompt), plain(prompt), seed, (), plain(negative), others)
    if negative and syntax.NETWORK.search(negative):
        raise UserError(
            f"{syntax.NETWORK.search(negative)[0]} in a negative prompt: a LoRA is for the whole picture; put it into the prompt"
        )
    text, tags = syntax.networks(prompt)
    return Job(prompt, text, seed, tuple(tags), negative)


def batches_of(jobs, cfg, sd, steps):
    """[(index of the first, jobs)] of up to --batch-size neighbours with the same LoRAs whose texts, the negative ones among them, have one length in
    chunks at every step: a longer neighbour (--long-prompts) would change what a picture attends to."""
    long, weighted = cfg.long_prompts or bool(cfg.prompt_syntax), cfg.prompt_weights or bool(cfg.prompt_syntax)
    weighted = "comfyui" if cfg.prompt_syntax == "comfyui" else weighted

    def lengths(text, *beside):
        """A number where all texts that a prompt is have one length, else when it has which."""
        if text is None:
            return None
        chunks = lambda some: sd.chunks((some, *beside)[: len(sd.encoder_names)], long, weighted)  # noqa: E731
        if cfg.prompt_syntax != "a1111":
            return chunks(text)
        found = [
            [(p.until, chunks(p.text)) for p in syntax.scheduled(part, steps)] for part, _ in syntax.composed(text)
        ]
        alone = {n for part in found for _, n in part}
        return alone.pop() if len(alone) == 1 else str(found)

    batches = []
    for i, one in enumerate(jobs):
        alike = (
            lengths(one.text, *(dict(one.others).get(name) for name in OTHERS[:2])),
            lengths(one.negative, *(dict(one.others).get(name) for name in OTHERS[2:])),
            one.loras,
        )
        if not batches or len(batches[-1][1]) == cfg.batch_size or alike != batches[-1][2]:
            batches.append((i, [], alike))
        batches[-1][1].append(one)
    return [(first, batch) for first, batch, _ in batches]


class Tagged:
    """The LoRAs of tags: read from a folder when they are first asked for, silent until obey()."""

    def __init__(self, folder, partial=False):
        self.folder, self.partial, self.attached, self.hashes = folder, partial, {}, {}

    def obey(self, sd, tags):
        """Let the pipeline draw with `tags` ((name, scale), …) and no others. Raises UserError for a name that is no file's."""
        wanted = {}
        for name, scale in tags:
            wanted[name] = wanted.get(name, 0.0) + scale
        for name in wanted:
            if name not in self.attached:
                path = self._file(name)
                found = lora.read(path, sd.models(), self.partial)
                self.hashes[name] = hashes(path)
                self.attached[name] = lora.attach(sd.models(), found, 0.0)
                print(f"lora: {found.name}, {len(found.deltas)} layers, by its tag in a prompt")
        for name, attached in self.attached.items():
            attached.scale = wanted.get(name, 0.0)

    def hashes_of(self, job):
        """{file: hash} of a Job's LoRAs."""
        return {k: v for name, _ in job.loras for k, v in self.hashes[name].items()}

    def _file(self, name):
        if self.folder is None:
            raise UserError(f"<lora:{printable(name)}:…> needs --lora-dir, the folder it is in")
        files = sorted(inside(self.folder, ".safetensors"))
        exact = {p.relative_to(self.folder).with_suffix("").as_posix(): p for p in files}
        alike = list({p.resolve(): p for p in files if p.stem == name}.values())  # a file and a link to it are one
        if name in exact:
            if len(alike) > 1:
                print(
                    f"note: <lora:{printable(name)}> is {exact[name]}, not {next(p for p in alike if p != exact[name])}",
                    file=sys.stderr,
                )
            return exact[name]
        if not alike:
            raise UserError(
                f"{self.folder}: has no LoRA {printable(name)}{nearest(name, dict.fromkeys([*exact, *(p.stem for p in files)]))}"
            )
        if len(alike) > 1:
            raise UserError(
                f"<lora:{printable(name)}> could be {alike[0]} or {alike[1]}; name its folder, <lora:FOLDER/{printable(name)}>"
            )
        return alike[0]
