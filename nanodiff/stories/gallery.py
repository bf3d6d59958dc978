"""Folders of pictures that a model draws: resumable, shared out over processes, each with the seed that repeats it.

    how = settings(sd, model, steps, scale)                                    # what decides a picture beside prompt and seed
    failed = draw(sd, [Job("00000.png", "a red apple", 7)], "out/pictures", how)

A folder has a plan, `drawn.json`: the settings, and the prompt and seed of every picture. It is written before the first picture, and a
picture replaces nothing but its own unfinished file, so a run that is killed at any moment goes on where it stopped, and ends with the
same files. Each picture is drawn from its own seed: the same for every batch size and number of processes, but for rounding.
"""

import json
from pathlib import Path
from typing import NamedTuple

from nanodiff.config import UserError, printable, read_json
from nanodiff.device import dist
from nanodiff.diffusion import samplers
from nanodiff.files import claim, write_bytes, write_json
from nanodiff.output import images
from nanodiff.training import loader

PLAN = "drawn.json"
QUALITY = 95  # of JPEGs


class Job(NamedTuple):
    """One picture. name: of its file, whose suffix says its format (.png, .jpg)."""

    name: str
    prompt: str
    seed: int


def settings(sd, model, steps=None, scale=None, height=None, width=None):
    """What decides a picture beside prompt and seed, as JSON values; None: the model's own."""
    steps, scale = sd.settings(steps or None, scale)
    samplers.check_steps(sd.schedule, steps)
    return {
        "model": str(model), "model_sha256": loader.fingerprint(*(m for m in (sd.net, sd.vae, *sd.encoders) if m is not None)),
        "dtype": str(next(sd.net.parameters()).dtype).removeprefix("torch."), "scheduler": samplers.name_of(sd.schedule), "steps": steps,
        "guidance_scale": scale, "height": height or sd.size[0], "width": width or sd.size[1],
    }  # fmt: skip


def draw(sd, jobs, folder, how, batch_size=16, anew=False, what="drawing", captions=False, on_saved=None, exact=False):
    """Draw the jobs whose pictures are not there yet. Every process must call it. Returns {name: why} of those that failed: a model's
    NaN costs its own picture, not the run.

    how: of settings(), and perhaps `negative_prompt` and `resize`, (width, height) to which each picture is brought. on_saved(job): called after
    each picture. captions: put the prompt beside each picture, NAME.txt, as training data has it. anew: pictures that the folder has from other
    settings, prompts or seeds are drawn again; otherwise they raise UserError, since a folder of two kinds would be measured as one. exact: the
    folder holds these pictures and no others. Raises UserError when all fail."""
    folder = Path(folder)
    todo = dist.on_main(_begin, folder, jobs, how, anew, exact)
    if len(todo) < len(jobs):
        dist.say(f"{folder}: {len(jobs) - len(todo)} of {len(jobs)} pictures are there already")
    # batches are those of the whole list: what is drawn again is rounded as it was
    lacking = {job.name for job in todo}
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    batches = [batch for batch in batches if any(job.name in lacking for job in batch)]
    mine, failed = batches[dist.world().rank :: dist.world().size], {}

    def run():
        for batch in dist.progress(mine, len(mine), f"{what} (batches)"):
            for some in (
                batch,
                *([[job] for job in batch] if len(batch) > 1 else ()),
            ):
                # one by one, where the batch had a fault
                try:
                    made = images.to_pil(sd.generate([j.prompt for j in some], how.get("negative_prompt"), seeds=[j.seed for j in some],
                                                     **{k: how[k] for k in ("steps", "guidance_scale", "height", "width")}).pixels)  # fmt: skip
                except UserError as e:
                    if len(some) == 1:
                        failed[some[0].name] = str(e)
                    continue
                for job, picture in zip(some, made, strict=True):
                    if job.name not in lacking:
                        continue
                    path = folder / job.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if captions:
                        write_bytes(path.with_suffix(".txt"), f"{job.prompt}\n".encode())
                    if how.get("resize"):
                        picture = picture.resize(tuple(how["resize"]), images.Image.Resampling.LANCZOS)
                    save(picture, path, how | {"prompt": job.prompt, "seed": job.seed})
                    if on_saved:
                        on_saved(job)
                if some is batch:
                    break
        return failed

    failed = {k: v for part in dist.gathered(dist.together(run)) for k, v in part.items()}
    dist.on_main(_failures, folder, failed)
    if failed:
        if len(failed) == len(jobs):
            raise UserError(f"{folder}: no picture could be drawn: {next(iter(failed.values()))}")
        name, why = next(iter(failed.items()))
        dist.say(
            f"warning: {folder}: {len(failed)} of {len(jobs)} pictures could not be drawn and are left out, such as {name}: {why}"
        )
    return failed


def save(picture, path, record):
    """Write a picture by its suffix. record: into a PNG."""
    if path.suffix == ".png":
        images.save_png(picture, path, record)
    else:
        images.save(picture, path, "JPEG", quality=QUALITY)


def planned(folder):
    """{name: Job} of the pictures that a folder of ours is to have. Raises UserError when it is none."""
    path = Path(folder) / PLAN
    if not path.is_file():
        raise UserError(f"{path}: is not there, so {folder} is no folder of generated pictures")
    return {k: Job(k, *v) for k, v in read_json(path)["pictures"].items()}


def lacking(folder):
    """(names of the plan that are not there, though they did not fail, {name: why} of those that failed)."""
    folder = Path(folder)
    failed = read_json(folder / PLAN).get("failed", {})
    return [n for n in planned(folder) if n not in failed and not there(folder / n)], failed


def _failures(folder, failed):
    plan = read_json(folder / PLAN)
    if plan.get("failed", {}) != failed:
        write_json(folder / PLAN, plan | {"failed": failed})


def complete(folder, names):
    """Are the pictures of these names there, each readable to its end?"""
    return all(there(Path(folder) / name) for name in names)


def there(path):
    try:
        return path.is_file() and images.open_image(path) is not None
    except UserError:
        return False


def _begin(folder, jobs, how, anew, exact=False):
    """The jobs that are to be drawn, after writing the plan."""
    claim(folder)
    for part in folder.rglob(".*.tmp-*"):  # of a run that was killed
        part.unlink()
    path, how = folder / PLAN, json.loads(json.dumps(how))
    before = read_json(path) if path.is_file() else {"settings": how, "pictures": {}}
    if different := [k for k in how if before["settings"].get(k) != how[k]]:
        if not anew:
            k = different[0]
            raise UserError(f"{folder}: holds pictures of another {k} ({printable(before['settings'].get(k))}, not {printable(how[k])}); "
                            "take another folder (or `overwrite_output_dir`)")  # fmt: skip
        before["pictures"] = dict.fromkeys(before["pictures"])
    old, new = before["pictures"], {j.name: [j.prompt, j.seed] for j in jobs}
    if bad := [n for n in new if Path(n).is_absolute() or ".." in Path(n).parts]:
        raise UserError(f"{folder}: {printable(bad[0])} is no name inside it")
    if len(new) < len(jobs):
        raise UserError(f"{folder}: two pictures would have one name")
    if (changed := [n for n in new if old.get(n) and old[n] != new[n]]) and not anew:
        before, now = (f"{printable(prompt)!r}, seed {seed}" for prompt, seed in (old[changed[0]], new[changed[0]]))
        raise UserError(
            f"{folder}: {changed[0]} was drawn from {before}, not {now}; take another folder (or `overwrite_output_dir`)"
        )
    if exact and not anew and not set(old) <= set(new):
        raise UserError(
            f"{folder}: holds {len(old)} pictures, {len(new)} are asked for; take another folder (or `overwrite_output_dir`)"
        )
    stranger = next((p for p in sorted(folder.iterdir()) if p.suffix in (".png", ".jpg") and p.name not in old), None)
    if stranger:
        raise UserError(f"{stranger}: is no picture of this run; take another folder")
    for name in old:
        if (anew and name not in new) or (name in new and old[name] != new[name]):
            (folder / name).unlink(missing_ok=True)
    write_json(path, {"settings": how, "pictures": new if anew else old | new})
    return [j for j in jobs if not there(folder / j.name)]
