"""A class label in the place of a text: one learned vector for each label, and one for none of them.

It stands where a text encoder stands, so classifier-free guidance and everything else work unchanged: the "text" is one
token. A model of no labels at all is unconditional.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanodiff.config import from_json


@dataclass
class Config:
    """Fields of config.json."""

    labels: tuple[str, ...] = ()
    hidden_size: int = 128

    @classmethod
    def from_json(cls, raw, where="text_encoder/config.json"):
        return from_json(cls, raw, {}, where)

    def to_json(self):
        return {"architectures": ["LabelEncoder"], "labels": list(self.labels), "hidden_size": self.hidden_size}

    # what a pipeline asks of a text encoder
    with_projection = True
    max_position_embeddings = 1
    projection_dim = property(lambda self: self.hidden_size)
    vocab_size = property(lambda self: len(self.labels) + 1)


class LabelEncoder(nn.Module):
    """ids [B, 1] (0: no label) -> ([states [B, 1, D]], pooled [B, D])."""

    Config = Config
    class_name = "LabelEncoder"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(len(cfg.labels) + 1, cfg.hidden_size)

    def final_norm(self, x):
        """A text encoder's states may be taken before its last norm; there is none here."""
        return x

    def forward(self, ids):
        states = self.embedding(torch.as_tensor(ids))
        return [states], states[:, 0]
