"""A short attack in every run of the tests; the whole one is `make attack`."""

import attack


def test_a_short_attack(capsys):
    assert attack.main(cases=150, seed=10_000) == 0, capsys.readouterr().out
