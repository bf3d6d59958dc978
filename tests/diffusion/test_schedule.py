"""Tables, forward process, timesteps: equal to the recordings; refusals by name."""

import json

import pytest
import torch
from util import GOLDEN, golden, max_error

from nanodiff.config import UserError
from nanodiff.diffusion import samplers
from nanodiff.diffusion.schedule import Schedule, split

SD = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
      "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["linear", "linear_zero_snr", "scaled_linear", "scaled_linear_zero_snr", "squaredcos_cap_v2", "sigmoid"]
)
def test_tables(name):
    tensors, _ = golden("schedulers.tables")
    beta, zero_snr = name.removesuffix("_zero_snr"), name.endswith("_zero_snr")
    ends = (
        {"beta_start": 0.00085, "beta_end": 0.012}
        if beta == "scaled_linear"
        else {"beta_start": 1e-4, "beta_end": 0.02}
    )
    kind = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    schedule = Schedule.from_config({"_class_name": "DDIMScheduler", "beta_schedule": beta} | ends | kind)
    want = tensors[f"alphas_cumprod.{name}"]
    assert max_error(schedule.alphas_cumprod, want) < 1e-6
    assert ((schedule.alphas_cumprod - want).abs() <= 2e-5 * want).all()


def test_forward_process():
    tensors, facts = golden("schedulers.forward_process")
    config = facts["args"]["config"]
    x, noise, t = tensors["x"], tensors["noise"], tensors["timesteps"]
    schedule = Schedule.from_config({"_class_name": "DDPMScheduler"} | config)
    velocity = Schedule.from_config({"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"} | config)
    zero = Schedule.from_config(
        {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True} | config
    )
    assert max_error(schedule.add_noise(x, noise, t), tensors["ddpm.add_noise"]) < 1e-6
    assert max_error(velocity.target(x, noise, t), tensors["ddpm.velocity"]) < 1e-6
    assert max_error(zero.add_noise(x, noise, t), tensors["ddpm_zero_snr.add_noise"]) < 1e-6


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_says_the_same(kind):
    schedule = Schedule.from_config(SD | {"prediction_type": kind})
    x0, noise = torch.randn(2, 4, 5, 3, 3).double()
    t = torch.tensor([0, 10, 500, 999])
    x = schedule.add_noise(x0, noise, t)
    got_x0, got_eps = schedule.to_x0_eps(schedule.target(x0, noise, t), x, t)
    assert max_error(got_x0, x0) < 1e-6 and max_error(got_eps, noise) < 1e-6  # the table is fp32


def test_flow_prediction():
    schedule = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    x0, noise = torch.randn(2, 3, 5).double()
    t = torch.tensor([1.0, 300.0, 999.0])
    x = schedule.add_noise(x0, noise, t)
    s = (t / 1000).double()[:, None]
    got_x0, got_eps = split("flow", noise - x0, x, 1 - s, s)
    assert max_error(got_x0, x0) < 1e-6 and max_error(got_eps, noise) < 1e-6
    assert max_error(x, (1 - s) * x0 + s * noise) < 1e-6


def test_zero_terminal_snr():
    schedule = Schedule.from_config(SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    plain = Schedule.from_config(SD)
    assert schedule.alphas_cumprod[-1] == 0 and schedule.snr(torch.tensor([999])) == 0
    assert abs(schedule.alphas_cumprod[0] - plain.alphas_cumprod[0]) < 1e-6
    assert (schedule.alphas_cumprod.diff() < 0).all()


CLASSES = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "euler": "EulerDiscreteScheduler", "pndm": "PNDMScheduler",
           "dpmpp2m": "DPMSolverMultistepScheduler", "lcm": "LCMScheduler"}  # fmt: skip
STEPS = json.loads((GOLDEN / "goldens" / "schedulers.timesteps.json").read_text())["steps"]


@pytest.mark.parametrize("n", STEPS, ids=str)
def test_timesteps(n):
    for name, want in STEPS[n].items():
        kind, _, spacing = name.partition(".")
        n = int(n)
        if kind == "flow":
            schedule = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
            got = [1000 * s for s in samplers.flow_sigmas(schedule, n)[:-1]]
        elif kind == "lcm":
            got = samplers.lcm_times(Schedule.from_config(SD, "LCMScheduler"), n)
        else:
            schedule = Schedule.from_config(SD | {"skip_prk_steps": True, "timestep_spacing": spacing}, CLASSES[kind])
            if kind == "dpmpp2m" and spacing != "trailing" and n >= 1000:
                with pytest.raises(UserError, match="distinct"):
                    samplers.sigma_grid(schedule, n)
                continue
            if kind in ("euler", "dpmpp2m"):
                got = samplers.sigma_grid(schedule, n)[0]
            else:
                got = schedule.spaced(n).tolist()
                got = got[:2] + got[1:] if kind == "pndm" and n > 1 else got
        if want["first"][0] == 1000 and kind != "flow":  # timestep 1000 does not exist: ours is the grid one lower
            got = [t + 1 for t in got]
        assert len(got) == want["count"], name
        assert got[:4] == pytest.approx(want["first"], abs=1e-3), name
        assert got[-3:] == pytest.approx(want["last"], abs=1e-3), name
        assert sum(got) == pytest.approx(want["sum"], rel=1e-6, abs=1e-2), name


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_step_count_gives_that_many_timesteps(spacing):
    schedule = Schedule.from_config(SD | {"timestep_spacing": spacing})
    for n in range(1, 1001):
        t = schedule.spaced(n)
        assert len(t) == n and t.min() >= 0 and t.max() <= 999 and (n == 1 or (t[:-1] > t[1:]).all()), n


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rescale_betas_zero_snr": True}, "ε-prediction"),
        ({"beta_schedule": "lineer"}, "beta_schedule"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"timestep_spacing": "even"}, "timestep_spacing"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
        ({"_class_name": "IPNDMScheduler"}, "IPNDMScheduler"),
        ({"set_alpha_to_won": False}, "set_alpha_to_one"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}, "variance_type"),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_exponential_sigmas": True},
            "only one",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
    ],
)
def test_refusals_name_the_field(change, says):
    with pytest.raises(UserError, match=says):
        Schedule.from_config(SD | change)


def test_fields_of_other_classes_are_left_alone():
    assert "skip_prk_steps" not in Schedule.from_config(SD | {"skip_prk_steps": True}).cfg


def test_config_round_trip():
    schedule = Schedule.from_config(SD)
    again = Schedule.from_config(schedule.to_json())
    assert again.cfg == schedule.cfg


@pytest.mark.parametrize("name", (None, "euler", "dpmpp_2m"))
def test_what_a_file_says_to_other_classes_is_saved(name):
    """Stable Diffusion's PNDM file says `clip_sample: false`, which is DDIM's: latents are not bounded by 1."""
    said = SD | {
        "_class_name": "PNDMScheduler",
        "clip_sample": False,
        "skip_prk_steps": True,
        "timestep_spacing": "leading",
    }
    said.pop("set_alpha_to_one", None)
    schedule = samplers.rescheduled(Schedule.from_config(said), name)
    saved = schedule.to_json()
    assert saved["clip_sample"] is False and saved["skip_prk_steps"] is True and saved["_class_name"] == schedule.kind
    assert samplers.rescheduled(Schedule.from_config(saved), "ddim").cfg["clip_sample"] is False
