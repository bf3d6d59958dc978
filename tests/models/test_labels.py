"""Class labels in the place of a text."""

import pytest
import torch

from nanodiff import weights
from nanodiff.config import UserError
from nanodiff.models.labels import Config, LabelEncoder
from nanodiff.pipeline import families
from nanodiff.text.tokenizer import LabelTokenizer


def test_a_label_is_one_vector_and_none_is_another(tmp_path):
    net, tok = LabelEncoder(Config(("cat", "dog"), 8)), LabelTokenizer(["cat", "dog"])
    ids = torch.tensor(tok(["dog", "", "cat"]))
    assert ids.tolist() == [[2], [0], [1]]
    states, pooled = net(ids)
    assert states[0].shape == (3, 1, 8) and torch.equal(pooled, net.embedding.weight[[2, 0, 1]])
    weights.save(net, tmp_path)
    again = weights.load(families.OWN["LabelEncoder"], tmp_path, torch.float32)
    assert again.cfg.labels == ("cat", "dog") and torch.equal(again(ids)[1], pooled)
    tok.save(tmp_path / "tokenizer")
    assert LabelTokenizer.load(tmp_path / "tokenizer").labels == ("cat", "dog")


def test_unknown_labels_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="'dgo' is no label of this model; it knows cat, dog; did you mean dog"):
        LabelTokenizer(["cat", "dog"])(["dgo"])
    (tmp_path / "labels.json").write_text('{"labels": [1]}')
    with pytest.raises(UserError, match="no list of labels"):
        LabelTokenizer.load(tmp_path)
