"""What a Hub's scheduler_config.json may say: the fields of each class with its defaults, the values that are implemented.

A class's defaults matter, because files leave out what equals them, and they differ: `steps_offset` is 0 where Stable Diffusion wants 1,
`timestep_spacing` is "leading" for DDIM and "linspace" for Euler (Lin et al. 2024, arXiv 2305.08891 table 2, compares them).

A file says two things at once: what the model was trained with (the betas, the prediction type: another value is another
model) and how its authors would sample (class, spacing, order: free to choose). schedule.py reads the first from any class.
"""

import math

# Defaults that a class uses when its config does not say (they differ between classes).
_DIFFUSION = {
    "num_train_timesteps": 1000,  # T
    "beta_start": 0.0001,  # β_1 and β_T, and how the others lie between them: schedule.betas_of()
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,  # all T of them, in place of the three above
    "prediction_type": "epsilon",  # schedule.split()
    "timestep_spacing": "leading",  # Schedule.spaced()
    "steps_offset": 0,  # added to a "leading" grid: Stable Diffusion asks at 981, …, 21, 1
}
_CLIPPING = {
    "clip_sample": True,  # x0 to ±clip_sample_range: right for pixels, wrong for latents, which have no such bound
    "clip_sample_range": 1.0,
    "thresholding": False,  # x0 to a quantile of its own, then divided by it: grids.clip()
    "dynamic_thresholding_ratio": 0.995,  # the quantile
    "sample_max_value": 1.0,  # the largest bound that it may give
    "rescale_betas_zero_snr": False,  # schedule.zero_terminal_snr()
}
# other spacings of the noise levels σ: grids.respaced()
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
# fields of ours, for what no class of the Hub has: the name of a sampler (samplers.SAMPLERS), of a grid of σ (grids.TABLES)
OWN, GRID = "_sampler", "_grid"
SPACINGS = (*_SIGMAS, "use_lu_lambdas")  # of which at most one is true
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
DEFAULTS = {
    "DDPMScheduler": _DIFFUSION | _CLIPPING | {"variance_type": "fixed_small"},
    "DDIMScheduler": _DIFFUSION | _CLIPPING | {"set_alpha_to_one": True},
    "PNDMScheduler": _DIFFUSION | {"set_alpha_to_one": False, "skip_prk_steps": False},
    "EulerDiscreteScheduler": _DIFFUSION
    | _SIGMAS
    | {
        "timestep_spacing": "linspace",
        "interpolation_type": "linear",  # "log_linear": even in ln σ from end to end
        "sigma_min": None,  # ends of the other spacings; None: those of the grid itself (multistep classes: of the training)
        "sigma_max": None,
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",  # where the last step ends: no noise, or "sigma_min", the training's least
        "rescale_betas_zero_snr": False,
    },
    "EulerAncestralDiscreteScheduler": _DIFFUSION | {"timestep_spacing": "linspace", "rescale_betas_zero_snr": False},
    "HeunDiscreteScheduler": _DIFFUSION
    | _SD_BETAS
    | _SIGMAS
    | {"timestep_spacing": "linspace", "clip_sample": False, "clip_sample_range": 1.0},
    "DPMSolverMultistepScheduler": _DIFFUSION
    | _SIGMAS
    | {
        "timestep_spacing": "linspace",
        "solver_order": 2,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "algorithm_type": "dpmsolver++",  # integrates x0; "dpmsolver" ε; sde-: with fresh noise at every step
        "solver_type": "midpoint",  # which of two second-order formulas: solvers.py
        "lower_order_final": True,  # first order at the last step of short runs, where the grid's ends lie far apart in λ
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "rescale_betas_zero_snr": False,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
    "LCMScheduler": _DIFFUSION
    | _SD_BETAS
    | _CLIPPING
    | {
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "original_inference_steps": 50,  # the teacher's grid in distillation, of which a student's is a part
        "timestep_scaling": 10.0,  # of the boundary condition: Luo et al. 2023, arXiv 2310.04378
    },
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": 1000,
        "shift": 1.0,  # σ' = shift·σ / (1 + (shift-1)·σ): more steps at much noise for larger pictures (SD 3: 3)
        "use_dynamic_shifting": False,  # the shift from the number of tokens, between the next two pairs
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,  # stretch the grid so that its last σ before 0 is this one
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
}
_THRESHOLDING = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_MULTISTEP = {
    "solver_order": 2,  # how many predictions a step is fitted to
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_LINSPACE = _DIFFUSION | _SIGMAS | {"timestep_spacing": "linspace"}
DEFAULTS |= {
    # which knows no spacing: always linspace
    "DPMSolverSinglestepScheduler": {
        k: v for k, v in _LINSPACE.items() if k not in ("timestep_spacing", "steps_offset")
    }
    | _THRESHOLDING
    | _MULTISTEP
    | {
        "lower_order_final": False,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
    }
    | {"lambda_min_clipped": -math.inf, "variance_type": None},
    "UniPCMultistepScheduler": _LINSPACE
    | _THRESHOLDING
    | _MULTISTEP
    # B(h) of the paper in two forms; steps without the corrector; σ as the others have it
    | {"predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None, "final_sigmas_type": "zero"}
    | {"rescale_betas_zero_snr": False, "sigma_min": None, "sigma_max": None, "shift_terminal": None},
    "DEISMultistepScheduler": _LINSPACE
    | _THRESHOLDING
    | _MULTISTEP
    | {"algorithm_type": "deis", "solver_type": "logrho"},
    "LMSDiscreteScheduler": _LINSPACE,
    "KDPM2DiscreteScheduler": _LINSPACE | _SD_BETAS,
    "KDPM2AncestralDiscreteScheduler": _LINSPACE | _SD_BETAS,
    "DPMSolverSDEScheduler": _LINSPACE | _SD_BETAS,
    "TCDScheduler": DEFAULTS["LCMScheduler"],
}
DEFAULTS["FlowMatchHeunDiscreteScheduler"] = DEFAULTS["FlowMatchEulerDiscreteScheduler"]
# the names that GRID can have, by what the class counts in (SPACES): see grids.TABLES and grids.flow_sigmas
GRIDS = {
    "sigma": ("ays", "ays_xl", "sgm_uniform", "simple", "normal", "beta_times"),
    "flow": ("sgm_uniform", "simple"),
    "timestep": (),
}
SPACES = {  # what each class counts its steps in: timesteps of the training, noise levels σ = s/α of its ODE, or the σ of a flow
    "DDPMScheduler": "timestep",
    "DDIMScheduler": "timestep",
    "PNDMScheduler": "timestep",
    "LCMScheduler": "timestep",
    "TCDScheduler": "timestep",
    "EulerDiscreteScheduler": "sigma",
    "EulerAncestralDiscreteScheduler": "sigma",
    "HeunDiscreteScheduler": "sigma",
    "DPMSolverMultistepScheduler": "sigma",
    "DPMSolverSinglestepScheduler": "sigma",
    "UniPCMultistepScheduler": "sigma",
    "DEISMultistepScheduler": "sigma",
    "LMSDiscreteScheduler": "sigma",
    "KDPM2DiscreteScheduler": "sigma",
    "KDPM2AncestralDiscreteScheduler": "sigma",
    "DPMSolverSDEScheduler": "sigma",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
}
# Kind and bounds of the values that are numbers; those that DEFAULTS has as true or false are bool.
NUMBERS = {
    "num_train_timesteps": (int, 1, 100_000),
    "beta_start": (float, 1e-12, 0.9999),
    "beta_end": (float, 1e-12, 0.9999),
    "steps_offset": (int, 0, 100_000),
    "clip_sample_range": (float, 1e-6, 1e6),
    "dynamic_thresholding_ratio": (float, 0, 1),
    "sample_max_value": (float, 1e-6, 1e6),
    "sigma_min": (float | None, 0, 1e6),
    "sigma_max": (float | None, 1e-6, 1e6),
    "timestep_scaling": (float, 1e-6, 1e6),
    "original_inference_steps": (int, 1, 100_000),
    "shift": (float, 1e-6, 1e6),
    "flow_shift": (float, 1e-6, 1e6),
    "base_shift": (float, -100, 100),
    "max_shift": (float, -100, 100),
    "base_image_seq_len": (int, 1, 1 << 24),
    "max_image_seq_len": (int, 1, 1 << 24),
    "shift_terminal": (float | None, 1e-6, 1),
}
# Fields of diffusers' other samplers, which come along when one class is exchanged for another, and say nothing of the model.
FOREIGN = {
    "predictor_order", "corrector_order", "tau_func", "eta", "rho", "sigma_data",
    "sigma_schedule", "s_noise", "s_churn", "s_min", "s_max", "clip_denoised", "noise_sampler_seed", "gamma",
}  # fmt: skip
# fields of diffusers < 0.9, and the values that change nothing
FORMER = {"tensor_format": ("pt", "np"), "predict_epsilon": (True,)}
_DPM = {
    "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    "algorithm_type": {"deis": "dpmsolver++"},
}
SAME = {  # what a class takes for another class's value, as diffusers does
    "DPMSolverMultistepScheduler": _DPM,
    "DPMSolverSinglestepScheduler": _DPM,
    "UniPCMultistepScheduler": {"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}},
    "DEISMultistepScheduler": {
        "solver_type": {"midpoint": "logrho", "heun": "logrho", "bh1": "logrho", "bh2": "logrho"},
        "algorithm_type": {"dpmsolver": "deis", "dpmsolver++": "deis"},
    },
}
# Values that a class accepts. "fixed_large_log" is refused because its formula in diffusers gives NaN.
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero", "sigma_min"),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "solver_p": (None,),
    "solver_order": (1, 2, 3),
    "time_shift_type": ("exponential", "linear"),
    "lambda_min_clipped": (-math.inf, "-inf"),
    "use_flow_sigmas": (False,),
    "invert_sigmas": (False,),
}
OWN_CHOICES = {("DEISMultistepScheduler", "algorithm_type"): ("deis",)}  # where one class accepts less than others do
