"""distill.py transfer: a teacher's pictures, a student, both compared."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from util import ROOT, TINY, in_process, stop_at_step

import distill
from nanodiff import config, data, lora, pipeline, weights
from nanodiff.output import images
from nanodiff.stories import transfer

NANO = ROOT / "assets" / "nano"
FOLDERS = ("checkpoints", "comparison_output", "metrics", "research_comparisons", "research_paper_materials", "sdxl_images", "visualization",
           "weakmodel_images")  # fmt: skip


def script(*argv):
    return in_process(distill, "distill.py", "transfer", *argv)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.json"
    path.write_text(json.dumps({"templates": {"standard": "{what}", "closeup": "{what} {how}"}, "training": ["standard"],
                                "words": {"what": ["fire", "red apple", "cat face", "sunflower"], "how": ["near"]}}))  # fmt: skip
    return path


def settings(folder, words, **more):
    """The document's CONFIG, in seconds: the embedded model teaches itself, disturbed."""
    return {
        "prompt_source": str(words), "num_images_to_generate": 3, "base_model_id": str(folder / "student"), "teacher_model_id": str(NANO),
        "output_dir": str(folder / "output"), "seed": 42, "resolution": 64, "train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 1e-3,
        "lr_scheduler": "constant", "mixed_precision": "no", "gradient_accumulation_steps": 1, "use_lora": True, "lora_r": 2, "lora_alpha": 4,
        "lora_dropout": 0.1, "lora_target_modules": ["to_q", "to_v", "q_proj", "fc1"], "eval_batch_size": 4, "num_inference_steps": 2,
        "guidance_scale": 3.0, "num_evaluation_prompts": 3, "panels": 1,
    } | more  # fmt: skip


def student(folder):
    """A model that lost its way a little."""
    sd = pipeline.load(NANO)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in sd.net.parameters():
            p.add_(0.05 * p.std() * torch.randn_like(p) if p.numel() > 1 else 0)
    sd.save(folder / "student")


def written(folder, words, **more):
    path = folder / "config.json"
    path.write_text(json.dumps(settings(folder, words, **more)))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("transfer")
    student(folder)
    code, out, err = script(
        "all", "--config", written(folder, words, method="both", feature_weight=0.1, sample_every=2)
    )
    assert code == 0, err
    return folder, out, err


def test_the_documents_folders(done):
    folder, out, _ = done
    root = folder / "output"
    assert all((root / name).is_dir() for name in FOLDERS)
    assert "teacher_images: 3" in out and "teacher_images_dropped: 0" in out and "pictures_compared: 3" in out
    learned = data.load(root / "sdxl_images")
    assert len(learned) == 3 and set(learned.captions) <= {"fire", "red apple", "cat face", "sunflower"}
    told = images.read_record(root / "sdxl_images" / "00001.png")
    assert (root / "sdxl_images" / "00001.txt").read_text().strip() == learned.captions[1] == told["prompt"]
    assert told["seed"] == 43 and told["steps"] == 2 and told["guidance_scale"] == 3.0
    names = {p.relative_to(root / "weakmodel_images").as_posix() for p in (root / "weakmodel_images").rglob("*.png")}
    assert names == {"standard/0000.png", "standard/0001.png", "closeup/0000.png"}, (
        "other prompts than the learned ones, where there are"
    )
    for arm in ("finetuned", "online", "teacher"):
        assert {
            p.relative_to(root / "comparison_output" / arm).as_posix()
            for p in (root / "comparison_output" / arm).rglob("*.png")
        } == names
    assert len(list((root / "research_comparisons").glob("difference_*.png"))) == 3
    assert len(list((root / "comparison_output").glob("comparison_all_*.png"))) == 1
    assert (root / "checkpoints" / "samples" / "000002.png").exists() and (root / "checkpoints" / "loss.png").exists()


def test_before_and_after_begin_from_the_same_latents(done, tmp_path, words):
    """With adapters that change nothing, before and after are the same pictures."""
    root = copied(done, tmp_path)
    nothing = tmp_path / "nothing.safetensors"
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    weights.save_tensors(
        nothing, {f"{layer}.lora_down.weight": torch.randn(2, 128), f"{layer}.lora_up.weight": torch.zeros(128, 2)}
    )
    code, _, err = script("evaluate", "--config", written(tmp_path, words), "--checkpoint", nothing)
    assert code == 0, err
    before, after = (root / transfer.ARMS[n] for n in ("original", "finetuned"))
    pictures = sorted(p.relative_to(before) for p in before.rglob("*.png"))
    assert len(pictures) == 3
    for name in pictures:
        assert (np.asarray(images.open_image(before / name)) == np.asarray(images.open_image(after / name))).all()
    plans = {n: json.loads((done[0] / "output" / transfer.ARMS[n] / "drawn.json").read_text()) for n in transfer.ARMS}
    assert plans["original"]["pictures"] == plans["finetuned"]["pictures"] == plans["online"]["pictures"]
    assert plans["original"]["settings"]["model_sha256"] != plans["finetuned"]["settings"]["model_sha256"]


def test_adapters_in_peft_form_and_in_kohyas(done):
    """Both components, both files: one change."""
    folder = done[0]
    base = pipeline.load(folder / "student")
    peft, kohya = (
        lora.read(folder / "output" / "checkpoints" / n, base.models())
        for n in ("lora_weights", "lora_kohya.safetensors")
    )
    assert {d.component for d in peft.deltas} == {"unet", "text_encoder"} and len(peft.deltas) == len(kohya.deltas)
    changes = {(d.component, d.module): d.scale * d.up @ d.down for d in peft.deltas}
    for d in kohya.deltas:
        assert torch.allclose(changes[d.component, d.module], d.scale * d.up @ d.down, atol=1e-6)
        assert d.scale == 2.0 and d.up.abs().max() > 0
    for part in ("unet", "text_encoder"):
        told = json.loads(
            (folder / "output" / "checkpoints" / "lora_weights" / part / "adapter_config.json").read_text()
        )
        assert told["r"] == 2 and told["lora_alpha"] == 4 and told["peft_type"] == "LORA"
    assert all(
        v.dtype == torch.float32
        for v in load_file(folder / "output" / "checkpoints" / "lora_kohya.safetensors").values()
    )


def test_numbers_and_report(done):
    root = done[0] / "output"
    with open(root / "metrics" / "metrics_standard_0.csv", encoding="utf-8") as f:
        assert next(csv.reader(f)) == [
            "Comparison",
            "SSIM",
            "MSE",
            "Histogram Similarity",
            "Hash Similarity",
            "Sharpness Ratio (first/second)",
            "Color Similarity",
        ]
    assert set(json.loads((root / "metrics" / "category_averages.json").read_text())) == {"standard", "closeup"}
    assert {"original_vs_finetuned", "original_vs_teacher", "finetuned_vs_teacher"} <= set(
        json.loads((root / "metrics" / "overall_metrics.json").read_text())
    )
    report = (root / "visualization" / "report.md").read_text()
    for words in (
        "Nearer to the teacher?",
        "Two ways to learn",
        "same latents",
        "they say nothing about which is better",
        "Not computed",
        "loss",
    ):
        assert words in report, words
    for name in ("radar_chart.png", "ssim_comparison.png", "improvement_percentage_chart.png", "improvement_table.png", "significance.csv",
                 "online.csv", "report.html"):  # fmt: skip
        assert (root / "visualization" / name).exists(), name
    summary = (root / "research_paper_materials" / "research_summary.md").read_text()
    assert "lora\\_rank | 2" in summary and "against the teacher" in summary
    assert (
        "http"
        not in (root / "visualization" / "report.html")
        .read_text()
        .replace("http-equiv", "")
        .split("<h2>Not computed")[0]
    )


def test_figures_from_the_numbers_alone(done, tmp_path):
    """The document's command, `--metrics_dir … --output_dir …`, with the pictures gone."""
    shutil.copytree(done[0] / "output" / "metrics", tmp_path / "o" / "metrics")
    code, _, err = script(
        "visualize", "--metrics_dir", tmp_path / "o" / "metrics", "--output_dir", tmp_path / "o" / "charts"
    )
    assert code == 0, err
    assert (tmp_path / "o" / "charts" / "radar_chart.png").exists() and (
        tmp_path / "o" / "research_paper_materials" / "research_summary.md"
    ).exists()
    before = (done[0] / "output" / "visualization" / "significance.csv").read_text()
    assert (tmp_path / "o" / "charts" / "significance.csv").read_text() == before


def copied(done, tmp_path):
    shutil.copytree(done[0] / "output", tmp_path / "output")
    (tmp_path / "student").symlink_to(done[0] / "student")
    return tmp_path / "output"


def test_generate_goes_on_with_what_is_missing(done, tmp_path, words):
    root = copied(done, tmp_path)
    want = {p.name: p.read_bytes() for p in (root / "sdxl_images").iterdir()}
    (root / "sdxl_images" / "00001.png").unlink()
    (root / "sdxl_images" / ".00002.png.tmp-1").write_bytes(b"half")
    path = written(tmp_path, words, method="both", feature_weight=0.1, sample_every=2)
    code, _, err = script("train", "--config", path)
    assert (
        code == 2 and "1 of 3 pictures are not there, such as 00001.png; `transfer generate` goes on with them" in err
    )
    code, _, err = script("generate", "--config", path)
    assert code == 0 and "2 of 3 pictures are there already" in err, err
    assert {p.name: p.read_bytes() for p in (root / "sdxl_images").iterdir()} == want


@pytest.mark.parametrize(
    "method, targets", [("data", ["q_proj", "v_proj", "k_proj", "out_proj", "fc1", "fc2"]), ("online", ["to_q", "fc1"])]
)
def test_resumed_to_the_same_adapters(done, tmp_path, words, method, targets, monkeypatch):
    """Stopped in its second update, gone on with: the same bytes, dropout included. The document's targets are the text encoder's alone."""
    root = copied(done, tmp_path)
    path = written(tmp_path, words, checkpointing_steps=1, method=method, lora_target_modules=targets)
    file = root / "checkpoints" / ("online" if method == "online" else "") / "lora_kohya.safetensors"
    shutil.rmtree(root / "checkpoints")
    code, _, err = script("train", "--config", path)
    assert code == 0, err
    want = load_file(file)
    assert (
        all(k.startswith("lora_te_") for k in want) == (method == "data")
        and max(v.abs().max() for k, v in want.items() if "lora_up" in k) > 0
    )
    shutil.rmtree(root / "checkpoints")
    stop_at_step(monkeypatch, 1)
    assert script("train", "--config", path)[0] == 130 and not file.exists()
    monkeypatch.undo()
    code, _, err = script("train", "--config", path)
    assert code == 0 and "resumed at step 1" in err, err
    got = load_file(file)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    code, _, err = script("train", "--config", path, "--teacher", tmp_path / "student", "--base-model-id", NANO)
    assert code == 2 and "method or teacher is not what it was" in err, err


def test_a_picture_that_fails_is_dropped_and_counted(tmp_path, words, monkeypatch):
    original = pipeline.Pipeline.generate

    def generate(self, prompts, *args, **more):
        if "fire" in prompts:
            raise config.UserError("not finite")
        return original(self, prompts, *args, **more)

    monkeypatch.setattr(pipeline.Pipeline, "generate", generate)
    (tmp_path / "student").symlink_to(NANO)
    path = written(tmp_path, words, num_images_to_generate=4)
    code, out, err = script("generate", "--config", path)
    assert (
        code == 0
        and "teacher_images: 3" in out
        and "teacher_images_dropped: 1" in out
        and "1 of 4 pictures could not be drawn" in err
    )
    code, _, err = script("train", "--config", path)
    assert code == 0 and "3 pictures of nano teach student" in err, "a failed picture is no missing one"


def test_a_checkpoint_of_anothers(done, tmp_path, words):
    """--checkpoint names what is compared; adapters for another base are refused."""
    root = copied(done, tmp_path)
    path = written(tmp_path, words)
    code, _, err = script(
        "evaluate", "--config", path, "--checkpoint", root / "checkpoints" / "online" / "lora_kohya.safetensors"
    )
    assert code == 0, err
    plan = json.loads((root / "comparison_output" / "finetuned" / "drawn.json").read_text())
    assert (
        plan["settings"]["model_sha256"]
        == json.loads((root / "comparison_output" / "online" / "drawn.json").read_text())["settings"]["model_sha256"]
    )
    strange = tmp_path / "strange.safetensors"
    down, up = torch.zeros(2, 7), torch.zeros(9, 2)
    weights.save_tensors(strange, {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": down,
                                   "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight": up})  # fmt: skip
    code, _, err = script("evaluate", "--config", path, "--checkpoint", strange)
    assert code == 2 and "strange.safetensors" in err and "it is for another family" in err


def test_the_whole_model_as_student(tmp_path, words):
    (tmp_path / "student").symlink_to(NANO)
    path = written(
        tmp_path, words, use_lora=False, lora_target_modules=[], num_images_to_generate=2, panels=0, method="online"
    )
    code, _, err = script("all", "--config", path)
    assert code == 0, err
    assert pipeline.load(tmp_path / "output" / "checkpoints" / "online" / "model").net is not None
    assert "finetuned" in (tmp_path / "output" / "visualization" / "report.md").read_text()


BAD = {
    "a key": (
        {"num_inference_step": 5},
        "generate",
        "unknown key 'num_inference_step'; did you mean num_inference_steps",
    ),
    "a type": ({"learning_rate": "1e-4"}, "generate", "learning_rate = '1e-4' has the wrong type"),
    "rank 0": ({"lora_r": 0}, "train", "--lora-rank 0 must be between 1"),
    "no layer": ({"lora_target_modules": ["to_q", "to_z"]}, "train", "--lora-targets to_z: no layer of"),
    "no prompts": ({"prompt_source": "absent.csv"}, "generate", "absent.csv: no such file"),
    "no teacher pictures": ({}, "train", "sdxl_images: is not there; `transfer generate` makes it"),
    "nothing trained": ({}, "evaluate", "lora_weights: is not there; `transfer train` makes it"),
    "nothing measured": ({}, "visualize", "metrics: is not there, or not complete; `transfer evaluate` makes it"),
    "another space": (
        {"base_model_id": str(TINY / "sd15"), "method": "online"},
        "generate",
        "do not share latents; use --method data",
    ),
    "a size": ({"resolution": 66}, "train", "--resolution 66 must be a multiple of 4"),
    "weights of online": (
        {"method": "online", "min_snr": 5.0},
        "train",
        "--min-snr and --snr-weighting are for --method data",
    ),
    "features of pictures": ({"feature_weight": 1.0}, "train", "--feature-weight is for --method online or both"),
    "a scheduler": ({"lr_scheduler": "cosin"}, "train", "lr_scheduler = 'cosin' is not one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_end_with_one_line(tmp_path, words, case, done):
    more, part, said = BAD[case]
    (tmp_path / "student").symlink_to(NANO)
    if case in ("no layer", "nothing trained", "a size"):
        shutil.copytree(done[0] / "output" / "sdxl_images", tmp_path / "output" / "sdxl_images")
    code, _, err = script(part, "--config", written(tmp_path, words, **more))
    assert code == 2 and said in err and "Traceback" not in err, err


def test_pictures_of_another_teacher_are_named(done, words):
    """Not refused: a copy of a model may have another name; its folder, or a revision behind it, is none."""
    folder, _, _ = done
    _, _, err = script(
        "train",
        "--config",
        folder / "config.json",
        "--teacher",
        TINY / "sd15",
        "--method",
        "data",
        "--feature-weight",
        0,
    )
    assert "note: " in err and "sdxl_images: was drawn by nano; --teacher is " in err
    _, _, err = script("train", "--config", folder / "config.json")
    assert "was drawn by" not in err


def test_words_after_transfer():
    for argv, said in (
        ((), "after transfer comes one of generate, train, evaluate, visualize, all, not nothing"),
        (("trian",), "did you mean train"),
    ):
        code, _, err = script(*argv)
        assert code == 2 and said in err
    code, _, err = in_process(distill, "distill.py", "tranfer")
    assert code == 2 and "one of recursive, transfer, few-step, not tranfer; did you mean transfer" in err


def test_memory_of_the_documents_targets():
    code, out, err = script("train", "--dry-run", *(a for t in ("q_proj", "fc1") for a in ("--lora-target-modules", t)))
    assert code == 0 and "M trained" in out, err


def test_sixteen_gigabytes():
    """The defaults, from configurations alone: no weights are there."""
    code, out, err = script("all", "--dry-run")
    assert code == 0, err
    lines = [line for line in out.splitlines() if ": peak" in line]
    assert len(lines) == 3 and all("fits in 16 GB" in line for line in lines)
    assert "train (student): 3.19 M trained, 1066.24 M frozen" in out
