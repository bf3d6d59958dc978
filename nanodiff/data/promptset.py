"""Sets of prompts: every combination of some words, drawn at random, or lists that are there already.

    read("assets/prompts/dogs.json").draw(1000, seed=42)

A file of words is JSON: `templates` {category: "a {breed} dog {pose}"}, `words` {name: [word, …]}, and `training`, the categories that
pictures to learn from are drawn of (default: the first). Lists are .txt (a prompt a line; one that begins with "# " or "## " is a comment), .csv and .tsv (a column of prompts, or of lists of
them as caption.py has them, and perhaps `category`), or any set of pictures with captions.
"""

import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanodiff.config import UserError, nearest, printable, read_json, short
from nanodiff.data import sources, tables
from nanodiff.device import dist

COLUMNS = ("prompt", "prompts", "caption", "text", "Title")
LISTED = "standard"  # the category of a list's prompts
FOLDER = re.compile(r"[\w][\w ().-]{0,60}")  # what a category may be called


class Words(NamedTuple):
    """Templates and the words that fill them."""

    templates: dict  # {category: text with {name}}
    words: dict  # {name: [word, …]}
    training: list  # categories

    def count(self, category):
        """Different prompts of a category."""
        return math.prod(len(self.words[n]) for n in names_in(self.templates[category]))

    def one(self, category, number):
        """Prompt `number` of a category, in the order in which the last word turns fastest."""
        chosen = {}
        for name in reversed(names_in(self.templates[category])):
            number, i = divmod(number, len(self.words[name]))
            chosen[name] = self.words[name][i]
        return self.templates[category].format(**chosen)

    def draw(self, n, seed, categories=None, without=()):
        """n pairs (category, prompt), each different while there are enough, as evenly over `categories` (default: `training`) as can be.
        without: prompts that are not to be drawn."""
        categories, taken, out = categories or self.training, set(without), []
        for k, category in enumerate(categories):
            share = n // len(categories) + (k < n % len(categories))
            rng, total = np.random.default_rng([seed, k]), self.count(category)
            order = (
                rng.permutation(total)
                if total <= 1 << 20
                else iter(lambda rng=rng, total=total: rng.integers(total), None)
            )
            fresh = (p for p in (self.one(category, int(i)) for i in order) if p not in taken)
            some = list(dict.fromkeys(itertools.islice(fresh, share)))
            while len(some) < share:  # all of them are used up
                some += [self.one(category, int(i)) for i in rng.permutation(total)[: share - len(some)]]
            out += [(category, p) for p in some]
        return out


class Lines(NamedTuple):
    """Prompts that are listed."""

    pairs: list  # (category, prompt)

    def draw(self, n, seed, categories=None, without=()):
        """The first n that are not in `without`; from the first on again when these are fewer. seed, categories: for Words alone."""
        fresh = [p for p in self.pairs if p[1] not in set(without)] or self.pairs
        return [fresh[i % len(fresh)] for i in range(n)]


def names_in(template):
    """The {names} of a template, each once, in order."""
    return list(dict.fromkeys(re.findall(r"\{(\w+)\}", template)))


def read(path, column=None):
    """Words or Lines of a file (see the module docstring). column: of a table's prompts. Raises UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".json" and isinstance(raw := read_json(path), dict) and "templates" in raw:
        return _words(raw, path)
    if path.suffix.lower() in tables.SUFFIXES:
        return Lines(_table(path, column))
    if column:
        raise UserError(f"`prompt_column` is for tables, and {path} is none")
    if path.suffix.lower() == ".txt":
        lines = [line for line in tables.lines(path) if not re.match(r"#+(\s|$)", line)]
    else:
        lines = list(sources.load(path).captions)
    if not lines:
        raise UserError(f"{path}: has no prompts")
    return Lines([(LISTED, line) for line in lines])


def _words(raw, path):
    for key in raw:
        if key not in Words._fields:
            raise UserError(f"{path}: unknown key {printable(key)!r}{nearest(key, Words._fields)}")
    templates, words = raw["templates"], raw.get("words", {})
    texts = lambda v: isinstance(v, list) and v and all(isinstance(w, str) and w for w in v)  # noqa: E731
    if not isinstance(templates, dict) or not templates or not all(isinstance(t, str) for t in templates.values()):
        raise UserError(f"{path}: templates is no object of texts")
    if not isinstance(words, dict) or not all(texts(v) for v in words.values()):
        raise UserError(f"{path}: words is no object of lists of texts")
    for name, some in words.items():
        if twice := [w for w in some if some.count(w) > 1]:
            dist.say(
                f"note: {path}: words of {name!r}: {short(twice[0])} stands twice, so some prompts are drawn more often"
            )
    for category, template in templates.items():
        rest = re.sub(r"\{\w+\}", "", template)
        if "{" in rest or "}" in rest:
            raise UserError(f"{path}: template {category!r} has a brace that is no {{name}}")
        if not FOLDER.fullmatch(category):
            raise UserError(f"{path}: category {printable(category)!r} cannot name a folder")
        for name in names_in(template):
            if not name.isidentifier():
                raise UserError(
                    f"{path}: template {category!r}: {{{name}}} is no name (a letter, then letters and digits)"
                )
            if name not in words:
                raise UserError(
                    f"{path}: template {category!r} wants {name!r}, which words has not{nearest(name, words)}"
                )
    training = raw.get("training", list(templates)[:1])
    if not texts(training):
        raise UserError(f"{path}: training is no list of categories")
    for category in training:
        if category not in templates:
            raise UserError(
                f"{path}: training names {category!r}, which templates has not{nearest(category, templates)}"
            )
    return Words(templates, words, training)


def _table(path, column):
    header, rows = tables.rows(path)
    name = tables.column(column, COLUMNS, header, path, "prompt_column")
    pairs = []
    for where, row in rows:
        texts, category = tables.captions_in(row[name], where), row.get("category", "").strip() or LISTED
        if not texts:
            raise UserError(f"{where}: no {name}")
        if not FOLDER.fullmatch(category):
            raise UserError(f"{where}: category {short(category)} cannot name a folder")
        pairs += [(category, text) for text in texts]
    if not pairs:
        raise UserError(f"{path}: has no rows")
    return pairs
