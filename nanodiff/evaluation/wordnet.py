"""Synonyms from a WordNet that somebody has: the database files of Princeton (wordnet.princeton.edu/documentation/wndb5wn).

    words = WordNet("dict"); words.synonyms("couches")     # {"couch", "sofa", "lounge", …}

`index.POS` has a line a lemma that ends with the byte offsets of its synsets, `data.POS` a line a synset with its words, `POS.exc` irregular
forms. A form that is no lemma is looked up without its endings, once, as the library's `morphy` does (morphy7wn).
"""

import re
from pathlib import Path

from nanodiff.config import UserError

ENDINGS = {  # what each ending is taken for, by part of speech
    "noun": (("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}  # fmt: skip


class WordNet:
    """The database in a folder. Raises UserError for a folder that lacks one of its files, and for lines that are no WordNet's."""

    def __init__(self, folder):
        self.folder, self.lemmas, self.irregular, self.data, self.known = Path(folder), {}, {}, {}, {}
        for pos in ENDINGS:
            try:
                self.data[pos] = (self.folder / f"data.{pos}").read_bytes()
                index = (self.folder / f"index.{pos}").read_text(encoding="utf-8")
                irregular = (self.folder / f"{pos}.exc").read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as e:
                raise UserError(
                    f"`wordnet` {self.folder}: needs index.{pos}, data.{pos} and {pos}.exc of WordNet: {e}"
                ) from None
            self.irregular[pos] = {word: lemmas for word, *lemmas in map(str.split, irregular.splitlines()) if lemmas}
            self.lemmas[pos] = {}
            for line in index.splitlines():
                if not line.startswith(" "):  # the licence
                    cells = line.split()
                    try:
                        self.lemmas[pos][cells[0]] = [int(offset) for offset in cells[-int(cells[2]) :]]
                    except (IndexError, ValueError):
                        raise UserError(
                            f"`wordnet` {self.folder}/index.{pos}: {line[:60]!r} is no line of WordNet's"
                        ) from None

    def synonyms(self, word):
        """All words (no phrases) of all synsets of a word's base forms, as a set."""
        if word not in self.known:
            self.known[word] = {w for pos in ENDINGS for form in self._forms(word, pos) for w in self._words(form, pos)}
        return self.known[word]

    def _forms(self, word, pos):
        """The word and its base forms, as far as they are lemmas."""
        others = self.irregular[pos].get(word)
        if others is None:
            others = [word[: len(word) - len(end)] + base for end, base in ENDINGS[pos] if word.endswith(end)]
        return dict.fromkeys(form for form in (word, *others) if form in self.lemmas[pos])

    def _words(self, lemma, pos):
        for offset in self.lemmas[pos][lemma]:
            line = self.data[pos][offset : self.data[pos].find(b"\n", offset)].decode("utf-8").split()
            if len(line) < 4 or line[0] != f"{offset:08d}":
                raise UserError(f"`wordnet` {self.folder}: data.{pos} does not belong to index.{pos}")
            for word in line[4 : 4 + 2 * int(line[3], 16) : 2]:
                word = re.sub(r"\((?:a|p|ip)\)$", "", word)  # where an adjective may stand
                if "_" not in word:
                    yield word
