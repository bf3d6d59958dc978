"""distill.py few-step: a student that needs few steps where its teacher needs many."""

import shlex
import shutil

import torch

from nanodiff import data, lora, pipeline, weights
from nanodiff.commandline import flagged
from nanodiff.config import UserError, among_pictures, printable
from nanodiff.device import choice, dist
from nanodiff.diffusion import fewstep, samplers
from nanodiff.diffusion.schedule import Schedule
from nanodiff.diffusion.schedule_config import GRID
from nanodiff.evaluation import features, image_sets, pages
from nanodiff.files import apart, write_json
from nanodiff.output import charts, images, report
from nanodiff.output.record import Record
from nanodiff.pipeline import sources
from nanodiff.stories import gallery
from nanodiff.stories.diffusion import side_of
from nanodiff.training import build, loader, teach
from nanodiff.training.options import decisive, listed

LEAST_NOISE = 0.9  # of the timesteps: what a latent consistency student must know at least


def few_schedule(cfg, sd):
    """The student's pipeline as it will draw: its sampler."""
    flow = sd.schedule.flow
    if cfg.method == "guidance":
        return sd.with_scheduler(None)
    # latents are not bounded, and a student's jump is not clipped
    whole = {"clip_sample": False} if sd.vae is not None else {}
    if cfg.method == "progressive":
        if not flow:  # the last jump ends at x̂0 itself
            return sd.with_scheduler("ddim", timestep_spacing="trailing", set_alpha_to_one=True, **whole)
        # a round's times must be every other one of the round before
        nested = sd.schedule.raw.get(GRID) in ("sgm_uniform", "simple")
        return sd.with_scheduler("flow_euler", sigmas=None if nested else "sgm_uniform")
    if flow:
        return sd.with_scheduler("flow_lcm")
    return sd.with_scheduler("lcm", original_inference_steps=cfg.known_steps, **whole)


def check_known(cfg, schedule):
    """Raise UserError for --known-steps that a schedule has not; say what of its noise they leave out. They are every T // known-th timestep
    (LCMScheduler's), so that of many that do not divide T the noisiest are none of them, from which pictures begin."""
    if cfg.method not in ("consistency", "dmd") or schedule.flow:
        return
    if cfg.known_steps > schedule.T:
        raise UserError(f"--known-steps {cfg.known_steps}: the schedule has {schedule.T} timesteps")
    usual = samplers.rescheduled(schedule, "lcm").cfg["original_inference_steps"]
    if cfg.lora and cfg.known_steps != usual:
        raise UserError(
            f"--known-steps {cfg.known_steps} with --lora: a LoRA's file does not say it, and beside this model it would be drawn with by {usual}"
        )
    last = schedule.T // cfg.known_steps * cfg.known_steps
    if last < LEAST_NOISE * schedule.T:
        raise UserError(
            f"--known-steps {cfg.known_steps}: the noisiest would be timestep {last - 1} of {schedule.T - 1}, and pictures begin with noise alone; take one that "
            f"divides {schedule.T}"
        )
    if last < schedule.T:
        dist.say(f"note: --known-steps {cfg.known_steps}: the noisiest is timestep {last - 1} of {schedule.T - 1}")


# options that decide what the students of some methods learn
OF_METHODS = {
    "student_steps": ("progressive", "consistency", "dmd"),
    "first_steps": ("progressive",),
    "substeps": ("progressive",),
    "known_steps": ("consistency", "dmd"),
    "critic_steps": ("dmd",),
}


def few_step(cfg):
    """The stage `few-step`: see the module docstring."""
    cfg.check()
    image_sets.spaces_of(listed(cfg.features))
    device = choice.pick_device(cfg.device)
    dist.start(device, cfg.dist_timeout)
    record = Record(cfg, device)
    if cfg.evaluate and "features" in getattr(cfg, "given", ()):  # asked for by name: known now, not after the training
        for space in listed(cfg.features):
            try:
                image_sets.network(measures(cfg, record.out, device), space)
            except features.Absent as e:
                raise UserError(f"--features {space}: {e}") from None
    if wrong := among_pictures(cfg.data, "data", cfg.output_dir):
        dist.say(f"warning: {flagged(wrong)}")
    dataset, target = dist.on_main(data.load, cfg.data), record.out / "model"
    weights_of = dist.on_main(lambda: [weights.digest(m) if m else None for m in (cfg.model, cfg.student)])
    torch.manual_seed(cfg.seed)
    rounds = [cfg.student_steps]
    if cfg.method == "progressive":
        first = cfg.first_steps or 4 * cfg.student_steps
        rounds = [first >> i for i in range(first.bit_length()) if first >> i >= cfg.student_steps]
    made = [target, *(record.out / f"steps-{n}" for n in rounds[:-1])]
    dist.on_main(apart, {"model": cfg.model, "student": cfg.student}, made)
    side = cfg.resolution or dist.on_main(side_of, cfg.model)
    own = {name: getattr(cfg, name) for name, methods in OF_METHODS.items() if cfg.method in methods}
    # "steps" says it, of each round
    own.pop("student_steps", None)
    own |= {"progressive": {"first_steps": rounds[0]}, "guidance": {"teacher_steps": cfg.teacher_steps}}.get(
        cfg.method, {}
    )
    settings, last = build.lora_settings(cfg) if cfg.lora else None, cfg.model
    folders = [*made[1:], target]
    every = {"method": cfg.method, "teacher": cfg.model, "student": cfg.student, "weights": weights_of, "guidance": cfg.guidance_scale,
             "data": dataset.fingerprint(), "sizes": dataset.weight(), "lora": settings, "resolution": side,
             **own, **decisive(cfg)}  # fmt: skip
    if not cfg.overwrite_output_dir:  # what is of other settings shows before the first round
        for folder, n in zip(folders, rounds, strict=True):
            dist.on_main(teach.settled, folder, {"steps": n} | every, quiet=True)
    for i, (folder, n) in enumerate(zip(folders, rounds, strict=True)):
        work, facts = folder.with_name(f"{folder.name}.training"), {"steps": n} | every
        if not dist.on_main(teach.settled, folder, facts, cfg.overwrite_output_dir):
            begins = cfg.student if cfg.student and i == 0 else last
            sd, nets = dist.together(teach.student, begins, settings)
            if cfg.lora and set(nets) != {sd.denoiser_name}:
                raise UserError("--lora-targets: few steps are the denoiser's business; name its layers")
            master = None if cfg.lora else fewstep.frozen(sd.net)
            teacher = sd
            if begins != last:
                teacher = teacher_of(sd, begins, last)
                master = teacher.net.requires_grad_(False).eval()
            scale, steps = (
                guidance_of(cfg, teacher) if i == 0 else 1.0,
                guided_steps(cfg, teacher) if cfg.method == "guidance" else n,
            )
            check_known(cfg, sd.schedule)
            sd = few_schedule(cfg, sd)
            # known now, not after the training
            for count in (
                steps * cfg.substeps if cfg.method == "progressive" and i == 0 else steps,
                *(cfg.check_steps if cfg.evaluate else ()),
            ):
                samplers.check_steps(sd.schedule, count)
            if cfg.evaluate and i == 0:  # the original teacher draws, too
                for count in (guided_steps(cfg, teacher), *cfg.check_steps):
                    samplers.check_steps(teacher.schedule, count)
            if cfg.method == "dmd":
                nets["critic"] = fewstep.frozen(master).requires_grad_(True)
            sd.index = {**sd.index, pipeline.SAMPLING: {"steps": steps, "guidance_scale": 1.0}}
            if i == 0:
                counts = rounds if cfg.method != "guidance" else [steps]
                dist.say(f"{cfg.method}: guidance {scale:g}, {' → '.join(map(str, counts))} steps")
            with record.timed("train"):
                make = teach.FewSteps(
                    cfg.method, n, scale, master, cfg.known_steps, cfg.substeps if i == 0 else 2, cfg.critic_steps
                )
                teach.fit(cfg, work, sd, nets, dataset, make, few_writer(cfg, sd, folder, facts), cfg.resolution,
                          caption_dropout=cfg.caption_dropout, adapter_dropout=cfg.lora_dropout,
                          teachers=[master] if begins != last else (), sheets=teach.Sheets(dataset.captions[:8], cfg.sample_every, steps, 1.0),
                          lesson_of=(cfg.method, str(last), n, scale), told=own)  # fmt: skip
            teach.free(sd, teacher, *(m for m in (master, nets.get("critic")) if m is not None))
        dist.on_main(few_tidy, folder, work)
        last = str(folder)
    record.file(target)
    if cfg.evaluate:
        with record.timed("evaluate"):
            few_quality(cfg, record, dataset, device)
    record.write()
    if dist.is_main():
        how = ["--model", str(target)]
        if cfg.lora:  # beside it the model's own settings are others'; a whole student's folder says them
            how = ["--model", cfg.model, "--lora", str(target), "--guidance-scale", "1"]
            if cfg.method == "consistency":
                flow = Schedule.from_config(sources.configs(cfg.model).scheduler()[0]).flow
                how += ["--scheduler", "flow_lcm" if flow else "lcm"]
            if count := cfg.student_steps if cfg.method == "consistency" else cfg.teacher_steps:
                how += ["--steps", str(count)]
        if cfg.method == "progressive" and (schedule := pipeline.source(target).scheduler()[0]).get(GRID):
            dist.say(
                f"note: its steps are of the grid {schedule[GRID]}, which other programs must be told (docs/distillation.md)"
            )
        print(f'student: {target}\nnext: python sample.py {shlex.join(how)} --prompt "…" --output-dir OUT')
    dist.finish()


def teacher_of(sd, student, teacher):
    """The teacher's pipeline for a student `sd` that begins elsewhere. Raises UserError where one cannot learn from the other: another
    latent space, prediction type or text encoder."""
    found = dist.together(pipeline.load, teacher, torch.float32, "cpu")
    found.check_trainable()
    fewstep.same_space(sd, found)
    if sd.schedule.prediction != found.schedule.prediction:
        raise UserError(
            f"--student {student} predicts {sd.schedule.prediction}, its teacher {found.schedule.prediction}"
        )
    if loader.fingerprint(*sd.encoders) != loader.fingerprint(*found.encoders):
        raise UserError(f"--student {student} has another text encoder than its teacher")
    return found


def few_tidy(folder, work):
    """Of a student that is there, keep of its training what people look at; the rest is for going on."""
    for name in ("metrics.jsonl", "loss.png", "samples"):
        if (work / name).exists():
            shutil.rmtree(folder / name) if (folder / name).is_dir() else None
            (work / name).replace(folder / name)
    shutil.rmtree(work, ignore_errors=True)


def guidance_of(cfg, sd):
    """The teacher's guidance: --guidance-scale, or what its folder or family has."""
    return sd.settings(None, cfg.guidance_scale)[1]


def guided_steps(cfg, sd):
    """The teacher's own steps: --teacher-steps, or what its folder or family has."""
    return sd.settings(cfg.teacher_steps)[0]


def few_writer(cfg, sd, folder, facts):
    """write() of teach.fit()."""

    def write(run, states):
        loss = run.more.get("epoch_loss") or (run.numbers or {}).get("loss")
        record = {"loss": loss, "updates": run.step, "settings": facts}
        states.pop("critic", None)
        if not cfg.lora:
            return teach.save_model(sd, folder, cfg.save_dtype, states, **record)
        form = lora.form_for(cfg.lora_format, sd.models())
        folder.mkdir(exist_ok=True)
        path = folder / ("lora_weights" if form == "peft" else "pytorch_lora_weights.safetensors")
        teach.save_adapters(
            sd,
            run,
            states,
            {form: path},
            cfg.save_dtype,
            title=f"{cfg.method}-{cfg.student_steps}",
            base_model=cfg.model,
        )
        return write_json(folder / "training.json", record)

    return write


def measures(cfg, out, device):
    """How the student is measured."""
    return image_sets.Settings(groups=("fid", "kid"), spaces=listed(cfg.features), weights_dir=cfg.weights_dir, cache=str(out / "cache"),
                               seed=cfg.seed, device=device)  # fmt: skip


def few_quality(cfg, record, dataset, device):
    """Draw with teacher and student at several steps, measure, and show quality against steps."""
    out, found, sets = record.out, {}, {}
    chosen = pages.spread(len(dataset), min(cfg.num_images, len(dataset)))
    jobs = [gallery.Job(f"{i:05d}.png", dataset.captions[p], i) for i, p in enumerate(chosen)]
    settings = measures(cfg, out, device)
    dtype = choice.pick_dtype("auto", device)
    for who in ("teacher", "student"):
        taught = who == "student"
        sd = dist.together(pipeline.load, cfg.model if cfg.lora or not taught else out / "model", dtype, device)
        if taught and cfg.lora:
            files = out / "model" / "lora_weights"
            lora.fuse(sd.models(), lora.read(files if files.is_dir() else out / "model", sd.models()), keep=False)
            sd = few_schedule(cfg, sd)
        own = guided_steps(cfg, sd) if not taught or cfg.method == "guidance" else cfg.student_steps
        for steps in sorted({*cfg.check_steps, own}):
            folder = out / "check" / f"{who}-{steps}"
            how = gallery.settings(
                sd, who, steps, 1.0 if taught else guidance_of(cfg, sd), cfg.resolution, cfg.resolution
            )
            gallery.draw(sd, jobs, folder, how, cfg.draw_batch_size, anew=True, what=f"{who}, {steps} steps")
            sets[who, steps] = dist.on_main(data.load, folder, captions=False)
            found[who, steps] = image_sets.images(sets[who, steps], settings, dataset, what=f"{who}-{steps}")
        teach.free(sd)
    numbers = {f"{who}.steps_{n}.{k}": m for (who, n), f in found.items() for k, m in f.metrics.items()}

    def write():
        document = report.Report(f"{cfg.method.capitalize()}: a student of {own} steps")
        document.text(f"{len(jobs)} pictures at each number of steps, the same prompts and seeds, against the {len(dataset)} of {cfg.data}. "
                      "The teacher's steps with guidance are two passes of the network, the student's one.")  # fmt: skip
        steps = sorted({n for _, n in found})
        names = list(dict.fromkeys(k for f in found.values() for k in f.metrics))
        nothing = (float("nan"),) * 3
        panels = {k: {who: [pages.band(found[who, n].metrics[k]) if (who, n) in found and k in found[who, n].metrics else nothing for n in steps]
                      for who in ("teacher", "student")} for k in names}  # fmt: skip
        chart = charts.lines(out / "quality.png", steps, panels, "steps", "less is better")
        document.picture(chart, "Distance to the real pictures against steps")
        document.table(
            ("who", "steps", *names),
            [[who, n, *(f.metrics[k]["value"] for k in names)] for (who, n), f in found.items()],
        )
        labels, cells = [], []
        for (who, n), d in sets.items():
            cells += [pages.small(d.image(i), 96) for i in range(min(8, len(d)))]
            labels += [f"{who}, {n}", *[""] * (min(8, len(d)) - 1)]
        images.save_png(images.grid(cells, min(8, len(jobs)), labels), out / "pictures.png")
        document.picture(out / "pictures.png", "The same prompts and seeds")
        return [
            *report.write_metrics(out, numbers),
            *(p for p in (chart, out / "pictures.png") if p),
            *document.write(out),
        ]

    for path in dist.on_main(write):
        record.file(path)
    for reason in sorted({why for f in found.values() for why in f.skipped.values()}):
        dist.say(f"note: not computed: {printable(reason)}")
    for k, m in numbers.items():
        record.result(k, m["value"])
