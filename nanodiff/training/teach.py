"""The loop by which a model learns from another one: pictures and captions in, a model or adapters out. distill.py's three stages differ
in the loss they hand it.

    fit(training, "out/work", sd, nets, dataset, make, write)

make(Lesson) -> f(batch) -> (loss, {name: part for the log}); write(run, states) is called on rank 0 with the averaged weights.
"""

import contextlib
import dataclasses
import gc
import json
import shutil
from typing import NamedTuple

import torch

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError, read_json, short, typed
from nanodiff.device import choice, dist, onednn
from nanodiff.diffusion import fewstep, objective
from nanodiff.files import write_bytes, write_folder
from nanodiff.output import charts, images
from nanodiff.pipeline import sources
from nanodiff.training import build, latents, loader, plan
from nanodiff.training.options import Noise, Training, decisive, replaced
from nanodiff.training.run import Run


class Lesson(NamedTuple):
    """What a loss is made of."""

    sd: object  # the student's pipeline
    run: Run
    calls: dict  # {component: what to call in its place}
    x0_of: latents.Latents
    text_of: latents.Texts
    seed: int
    caption_dropout: float  # share of captions replaced by the empty text (SDXL: zeros)

    def denoise(self, condition, call=None, sd=None):
        """f(x, t) -> the student's prediction, condition (states, pooled). call, sd: in place of the student's network, and of its pipeline."""
        call, sd = call or self.calls.get(self.sd.denoiser_name, self.sd.net), sd or self.sd
        return lambda x, t: sd.denoise(call, x, t, *condition)

    def nothing(self, condition, batch):
        """(states, pooled) against which the model's guidance works: of the empty text, or what its family has in its place."""
        if self.sd.nothing_is_zeros:
            return tuple(map(torch.zeros_like, condition))
        return self.text_of(batch, [""] * len(batch.indices))


def plain(noise: Noise):
    """make() of ordinary training on the pictures: build.losses."""

    def make(lesson):
        losses = build.losses(noise, lesson.sd, lesson.calls, lesson.run.device)

        def loss(batch):
            value, unweighted = losses(batch, lesson.x0_of, lesson.text_of, lesson.seed)
            return value, {"unweighted_loss": unweighted}

        return loss

    return make


@dataclasses.dataclass
class FewSteps:
    """make() of fit() for a student of few steps, by the methods of fewstep.py; every draw is a function of seed, sample and purpose."""

    method: str  # "progressive", "guidance", "consistency" or "dmd"
    steps: int  # the student's
    scale: float  # the teacher's guidance
    teacher: torch.nn.Module | None  # its network; None: an adapted student's own base
    known_steps: int = 50  # times that consistency learns
    substeps: int = 2  # of the teacher, that are one of progressive's; 2 where it is the student of another round
    critic_steps: int = 5  # updates of dmd's critic for one of the student

    def __call__(self, lesson):
        if self.teacher is not None:
            self.teacher.to(lesson.run.device)
        method = getattr(self, self.method)
        return lambda batch: method(Round(lesson, batch, self.teacher, self.scale))

    def progressive(self, r):
        i = r.draw("timestep", 0, lambda g: torch.randint(self.steps, (), generator=g))
        return fewstep.progressive(r.student, r.guide, r.schedule, r.x0, r.normal(0), i, self.steps, self.substeps), {}

    def guidance(self, r):
        shift = r.schedule.cfg["shift"] if r.schedule.flow else 1.0
        t = objective.timesteps(r.schedule, r.lesson.seed, r.rows, shift=shift).to(r.x0.device)
        return fewstep.guidance(r.student, r.guide, r.schedule, r.schedule.add_noise(r.x0, r.normal(0), t), t), {}

    def consistency(self, r):
        i = r.draw("timestep", 0, lambda g: torch.randint(self.known_steps, (), generator=g))
        return fewstep.consistency(r.student, r.now, r.guide, r.schedule, r.x0, r.normal(0), i, self.known_steps), {}

    def dmd(self, r):
        """The critic learns at every update, the student at every critic_steps-th, from pictures that it draws itself."""
        run, schedule = r.lesson.run, r.schedule
        taught = run.step % self.critic_steps == 0
        k = torch.randint(self.steps, (), generator=objective.generator(r.lesson.seed, "timestep", f"step {run.step}"))
        k = k.item()
        with torch.set_grad_enabled(taught):
            x0 = fewstep.drawn(r.now, schedule, [r.normal(j) for j in range(k + 1)], self.steps, k, r.student)
        t, u = (
            fewstep.matched_times(schedule, r.draw("timestep", i, lambda g: torch.rand((), generator=g)))
            for i in (1, 2)
        )
        critic = r.lesson.denoise(r.condition, r.lesson.calls["critic"])
        value = fewstep.denoising(critic, schedule, x0, r.normal("critic"), t)
        parts = {"critic": value}
        if taught:
            frozen = r.lesson.denoise(r.condition, run.net["critic"])
            parts["student"] = fewstep.distribution(x0, r.guide, frozen, schedule, r.normal("match"), u)
            value = value + parts["student"]
        return value, parts


class Round:
    """A micro-batch as the methods of FewSteps need it: x0, condition, student (f(x, t) that learns), now (its own network as it is), guide."""

    def __init__(self, lesson, batch, teacher, scale):
        self.lesson, self.rows, self.schedule = lesson, batch.indices, lesson.sd.schedule
        self.x0, self.condition = lesson.x0_of(batch), lesson.text_of(batch)
        self.own, empty = lesson.sd.net, lesson.nothing(self.condition, batch)
        self.student, self.now = lesson.denoise(self.condition), lesson.denoise(self.condition, self.own)
        net = self.own if teacher is None else teacher
        self.shared = teacher is None  # the teacher is the student without its adapters
        self.predict = fewstep.guided(lesson.denoise(self.condition, net), lesson.denoise(empty, net), scale)

    def draw(self, stream, part, one):
        """One one(generator) for each sample, stacked."""
        return objective.draw(self.lesson.seed, stream, [f"{i}.{part}" for i in self.rows], one).to(self.x0.device)

    def normal(self, part):
        return self.draw("noise", part, lambda g: torch.randn(self.x0.shape[1:], generator=g))

    def guide(self, x, t):
        """The teacher's prediction, guided."""
        with torch.no_grad(), lora.without(self.own) if self.shared else contextlib.nullcontext():
            return self.predict(x, t)


def online(noise: Noise, teacher, texts, feature_weight=0.0):
    """make() of fit(): the student's x̂0 against the teacher's at the same x_t, each told in its own words; with feature_weight, also
    where both UNets look. noise: how times and noise are drawn; teacher: its pipeline, which shares the student's latents and schedule; texts:
    of the data set."""

    def made(lesson):
        sd, run = lesson.sd, lesson.run
        for module in teacher.models().values():
            module.to(run.device).requires_grad_(False).eval()
        teacher.vae = None  # the student's is the same
        theirs = latents.Texts(teacher, texts, lesson.seed, run.device, lesson.caption_dropout, folder=run.out / "cache",
                               dtype=run.precision or torch.float32)  # fmt: skip
        # hooks that stay for as long as the networks live
        places = [fewstep.Features(n) for n in (sd.net, teacher.net)] if feature_weight else []
        shift = noise.timestep_shift or (sd.schedule.cfg["shift"] if sd.schedule.flow else 1.0)

        def loss(batch):
            x0 = lesson.x0_of(batch)
            t = objective.timesteps(sd.schedule, lesson.seed, batch.indices, noise.timestep_sampling, noise.timestep_mean, noise.timestep_std,
                                    shift).to(x0.device)  # fmt: skip
            eps = objective.draw(lesson.seed, "noise", batch.indices, lambda g: torch.randn(x0.shape[1:], generator=g))
            eps = objective.offset(eps.to(x0), noise.offset_noise, lesson.seed, batch.indices)
            x = sd.schedule.add_noise(x0, eps, t)
            with torch.no_grad():
                want, _ = fewstep.split(
                    teacher.schedule, lesson.denoise(theirs(batch), teacher.net, teacher)(x, t), x, t
                )
            got, _ = fewstep.split(sd.schedule, lesson.denoise(lesson.text_of(batch))(x, t), x, t)
            parts = {"output": fewstep.mean_error(sd.schedule, got, want, t, x)}
            if places:
                parts["features"] = fewstep.features(places[0].seen, places[1].seen)
            return parts["output"] + feature_weight * parts.get("features", 0.0), parts

        return loss

    return made


class Sheets(NamedTuple):
    """Sample sheets while a model learns."""

    prompts: list = ()
    every: int = 0  # updates; 0 = none
    steps: int | None = None  # None: the model's own
    guidance: float | None = None


def fit(training: Training, work, sd, nets, dataset, make, write, side=None, *, caption_dropout=0.0, adapter_dropout=0.0, sheets=None,
        lesson_of=(), told=None, teachers=()):  # fmt: skip
    """Train nets ({component: module}, of the pipeline sd) on a data set; checkpoints, log and caches lie in the folder `work`, where a
    killed run goes on. training: options of every training, by which one that goes on is compared; side: pixels, default the model's;
    caption_dropout: share of captions replaced by the empty text (SDXL: zeros); adapter_dropout: of the adapters' inputs.

    lesson_of, told: what else must be the same when a run goes on, as JSON values: method, teacher; {name: value}; teachers: modules whose weights must be, as sd's
    must. Raises UserError for a `work` that was begun with others or another data set, and for a size that the model cannot have."""
    if side and side % sd.multiple:
        raise UserError(f"`resolution` {side} must be a multiple of {sd.multiple}")
    if side:
        sd.check_size(side, side, "`resolution`")
    sheets = sheets or Sheets()
    group = training.batch_size * training.grad_accum * dist.world().size
    updates = training.max_steps or training.epochs * max(1, -(-len(dataset) // group))
    run = Run(
        replaced(
            training,
            output_dir=str(work),
            resume=None if training.overwrite_output_dir else training.resume or "auto",
            checkpointing_steps=training.checkpointing_steps or max(1, updates // 10),
        )
    )
    begun = loader.fingerprint(*(m for m in (sd.net, *sd.encoders, *teachers) if m is not None))
    vae = sd.vae and loader.fingerprint(sd.vae)
    for module in sd.models().values():
        onednn.learn(module.to(run.device))
    transform = loader.Transform(side or sd.size[0], True)
    seed = training.seed
    feed = loader.Feed(
        dataset, transform, seed, training.batch_size, training.grad_accum, timeout=training.dist_timeout
    )
    calls = run.trainable(nets, random="lora_dropout" if adapter_dropout else None)
    if training.gradient_checkpointing and sd.denoiser_name not in nets:
        dist.recompute(sd.net)  # it is frozen, but gradients pass through it to the text encoder
    run.schedule(feed.per_epoch)
    run.resume()
    run.same("data set", dataset.fingerprint(), must=True)
    run.same("size of its pictures", dataset.weight(), must=True)
    run.same("method or teacher", list(lesson_of), must=True)
    run.same("model that it begins with, or its teacher,", begun, must=True)
    run.same("VAE", vae, must=True)
    for name, value in {"resolution": side or sd.size[0], **(told or {})}.items():
        run.same(name, value, must=True)
    for name, value in decisive(training).items():
        run.same(name, value, must=True)
    feed.serve(run)
    cache = work / "cache"
    lesson = Lesson(
        sd, run, calls, latents.Latents(sd.vae, feed, seed, run.device, cache),
        latents.Texts(sd, dataset.texts, seed, run.device, caption_dropout, calls.get("text_encoder"), cache,
                      dtype=run.precision or torch.float32), seed, caption_dropout,
    )  # fmt: skip
    loss_of = make(lesson)
    for step in run.steps():
        for batch in feed.update(step):
            build.reseed(adapter_dropout, seed, batch)
            with run.forward(batch):
                loss, parts = loss_of(batch)
            run.backward(loss, batch, **parts)
        run.update()
        if sheets.prompts and run.every(sheets.every):
            path = work / "samples" / f"{step + 1:06d}.png"
            sheet(run, sd, sheets.prompts, path, sheets.steps, sheets.guidance)
        if run.epoch_ended():
            run.more["epoch_loss"] = run.epoch_loss
            run.judge(run.epoch_loss)
    run.save()
    with run.averaged():
        states = {k: dist.whole_state(m) for k, m in run.net.items()}
        dist.on_main(write, run, states)
    dist.on_main(_curve, run)
    run.close(leave=False)


def _curve(run):
    log = run.out / "metrics.jsonl"
    if log.exists() and charts.losses(log, run.out / "loss.png"):
        run.record.file(run.out / "loss.png")


def student(model, settings=None):
    """(pipeline in fp32, {component: module to train}). settings: None, for the whole denoiser; or lora.adapt()'s, for adapters on the
    denoiser and the text encoder, wherever their targets are. Raises UserError for a target that is nowhere."""
    sd, nets = build.student(model)
    if settings is None:
        return sd, nets
    sd.net.requires_grad_(False)
    parts = {sd.denoiser_name: sd.net} | {n: m for n, m in sd.models().items() if n.startswith("text_encoder")}
    shared = adapters_of(parts, settings, model)
    if len(parts) > 2 and set(shared) - {sd.denoiser_name}:
        raise UserError("`lora_targets`: adapters on a text encoder are trained where a model has one, not several")
    for n, mine in shared.items():
        lora.adapt(parts[n], component=n, **mine)
    return sd, {n: parts[n] for n in shared}


def adapters_of(parts, settings, model):
    """{component: settings of lora.adapt()}: every target and pattern goes to the components that have such layers; the default targets are
    the denoiser's, which is the first of `parts`. Raises UserError for one that is nowhere."""
    layers = {
        n: [k for k, m in net.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        for n, net in parts.items()
    }
    if settings["targets"] == lora.ATTENTION:
        layers = dict([next(iter(layers.items()))])
        return dict.fromkeys(layers, settings)
    places = lambda target: [n for n, names in layers.items() if any(lora.matches(k, target) for k in names)]  # noqa: E731
    found = {target: places(target) for target in settings["targets"]}
    for target, where in found.items():
        if not where:
            ends = sorted({k.rpartition(".")[2] for names in layers.values() for k in names})
            raise UserError(f"`lora_targets` {target}: no layer of {model} has such a name; it has {', '.join(ends)}")
    out = {}
    for n in (n for n in layers if any(n in where for where in found.values())):
        out[n] = settings | {"targets": tuple(t for t, where in found.items() if n in where)}
        for kind in ("rank_pattern", "alpha_pattern"):
            out[n][kind] = {t: v for t, v in settings[kind].items() if n in places(t)}
    for kind in ("rank_pattern", "alpha_pattern"):
        for target in settings[kind]:
            if not any(target in mine[kind] for mine in out.values()):
                raise UserError(f"`lora`-{kind.replace('_', '-')} {target}: matches none of the adapted layers")
    return out


def estimate(training: Training, model, settings, side, dtype):
    """plan.Estimate of fit() for a student, from its configuration alone. settings: as student() takes them; side: pixels, or None."""
    src = sources.configs(model)
    family = pipeline.FAMILIES[src.kind]
    meta = {n: weights.skeleton(src.builder(n), src.config(n)) for n in pipeline.BUILDERS if n in src.parts}
    net, texts = meta[family.denoiser_name], {n: m for n, m in meta.items() if n.startswith("text_encoder")}
    scale = meta["vae"].cfg.downscale if "vae" in meta else 1
    own = net.cfg.sample_size if isinstance(net.cfg.sample_size, int) else 64
    trained = {family.denoiser_name: net.requires_grad_(settings is None)}
    if settings is not None:
        with torch.device("meta"):
            for n, mine in adapters_of({family.denoiser_name: net} | texts, settings, model).items():
                lora.adapt(meta[n], component=n, **mine)
                trained[n] = meta[n]
    length = family.family.text_length
    x, t, given = build.outline(net, training.batch_size, side // scale if side else own, length)
    ids = torch.zeros(training.batch_size, length, dtype=torch.long, device="meta")

    def loss():
        condition = given
        for n in trained:
            if n != family.denoiser_name:
                condition = (trained[n](ids)[0][-1], *given[1:])
        return net(x, t, *condition).float().pow(2).mean()

    frozen = {n: m for n, m in meta.items() if n not in trained}
    return plan.estimate(trained, loss, frozen, 4, dtype, ema=training.ema, recompute=training.gradient_checkpointing,
                         optimizer=training.optimizer)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# What comes out


def save_model(sd, folder, dtype, states, **facts):
    """The whole pipeline as a Hub folder, there at once or not at all; facts go into its training.json."""

    def fill(fresh):
        sd.save(fresh, choice.DTYPES[dtype], states)
        write_bytes(fresh / "training.json", json.dumps(facts).encode())

    write_folder(folder, fill)


def save_adapters(sd, run, states, targets, dtype, **facts):
    """Adapters in several forms. targets: {form: path}; facts: for kohya's header, and base_model for PEFT's. Returns the paths."""
    made = lora.trained(dict(run.net.items()), states, choice.DTYPES[dtype])
    facts = {
        "steps": run.step,
        "seed": run.cfg.seed,
        "learning_rate": run.cfg.lr,
        "prediction_type": sd.schedule.prediction,
    } | facts
    for form, path in targets.items():
        write = lambda target, form=form: lora.write(target, made, sd.models(), form, facts)  # noqa: E731
        write_folder(path, write) if form == "peft" else write(path)  # PEFT's are folders
    return list(targets.values())


def settled(folder, facts, anew=False, option="output_dir", quiet=False):
    """Is the model of `folder` there, made with these facts (JSON values)? anew: delete it when it was made with others, which otherwise
    raises UserError naming the option that says where it lies. quiet: do not say that it is there. On rank 0."""
    path = folder / "training.json"
    if not path.is_file():
        return False
    before = typed(read_json(path).get("settings", {}), dict, f"{path}: settings")
    for name, value in json.loads(json.dumps(facts)).items():
        if name in before and before[name] != value:
            if not anew:
                raise UserError(f"{folder}: was made with {name} {short(before[name])}, not {short(value)}; take another `{option}` "
                                "(or `overwrite_output_dir`)")  # fmt: skip
            dist.say(f"{folder}: was made with {name} {short(before[name])}, not {short(value)}; it is made again")
            shutil.rmtree(folder)
            return False
    if not quiet:
        dist.say(f"{folder}: is there already")
    return True


def free(*pipelines):
    """Give the memory of pipelines and networks back, whoever else has a name for them."""
    for one in pipelines:
        for module in one.models().values() if hasattr(one, "models") else [one]:
            module.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sheet(run, sd, prompts, path, steps=None, guidance=None, size=None, strip=False, labels=True):
    """Sample pictures with the averaged weights and fixed noise, as one PNG. strip: x_t at some of the steps instead, a row a prompt."""

    def draw():
        height, width = size or (None, None)
        made = sd.generate(prompts, steps=steps, guidance_scale=guidance, height=height, width=width, keep_steps=strip)
        for module in sd.models().values():
            onednn.undo(module)  # training goes on with the layers it had
        if strip:
            chosen = sorted({round(i * (len(made.history) - 1) / 7) for i in range(8)})
            frames = [sd.decode(made.history[i].x.float()) for i in chosen]
            return torch.stack(frames, dim=1).flatten(0, 1), len(chosen), None
        return made.pixels, None, prompts if labels else None

    def write(drawn):
        images.save_grid(drawn[0], path, nrow=drawn[1], labels=drawn[2])

    with run.averaged():
        sd.kept.clear()  # what the text encoder said before
        if run.cfg.parallel == "fsdp":  # every rank computes its shards
            dist.on_main(write, dist.together(draw))
        else:
            dist.on_main(lambda: write(draw()))
        sd.kept.clear()
    if dist.is_main():
        run.watch.picture(run.step + 1, "denoising" if strip else "samples", images.open_image(path))
