"""The table of samplers: ours, AUTOMATIC1111's and ComfyUI's names, and the recordings that hold them: python -m docs.samplers > docs/samplers.md"""

import collections
import json
from pathlib import Path

from nanodiff.diffusion import samplers
from nanodiff.diffusion.samplers import SAMPLERS
from nanodiff.diffusion.schedule import Schedule
from nanodiff.output import foreign, infotext

GOLDENS = Path(__file__).parents[1] / "tests" / "golden" / "goldens"
HEAD = """# Samplers and grids of noise levels

`--scheduler NAME`, and for most `--sigmas GRID` beside it. *Recorded*: runs of the reference whose every step ours equals (tests/golden, diffusers 0.42.1;
`dpmpp_2s_a` and
`dpmpp_3m_sde` k-diffusion 0.1.1); every sampler is also held against closed forms (tests/diffusion/test_samplers.py). *Calls*: of the network, a step.

| ours | what it is | AUTOMATIC1111 | ComfyUI | class of scheduler_config.json | calls | recorded |
|---|---|---|---|---|---|---|
"""
GRIDS = """
| `--sigmas` | AUTOMATIC1111's schedule type | ComfyUI's scheduler |
|---|---|---|
"""
TAIL = """
Where AUTOMATIC1111's menu says "Automatic" it takes Karras's grid for DPM2, DPM2 a, DPM++ 2M, DPM++ SDE and DPM++ 2S a, and the exponential one for DPM++ 2M SDE and
3M SDE; so does `--from-image`. Not here, among others: DPM fast and adaptive, Restart, DPM++ 2M SDE Heun, heunpp2, the CFG++ forms; of the schedule types Polyexponential, KL Optimal and
DDIM. Their "Align Your Steps" ends at 0.029 and then 0, with n levels where ours (and the authors', and ComfyUI's node AlignYourStepsScheduler) are n + 1; their `lcm` on an even
grid spends its last step at the clean end, which ours (diffusers') leaves out; ComfyUI's `deis` is of third order in t and ends at 0, ours (diffusers' logrho) of second order in
ln σ and ends at the smallest σ. `--from-image` says so. DPM2, DPM2 a and DPM++ 3M SDE leave the last level but one out in AUTOMATIC1111, dpm_2, dpm_2_ancestral and
uni_pc in ComfyUI; here they do not.
A picture of theirs is drawn with `--timestep-spacing linspace`, since both go from the noisiest level of the training to the cleanest whatever the model's scheduler_config.json says
(SDXL's begins lower, the more so the fewer the steps: a quarter at 20), and with `normal` where a sampler has a grid of its own (`dpmpp_2m` and its kin).
Of a flow (SD 3, 3.5) there are `karras`, `exponential`, `beta`, `sgm_uniform` and `simple`; ComfyUI calls its samplers "euler" and "heun". A flow's own grid is
diffusers', which ends next to 0 (0.001, with SD 3's shift 0.009): of 4 steps the last one does nothing (on the small world 0.29 of the captions are drawn right by it, 0.59 by `sgm_uniform`).
`euler` takes `--s-churn`, `--s-tmin`, `--s-tmax` and `--s-noise` (their "Sigma churn", …), `ddim` and `tcd` `--eta`. The churn asks
the network before its noise, as diffusers does; AUTOMATIC1111 after it. `dpmpp_sde` draws its noise from the picture's own seed, by the law of the Brownian path
that diffusers, AUTOMATIC1111 and ComfyUI take from torchsde's tree: another picture from the same seed (theirs have the tree for 2M SDE and 3M SDE, too). `dpmpp_2s_a` is
k-diffusion's alone, and `dpmpp_3m_sde` its, not diffusers' (a wrong sign there). With the other samplers the same seed gives diffusers' picture, which is AUTOMATIC1111's
only where its noise is drawn on the CPU; but for `lms` that begins with a picture (diffusers forgets there how many steps it has seen, k-diffusion does not), and for inpainting
by an ordinary model with samplers that ask twice a step (`heun`, `kdpm2`, `kdpm2_a`): diffusers puts the kept part back between the two questions, here it is put back after the step.
Where such a sampler ends early (`--denoising-end`) diffusers may cut between the two questions, here a run in two parts is the run in one; in inpainting diffusers
then puts the picture back without the noise of that step. One picture that several prompts repaint is encoded for each with its own seed, as if it were drawn alone; in diffusers once, with the first one's. `flow_heun` has the grids and shifts of the file as
`flow_euler` has them, which diffusers' class leaves out. `pndm` that begins at its third step or later leaves the noise one level behind, as diffusers does.
"""


def recorded():
    """{sampler: how many recorded runs}"""
    found = collections.Counter()
    for path in GOLDENS.glob("schedulers.*.json"):
        for case in json.loads(path.read_text(encoding="utf-8")).get("args", {}).values():
            if isinstance(case, dict) and {"scheduler", "config"} <= case.keys():
                # a run, not a table of the schedule's
                found[samplers.name_of(Schedule.from_config(case["config"], case["scheduler"]))] += 1
    return found


def theirs(table, ours):
    """What a table such as infotext.MENU calls a sampler of ours."""
    names = [(name, [k for k in kinds if k not in ("", "Automatic")]) for name, kinds, mine in table if mine == ours]
    return "; ".join(f"{name} ({', '.join(kinds)})" if kinds else name for name, kinds in names) or "–"


def table():
    counts, lines = recorded(), []
    for name, row in SAMPLERS.items():
        what = (row.run.__doc__ or "").split("\n")[0].partition(":")[0].rstrip(".,")
        calls = "2" if row.twice else "1"
        lines.append(
            f"| `{name}` | {what} | {theirs(infotext.MENU, name)} | {theirs(foreign.COMFYUI, name)} | {row.kind} | {calls} | {counts[name] or '–'} |"
        )
    mine = {ours: theirs for theirs, ours in infotext.SPACINGS.items()} | {"normal": "Uniform, Normal"}
    comfyui = {g: g for g in foreign.GRIDS if g != "beta"} | {"beta_times": "beta", "normal": "normal"}
    grids = [f"| `{grid}` | {mine.get(grid, '–')} | {comfyui.get(grid, '–')} |" for grid in samplers.SIGMAS]
    return HEAD + "\n".join(lines) + "\n" + GRIDS + "\n".join(grids) + "\n" + TAIL


if __name__ == "__main__":
    print(table(), end="")
