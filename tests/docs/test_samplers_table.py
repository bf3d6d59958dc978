"""The table of samplers is the samplers'."""

from util import ROOT

from docs import samplers


def test_the_table_is_what_there_is():
    kept = (ROOT / "docs" / "samplers.md").read_text()
    assert kept == samplers.table(), "python -m docs.samplers > docs/samplers.md"
    assert samplers.recorded()["euler"] >= 10
