"""Scores of captions against references: BLEU, ROUGE-L, METEOR (exact, stem, synonyms), CIDEr-D; the Penn Treebank tokenizer.

All take `candidates`, a list of texts, and `references`, a list of lists of texts, already tokenised and joined by spaces
(see `tokenize`). Each gives a `Score`: the value of the whole set, and that of every caption alone. The two are not the same thing: corpus BLEU pools its counts before it divides, the mean of single BLEUs does not.

- BLEU (Papineni et al. 2002, ACL, eq. 1-3): clipped n-gram precisions, brevity penalty against the closest reference
  length, as the COCO caption server computes it, with its two tiny constants in place of a smoothing.
- ROUGE-L (Lin 2004, ACL workshop, eq. 2-4): longest common subsequence; COCO's form has β = 1.2 and takes the best precision and
  the best recall of all references apart; `rouge_l_f1` has β = 1 and takes the best reference, as rouge-score does.
- METEOR (Banerjee and Lavie 2005, ACL workshop) with α 0.9, β 3, γ 0.5, words matched exactly, then by Porter stem,
  then, where a WordNet is given, by synonyms, as nltk does. Paraphrases are not matched, so it is not the number of the official Java program.
- CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726 eq. 2-4): tf-idf of n-grams, clipped, with a penalty of the length; document
  frequencies from the references given, so a subset scores differently.
"""

import functools
import itertools
import math
from collections import Counter
from typing import NamedTuple

import numpy as np

from nanodiff.config import UserError, printable
from nanodiff.evaluation.ptb import tokenize as tokenize  # as it was called here

NAMES = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "rouge_l_f1", "meteor", "cider")
TINY, SMALL = 1e-15, 1e-9  # the constants of the COCO program, which keep its quotients finite
N, SIGMA = 4, 6.0  # longest n-gram; the width of CIDEr-D's length penalty, in words


class Score(NamedTuple):
    """A number for the whole set, and for each caption alone."""

    value: float
    each: list


# ---------------------------------------------------------------------------------------------------------
# Words


def _vowels(word):
    """For each letter whether it is a vowel; y is one after a consonant."""
    found = []
    for i, letter in enumerate(word):
        found.append(letter in "aeiou" or (letter == "y" and i > 0 and not found[i - 1]))
    return found


def _measure(stem):
    """How many times a vowel is followed by a consonant: m in [C](VC)^m[V]."""
    kinds = _vowels(stem)
    return sum(a and not b for a, b in itertools.pairwise(kinds))


def _short(word):
    """Does it end consonant, vowel, consonant (not w, x, y)? Or is it vowel, consonant alone?"""
    kinds = _vowels(word)
    if len(word) >= 3:
        return kinds[-3:] == [False, True, False] and word[-1] not in "wxy"
    return kinds == [True, False]


_IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "innings": "inning", "outings": "outing",
              "cannings": "canning"}  # fmt: skip
_KEPT = {"sky", "news", "inning", "outing", "canning", "howe", "proceed", "exceed", "succeed"}
_STEP2 = [("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
          ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
          ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
          ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful")]  # fmt: skip
_STEP3 = [("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")]
_STEP4 = ("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
          "ous", "ive", "ize")  # fmt: skip


def _replaced(word, rules):
    """The first rule whose ending the word has, applied when the rest has a measure above 0."""
    for ending, other in rules:
        if word.endswith(ending):
            rest = word[: -len(ending)]
            return rest + other if _measure(rest) > 0 else word
    return word


@functools.lru_cache(maxsize=1 << 16)
def stem(word):
    """The stem of an English word: Porter's algorithm (1980, Program 14(3)) with the later changes that NLTK has (its own
    irregular words; `ies`, `ied` and `y` treated as in Porter's later versions)."""
    word = word.lower()
    if word in _IRREGULAR or word in _KEPT or len(word) <= 2:
        return _IRREGULAR.get(word, word)
    word = _plural(word)
    word = _past(word)
    if word.endswith("y") and len(word) > 2 and not _vowels(word)[-2]:
        word = word[:-1] + "i"
    word = _derived(word)
    word = _replaced(word, _STEP3)
    for ending in sorted(_STEP4, key=len, reverse=True):
        if word.endswith(ending):
            rest = word[: -len(ending)]
            if _measure(rest) > 1 and (ending != "ion" or rest[-1] in "st"):
                word = rest
            break
    if word.endswith("e"):
        rest = word[:-1]
        if _measure(rest) > 1 or (_measure(rest) == 1 and not _short(rest)):
            word = rest
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


def _plural(word):
    """Step 1a."""
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    for ending, other in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
        if word.endswith(ending):
            return word[: -len(ending)] + other
    return word


def _past(word):
    """Step 1b."""
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    ending = next((e for e in ("ed", "ing") if word.endswith(e) and any(_vowels(word[: -len(e)]))), None)
    if not ending:
        return word
    rest = word[: -len(ending)]
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if len(rest) > 1 and rest[-1] == rest[-2] and not _vowels(rest)[-1]:
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if _measure(rest) == 1 and _short(rest) else rest


def _derived(word):
    """Step 2."""
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _derived(word[:-4] + "al")
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replaced(word, _STEP2)


# ---------------------------------------------------------------------------------------------------------
# Scores


def _ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _bleu_counts(candidate, references):
    """[length, closest reference length, guesses 1-4, matches 1-4] of one caption: what corpus BLEU adds up."""
    words, others = candidate.split(), [r.split() for r in references]
    closest = min((abs(len(o) - len(words)), len(o)) for o in others)[1]
    guesses, matches = [], []
    for n in range(1, N + 1):
        most = Counter()
        for other in others:
            most |= _ngrams(other, n)
        guesses.append(max(0, len(words) - n + 1))
        matches.append((_ngrams(words, n) & most).total())
    return [len(words), closest, *guesses, *matches]


def _bleu_of(counts):
    """[BLEU-1 … BLEU-4] of summed counts."""
    length, closest, guesses, matches = counts[0], counts[1], counts[2 : 2 + N], counts[2 + N :]
    ratio = (length + TINY) / (closest + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, values = 1.0, []
    for n in range(N):
        product *= (matches[n] + TINY) / (guesses[n] + SMALL)
        values.append(product ** (1 / (n + 1)) * brevity)
    return values


def bleu(candidates, references):
    """[Score of BLEU-1, …, BLEU-4]; values 0 to 1."""
    counts = [_bleu_counts(c, r) for c, r in zip(candidates, references, strict=True)]
    each = [_bleu_of(c) for c in counts]
    whole = _bleu_of(np.sum(counts, 0).tolist())
    return [Score(whole[n], [e[n] for e in each]) for n in range(N)]


def _common(a, b):
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def _f_score(precision, recall, beta):
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def rouge_l(candidates, references, beta=1.2, apart=True):
    """apart: the best precision and the best recall, of different references perhaps (COCO); else the best reference's F."""
    each = []
    for candidate, others in zip(candidates, references, strict=True):
        words = candidate.split()
        pairs = []
        for other in (o.split() for o in others):
            common = _common(words, other)
            pairs.append((common / len(words) if words else 0.0, common / len(other) if other else 0.0))
        if apart:
            each.append(_f_score(max(p for p, _ in pairs), max(r for _, r in pairs), beta))
        else:
            each.append(max(_f_score(p, r, beta) for p, r in pairs))
    return Score(sum(each) / len(each), each)


def _aligned(words, others, synonyms=None):
    """[(place in words, place in others)]: equal words first, then equal stems, then synonyms, each from the end, each place once.

    Synonyms are asked of the stems, as nltk does, whose numbers people compare with: "big" does not match "large", whose stem is "larg"."""
    left, right, found = dict(enumerate(words)), dict(enumerate(others)), []
    ways = [str.__eq__, lambda a, b: stem(a) == stem(b)] + (
        [lambda a, b: stem(b) in synonyms(stem(a))] if synonyms else []
    )
    for same in ways:
        for i in sorted(left, reverse=True):
            j = next((j for j in sorted(right, reverse=True) if same(left[i], right[j])), None)
            if j is not None:
                found.append((i, j))
                del left[i], right[j]
    return sorted(found)


def _meteor_of(words, others, synonyms=None, alpha=0.9, beta=3.0, gamma=0.5):
    matches = _aligned(words, others, synonyms)
    if not matches:
        return 0.0
    precision, recall = len(matches) / len(words), len(matches) / len(others)
    mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
    chunks = 1 + sum((b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in itertools.pairwise(matches))
    return (1 - gamma * (chunks / len(matches)) ** beta) * mean


def meteor(candidates, references, synonyms=None):
    """The best reference's METEOR of each caption, by equal words and stems (see above), and their mean. synonyms(word): a set of words that
    match it too (wordnet.WordNet's)."""
    each = [
        max(_meteor_of(c.split(), r.split(), synonyms) for r in others)
        for c, others in zip(candidates, references, strict=True)
    ]
    return Score(sum(each) / len(each), each)


def cider(candidates, references):
    """CIDEr-D × 10 as COCO reports it; 0 for a set of one picture, whose words all have no weight."""
    rows = [
        (
            [_ngrams(c.split(), n) for n in range(1, N + 1)],
            [[_ngrams(r.split(), n) for n in range(1, N + 1)] for r in rs],
        )
        for c, rs in zip(candidates, references, strict=True)
    ]
    seen = [Counter(gram for _, others in rows for gram in {g for o in others for g in o[n]}) for n in range(N)]
    pictures = math.log(len(rows))

    def weigh(grams):
        vector = [{g: c * (pictures - math.log(max(1, seen[n][g]))) for g, c in grams[n].items()} for n in range(N)]
        return vector, [math.sqrt(sum(v * v for v in part.values())) for part in vector], grams[1].total()

    each = []
    for mine, others in rows:
        (a, norm_a, length_a), values = weigh(mine), []
        for b, norm_b, length_b in map(weigh, others):
            penalty = math.exp(-((length_a - length_b) ** 2) / (2 * SIGMA**2))
            for n in range(N):
                dot = sum(min(v, b[n][g]) * b[n][g] for g, v in a[n].items() if g in b[n])
                norm = norm_a[n] * norm_b[n]
                values.append(penalty * (dot / norm if norm else dot))
        each.append(10 * sum(values) / len(values))
    return Score(sum(each) / len(each), each)


def check_names(names, more=()):
    """Raise UserError for a metric that we do not have. more: those that a stage has beside NAMES."""
    for name in (n for n in names if n not in more):
        if name == "spice":
            raise UserError(
                "spice needs the Stanford parser (Java), which nanodiff does not use; cider, rouge_l and meteor are here"
            )
        if name == "perplexity":
            raise UserError(
                "perplexity needs a language model's own tokens, not captions; it is no metric of this stage"
            )
        if name not in NAMES:
            raise UserError(f"`metrics`: {printable(name)!r} is none of {', '.join((*NAMES, *more))}")


def scores(candidates, references, names=NAMES, synonyms=None):
    """{name: Score} of the metrics asked for. synonyms: of meteor(). Raises UserError for one that we do not have."""
    check_names(names)
    found = {}
    if any(n.startswith("bleu") for n in names):
        found |= {f"bleu{n + 1}": s for n, s in enumerate(bleu(candidates, references))}
    if "rouge_l" in names:
        found["rouge_l"] = rouge_l(candidates, references)
    if "rouge_l_f1" in names:
        found["rouge_l_f1"] = rouge_l(candidates, references, beta=1.0, apart=False)
    if "meteor" in names:
        found["meteor"] = meteor(candidates, references, synonyms)
    if "cider" in names:
        found["cider"] = cider(candidates, references)
    return {n: found[n] for n in names}


def bootstrap(candidates, references, found, seed=0, resamples=1000, level=0.95):
    """{name: (low, high)}: percentile interval of each score under resampling of the pictures (Koehn 2004, EMNLP). BLEU is
    computed anew from resampled counts, the others are means; CIDEr's document frequencies stay those of the whole set."""
    rng, n = np.random.default_rng(seed), len(candidates)
    tails = [50 * (1 - level), 100 - 50 * (1 - level)]
    each = {name: np.array(score.each) for name, score in found.items() if not name.startswith("bleu")}
    counts = (
        np.array([_bleu_counts(c, r) for c, r in zip(candidates, references, strict=True)])
        if len(each) < len(found)
        else None
    )
    drawn = {name: [] for name in found}
    for _ in range(resamples):
        picks = rng.integers(n, size=n)
        bleu = _bleu_of(counts[picks].sum(0).tolist()) if counts is not None else ()
        for name in found:
            drawn[name].append(each[name][picks].mean() if name in each else bleu[int(name[4:]) - 1])
    return {name: tuple(map(float, np.percentile(values, tails))) for name, values in drawn.items()}


def paired(candidates, references, names=("--candidates", "--references")):
    """(ids, candidate texts, reference lists) of two read() files. Raises UserError unless both have the same ids, and
    every candidate is one text."""
    for a, b, (mine, other) in ((candidates, references, names), (references, candidates, names[::-1])):
        missing = [k for k in a if k not in b]
        if missing:
            some = ", ".join(map(printable, missing[:5]))
            raise UserError(f"{len(missing)} of {len(a)} ids of {mine} are not in {other}, such as {some}")
    for key, texts in candidates.items():
        if len(texts) != 1:
            raise UserError(f"{names[0]}: {printable(key)} has {len(texts)} captions, expected one")
    ids = list(references)
    return ids, [candidates[i][0] for i in ids], [references[i] for i in ids]
