"""Runs: learning rate, EMA, non-finite gradients, resume bit for bit, records."""

import json
import os
import shutil
import signal
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from util import rms_ratio

from nanodiff.config import UserError
from nanodiff.device import choice, cudagraph
from nanodiff.files import out_dir
from nanodiff.models.upsample import Upsample
from nanodiff.output.record import Record
from nanodiff.training import checkpoint
from nanodiff.training.options import Training
from nanodiff.training.run import Run


@dataclass
class Config(Training):
    device: str = "cpu"
    mixed_precision: str = "no"
    lr: float = 0.01
    lr_warmup_steps: float = 2
    lr_first_cycle: int = 1
    max_steps: int = 10
    ema_decay: float = 0.9
    checkpointing_steps: int = 3
    checkpoints_total_limit: int | None = None
    cuda_graph: bool = False
    grad_accum: int = 1
    dist_timeout: int = 20
    log_every: int = 1
    oscillation_threshold: float = 0.0
    token: str = "secret-token"
    kernels: str = "torch"


class Micro(NamedTuple):
    """What engine.Run wants to know of a micro-batch."""

    x: torch.Tensor
    weight: float = 0.5
    count: int = 8
    last: bool = True
    keys: tuple = ("a.png", "b.png")
    waited: float = 0.0


def start(out, resume=None, net=None, per_epoch=4, **more):
    run = Run(Config(str(out), resume=resume, **more))
    torch.manual_seed(0)
    calls = run.trainable({"net": net or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))})
    run.schedule(per_epoch)
    run.resume()
    return run, calls["net"]


def train(out, total=10, stop=None, resume=None, poison=None, loss=None, **more):
    """A small regression with EMA and accumulation; returns (net, run)."""
    run, net = start(out, resume, max_steps=total, **more)
    for step in run.steps():
        for micro in range(2):
            g = torch.Generator().manual_seed(1000 * step + micro)
            x = torch.randn(8, 4, generator=g)
            x = x * float("nan") if step == poison else x
            batch = Micro(x, last=micro == 1)
            with run.forward(batch):
                value = (net(x) - x.sum(1, keepdim=True)).pow(2).mean()
            run.backward(value, batch)
        run.update()
        if run.epoch_ended():
            run.judge(run.epoch_loss if loss is None else loss)
        if step == stop:
            run.step += 1
            run.save()
            break
    run.lock.close()
    return net, run


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stop", [0, 3, 8])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, stop, precision, monkeypatch):
    """S1-31, bit for bit: weights, EMA, optimizer and loss scale, with accumulation, mixed precision and a moving learning rate."""
    # fp16 too, which is refused on a CPU as too slow
    monkeypatch.setattr(choice, "pick_precision", lambda *args: precision)
    whole, run = train(tmp_path / "whole")
    train(tmp_path / "cut", stop=stop)
    again, resumed = train(tmp_path / "cut", resume="auto")
    for a, b in ((whole.state_dict(), again.state_dict()), (run.average.shadow, resumed.average.shadow)):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert run._tensors().keys() == resumed._tensors().keys()
    assert all(torch.equal(v, resumed._tensors()[k]) for k, v in run._tensors().items())
    assert run.scaler.state_dict() == resumed.scaler.state_dict()
    if precision == torch.float16:
        assert 0 < run.skipped == resumed.skipped and run.scaler.get_scale() < 2**16, "the first scales were too large"


def test_mixed_precision_is_used_and_close(tmp_path, monkeypatch):
    """Ten updates, each with a gradient rounded to eight bits."""
    exact, _ = train(tmp_path / "exact")
    monkeypatch.setattr(choice, "pick_precision", lambda *args: torch.bfloat16)
    mixed, _ = train(tmp_path / "mixed")
    for k, v in exact.state_dict().items():
        assert 0 < rms_ratio(mixed.state_dict()[k], v) < 10 * torch.finfo(torch.bfloat16).eps, k


FREE = {"optimizer": "schedule_free", "ema": False, "lr_scheduler": "constant_with_warmup"}


@pytest.mark.parametrize("stop", [0, 3, 8])
def test_a_resumed_schedule_free_run_is_the_uninterrupted_one(tmp_path, stop):
    whole, run = train(tmp_path / "whole", **FREE)
    train(tmp_path / "cut", stop=stop, **FREE)
    again, resumed = train(tmp_path / "cut", resume="auto", **FREE)
    trained = {k: v.clone() for k, v in again.state_dict().items()}
    assert all(torch.equal(v, trained[k]) for k, v in whole.state_dict().items())
    with run.averaged(), resumed.averaged():
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
        assert not torch.equal(again.state_dict()["0.weight"], trained["0.weight"]), "the mean is not what is trained"
    assert run._tensors().keys() == resumed._tensors().keys()
    assert all(torch.equal(v, resumed._tensors()[k]) for k, v in run._tensors().items())


@pytest.mark.parametrize("stop", [0, 3, 8])
def test_a_resumed_muon_run_is_the_uninterrupted_one(tmp_path, stop):
    whole, run = train(tmp_path / "whole", optimizer="muon")
    train(tmp_path / "cut", stop=stop, optimizer="muon")
    again, resumed = train(tmp_path / "cut", resume="auto", optimizer="muon")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    kinds = {k.rpartition("/")[2] for k in run._tensors() if k.startswith("opt/")}
    assert kinds == {"step", "momentum_buffer", "exp_avg", "exp_avg_sq"}, "matrices and the rest"
    assert run._tensors().keys() == resumed._tensors().keys()
    assert all(torch.equal(v, resumed._tensors()[k]) for k, v in run._tensors().items())


def test_another_optimizer_cannot_go_on(tmp_path):
    train(tmp_path, stop=2)
    with pytest.raises(UserError, match="was trained with `optimizer` adamw `lr_scheduler` cosine"):
        train(tmp_path, resume="auto", **FREE)


def test_another_mixture_cannot_go_on(tmp_path):
    train(tmp_path, stop=2, **FREE)
    with pytest.raises(UserError, match=r"`adam_beta1` 0\.9"):
        train(tmp_path, resume="auto", **FREE, adam_beta1=0.5)


@pytest.mark.parametrize("ema", (True, False))
def test_what_is_derived_from_weights_follows_an_update(tmp_path, ema):
    """A sheet, a critic, a consistency target: calls without gradients between updates see the weights as they are."""
    run, net = start(tmp_path / "run", net=Upsample(4), ema=ema)
    x = torch.randn(2, 4, 3, 3)
    enlarged = lambda: net.conv(torch.nn.functional.interpolate(x, scale_factor=2.0))  # noqa: E731
    for step in run.steps():
        with torch.no_grad():
            torch.testing.assert_close(net(x), enlarged(), rtol=1e-4, atol=1e-5)
        before = net.conv.weight.detach().clone()
        batch = Micro(x, weight=1.0)
        with run.forward(batch):
            loss = net(x).pow(2).mean()
        run.backward(loss, batch)
        run.update()
        assert not torch.equal(net.conv.weight, before)
        if step == 3:
            break
    run.lock.close()


@pytest.mark.parametrize("lost", ["opt/", "ema/"])
def test_resume_needs_every_part_of_the_state(tmp_path, lost, monkeypatch):
    """The test above can fail: without the optimizer's or the EMA's state the end is another."""
    whole, run = train(tmp_path / "whole")
    keep = Run._tensors
    monkeypatch.setattr(Run, "_tensors", lambda self: {k: v for k, v in keep(self).items() if not k.startswith(lost)})
    train(tmp_path / "cut", stop=4)
    try:
        again, resumed = train(tmp_path / "cut", resume="auto")
    except KeyError:
        return
    same = all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    same_ema = all(torch.equal(v, resumed.average.shadow[k]) for k, v in run.average.shadow.items())
    assert not (same and same_ema)


def test_non_finite_gradients_are_skipped_counted_and_said(tmp_path, capsys):
    net, run = train(tmp_path, poison=4)
    assert run.skipped == 1 and all(torch.isfinite(p).all() for p in net.parameters())
    assert "step 4" in capsys.readouterr().err


def test_too_many_non_finite_gradients_stop(tmp_path):
    run, net = start(tmp_path, max_steps=100, net=nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"10 non-finite .*a\.png, b\.png; last good checkpoint: .*checkpoint-3"):
        for step in run.steps():
            run.backward(net(torch.tensor([[float("inf") if step > 4 else 1.0]])).sum(), Micro(None))
            run.update()
    assert [s for s, _ in checkpoint.found(tmp_path)] == [3]  # none of the streak's, which would crowd it out
    run.lock.close()
    run, _ = start(tmp_path, "auto", net=nn.Linear(1, 1), max_steps=100)
    assert run.step == 3 and run.bad_in_row == 0


def test_a_signal_amid_losses_that_are_not_finite_leaves_the_good_checkpoints(tmp_path):
    run, net = start(tmp_path, max_steps=100, net=nn.Linear(1, 1), checkpoints_total_limit=1)
    with pytest.raises(KeyboardInterrupt):
        for step in run.steps():
            run.backward(net(torch.tensor([[float("inf") if step > 3 else 1.0]])).sum(), Micro(None))
            if step == 6:
                os.kill(os.getpid(), signal.SIGINT)
            run.update()
    assert [s for s, _ in checkpoint.found(tmp_path)] == [7, 3] and run.last_saved.name == "checkpoint-3"


def test_resume_names_what_changed_and_refuses_another_model(tmp_path, capsys):
    train(tmp_path, stop=2)
    train(tmp_path, resume="auto", seed=5)
    assert "seed was 0" in capsys.readouterr().err
    with pytest.raises(UserError, match="another model"):
        start(tmp_path, "auto", nn.Linear(3, 1))


def test_a_used_folder_is_not_mixed_with_a_new_run(tmp_path):
    train(tmp_path, stop=4)
    with pytest.raises(UserError, match="earlier run"):
        train(tmp_path)


def test_resume_cuts_the_log(tmp_path):
    train(tmp_path, stop=4)
    whole = "".join(f'{{"step": {i}, "loss": 1}}\n' for i in range(1, 9))
    (tmp_path / "metrics.jsonl").write_text(whole + '\0\0{"step": 3}\n' + '{"step": 9, "lo')
    train(tmp_path, resume="auto")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11)) and "grad_norm" not in lines[4]


def test_resume_without_a_checkpoint_says_so(tmp_path, capsys):
    train(tmp_path, total=1, resume="auto")
    assert "no checkpoint yet" in capsys.readouterr().err


def test_record_keeps_results_and_no_secret(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x.py", "--toke", "secret-token", "--hf_token=secret-token"])
    record = Record(Config(str(tmp_path)), torch.device("cpu"))
    with record.timed("work"):
        pass
    record.result("score", 0.5)
    record.file("a.png", seed=1)
    record.write()
    text = (tmp_path / "run.json").read_text()
    saved = json.loads(text)
    assert (
        "secret-token" not in text
        and saved["results"] == {"score": 0.5}
        and saved["files"] == [{"path": "a.png", "seed": 1}]
    )
    assert {"config", "argv", "versions", "device", "git_commit", "seconds", "peak_memory_mb"} <= saved.keys()
    assert capsys.readouterr().out == "score: 0.5\n"


def test_output_folder_is_proved_first(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in ("file", "file/sub"):
        with pytest.raises(UserError, match="is a file"):
            out_dir(tmp_path / bad)


def test_devices_and_types(tmp_path, capsys):
    cpu = torch.device("cpu")
    assert choice.pick_dtype("auto", cpu) == torch.float32 and choice.pick_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(UserError, match="fp16"):
        choice.pick_dtype("fp16", cpu)
    if not torch.cuda.is_available():
        assert choice.pick_device("cuda") == cpu and "no CUDA device" in capsys.readouterr().err
        with pytest.raises(UserError, match="fp16 needs a CUDA GPU"):
            Run(Config(str(tmp_path), mixed_precision="fp16"))


def test_several_processes_are_refused_where_nobody_joined_them(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes"):
        Record(Config(str(tmp_path)), torch.device("cpu"))


def test_a_skipped_update_moves_nothing(tmp_path):
    """Weights, EMA and the learning rate's place stay; the next good update takes that place."""
    _, clean = train(tmp_path / "clean", total=5)
    _, bad = train(tmp_path / "bad", total=5, poison=1)
    lr = {
        k: [json.loads(x)["lr"] for x in (tmp_path / k / "metrics.jsonl").read_text().splitlines()]
        for k in ("clean", "bad")
    }
    assert lr["bad"] == lr["clean"][:2] + lr["clean"][1:4]
    assert bad.skipped == 1 and clean.skipped == 0


def test_another_runs_checkpoint_goes_on_in_a_folder_of_its_own(tmp_path, capsys):
    train(tmp_path / "a", stop=5)
    train(tmp_path / "b", total=4, stop=3)
    log = (tmp_path / "b" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="checkpoint-4 is of an earlier run: `resume` auto would continue it"):
        train(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-6"))
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == log
    _, run = train(tmp_path / "c", resume=str(tmp_path / "a" / "checkpoint-6"))
    assert run.step == 10
    shutil.copytree(tmp_path / "b", tmp_path / "d", ignore=shutil.ignore_patterns(".lock"))
    _, run = train(tmp_path / "d", resume=str(tmp_path / "a" / "checkpoint-6"), overwrite_output_dir=True)
    assert run.step == 10 and [s for s, _ in checkpoint.found(tmp_path / "d")] == [9]


def test_a_resume_says_what_is_left_and_judges_anew(tmp_path, capsys):
    train(tmp_path, total=8, stop=7)
    capsys.readouterr()
    _, run = train(tmp_path, total=8, resume="auto")
    assert "nothing is left to train: 8 updates are done, and this run has 8" in capsys.readouterr().err
    run, _ = start(tmp_path, "auto", max_steps=0, epochs=3, per_epoch=2)
    err = capsys.readouterr().err
    assert "an epoch was 4 updates and is 2 now: of 3 epochs 4 count as done, where 2 were" in err, err
    assert "nothing is left to train: 8 updates are done, and this run has 6" in err
    run.lock.close()


def test_what_it_begins_from_is_not_written_over(tmp_path):
    for inside in ("best_model", "model-epoch-3", "model/vae"):
        out = tmp_path / inside.replace("/", "-")
        (out / inside).mkdir(parents=True)
        cfg = Config(str(out))
        cfg.vae = str(out / inside)
        with pytest.raises(UserError, match=r"`vae` .*this run writes to"):
            Run(cfg)
    cfg = Config(str(tmp_path / "vae"))
    cfg.vae = cfg.output_dir  # the folder that its own will lie in
    (tmp_path / "vae").mkdir()
    Run(cfg).lock.close()


def test_a_file_where_pictures_go(tmp_path):
    (tmp_path / "samples").write_text("")
    with pytest.raises(UserError, match="samples: is a file"):
        start(tmp_path)


def test_links_of_others_stay(tmp_path):
    run, _ = start(tmp_path, max_steps=3)
    for name, target in {"mine": "/mnt/unmounted/x", "checkpoint_0001.pt": "checkpoint-1"}.items():
        os.symlink(target, tmp_path / name)
    run._drop_links()
    assert {p.name for p in tmp_path.iterdir() if p.is_symlink()} == {"mine"}


def test_a_checkpoint_behind_a_link_or_put_away_is_the_runs_own(tmp_path):
    train(tmp_path / "o", stop=5)
    (tmp_path / "o" / "checkpoint-6").rename(tmp_path / "elsewhere")
    (tmp_path / "o" / "checkpoint-6").symlink_to(tmp_path / "elsewhere")
    _, run = train(tmp_path / "o", total=8, stop=6, resume="auto")
    assert run.step == 7
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "o" / "keep" / "checkpoint-6")
    for named in ("checkpoint-6", "keep/checkpoint-6"):
        run, _ = start(tmp_path / "o", str(tmp_path / "o" / named), max_steps=8)
        assert run.step == 6
        run.lock.close()


def test_one_skipped_update_costs_no_checkpoint(tmp_path):
    run, net = start(tmp_path, max_steps=8, net=nn.Linear(1, 1), checkpoints_total_limit=None)
    for step in run.steps():
        run.backward(net(torch.tensor([[float("inf") if step in (2, 5) else 1.0]])).sum(), Micro(None))
        run.update()
    assert [s for s, _ in checkpoint.found(tmp_path)] == [7, 4]  # each as soon as the losses are finite again


def test_what_is_kept_before_an_error_is_what_is_said(tmp_path, capsys):
    run, net = start(tmp_path, max_steps=8, net=nn.Linear(1, 1))
    for step in run.steps():
        run.backward(net(torch.tensor([[float("inf") if step > 3 else 1.0]])).sum(), Micro(None))
        run.update()
        if step == 5:
            break
    run.step += 1
    run.keep()
    assert f"{tmp_path / 'checkpoint-6'}: --resume" in capsys.readouterr().err and run.last_saved.name == "checkpoint-3"
    assert [s for s, _ in checkpoint.found(tmp_path)] == [6, 3]


def test_two_runs_in_one_folder(tmp_path):
    run, _ = start(tmp_path)
    with pytest.raises(UserError, match="another run is using this folder"):
        start(tmp_path)
    run.lock.close()


def test_overwrite_deletes_the_older_checkpoints(tmp_path):
    train(tmp_path, total=4)
    _, run = train(tmp_path, total=2, overwrite_output_dir=True)
    assert run.step == 2 and [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
    ]


def test_early_stop_says_why_and_survives_a_resume(tmp_path, capsys):
    _, run = train(tmp_path / "a", total=100, early_stopping_patience=2, loss=1.0)
    assert run.step == 12 and "early stopping: 2 epochs" in capsys.readouterr().err
    train(tmp_path / "b", total=100, early_stopping_patience=2, loss=1.0, stop=9)
    _, run = train(tmp_path / "b", total=100, early_stopping_patience=2, loss=1.0, resume="auto")
    assert run.step == 12


def test_plateau_halves_the_rate(tmp_path):
    train(tmp_path, total=60, lr_scheduler="plateau", lr_warmup_steps=0, loss=1.0)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[0] == 0.01 and rates[47] == 0.01 and rates[48] == 0.005


def test_sigusr1_saves_and_goes_on(tmp_path):
    run, net = start(tmp_path, max_steps=5, checkpointing_steps=0)
    for step in run.steps():
        run.backward(net(torch.ones(2, 4)).mean(), Micro(None, 1.0))
        if step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        run.update()
    assert run.step == 5 and [s for s, _ in checkpoint.found(tmp_path)] == [2]


def test_sigusr1_amid_a_sheet_saves_after_the_next_update(tmp_path):
    run, net = start(tmp_path, max_steps=5, checkpointing_steps=0)
    for step in run.steps():
        run.backward(net(torch.ones(2, 4)).mean(), Micro(None, 1.0))
        run.update()
        if step == 1:  # the update is over, and the processes have agreed on what they got
            os.kill(os.getpid(), signal.SIGUSR1)
    assert run.step == 5 and [s for s, _ in checkpoint.found(tmp_path)] == [3]


def test_a_sheet_is_no_part_of_an_update(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("nanodiff.training.run.time", SimpleNamespace(monotonic=lambda: now[0]))
    run, net = start(tmp_path, max_steps=4, checkpointing_steps=0)
    for _ in run.steps():
        run.backward(net(torch.ones(2, 4)).mean(), Micro(None, 1.0))
        now[0] += 0.5
        run.update()
        now[0] += 100.0  # a sheet of pictures, a checkpoint
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["images_per_s"] for r in rows] == [16.0] * 4  # 8 in half a second


def test_resume_from_auto_precision_and_report(tmp_path, capsys):
    run, _ = start(tmp_path, mixed_precision="auto")
    assert run.precision in (None, torch.bfloat16)
    assert "device: CPU" in capsys.readouterr().err
    with pytest.raises(UserError, match="torchrun"):
        start(tmp_path / "x", parallel="fsdp")


def test_a_missing_extra_is_named_before_work(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"--report-to wandb: wandb is not installed"):
        start(tmp_path, report_to="wandb")


def test_nothing_to_train(tmp_path):
    with pytest.raises(UserError, match="every parameter is frozen"):
        start(tmp_path, net=nn.Linear(1, 1).requires_grad_(False))


def test_frozen_parameters_are_not_saved(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1))
    run, _ = start(tmp_path, net=net)
    run.save()
    kept = checkpoint.read(tmp_path / "checkpoint-0", {})
    assert {"net/net.1.weight", "ema/net.1.weight"} <= kept.keys() and not any(".0." in name for name in kept)


def test_what_the_run_began_with_is_remembered(tmp_path, capsys):
    run, _ = start(tmp_path)
    run.same("data set", "a")
    run.save()
    run.lock.close()
    run, _ = start(tmp_path, "auto")
    run.same("data set", "a")
    assert "data set" not in capsys.readouterr().err
    run.same("data set", "b")
    assert "the data set is not what it was" in capsys.readouterr().err


def test_going_back_moves_younger_checkpoints_aside(tmp_path, capsys):
    train(tmp_path, total=10)
    train(tmp_path, total=4, resume=str(tmp_path / "checkpoint-3"))
    assert "checkpoint-9.abandoned now" in capsys.readouterr().err
    assert [s for s, _ in checkpoint.found(tmp_path)] == [3] and (tmp_path / "checkpoint-6.abandoned").is_dir()


def test_an_epoch_of_skipped_updates_has_no_loss(tmp_path):
    run, net = start(tmp_path, max_steps=2, per_epoch=1)
    for step in run.steps():
        run.backward(net(torch.full((2, 4), float("nan") if step == 0 else 1.0)).mean(), Micro(None, 1.0))
        run.update()
        judged = run.judge(run.epoch_loss)
        assert judged == (step == 1), "the first one is not the best ever"


def test_an_early_stopped_run_may_go_on_under_other_limits(tmp_path):
    train(tmp_path, total=100, early_stopping_patience=2, loss=1.0, checkpointing_steps=4)
    _, run = train(tmp_path, total=20, early_stopping_patience=0, loss=1.0, resume="auto")
    assert run.step == 20


def test_the_tokenizer_must_be_the_same(tmp_path):
    run, _ = start(tmp_path)
    run.same("tokenizer", "a", must=True)
    with pytest.raises(UserError, match="tokenizer is not what it was"):
        run.same("tokenizer", "b", must=True)


@pytest.mark.parametrize(
    "more", [{"gradient_checkpointing": True}, {"lora_dropout": 0.1}, {"grad_accum": 2}, {"parallel": "fsdp"}], ids=str
)
def test_a_graph_is_refused_where_a_pass_is_not_always_the_same(tmp_path, more):
    run = Run(Config(str(tmp_path), cuda_graph=True))
    random = "lora_dropout" if more.pop("lora_dropout", None) else None
    vars(run.cfg).update(more)
    with pytest.raises(
        UserError, match=f"cuda_graph.*not with.*{'fsdp' if 'parallel' in more else random or next(iter(more))}"
    ):
        run._graphed(random)


def test_without_a_gpu_a_graph_is_said_to_be_none(tmp_path, capsys):
    _, call = start(tmp_path, cuda_graph=True)
    assert isinstance(call, nn.Module) and "one process and a CUDA device" in capsys.readouterr().err


def test_on_a_gpu_every_net_is_called_through_its_graph(tmp_path):
    run, call = start(tmp_path)
    run.cfg.cuda_graph, run.device = True, torch.device("cuda")
    (learning,) = run._graphed(None).values()
    assert isinstance(learning, cudagraph.Learning) and learning.module is call
