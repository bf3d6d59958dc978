"""distill.py few-step: students of the embedded model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from util import ROOT, in_process, stop_at_step

import distill
from nanodiff import lora, pipeline
from nanodiff.diffusion import samplers

NANO = ROOT / "assets" / "nano"


def script(folder, **more):
    options = {"model": NANO, "data": folder / "data", "output-dir": folder / "out", "method": "consistency", "max-steps": 2, "batch-size": 2,
               "guidance-scale": 3, "num-images": 2, "lr": 1e-3, "mixed-precision": "no", "seed": 3, "ema-decay": 0.5} | more  # fmt: skip
    argv = [a for k, v in options.items() if v is not None for a in ([f"--{k}"] if v is True else [f"--{k}", v])]
    return in_process(distill, "distill.py", "few-step", *argv)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four of the embedded pictures."""
    import tarfile

    folder = tmp_path_factory.mktemp("data")
    with tarfile.open(ROOT / "assets" / "emoji" / "emoji.tar") as tar:
        names = tar.getnames()[:8]
        for name in names:
            (folder / name).write_bytes(tar.extractfile(name).read())
    return folder


@pytest.fixture
def folder(pictures, tmp_path):
    (tmp_path / "data").symlink_to(pictures)
    return tmp_path


def moved(model):
    """How far a student's denoiser is from the embedded model's."""
    a, b = (pipeline.load(p, torch.float32).net.state_dict() for p in (NANO, model))
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


SAMPLERS = {"consistency": "lcm", "dmd": "lcm", "progressive": "ddim", "guidance": "ddim"}


@pytest.mark.parametrize("method", SAMPLERS)
def test_methods(folder, method):
    """Each trains, and leaves a folder that draws in its few steps when nothing more is said."""
    code, _, err = script(
        folder,
        method=method,
        **{"no-evaluate": True, "student-steps": 2 if method != "guidance" else None, "teacher-steps": 6},
        **({"critic-steps": 3} if method == "dmd" else {}),
    )
    assert code == 0, err
    sd = pipeline.load(folder / "out" / "model", torch.float32)
    assert samplers.name_of(sd.schedule) == SAMPLERS[method] and sd.sampling("guidance_scale") == 1.0
    assert sd.sampling("steps") == (6 if method == "guidance" else 2)
    assert 1e-6 < moved(folder / "out" / "model") < 1
    rows = [json.loads(line) for line in (folder / "out" / "model" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and rows[-1]["loss"] > 0 and ("critic" in rows[-1]) == (method == "dmd")
    assert ("student" in rows[-1]) == (method == "dmd"), "whether it learns is to be seen"
    if method == "progressive":
        assert "8 → 4 → 2 steps" in err and (folder / "out" / "steps-4" / "model_index.json").is_file()
    picture = sd.generate(["fire"], steps=2, guidance_scale=1.0, seeds=[0]).pixels
    assert torch.isfinite(picture).all()


def test_a_teacher_is_what_its_weights_are(folder):
    """Not its path; and a student never takes its teacher's place."""
    teacher, quick = folder / "teacher", {"no-evaluate": True, "student-steps": 2, "max-steps": 1}
    shutil.copytree(NANO, teacher)
    for said in ("student: ", "is there already"):
        code, out, err = script(folder, model=teacher, **quick)
        assert code == 0 and said in out + err
    made = (folder / "out" / "model" / "training.json").read_bytes()
    path = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({k: v * 1.01 for k, v in tensors.items()}, path)
    code, _, err = script(folder, model=teacher, **quick)
    assert (
        code == 2
        and "was made with weights" in err
        and (folder / "out" / "model" / "training.json").read_bytes() == made
    )
    for said in ("student: ", "is there already"):  # a student inside its teacher's folder is no part of the teacher
        code, out, err = script(folder, model=teacher, **quick | {"output-dir": teacher / "fast"})
        assert code == 0 and said in out + err, err
    code, _, err = script(folder, model=folder / "out" / "model", **quick)
    assert code == 2 and "--model" in err and "this run writes to" in err
    assert (folder / "out" / "model" / "training.json").read_bytes() == made


def test_a_student_is_what_its_method_was_told(folder):
    """Another number of known times, or of the critic's updates, is another student."""
    quick = {"no-evaluate": True, "student-steps": 2, "max-steps": 2, "method": "dmd", "critic-steps": 2}
    for more, says in (({}, "student: "), ({}, "is there already"), ({"known-steps": 25}, "known_steps 50, not 25"),
                       ({"critic-steps": 1}, "critic_steps 2, not 1"), ({"resolution": 32}, "resolution 64, not 32"),
                       ({"resolution": 64}, "is there already")):  # fmt: skip
        code, out, err = script(folder, **quick | more)
        assert code == 2 * ("not" in says) and says in out + err, err


def test_other_pictures_of_the_same_names_are_another_data_set(folder, pictures):
    data = folder / "mine"
    shutil.copytree(pictures, data)
    quick = {"no-evaluate": True, "student-steps": 2, "max-steps": 1, "data": data}
    assert script(folder, **quick)[0] == 0
    one = next(p for p in sorted(data.iterdir()) if p.suffix != ".txt")
    one.write_bytes(one.read_bytes() + b"\0")
    code, _, err = script(folder, **quick)
    assert code == 2 and "was made with sizes" in err


def test_the_comparison(folder):
    code, out, err = script(folder, **{"check-steps": 1, "teacher-steps": 3, "student-steps": 2})
    assert code == 0, err
    for name in ("teacher.steps_1", "teacher.steps_3", "student.steps_1", "student.steps_2"):
        assert f"{name}.pixels_fid" in out
    assert "student.steps_3" not in out
    assert all(
        (folder / "out" / n).exists()
        for n in ("quality.png", "pictures.png", "report.html", "metrics.json", "run.json")
    )
    plans = {
        n: json.loads((folder / "out" / "check" / n / "drawn.json").read_text()) for n in ("teacher-1", "student-1")
    }
    assert plans["teacher-1"]["pictures"] == plans["student-1"]["pictures"], "the same prompts and seeds"
    assert (
        plans["teacher-1"]["settings"]["guidance_scale"] == 3 and plans["student-1"]["settings"]["guidance_scale"] == 1
    )


def test_adapters_alone(folder):
    """--lora: a file that gives any copy of the base the student's few steps; the base is its own teacher."""
    code, _, err = script(
        folder, **{"lora": True, "lora-rank": 2, "check-steps": 1, "teacher-steps": 2, "student-steps": 2}
    )
    assert code == 0, err
    path = folder / "out" / "model" / "pytorch_lora_weights.safetensors"
    sd = pipeline.load(NANO, torch.float32)
    found = lora.read(path, sd.models())
    assert {d.component for d in found.deltas} == {"unet"} and all(d.down.shape[0] == 2 for d in found.deltas)
    assert max((d.up @ d.down).abs().max() for d in found.deltas) > 0
    assert not (folder / "out" / "model" / "unet").exists()


def test_the_guidance_is_the_teachers(folder):
    """A student that few-step wrote asks for guidance 1; that is not what its own student is to learn."""
    sd = pipeline.load(NANO, torch.float32)
    sd.index = {**sd.index, pipeline.SAMPLING: {"steps": 2, "guidance_scale": 1.0}}
    sd.save(folder / "student")
    options = {"student": folder / "student", "guidance-scale": None, "no-evaluate": True, "max-steps": 1}
    code, _, err = script(folder, **options)
    assert code == 0 and "consistency: guidance 3, 4 steps" in err, err
    sd = pipeline.load(NANO, torch.float32)
    sd.schedule = type(sd.schedule).from_config(sd.schedule.to_json() | {"prediction_type": "sample"})
    sd.save(folder / "other")
    code, _, err = script(folder, **options | {"student": folder / "other", "output-dir": folder / "o2"})
    assert code == 2 and "predicts sample, its teacher v_prediction" in err, err


@pytest.mark.parametrize("more", [
    {"method": "dmd", "critic-steps": 2},  # the most state: two networks, a simulated start
    {"lora": True, "lora-rank": 2, "lora-dropout": 0.2},
])  # fmt: skip
def test_resumed_to_the_same_bytes(folder, more, monkeypatch):
    """Stopped in its second update, gone on with: what one run gives."""
    options = {"max-steps": 3, "no-evaluate": True, "student-steps": 2, "checkpointing-steps": 1} | more
    code, _, err = script(folder, **options)
    assert code == 0, err
    name = "pytorch_lora_weights.safetensors" if "lora" in more else "unet/diffusion_pytorch_model.safetensors"
    want = load_file(folder / "out" / "model" / name)
    shutil.rmtree(folder / "out")
    stop_at_step(monkeypatch, 1)
    assert script(folder, **options)[0] == 130 and not (folder / "out" / "model").exists()
    monkeypatch.undo()
    code, _, err = script(folder, **options)
    assert code == 0 and "resumed at step 1" in err, err
    got = load_file(folder / "out" / "model" / name)
    assert all(torch.equal(got[k], want[k]) for k in want)
    code, _, err = script(folder, **options)
    assert code == 0 and "is there already" in err and "resumed at" not in err, (
        "a student that is there is left as it is"
    )
    code, _, err = script(folder, **options | {"lr": 2e-3})
    assert code == 2 and "was made with lr 0.001, not 0.002" in err, err


BAD = {
    "no data": ({"data": None}, "--data is required"),
    "no such data": ({"data": "absent"}, "absent: no such folder"),
    "a method": ({"method": "consistent"}, "invalid choice: 'consistent'"),
    "rounds": (
        {"method": "progressive", "first-steps": 6},
        "--first-steps 6 halved again and again must give --student-steps 4",
    ),
    "rounds of another": ({"first-steps": 8}, "--first-steps is progressive's"),
    "adapters": ({"method": "progressive", "lora": True}, "--lora: progressive trains the whole network"),
    "settings of adapters": ({"lora-rank": 4}, "--lora-… are settings of --lora"),
    "no steps": ({"student-steps": 0}, "--student-steps must be at least 1, not 0"),
    "more steps than times": ({"known-steps": 1}, "--known-steps must be at least 2, not 1"),
    "more steps than known": ({"student-steps": 60}, "--student-steps 60: the student knows --known-steps 50 times"),
    "a check that the student cannot take": (
        {"known-steps": 4},
        "the model was distilled on 4 timesteps and cannot take 8 steps",
    ),
    "a teacher without steps": ({"teacher-steps": 0}, "--teacher-steps"),
    "a teacher of too many": (
        {"teacher-steps": 2000, "student-steps": 2, "check-steps": 1},
        "2000: must be between 1 and the 1000",
    ),
    "a LoRA of other times": (
        {"lora": True, "known-steps": 25, "student-steps": 2},
        "--known-steps 25 with --lora: a LoRA's file does not say it",
    ),
    "more than there are": ({"method": "progressive", "student-steps": 600}, "must be between 1 and the 1000"),
    "another's option": ({"method": "guidance", "critic-steps": 3}, "--critic-steps is dmd's, not guidance's"),
    "a text encoder's layers": ({"lora": True, "lora-targets": "q_proj"}, "few steps are the denoiser's business"),
    "check": ({"check-steps": 0}, "--check-steps must be at least 1"),
    "another base": ({"student": ROOT / "tests" / "golden" / "tiny" / "sd15"}, "the teacher has another"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_end_with_one_line(folder, case):
    more, said = BAD[case]
    code, _, err = script(folder, **more)
    assert code == 2 and said in err and "Traceback" not in err, err


def test_times_that_a_student_cannot_know(folder):
    code, _, err = script(folder, **{"known-steps": 2000})
    assert code == 2 and "--known-steps 2000: the schedule has 1000 timesteps" in err
    code, _, err = script(folder, **{"known-steps": 600})
    assert code == 2 and "the noisiest would be timestep 599 of 999" in err
    code, _, err = script(folder, **{"known-steps": 30, "no-evaluate": True})
    assert code == 0 and "the noisiest is timestep 989 of 999" in err


def test_spaces_are_known_before_the_training(folder):
    code, _, err = script(folder, features="bogus")
    assert code == 2 and "--features: 'bogus' is none of inception, clip, pixels" in err
    code, _, err = script(folder, features="inception")
    assert code == 2 and "--features inception: " in err and not (folder / "out" / "model").exists()


def test_the_next_command_draws_as_the_student_was_taught(folder):
    (folder / "two words").mkdir()
    lora_of = {"output-dir": folder / "two words" / "out", "lora": True, "no-evaluate": True, "student-steps": 2}
    code, out, err = script(folder, **lora_of)
    assert code == 0 and f"--lora '{folder}/two words/out/model' --guidance-scale 1 --scheduler lcm --steps 2" in out, (
        err
    )
    code, out, err = script(folder, method="guidance", **{"student-steps": 2})
    assert code == 2 and "--student-steps is progressive and consistency and dmd's, not guidance's" in err
