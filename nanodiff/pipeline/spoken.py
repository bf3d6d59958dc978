"""Prompts whose text changes on the way, or that are several texts (text/syntax.py): which denoiser holds at which step.

Explained in the book (docs/book): chapter 9.
"""

import torch

from nanodiff.config import UserError
from nanodiff.text.syntax import composed, scheduled


def spoken(sd, prompts, negative, words, guided, steps, times, make):
    """model(x, t) of a run of `steps` over `times`. make(text, negative) -> model of fixed texts;
    text: conditions.Text, or [(Text, weights [B])] of a composition. Raises UserError for a composition without guidance."""
    rows = [[(scheduled(text, steps), weight) for text, weight in composed(p)] for p in prompts]
    most = max(map(len, rows))
    if most > 1 and not guided:
        raise UserError("AND in a prompt needs guidance: a `guidance_scale` above 1")
    # a picture with fewer texts than its neighbours says its first one again, at weight 0
    rows = [[*row, *[(row[0][0], 0.0)] * (most - len(row))] for row in rows]
    against = None
    if negative is not None:
        each = [negative] * len(prompts) if isinstance(negative, str) else negative
        against = [scheduled(text or "", steps) for text in each]
    models = {}

    def holding(parts, step):
        return next((part.text for part in parts if step < part.until), parts[-1].text)

    def built(texts, others):
        weights = [torch.tensor([row[k][1] for row in rows]) for k in range(most)]
        found = [sd.conditions(list(some), others and list(others), words, guided) for some in zip(*texts, strict=True)]
        plain = most == 1 and bool((weights[0] == 1).all())
        text = found[0][0] if plain or not guided else [(f[0], w) for f, w in zip(found, weights, strict=True)]
        return make(text, found[0][1])

    def model(x, t):
        step = sum(u > t for u in times)
        texts = tuple(tuple(holding(parts, step) for parts, _ in row) for row in rows)
        others = against and tuple(holding(parts, step) for parts in against)
        if (texts, others) not in models:
            models[texts, others] = built(texts, others)
        return models[texts, others](x, t)

    return model


def texts_of(prompt, steps):
    """All texts that a prompt is in a run of `steps`, each once."""
    return list(dict.fromkeys(part.text for text, _ in composed(prompt) for part in scheduled(text, steps)))
