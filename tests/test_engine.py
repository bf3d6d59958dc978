"""Runs: learning rate, EMA, non-finite gradients, resume bit for bit, records."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from nanodiff import engine
from nanodiff.config import UserError


@dataclass
class Config:
    output_dir: str = ""
    device: str = "cpu"
    seed: int = 0
    mixed_precision: str = "no"
    lr: float = 0.01
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 2
    max_grad_norm: float = 1.0
    grad_accum: int = 2
    resume: str | None = None
    checkpointing_steps: int = 3
    checkpoints_total_limit: int | None = None
    token: str = "secret-token"
    kernels: str = "torch"


def train(out, total=10, stop=None, resume=None, poison=None, **more):
    """A small regression with EMA and accumulation; returns (net, run)."""
    run = engine.Run(Config(str(out), resume=resume, **more), total)
    torch.manual_seed(0)
    net, _opt = run.trainable(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), 0.01)
    run.ema(net, 0.9)
    run.resume()
    for step in run.steps():
        for micro in range(2):
            g = torch.Generator().manual_seed(1000 * step + micro)
            x = torch.randn(8, 4, generator=g)
            x = x * float("nan") if step == poison else x
            run.backward((net(x) - x.sum(1, keepdim=True)).pow(2).mean())
        run.update()
        if step == stop:
            run.step += 1
            run.save()
            break
    return net, run


@pytest.mark.parametrize("stop", [0, 3, 8])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, stop):
    """S1-31, bit for bit: weights, EMA, optimizer, with accumulation and a moving learning rate."""
    whole, run = train(tmp_path / "whole")
    train(tmp_path / "cut", stop=stop)
    again, resumed = train(tmp_path / "cut", resume="auto")
    for a, b in ((whole.state_dict(), again.state_dict()), (run.average.shadow, resumed.average.shadow)):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert run._tensors().keys() == resumed._tensors().keys()
    assert all(torch.equal(v, resumed._tensors()[k]) for k, v in run._tensors().items())


@pytest.mark.parametrize("lost", ["opt/", "ema/"])
def test_resume_needs_every_part_of_the_state(tmp_path, lost, monkeypatch):
    """The test above can fail: without the optimizer's or the EMA's state the end is another."""
    whole, run = train(tmp_path / "whole")
    keep = engine.Run._tensors
    monkeypatch.setattr(
        engine.Run, "_tensors", lambda self: {k: v for k, v in keep(self).items() if not k.startswith(lost)}
    )
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
    run = engine.Run(Config(str(tmp_path)), 100)
    net, _ = run.trainable(nn.Linear(1, 1), 0.1)
    run.ema(net, 0)
    with pytest.raises(UserError, match="10 non-finite"):
        for _ in run.steps():
            run.backward(net(torch.tensor([[float("inf")]])).sum())
            run.update()


def test_resume_names_what_changed_and_refuses_another_model(tmp_path, capsys):
    train(tmp_path, stop=2)
    train(tmp_path, resume="auto", seed=5)
    assert "seed was 0" in capsys.readouterr().err
    run = engine.Run(Config(str(tmp_path), resume="auto"), 10)
    net, _ = run.trainable(nn.Linear(3, 1), 0.1)
    run.ema(net, 0)
    with pytest.raises(UserError, match="another model"):
        run.resume()


def test_a_used_folder_is_not_mixed_with_a_new_run(tmp_path):
    train(tmp_path, stop=4)
    with pytest.raises(UserError, match="earlier run"):
        train(tmp_path)


def test_resume_cuts_the_log(tmp_path):
    train(tmp_path, stop=4)
    whole = "".join(f'{{"step": {i}, "loss": 1}}\n' for i in range(1, 9))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 9, "lo')
    train(tmp_path, resume="auto")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_resume_without_a_checkpoint_says_so(tmp_path, capsys):
    train(tmp_path, total=1, resume="auto")
    assert "no checkpoint yet" in capsys.readouterr().err


def test_learning_rate():
    lr = lambda step, kind="cosine": engine.learning_rate(step, 1.0, 110, 10, kind)  # noqa: E731
    assert lr(0) == 0.1 and lr(9) == 1.0 and lr(60) == pytest.approx(0.5) and lr(110) == pytest.approx(0)
    assert lr(60, "linear") == 0.5 and lr(109, "constant") == 1.0


def test_ema_decay_warms_up_and_restores():
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = engine.EMA(net, decay=0.9)
    net.weight.data.fill_(1.0)
    ema.update(net, 0)
    assert ema.shadow["weight"].item() == 1.0, "decay 0 at the first update"
    net.weight.data.fill_(2.0)
    ema.update(net, 10**6)
    assert ema.shadow["weight"].item() == pytest.approx(1.1)
    with ema.applied(net):
        assert net.weight.item() == pytest.approx(1.1)
    assert net.weight.item() == 2.0


def test_record_keeps_results_and_no_secret(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x.py", "--toke", "secret-token", "--hf_token=secret-token"])
    record = engine.Record(Config(str(tmp_path)), torch.device("cpu"))
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
            engine.out_dir(tmp_path / bad)


def test_devices_and_types(tmp_path, capsys):
    cpu = torch.device("cpu")
    assert engine.pick_dtype("auto", cpu) == torch.float32 and engine.pick_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(UserError, match="fp16"):
        engine.pick_dtype("fp16", cpu)
    if not torch.cuda.is_available():
        assert engine.pick_device("cuda") == cpu and "no CUDA device" in capsys.readouterr().err
        with pytest.raises(UserError, match="fp16 needs a GPU"):
            engine.Run(Config(str(tmp_path), mixed_precision="fp16"), 1)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes"):
        engine.Run(Config(str(tmp_path)), 1)
