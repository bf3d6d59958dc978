"""Prompts whose text changes on the way, or that are several texts (text/syntax.py): which denoiser holds at which step.

Explained in the book (docs/book): chapter 9.
"""

import torch

from nanodiff.config import UserError
from nanodiff.pipeline.conditions import negative_skip
from nanodiff.text.syntax import composed, scheduled


class Spoken:
    """The texts of a run over `times`, those that it takes (a run that begins late counts from there), all of them encoded when this is made.

    prompts: one a picture. negative: one for all, one for each, or None. Raises UserError for a composition without guidance.
    """

    def __init__(self, sd, prompts, negative, words, guided, times):
        self.times, steps = sorted(set(map(float, times)), reverse=True), len(set(times))
        rows = [[(scheduled(text, steps, words.earlier), weight) for text, weight in composed(p)] for p in prompts]
        self.most = max(map(len, rows))
        if self.most > 1 and not guided:
            raise UserError("AND in a prompt needs guidance: a `guidance_scale` above 1")
        # a picture with fewer texts than its neighbours says its first one again, at weight 0
        self.rows = [[*row, *[(row[0][0], 0.0)] * (self.most - len(row))] for row in rows]
        self.against = None
        if negative is not None:
            each = [negative] * len(prompts) if isinstance(negative, str) else negative
            self.against = [scheduled(text or "", steps, words.earlier) for text in each]
        self.guided, self.encoded = guided, {}
        for key in dict.fromkeys(map(self.at, range(steps))):
            self.encoded[key] = self._encode(sd, words, *key)

    def at(self, step):
        """(the texts of each picture, the negative texts or None) before a step."""
        texts = tuple(tuple(_holding(parts, step) for parts, _ in row) for row in self.rows)
        return texts, self.against and tuple(_holding(parts, step) for parts in self.against)

    def _encode(self, sd, words, texts, others):
        """(Text, or [(Text, weights [B])] of a composition, negative Text)"""
        found = [
            sd.conditions(list(some), others and list(others), words, self.guided) for some in zip(*texts, strict=True)
        ]
        weights = [torch.tensor([row[k][1] for row in self.rows]) for k in range(self.most)]
        if not self.guided or (self.most == 1 and bool((weights[0] == 1).all())):
            return found[0]
        longest = max(text.states.shape[1] for text, _ in found)
        parts = [sd.filled(text, longest, words.clip_skip) for text, _ in found]
        return list(zip(parts, weights, strict=True)), sd.filled(found[0][1], longest, negative_skip(words))

    def model(self, make):
        """model(x, t) of the run. make(text, negative) -> model of fixed texts, as Guidance.denoiser() gives it."""
        models = {}

        def model(x, t):
            key = self.at(sum(u > t for u in self.times))
            if key not in models:
                models[key] = make(*self.encoded[key])
            return models[key](x, t)

        return model


def _holding(parts, step):
    """The text of [syntax.Part] before a step."""
    return next((part.text for part in parts if step < part.until), parts[-1].text)


def texts_of(prompt, steps):
    """All texts that a prompt is in a run of `steps`, each once."""
    return list(dict.fromkeys(part.text for text, _ in composed(prompt) for part in scheduled(text, steps)))
