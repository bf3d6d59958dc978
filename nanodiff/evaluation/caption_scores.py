"""Captions against references, with intervals."""

import numpy as np

from nanodiff.commandline import flagged
from nanodiff.config import UserError
from nanodiff.evaluation import textmetrics
from nanodiff.evaluation.wordnet import WordNet
from nanodiff.output import report

# ---------------------------------------------------------------------------------------------------------
# Captions


def captions(candidates, references, tokenizer="ptb", names=textmetrics.NAMES, resamples=1000, seed=0, wordnet=None):
    """({metric: entry}, ids, {metric: Score}) of {id: [caption]} and {id: [captions]}. wordnet: folder of WordNet's database, by whose
    synonyms METEOR matches words too. Raises UserError for ids that differ."""
    ids, mine, theirs = textmetrics.paired(candidates, references)
    if "cider" in names and len(ids) == 1:
        raise UserError(
            "cider weighs words by how few pictures have them, so it needs more than one picture; choose `metrics` without it"
        )
    if tokenizer == "ptb":
        mine, theirs = [textmetrics.tokenize(t) for t in mine], [[textmetrics.tokenize(t) for t in r] for r in theirs]
    synonyms = WordNet(wordnet).synonyms if wordnet and "meteor" in names else None
    found = textmetrics.scores(mine, theirs, names, synonyms)
    matched = (
        "exact + Porter stem + WordNet synonyms, as nltk's"
        if synonyms
        else "exact + Porter stem, no synonyms (`wordnet` adds them)"
    )
    intervals = textmetrics.bootstrap(mine, theirs, found, seed, resamples) if resamples and len(ids) > 1 else {}
    out = {}
    for name, score in found.items():
        kind = {"meteor": f"{flagged(matched)}: not the Java program's number", "rouge_l": "COCO, beta 1.2",
                "rouge_l_f1": "rouge-score, F1", "cider": "CIDEr-D x 10"}.get(name, "corpus, closest length")  # fmt: skip
        facts = report.provenance(
            form=kind, tokenizer=tokenizer, references=sum(map(len, theirs)), bootstrap=resamples, seed=seed
        )
        out[name] = report.entry(score.value, len(ids), facts, ci=intervals.get(name))
        if name.startswith("bleu"):
            mean = facts | {"form": "mean of single captions' BLEU"}
            out[f"{name}_mean"] = report.entry(np.mean(score.each), len(ids), mean, np.std(score.each))
    return out, ids, found
