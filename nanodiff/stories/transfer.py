"""distill.py transfer: a teacher draws, a student learns from it, both are compared, before and after."""

import shutil
from pathlib import Path

import torch

from nanodiff import data, lora, pipeline
from nanodiff.commandline import as_dict
from nanodiff.config import UserError, printable, read_json
from nanodiff.data import promptset
from nanodiff.device import choice, dist, memory
from nanodiff.diffusion import fewstep
from nanodiff.diffusion.schedule import Schedule
from nanodiff.evaluation import image_pairs, image_sets, pages
from nanodiff.files import apart, out_dir, write_json
from nanodiff.output import report
from nanodiff.output.record import Record
from nanodiff.pipeline import sources
from nanodiff.stories import gallery
from nanodiff.training import build, teach

ARMS = {"original": "weakmodel_images", "finetuned": "comparison_output/finetuned", "online": "comparison_output/online",
        "teacher": "comparison_output/teacher"}  # fmt: skip
PAIRINGS = [("original", "finetuned"), ("original", "teacher"), ("finetuned", "teacher")]


def transfer(*stages):
    """The main of `transfer` and some of its parts, one after the other."""

    def main(cfg):
        cfg.check()
        if cfg.dry_run:
            return transfer_plan(cfg)
        device = choice.pick_device(cfg.device)
        dist.start(device, cfg.dist_timeout)
        dist.agree(as_dict(cfg), "configuration")
        record = Record(cfg, device)
        dist.on_main(preflight, cfg, stages)
        for stage in stages:
            with record.timed(stage.__name__.removeprefix("transfer_")):
                stage(cfg, record, device)
        record.write()
        if len(stages) == 1:  # the next part's run.json takes this one's place
            name = stages[0].__name__.removeprefix("transfer_")
            dist.on_main(lambda: shutil.copy(record.out / "run.json", record.out / f"run-{name}.json"))
        dist.finish()

    return main


def preflight(cfg, stages):
    """What can be known to be wrong before hours of work. Raises UserError."""
    if transfer_train in stages:
        written = [cfg.work(method) / name for method in cfg.methods for name in ("model", "lora_weights")]
        apart({"model": cfg.model, "teacher": cfg.teacher}, written)
        build.check_noise(
            cfg, Schedule.from_config(sources.configs(cfg.model).scheduler()[0]), getattr(cfg, "given", ())
        )
    if transfer_generate in stages or transfer_evaluate in stages:
        learning_prompts(cfg)
    if transfer_evaluate in stages:
        evaluation_prompts(cfg)
    if cfg.method != "data" and (transfer_generate in stages or transfer_train in stages):
        both = [sources.configs(m) for m in (cfg.model, cfg.teacher)]
        a, b = (src.config("vae") if "vae" in src.parts else None for src in both)
        if a != b:
            raise UserError(
                f"--method {cfg.method}: {cfg.teacher} has another VAE than {cfg.model}, so they do not share latents; use --method data"
            )
        if not fewstep.same_schedule(*(Schedule.from_config(src.scheduler()[0]) for src in both)):
            raise UserError(
                f"--method {cfg.method}: {cfg.teacher} has another noise schedule than {cfg.model}; use --method data"
            )
    if transfer_evaluate in stages and transfer_train not in stages:
        for method in cfg.methods:
            path = taught(cfg, method)
            if not (path / "model_index.json").is_file():
                lora.read(path, lora.skeletons(cfg.model))


def learning_prompts(cfg):
    """[(category, prompt)] of the teacher's pictures."""
    return promptset.read(cfg.prompt_source, cfg.prompt_column).draw(cfg.num_images, cfg.seed)


def evaluation_prompts(cfg, say=False):
    """[(category, prompt)] of the comparison: none that is learned from, where there are others. say: what weakens it."""
    learned = [p for _, p in learning_prompts(cfg)]
    source = promptset.read(cfg.evaluation_prompts or cfg.prompt_source, cfg.prompt_column)
    categories = list(source.templates) if isinstance(source, promptset.Words) else None
    chosen = source.draw(cfg.num_evaluation_prompts, cfg.seed + 1, categories, learned)
    texts = [p for _, p in chosen]
    if say and (again := set(learned) & set(texts)):
        dist.say(f"note: {len(again)} of the compared prompts are learned from, too: there are no others")
    if say and len(set(texts)) < len(texts):
        dist.say(
            f"warning: {len(texts)} pictures of {len(set(texts))} different prompts: the tests take them for independent ones"
        )
    return chosen


def painter(model, device, adapters=None):
    """A pipeline that draws; adapters: a LoRA's file or folder, which is merged into its weights."""
    sd = dist.together(pipeline.load, model, choice.pick_dtype("auto", device), device)
    if adapters:
        dist.together(lambda: lora.fuse(sd.models(), lora.read(adapters, sd.models()), keep=False))
    return sd


def transfer_generate(cfg, record, device):
    """The teacher's pictures, each with its prompt beside it."""
    prompts = dist.on_main(learning_prompts, cfg)
    if (different := len({p for _, p in prompts})) < len(prompts):
        dist.say(f"note: {len(prompts)} pictures of {different} different prompts: {cfg.prompt_source} has no more")
    jobs = [gallery.Job(f"{i:05d}.png", prompt, cfg.seed + i) for i, (_, prompt) in enumerate(prompts)]
    sd = painter(cfg.teacher, device)
    how = teacher_settings(cfg, sd)
    failed = gallery.draw(
        sd, jobs, cfg.teacher_images, how, cfg.eval_batch_size, cfg.overwrite_output_dir, "teacher", captions=True
    )
    teach.free(sd)  # before the student is there: 16 GB are enough for one of them
    record.result("teacher_images", len(jobs) - len(failed))
    record.result("teacher_images_dropped", len(failed))


def teacher_settings(cfg, sd):
    """gallery.settings of the teacher's pictures."""
    scale = cfg.guidance_scale if cfg.teacher_guidance_scale is None else cfg.teacher_guidance_scale
    return gallery.settings(
        sd,
        Path(cfg.teacher).name,
        cfg.teacher_steps or cfg.steps,
        scale,
        cfg.teacher_resolution,
        cfg.teacher_resolution,
    )


def teacher_data(cfg):
    """The pictures to learn from. Raises UserError for a folder that is not complete."""
    folder = cfg.teacher_images
    if not folder.is_dir():
        raise UserError(f"{folder}: is not there; `transfer generate` makes it")
    if (folder / gallery.PLAN).is_file():
        drawn_by = str(read_json(folder / gallery.PLAN)["settings"]["model"])
        names = {Path(name.partition("@")[0]).name for name in (drawn_by, cfg.teacher)}
        if len(names) > 1:  # a copy may have another name
            dist.say(f"note: {folder}: was drawn by {printable(drawn_by)}; --teacher is {printable(cfg.teacher)}")
        lacking, _ = gallery.lacking(folder)
        lacking = [n for n in lacking if n in {f"{i:05d}.png" for i in range(cfg.num_images)}]
        if lacking:
            raise UserError(f"{folder}: {len(lacking)} of {len(gallery.planned(folder))} pictures are not there, such as {lacking[0]}; "
                            "`transfer generate` goes on with them")  # fmt: skip
        names = {f"{i:05d}.png" for i in range(cfg.num_images)}  # an earlier run may have made more
        every = data.load(folder)
        return every.subset([i for i, key in enumerate(every.keys) if key in names])
    return data.load(folder)


def transfer_train(cfg, record, device):
    """The student, once for every method."""
    dataset = dist.on_main(teacher_data, cfg)
    for method in cfg.methods:
        torch.manual_seed(cfg.seed)  # the adapters' beginnings
        sd, nets = dist.together(teach.student, cfg.model, build.lora_settings(cfg) if cfg.lora else None)
        make = teach.plain(cfg)
        if method == "online":
            master = dist.together(pipeline.load, cfg.teacher, torch.float32, "cpu")
            master.check_trainable()
            dist.together(fewstep.same_space, sd, master)
            make = teach.online(cfg, master, dataset.texts, cfg.feature_weight)
        else:
            master = None
        work = cfg.work(method)
        dist.say(f"{method}: {len(dataset)} pictures of {Path(cfg.teacher).name} teach {Path(cfg.model).name}")

        def write(run, states, sd=sd, work=work):
            if not cfg.lora:
                return teach.save_model(
                    sd, work / "model", cfg.save_dtype, states, loss=run.more.get("epoch_loss"), updates=run.step
                )
            form = lora.form_for(cfg.lora_format, sd.models())
            targets = {"peft": work / "lora_weights"} | (
                {} if form == "peft" else {form: work / f"lora_{form}.safetensors"}
            )
            names = {"title": f"{Path(cfg.teacher).name} to {Path(cfg.model).name}", "base_model": cfg.model}
            return teach.save_adapters(sd, run, states, targets, cfg.save_dtype, **names)

        shown = [p for _, p in dist.on_main(evaluation_prompts, cfg)[:8]] if cfg.sample_every else ()
        teach.fit(cfg, work, sd, nets, dataset, make, write, cfg.resolution, teachers=[master.net] if master else (), caption_dropout=cfg.caption_dropout, adapter_dropout=cfg.lora_dropout,
                  sheets=teach.Sheets(shown, cfg.sample_every, cfg.steps, cfg.guidance_scale),
                  lesson_of=(method, str(cfg.teacher), str(cfg.model), cfg.feature_weight if method == "online" else 0))  # fmt: skip
        record.file(work / ("lora_weights" if cfg.lora else "model"))
        teach.free(sd, *([master] if master else []))


def transfer_evaluate(cfg, record, device):
    """Before, after and teacher: the same prompts, and the same initial latents for the student's two."""
    prompts, counts, jobs = dist.on_main(evaluation_prompts, cfg, True), {}, []
    for i, (category, prompt) in enumerate(prompts):
        k = counts[category] = counts.get(category, -1) + 1
        jobs.append(gallery.Job(f"{category}/{k:04d}.png", prompt, cfg.seed + 1_000_000 + i))
    arms = ["original", "finetuned", *(["online"] if cfg.method == "both" else []), "teacher"]
    failed = {}
    for arm in arms:
        failed |= draw_arm(cfg, arm, jobs, device)
    names = {j.name for j in jobs if j.name not in failed}
    if len(names) < 2:
        raise UserError("fewer than two pictures could be drawn by all models, so nothing can be compared")
    folders = {}
    for arm in arms:
        every = dist.on_main(data.load, cfg.root / ARMS[arm])
        folders[arm] = every.subset([i for i, key in enumerate(every.keys) if key in names])
    found, metrics, skipped = compare_arms(cfg, folders, device)
    for reason in dict.fromkeys(skipped.values()):
        dist.say(f"note: not computed: {printable(reason)}")
    facts = {"skipped": skipped, "dropped": failed, "prompts": {job.name: job.prompt for job in jobs}}
    for path in dist.on_main(write_comparison, cfg, found, metrics, folders, facts):
        record.file(path)
    for metric in ("mse", "ssim"):
        for arm in ("original", "finetuned", "online"):
            if (name := f"{arm}_vs_teacher.{metric}") in metrics:
                record.result(name, metrics[name]["value"])
    record.result("pictures_compared", len(names))


def draw_arm(cfg, arm, jobs, device):
    """Draw one arm's pictures; returns {name: why it could not be drawn}."""
    if arm == "teacher":
        sd = painter(cfg.teacher, device)
        how = teacher_settings(cfg, sd)
    else:
        trained = None if arm == "original" else taught(cfg, "online" if arm == "online" else cfg.methods[0])
        whole = trained is not None and (trained / "model_index.json").is_file()
        sd = painter(trained if whole else cfg.model, device, None if whole else trained)
        how = gallery.settings(sd, arm, cfg.steps, cfg.guidance_scale, cfg.resolution, cfg.resolution)
    failed = gallery.draw(sd, jobs, cfg.root / ARMS[arm], how, cfg.eval_batch_size, anew=True, what=arm, captions=True)
    teach.free(sd)
    return failed


def compare_arms(cfg, folders, device):
    """(the pairs of pictures, {metric: …}, {metric: why it was not computed}) of {arm: its pictures}: PAIRINGS, and with both methods
    the online student against its teacher."""
    settings = image_sets.Settings(("fid", "clip_score"), weights_dir=cfg.weights_dir, clip=cfg.clip, seed=cfg.seed, device=device,
                                 cache=str(cfg.root / "cache"))  # fmt: skip
    three = {k: v for k, v in folders.items() if k != "online"}
    found, resized = image_pairs.pairs(three, PAIRINGS, settings)
    metrics = image_pairs.pair_metrics(found, {}, resized, cfg.seed)
    whole, skipped = image_pairs.of_sets(three, PAIRINGS, settings)
    metrics |= whole
    if "online" not in folders:
        return found, metrics, skipped
    pairing = [("online", "teacher")]
    both = {k: folders[k] for k in ("finetuned", "online", "teacher")}
    second, resized = image_pairs.pairs(both, pairing, settings)
    more = image_pairs.pair_metrics(second, {}, resized, cfg.seed)
    metrics |= {f"online_vs_teacher.{k}": m for k, m in more.items()}
    whole, _ = image_pairs.of_sets({k: folders[k] for k in ("online", "teacher")}, pairing, settings)
    named = ("online.", "teacher.")  # what says already whose it is
    metrics |= {k if k.startswith(named) else f"online_vs_teacher.{k}": m for k, m in whole.items()}
    found = [p._replace(numbers=p.numbers | q.numbers) for p, q in zip(found, second, strict=True)]
    return found, metrics, skipped


def write_comparison(cfg, found, metrics, folders, facts):
    """Tables, figures and pictures of a comparison in the document's folders; returns their paths. Older ones make room."""
    folder, side, maps = (out_dir(cfg.root / n) for n in ("metrics", "comparison_output", "research_comparisons"))
    # this one is written last: without it nothing was evaluated to the end
    (folder / "evaluation.json").unlink(missing_ok=True)
    files = [*pages.write_pairs(folder, found), *report.write_metrics(folder, metrics)]
    files += pages.pictures_of(cfg.panels, side, maps, report.Report(""), found, folders, PAIRINGS)
    settings = {k: str(v) for k, v in as_dict(cfg).items() if v not in (None, "", [])}
    write_json(folder / "evaluation.json", {"settings": settings, **facts})
    return files


def taught(cfg, method):
    """What train wrote, or --checkpoint: a LoRA's file or folder, or a model's folder."""
    if cfg.checkpoint and method == cfg.methods[0]:
        path = Path(cfg.checkpoint)
        if not path.exists():
            raise UserError(f"--checkpoint {path}: no such file or folder")
        return path
    path = cfg.work(method) / ("lora_weights" if cfg.lora else "model")
    if not path.is_dir():
        raise UserError(f"{path}: is not there; `transfer train` makes it, or --checkpoint names another")
    return path


def transfer_visualize(cfg, record, device):
    """Figures, tests and the report, from the numbers of evaluate alone."""
    for path in dist.on_main(_visualize, cfg):
        record.file(path)


def _visualize(cfg):
    numbers = Path(cfg.metrics_dir) if cfg.metrics_dir else cfg.root / "metrics"
    if not (numbers / "evaluation.json").is_file():
        raise UserError(f"{numbers}: is not there, or not complete; `transfer evaluate` makes it")
    root = numbers.resolve().parent
    look = out_dir(cfg.root if cfg.metrics_dir else root / "visualization")
    earlier = ("*_comparison.png", "*_chart.png", "*_table.png", "online.csv", "significance.csv")
    for pattern in earlier:  # no figure of an earlier evaluation stays
        for old in look.glob(pattern):
            old.unlink()
    found, metrics, facts = (
        pages.read_pairs(numbers),
        report.read_metrics(numbers),
        read_json(numbers / "evaluation.json"),
    )
    settings = facts["settings"]
    document = report.Report(f"From {Path(settings['teacher']).name} to {Path(settings['model']).name}")
    document.text(pages.CANNOT)
    document.text(f"{len(found)} prompts in {len({p.category for p in found})} categories. The student before and after training began from the "
                  f"same latents. {len(facts['dropped'])} pictures could not be drawn and are left out.")  # fmt: skip
    _show_panels(document, root, found, facts.get("prompts", {}))
    tests, path = pages.nearer(look, document, found, int(settings["seed"]))
    files = [path]
    if "online_vs_teacher" in found[0].numbers:
        document.heading("Two ways to learn")
        document.text("Finetuned: trained on the teacher's pictures. Online: trained on the output of the teacher's denoiser on the same pictures, "
                      "with as many updates. The test asks whether online's pictures are nearer to the teacher's than finetuned's.")  # fmt: skip
        files.append(pages.nearer(look, document, found, int(settings["seed"]), "finetuned", "online", "online.csv")[1])
    drawn = pages.charts_of(look, document, found, PAIRINGS, metrics)
    for curve in sorted((root / "checkpoints").rglob("loss.png")):
        document.picture(curve, f"loss: {curve.parent.name}")
    panels = sorted((root / "comparison_output").glob("comparison_all_*.png"))
    both = image_pairs.shared(found, "original_vs_teacher", "finetuned_vs_teacher")
    files += [
        *drawn,
        *pages.research(settings, root / "research_paper_materials", tests, both, metrics, [*drawn, *panels]),
    ]
    document.heading("Settings")
    decisive = ("teacher", "model", "method", "num_images", "num_evaluation_prompts", "epochs", "lr", "batch_size", "lora_rank", "lora_alpha",
                "lora_targets", "steps", "guidance_scale", "resolution", "seed")  # fmt: skip
    first = [n for n in decisive if n in settings]
    document.table(
        ("setting", "value"), [[n, str(settings[n])] for n in (*first, *(n for n in settings if n not in first))]
    )
    document.heading("Numbers")
    report.metrics_table(document, metrics)
    if facts["skipped"]:
        document.heading("Not computed")
        pages.not_computed(document, facts["skipped"])
    for name in ("ssim", "mse"):
        if name in tests:
            p = tests[name].p_t
            sure = "" if p < 0.05 else ", so it may be chance"
            print(f"{name}: finetuned is {pages.NEARER[tests[name].nearer]}, p = {p:.2g} (paired t test, Holm){sure}")
    print(f"report: {look / 'report.html'}")
    return [*files, *document.write(look)]


def _show_panels(document, root, found, prompts, most=6):
    """Of the first pictures: the panel of all models, under it its prompt, and where before and after differ from the teacher."""
    document.heading("Pictures")
    counts, parts, shown = {}, pages.distinct(p.category for p in found), 0
    for pair in found:
        i = counts[pair.category] = counts.get(pair.category, -1) + 1
        name = f"{parts[pair.category]}_{i}.png"
        panel = root / "comparison_output" / f"comparison_all_{name}"
        if not panel.is_file() or shown == most:
            continue
        shown += 1
        prompt = next((p for n, p in prompts.items() if n == pair.name or n.rpartition(".")[0] == pair.name), None)
        document.picture(panel, prompt or pair.name)
        for a in ("original", "finetuned"):
            path = root / "research_comparisons" / f"difference_{a}_vs_teacher_{name}"
            document.picture(
                path if path.is_file() else None, f"where {a} differs from the teacher: {prompt or pair.name}"
            )


def transfer_plan(cfg):
    """Memory of each stage on a GPU, from configurations alone."""
    low = {"fp16": torch.float16, "no": None}.get(cfg.mixed_precision, torch.bfloat16)
    peaks, teacher = {}, 0
    for name, model, side in (
        ("generate (teacher)", cfg.teacher, cfg.teacher_resolution),
        ("evaluate (student)", cfg.model, cfg.resolution),
    ):
        stages = pipeline.plan(
            sources.configs(model), torch.float16, side, side, cfg.eval_batch_size, True, None, True, 256, False
        )
        print(f"{name}: {model}")
        print("\n".join(memory.table(stages, None)))
        peaks[name] = memory.peaks(stages)["none"]
        teacher = teacher or sum(s.parameters for s in stages)
    found = teach.estimate(cfg, cfg.model, build.lora_settings(cfg) if cfg.lora else None, cfg.resolution, low)
    print(
        f"train (student): {found.trained / 1e6:.2f} M trained, {found.frozen / 1e6:.2f} M frozen, activations {found.activations / 1e9:.3f} GB"
    )
    peaks["train (student)"] = found.peak + (4 * teacher if cfg.method != "data" else 0)
    for name, peak in peaks.items():
        print(
            f"{name}: peak {peak / 1e9:.2f} GB: {'fits' if peak * 1.1 < 16e9 else 'does not fit'} in 16 GB with a tenth to spare"
        )
    print("the teacher is freed before the student trains, so the largest of these counts" if cfg.method == "data" else
          "--method online trains with the teacher beside the student")  # fmt: skip


generate, train, evaluate, visualize = map(
    transfer, (transfer_generate, transfer_train, transfer_evaluate, transfer_visualize)
)
all = transfer(transfer_generate, transfer_train, transfer_evaluate, transfer_visualize)
