"""A student of half the width: which channels stay, and that what is left says what the teacher said."""

import pytest
import torch
from util import TINY, error_line, rms_ratio, run

from assets.world import narrow
from nanodiff import pipeline


@pytest.fixture(scope="module")
def world():
    return pipeline.load("assets/world")


def test_the_columns_that_tell_the_others():
    """Of six columns three are mixtures of the others: any three that span them tell all, and none that is a copy of another is taken."""
    torch.manual_seed(0)
    own = torch.randn(500, 3)
    x = torch.cat([own, own @ torch.randn(3, 2), own[:, :1]], dim=1)
    kept, left = narrow.telling(x, 3)
    assert left < 1e-9 and len(set(kept)) == 3 and not {0, 5} <= set(kept)
    _, more = narrow.telling(x, 2)
    assert 0.001 < more < 0.5
    assert narrow.telling(torch.randn(2000, 4), 2)[1] == pytest.approx(0.5, abs=0.05)


def test_half_the_width_says_most_of_it(world):
    given = narrow.given_of(world, 32)
    small, left = narrow.narrowed(world.net, given)
    assert (small.cfg.width, small.cfg.num_attention_heads, small.cfg.num_layers) == (64, 2, 6)
    linear = [name for name, module in small.named_modules() if isinstance(module, torch.nn.Linear)]
    copied = {"context_embedder", *(f"time_text_embed.{e}_embedder.linear_1" for e in ("timestep", "text"))}
    assert set(left) == set(linear) - copied, "every layer is fitted, or is a part of the teacher's"
    assert 0 < left["proj_out"] < 0.5
    other = narrow.given_of(world, 48)
    fresh = tuple(part[32:] for part in other)
    with torch.no_grad():
        want, got, untaught = (net(*fresh) for net in (world.net, small, type(small)(small.cfg)))
    assert rms_ratio(got, want) < 0.8 < 0.95 < rms_ratio(untaught, want)


def test_the_command(tmp_path):
    done = run("-m", "assets.world.narrow", "--scenes", 8, "--output-dir", tmp_path / "out")
    assert done.returncode == 0 and "width 64, 0.89 M parameters" in done.stdout, done.stderr
    assert pipeline.load(tmp_path / "out").net.cfg.caption_projection_dim == 64
    for model in ("sd15", "sd35-medium"):
        argv = ("-m", "assets.world.narrow", "--model", TINY / model, "--output-dir", tmp_path / model)
        assert "is no model of the small world" in error_line(run(*argv))
