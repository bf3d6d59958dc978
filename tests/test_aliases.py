"""Other programs' names for options: each row of the table is of an option that there is, and every stage takes them."""

import dataclasses

import pytest

import caption
import distill
import eval as judge
import sample
import train
from nanodiff import aliases
from nanodiff.commandline import by_names, from_mapping
from nanodiff.training import options

SCRIPTS = {"train": train, "sample": sample, "distill": distill, "caption": caption, "eval": judge}
CLASSES = {
    c
    for m in (*SCRIPTS.values(), options)
    for c in vars(m).values()
    if isinstance(c, type) and dataclasses.is_dataclass(c)
}


def test_the_table_has_no_row_that_means_nothing():
    """A class is named once among all scripts, and a name is of one option of it, which is not itself an option."""
    names = [c.__name__ for c in CLASSES]
    for owner, rows in aliases.OF.items():
        assert names.count(owner) == 1, owner
        cls = next(c for c in CLASSES if c.__name__ == owner)
        fields = {f.name for f in dataclasses.fields(cls)}
        assert set(rows) <= fields, owner
        for others in rows.values():
            assert others and not {n.replace("-", "_") for n in others} & fields, (owner, others)


@pytest.mark.parametrize("cls", sorted(CLASSES, key=str), ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_every_name_is_of_one_option(cls):
    fields = {f.name for f in dataclasses.fields(cls)}
    said = [n.replace("-", "_") for f in fields for n in (f, *aliases.of(cls, f))]
    assert len(said) == len(set(said)) == len(by_names(cls)), [n for n in said if said.count(n) > 1]


def test_a_derived_class_has_its_bases_names_and_may_have_others():
    assert aliases.of(train.DiffusionConfig, "lr") == aliases.of(distill.FewStep, "lr") == ("learning-rate",)
    assert aliases.of(distill.Transfer, "lora_rank") == ("lora-r", "rank")
    assert aliases.of(distill.FewStep, "lora_rank") == ("rank",)
    assert aliases.of(sample.Config, "seed") == ()


def test_a_config_file_may_use_them():
    values = from_mapping(train.DiffusionConfig, {"learning_rate": 1e-3, "train-batch-size": 3}, "x.json")
    assert values == {"lr": 1e-3, "batch_size": 3}
