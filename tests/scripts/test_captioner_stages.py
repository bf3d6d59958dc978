"""caption.py augment, synthesize, split, train, infer, eval: the whole chain on tiny models; goes on; mistakes."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from util import TINY, error_line, in_process, launch, rms_ratio, run, stop_at_step

import caption
from nanodiff.config import printable
from nanodiff.data import captionset
from nanodiff.device import quantize
from nanodiff.stories import captioner, captioner_model
from nanodiff.weights import hub, load_tensors, save_tensors

SMALL = {"vision-model": TINY / "vit", "model-name": TINY / "llama", "lora-r": 4, "lora-dropout": 0.1, "vit-lora-r": 2, "lr": 3e-3,
         "mixed-precision": "no", "max-new-tokens": 6, "samples": 2, "seed": 3}  # fmt: skip


def words(options):
    out = []
    for k, v in options.items():
        values = v if isinstance(v, list) else [v]
        out += [w for x in values if x is not None for w in ([f"--{k}"] if x is True else [f"--{k}", x])]
    return out


def stage(name, **options):
    return in_process(caption, "caption.py", name, *words({k.replace("_", "-"): v for k, v in options.items()}))


def on(n, name, **options):
    """The stage on n processes."""
    done = launch(n, "caption.py", name, *words({k.replace("_", "-"): v for k, v in options.items()}))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """24 drawn dishes of six colours and their CSV; titles plain, as lists, and two to a picture."""
    root = tmp_path_factory.mktemp("captions")
    (root / "images").mkdir()
    colours = {
        "red": (220, 30, 30),
        "green": (30, 200, 60),
        "blue": (40, 60, 220),
        "dark": (20, 20, 20),
        "white": (250, 250, 250),
        "pink": (250, 150, 200),
    }
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        name = list(colours)[i % 6]
        noise = rng.integers(-20, 20, (40, 60, 3))
        Image.fromarray((np.array(colours[name]) + noise).clip(0, 255).astype(np.uint8)).save(
            root / "images" / f"dish_{i:02d}.jpg", quality=95
        )
        rows.append(
            (
                f"dish_{i:02d}",
                [
                    f"{name} salad {i}",
                    json.dumps([f"{name} salad {i}"]),
                    json.dumps([f"{name} salad {i}", f"a {name} plate"]),
                ][i % 3],
            )
        )
    with open(root / "titles.csv", "w", newline="") as f:
        csv.writer(f).writerows([("Image_Name", "Title"), *rows])
    return root


@pytest.fixture(scope="module")
def parts(home):
    code, out, err = stage("split", original_csv=home / "titles.csv", output_dir=home / "data")
    assert code == 0 and "train_original: 20" in out, err
    return {
        "train-csv-path": home / "data" / "train.csv",
        "val-csv-path": home / "data" / "val.csv",
        "image-path": home / "images",
    }


@pytest.fixture(scope="module")
def trained(home, parts):
    """A captioner with adapters, three epochs."""
    code, out, err = stage(
        "train", **parts, **SMALL, output_dir=home / "cap", epochs=3, batch_size=8, save_epochs=2, hf_token="hf_secret"
    )
    assert code == 0, err
    return home / "cap", out, err


def training(folder):
    return json.loads((folder / "captioner.json").read_text())["training"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_writes_what_is_promised(trained):
    folder, out, err = trained
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    assert names == {"last_checkpoint", "best_model", "epoch_2"}  # S3-32
    log = [x for x in lines(folder / "metrics.jsonl") if "val_loss" in x]
    assert [x["epoch"] for x in log] == [1, 2, 3]
    losses = [x["val_loss"] for x in log]
    best = training(folder / "checkpoints" / "best_model")
    assert best["val_loss"] == pytest.approx(min(losses), rel=1e-5), "the best of all epochs, not the last (S3-37)"
    assert training(folder / "checkpoints" / "last_checkpoint")["epoch"] == 3
    assert losses[-1] < losses[0]
    assert float(out.partition("best_val_loss: ")[2].split()[0]) == pytest.approx(min(losses), rel=1e-5)
    samples = lines(folder / "samples.jsonl")
    assert len(samples) == 6 and {"epoch", "image", "reference", "prediction"} == set(samples[0])
    assert err.count("reference:") == 6, "sample captions after each epoch"
    assert (folder / "samples.png").is_file() and (folder / "loss.png").is_file()
    assert "hf_secret" not in (folder / "run.json").read_text()


def test_the_best_stays_the_best(home, parts, monkeypatch):
    """An epoch that is worse does not take its place."""
    told = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(captioner, "validate", lambda *args: next(told))
    assert stage("train", **parts, **SMALL, output_dir=home / "fake", epochs=3, batch_size=20)[0] == 0
    assert training(home / "fake" / "checkpoints" / "best_model")["epoch"] == 2
    assert training(home / "fake" / "checkpoints" / "last_checkpoint")["best_val_loss"] == 1.0


def test_a_stopped_run_goes_on(home, parts, trained, monkeypatch):
    """Stopped within an epoch and resumed: the same weights, dropout and all. (In processes of their own: the same bytes; here memory is
    aligned differently.)"""
    options = parts | SMALL | {"epochs": 3, "batch-size": 8, "save-epochs": 2, "output-dir": home / "stopped"}
    with monkeypatch.context() as patch:
        stop_at_step(patch, 4)
        assert stage("train", **options, checkpointing_steps=2)[0] == 130
    code, _, err = stage("train", **options, checkpointing_steps=2, resume="auto")
    assert code == 0 and "resumed at step 4" in err, err
    for name in ("best_model", "last_checkpoint"):
        one, two = (folder / "checkpoints" / name for folder in (trained[0], home / "stopped"))
        files = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
        assert len(files) == 3
        for file in files:
            a, b = load_tensors(one / file), load_tensors(two / file)
            assert max(rms_ratio(b[k], a[k]) for k in a if a[k].any()) < 1e-4, file


def test_two_processes_learn_the_same(home, parts):
    for n in (1, 2):
        on(n, "train", **parts | SMALL | {"lora-dropout": 0, "vit-lora-dropout": 0, "projector-dropout": 0, "batch-size": 8 // n, "epochs": 1,
                                              "grad-accum": 1, "output-dir": home / f"cap{n}"})  # fmt: skip
    one, two = (lines(home / f"cap{n}" / "metrics.jsonl") for n in (1, 2))
    assert one[-1]["val_loss"] == pytest.approx(two[-1]["val_loss"], rel=1e-4)
    a, b = (
        load_tensors(home / f"cap{n}" / "checkpoints" / "last_checkpoint" / "projector.safetensors") for n in (1, 2)
    )
    assert all(rms_ratio(b[k], a[k]) < 5e-3 for k in a)


def test_a_small_one_from_nothing(home, parts):
    """--model-size: all of it learns, and half-precision copies are not asked for; another caption of a picture each time."""
    options = parts | {"model-size": "tiny", "vocab-size": 600, "output-dir": home / "tiny", "epochs": 2, "batch-size": 10, "random-flip": True,
                       "random-jitter": 0.1, "max-length": 3, "max-new-tokens": 6}  # fmt: skip
    code, _, err = stage("train", **options)
    assert code == 0 and "are longer than --max-length 3 tokens, and cut" in err, err
    folder = home / "tiny" / "checkpoints" / "best_model"
    assert (folder / "llm" / "config.json").is_file() and not (folder / "llm_adapter").exists()
    code, _, err = stage(
        "complete",
        model=folder / "llm",
        prompt="Image:",
        temperature=0,
        max_new_tokens=3,
        output_dir=home / "tiny-text",
    )
    assert code == 0, err


def test_telling(home, trained):
    """S3-33: one picture's caption alone; a folder, a CSV, a line each; the same each time, for any batch."""
    one = {"model_file": f"{trained[0]}/checkpoints/best_model.pt", "output_dir": home / "told", "max_new_tokens": 6}
    picture = home / "images" / "dish_03.jpg"
    code, out, err = stage("infer", **one, infer_image_path=picture)
    assert code == 0, err
    net = captioner_model.load(one["model_file"], torch.float32, "cpu")
    assert out == printable(net.describe([Image.open(picture)], 6)[0]) + "\n"
    assert (home / "told" / "sheet.png").is_file()
    code, out, err = stage("infer", **one, infer_image_path=home / "images", batch_size=5)
    assert code == 0 and out.count("\n") == 24 and out.startswith("dish_00.jpg\t"), err
    assert captionset.read(home / "told" / "captions.csv")[0].name == "dish_00", "without the suffix, as in every table"
    odd = home / "odd"
    (odd / "below").mkdir(parents=True)
    for name in ("a.jpg", "b.heic", "below/c.jpg"):
        shutil.copy(picture, odd / name)
    code, _, err = stage("infer", **one, infer_image_path=odd)
    assert code == 0 and "2 other files and folders in it are left out, such as b.heic" in err
    bare = home / "bare.csv"
    bare.write_text("Image_Name\ndish_03\ndish_04\n")
    code, more, err = stage("infer", **one, infer_image_path=bare)
    assert code == 0 and [x.split("\t")[1] for x in more.splitlines()] == [
        x.split("\t")[1] for x in out.splitlines()[3:5]
    ], err
    assert len(captionset.read(home / "told" / "captions.csv")) == 2


def test_telling_with_quantized_weights(home, trained):
    """The language model in int8, its adapters added in before: the loss of a caption moves by a hundredth, the same by the command."""
    one = {"model_file": trained[0] / "checkpoints" / "best_model", "output_dir": home / "told8", "max_new_tokens": 6}
    code, out, err = stage("infer", **one, infer_image_path=home / "images", quantize="int8")
    assert code == 0 and out.count("\n") == 24 and "quantized to int8: the weights are 0." in err, err
    plain, fused = (captioner_model.load(one["model_file"], torch.float32, "cpu", fused=f) for f in (False, True))
    weight = [net.llm.model.layers[0].self_attn.q_proj.weight for net in (plain, fused)]
    assert not torch.equal(*weight)
    pixels = plain.pictures.batch([Image.open(home / "images" / "dish_03.jpg")])
    ids = torch.tensor([plain.caption_ids("a red dish")])
    loss = [net(pixels, ids).item() for net in (plain, fused)]
    assert abs(loss[0] - loss[1]) < 1e-4 * abs(loss[0])
    quantize.language(fused.llm, "int8")
    assert 0 < abs(fused(pixels, ids).item() - loss[0]) < 0.01 * abs(loss[0])
    code, _, err = stage("infer", **one, infer_image_path=home / "images", quantize="int4")
    assert code == 2 and "--quantize int4: a layer of " in err, err


def test_judging(home, parts, trained):
    """S3-34, S3-38, S0-26: the metrics of the document and more, corpus and single captions told apart."""
    options = {"model-file": trained[0] / "checkpoints" / "last_checkpoint", "test-csv-path": parts["val-csv-path"], "image-path": home / "images",
               "max-new-tokens": 6, "output-dir": home / "judged", "bootstrap": 20}  # fmt: skip
    code, _, err = in_process(caption, "caption.py", *caption.worded(["-t", "eval", *words(options)]))
    assert code == 0, err
    found = json.loads((home / "judged" / "metrics.json").read_text())
    assert {"bleu1", "bleu2", "bleu4", "bleu1_mean", "rouge_l", "meteor", "cider", "perplexity"} <= set(found)
    rows = captionset.located(captionset.read(parts["val-csv-path"]), [home / "images"])
    net = captioner_model.load(options["model-file"], torch.float32, "cpu")
    nats, tokens = 0.0, 0
    for row in rows:
        for text in row.captions:
            ids = torch.tensor([net.caption_ids(text)])
            nats, tokens = nats + net(net.pictures.batch([Image.open(row.path)]), ids).item(), tokens + ids.numel()
    assert found["perplexity"]["value"] == pytest.approx(np.exp(nats / tokens), rel=1e-3)
    assert "CLIP" in err and "not computed" in err, "without weights it is said to be missing"
    for name in ("captions.csv", "sheet.png", "report.html", "scores.png"):
        assert (home / "judged" / name).is_file(), name
    code, _, err = stage("eval", **options | {"metrics": "spice"})
    assert code == 2 and "spice needs the Stanford parser" in err
    code, _, err = stage(
        "eval", **options | {"metrics": "perplexity,bleu2", "max-samples": 1, "output-dir": home / "judged1"}
    )
    assert code == 0 and set(json.loads((home / "judged1" / "metrics.json").read_text())) == {
        "perplexity",
        "bleu2",
        "bleu2_mean",
    }, err


VARY = {
    "template": "{first}",
    "chat": "no",
    "max-new-tokens": 8,
    "min-words": 1,
    "attempts": 3,
    "variations": 2,
    "batch-size": 4,
    "temperature": 1.2,
}


def test_captions_are_varied_the_same_by_any_number_of_processes(home):
    """S3-19, S3-20, S3-39: unique, never the original; what is lacking is recorded, not raised."""
    options = VARY | {"data-csv": home / "titles.csv", "model": TINY / "llama", "output-dir": home / "v1"}
    code, _, err = stage("augment", **options)
    assert code == 0, err
    on(2, "augment", **options | {"output-dir": home / "v2"})
    names = ("augmented_captions.csv", "augmented_shortfall.csv", "augmented.jsonl")
    assert [(home / "v1" / n).read_bytes() for n in names] == [(home / "v2" / n).read_bytes() for n in names]
    rows = captionset.read(home / "v1" / "augmented_captions.csv")
    originals = {r.name: r.captions[0] for r in captionset.read(home / "titles.csv")}
    texts = {}
    for row in rows:
        assert captionset.cleaned(row.captions[0]) != captionset.cleaned(originals[row.source])
        texts.setdefault(row.source, []).append(captionset.cleaned(row.captions[0]))
    assert all(len(set(t)) == len(t) <= 2 for t in texts.values()) and rows
    done = json.loads((home / "v1" / "run.json").read_text())["results"]
    assert done["captions"] == 24 and done["variations"] == len(rows) and done["tokens_per_s"] > 0
    few = sum(len(texts.get(n, [])) < 2 for n in originals)
    assert (
        done["captions_with_fewer"]
        == few
        == len((home / "v1" / "augmented_shortfall.csv").read_text().splitlines()) - 1
    )


def test_varying_goes_on(home, monkeypatch):
    """Killed between two batches, and begun at a caption of one's own: what is there stays, the rest is made, the result is the same."""
    options = VARY | {"data-csv": home / "titles.csv", "model": TINY / "llama"}
    add, n, whole = captionset.Journal.add, [], captionset.variations
    # this model ends no line, and so would have none
    monkeypatch.setattr(captionset, "variations", lambda *a: whole(*a[:5]))

    def killed(self, *args):
        n.append(1)
        if len(n) == 6:
            raise KeyboardInterrupt
        return add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(captionset.Journal, "add", killed)
        assert stage("augment", **options, output_dir=home / "v3")[0] == 130
    assert len(captionset.read(home / "v3" / "augmented_captions.csv")) > 0, "rows are there as they come"
    code, _, err = stage("augment", **options, output_dir=home / "v3")
    assert code == 0 and "5 of 24 captions are varied already" in err, err
    assert stage("augment", **options, output_dir=home / "v4", start_idx=8)[0] == 0
    assert stage("augment", **options, output_dir=home / "v4", max_samples=8)[0] == 0
    assert stage("augment", **options, output_dir=home / "v0")[0] == 0
    want = (home / "v0" / "augmented_captions.csv").read_bytes()
    assert (
        (home / "v3" / "augmented_captions.csv").read_bytes()
        == want
        == (home / "v4" / "augmented_captions.csv").read_bytes()
    )


def test_another_model_in_the_same_folder_is_another_model(home, tmp_path):
    """A journal knows a language model by its weights: another one under the same path does not go on with it."""
    model = tmp_path / "llama"
    shutil.copytree(TINY / "llama", model)
    options = VARY | {"data-csv": home / "titles.csv", "model": model, "max-samples": 2, "output-dir": tmp_path / "v"}
    assert stage("augment", **options)[0] == 0
    kept = (tmp_path / "v" / "augmented.jsonl").read_bytes()
    tensors = load_tensors(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_tensors(model / "model.safetensors", tensors)
    code, _, err = stage("augment", **options)
    assert code == 2 and "was begun with another model_sha256" in err, err
    assert (tmp_path / "v" / "augmented.jsonl").read_bytes() == kept


def test_a_gemma_is_asked_in_its_chat_form(home):
    options = VARY | {
        "data-csv": home / "titles.csv",
        "model": TINY / "gemma3",
        "chat": "auto",
        "template": None,
        "max-samples": 2,
        "output-dir": home / "g",
    }
    code, _, err = stage("augment", **options)
    assert code == 0, err
    first = lines(home / "g" / "augmented.jsonl")[0]["settings"]
    assert first["chat"] is True and "{n} different variations" in first["template"]


def test_pictures_split_and_trained_on(home, parts):
    """S3-21, S3-22, S3-36: names as on disk; the negative prompt counts; then 80/10/10 of both kinds."""
    source = home / "captions.csv"
    rows = [captionset.Row(f"dish {i:02d}_v1", (f"new dish {i}",), "", f"dish_{i:02d}") for i in range(6)]
    captionset.write(
        source, [r._replace(name=r.name.replace(" ", "_")) for r in rows], {captionset.SOURCE: lambda r: r.source}
    )
    options = {"data-csv": source, "model": TINY / "sd15", "steps": 2, "resize": "40x24", "batch-size": 2}
    code, out, err = stage("synthesize", **options, output_dir=home / "s1")
    assert code == 0 and "pictures: 6" in out, err
    on(2, "synthesize", **options | {"output-dir": home / "s2"})
    listed = captionset.read(home / "s1" / "synthetic_captions.csv")
    found = captionset.located(listed, [home / "s1" / "images"])
    assert len(found) == 6 and {Image.open(r.path).size for r in found} == {(40, 24)} and found[0].path.endswith(".jpg")
    assert (home / "s1" / "synthetic_captions.csv").read_bytes() == (
        home / "s2" / "synthetic_captions.csv"
    ).read_bytes()
    for r in found:
        a, b = (np.asarray(Image.open(home / s / "images" / f"{r.name}.jpg"), dtype=int) for s in ("s1", "s2"))
        assert abs(a - b).max() <= 2
    plan = json.loads((home / "s1" / "images" / "drawn.json").read_text())
    assert plan["settings"]["scheduler"] == "ddpm" and "blurry" in plan["settings"]["negative_prompt"]
    assert "professional" in next(iter(plan["pictures"].values()))[0]
    before = found[0].path
    code, _, err = stage("synthesize", **options | {"negative-prompt": ""}, output_dir=home / "s1")
    assert code == 2 and "another negative_prompt" in err
    assert stage("synthesize", **options | {"negative-prompt": "red", "format": "png"}, output_dir=home / "s3")[0] == 0
    other = captionset.located(listed, [home / "s3" / "images"])
    assert (np.asarray(Image.open(other[0].path), dtype=int) != np.asarray(Image.open(before), dtype=int)).mean() > 0.2
    code, out, err = stage("split", original_csv=home / "titles.csv", synthetic_csv=[home / "s1" / "synthetic_captions.csv"],
                           image_path=[home / "images", home / "s1" / "images"], output_dir=home / "both")  # fmt: skip
    assert code == 0 and "val_synthetic: 1" in out and "test_synthetic: 0" in out and "train_synthetic: 5" in out, (
        out,
        err,
    )
    code, out, err = stage("train", **parts | SMALL | {"train-csv-path": home / "both" / "train.csv", "val-csv-path": home / "both" / "val.csv",
                                                       "image-path": [home / "images", home / "s1" / "images"], "epochs": 1, "samples": 0,
                                                       "output-dir": home / "cap-both"})  # fmt: skip
    assert code == 0 and "24 training and 3 validation" in err, err


def test_turbo_models_are_drawn_without_guidance(home):
    source = home / "one.csv"
    captionset.write(source, [captionset.Row("only", ("a dish",))])
    code, _, err = stage(
        "synthesize",
        data_csv=source,
        model=TINY / "sd-turbo",
        resize="none",
        scheduler="euler",
        output_dir=home / "turbo",
    )
    assert code == 0 and "the negative prompt is not used" in err, err


def test_the_documents_commands(home, parts):
    """S3-29: -t in any place; its flags with underscores."""
    assert (
        caption.worded(["-t", "train", "--x", "1"])
        == ["train", "--x", "1"]
        == caption.worded(["--x", "1", "--task=train"])[0:1] + ["--x", "1"]
    )
    assert caption.worded(["train", "--x"]) == ["train", "--x"]
    argv = ["-t", "train", "--hf_token", "hf_x", "--num_epochs", 1, "--output_dir", home / "doc", "--lora_alpha", 32, "--lora_dropout", 0.1, "--lora_r", 8,
            "--batch_size", 12, "--model_name", TINY / "llama", "--vision_model", TINY / "vit", "--train_csv_path", parts["train-csv-path"],
            "--val_csv_path", parts["val-csv-path"], "--image_path", home / "images", "--samples", 0]  # fmt: skip
    code, _, err = in_process(caption, "caption.py", *caption.worded(list(map(str, argv))))
    assert code == 0, err
    net = captioner_model.load(home / "doc" / "checkpoints" / "last_checkpoint.pt", torch.float32, "cpu")
    assert net.settings.language_model == str(TINY / "llama")


def test_mistakes_end_with_one_line(home, parts, trained, tmp_path):
    good = parts | SMALL | {"epochs": 1}
    broken, empty = tmp_path / "broken.csv", tmp_path / "empty.csv"
    broken.write_text('Image_Name,Title\ndish_00,"[""no end"\n')
    empty.write_text("Image_Name,Title\ndish_00,\n")
    absent = tmp_path / "absent.csv"
    absent.write_text("Image_Name,Title\ndish_00,x\nnowhere,y\n")
    small = shutil.copytree(TINY / "llama", tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    model = trained[0] / "checkpoints" / "best_model"
    mine = shutil.copytree(home / "images", tmp_path / "mine")  # where a run would replace what it reads
    for file in ("captions.csv", "augmented_captions.csv", "synthetic_captions.csv"):
        shutil.copy(home / "titles.csv", mine / file)
    grey, ends = shutil.copytree(TINY / "vit", tmp_path / "grey"), shutil.copytree(TINY / "llama", tmp_path / "ends")
    edit = lambda folder, **more: (folder / "config.json").write_text(  # noqa: E731
        json.dumps(json.loads((folder / "config.json").read_text()) | more)
    )
    edit(grey, num_channels=1)
    edit(ends, eos_token_id=600)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff no picture")
    for i, (name, options, said) in enumerate(
        (
            ("train", good | {"train-csv-path": tmp_path / "no.csv"}, "no such file (caption.py split writes it)"),
            ("train", good | {"train-csv-path": broken}, "broken.csv:2"),
            ("train", good | {"train-csv-path": empty}, "captions are empty"),
            ("train", good | {"train-csv-path": absent}, "1 of 2 pictures are not in"),
            ("train", good | {"image-path": tmp_path / "no"}, "no such folder"),
            ("train", good | {"model-name": TINY / "vit"}, "model_type 'vit' is not supported"),
            ("train", good | {"vision-model": TINY / "llama"}, "is no ViT"),
            ("train", good | {"model-name": small}, "has ids up to 501, the model's vocabulary has 300"),
            ("train", good | {"lora-targets": "to_q"}, "no layer of the llm has such a name"),
            ("train", good | {"parallel": "fsdp"}, "--parallel fsdp"),
            ("train", good | {"lora-r": 0}, "--lora-r must be at least 1"),
            ("train", good | {"test-csv-path": parts["val-csv-path"]}, "2 pictures of"),
            ("train", good | {"test-csv-path": tmp_path / "no.csv"}, "no.csv: no such file"),
            ("train", good | {"lr-scheduler": "cosine"}, "or train by --optimizer adamw"),
            ("infer", {"infer-image-path": bad}, "--model-file is required"),
            ("infer", {"model-file": model}, "--infer-image-path is required"),
            ("infer", {"model-file": model, "infer-image-path": tmp_path / "no.jpg"}, "no such file or folder"),
            ("infer", {"model-file": model, "infer-image-path": bad}, "not a readable image"),
            ("infer", {"model-file": tmp_path / "no.pt", "infer-image-path": home / "images"}, "is not there"),
            ("infer", {"model-file": TINY / "llama", "infer-image-path": home / "images"}, "is no captioner's folder"),
            (
                "infer",
                {"model-file": model, "model-name": TINY / "gemma3", "infer-image-path": home / "images"},
                "another language model or ViT",
            ),
            (
                "eval",
                {"model-file": model, "eval-set": "val", "val-csv-path": absent, "image-path": home / "images"},
                "1 of 2 pictures",
            ),
            ("eval", {"model-file": model, "eval-set": "all"}, "invalid choice"),
            ("eval", {"model-file": tmp_path / "x", "metrics": "bleu9"}, "'bleu9' is none of"),
            ("eval", {"model-file": model, "max-samples": 0}, "--max-samples must be at least 1"),
            ("train", good | {"model-size": "tiny"}, "is for adapters on pretrained models"),
            ("train", good | {"projector-dropout": 2}, "--projector-dropout 2 must be at least 0"),
            ("augment", {"data-csv": tmp_path / "no.csv", "model": TINY / "llama"}, "No such file"),
            ("augment", {"data-csv": home / "titles.csv", "model": TINY / "vit"}, "model_type 'vit' is not supported"),
            (
                "augment",
                {"data-csv": home / "titles.csv", "model": TINY / "llama", "template": "say it"},
                "names neither {caption} nor {first}",
            ),
            (
                "augment",
                {"data-csv": home / "titles.csv", "model": TINY / "llama", "template": "{caption} {size}"},
                "{size} is none of",
            ),
            ("augment", {"data-csv": home / "titles.csv", "model": TINY / "llama", "start-idx": 99}, "has 24 captions"),
            (
                "augment",
                {"data-csv": home / "titles.csv", "model": TINY / "llama", "max-words": 1},
                "--max-words 1 is less than",
            ),
            (
                "augment",
                {"data-csv": home / "titles.csv", "model": TINY / "llama", "max-new-tokens": 4000},
                "more than the 2048 that the model reads",
            ),
            (
                "synthesize",
                {"data-csv": home / "titles.csv", "model": TINY / "sd15", "template": "a dish"},
                "does not name {caption}",
            ),
            (
                "synthesize",
                {"data-csv": home / "titles.csv", "model": TINY / "sd15", "resize": "big"},
                "expected WIDTHxHEIGHT, such as 274x169, or none",
            ),
            ("synthesize", {"data-csv": home / "titles.csv", "model": TINY / "llama"}, "llama"),
            ("split", {"original-csv": home / "titles.csv", "test-share": 0.7}, "--test-share 0.7 must be above 0"),
            ("split", {"original-csv": home / "titles.csv", "synthetic-csv": tmp_path / "no.csv"}, "No such file"),
            ("train", good | {"lora-targets": "q_proj,to_q"}, "--lora-targets to_q: no layer of the llm"),
            ("train", good | {"vision-model": grey}, "num_channels = 1, but pictures are shown in three"),
            ("train", good | {"model-name": ends}, "eos_token_id 600 is beyond the model's vocabulary of 506"),
            ("eval", {"model-file": model, "metrics": "bleu9"}, "cider, perplexity, clip_score"),
            ("eval", {"model-file": model, "bootstrap": 1}, "--bootstrap 1 has no spread"),
            ("infer", {"model-file": model, "infer-image-path": mine, "output-dir": mine}, "holds the pictures of"),
            (
                "infer",
                {"model-file": model, "infer-image-path": mine / "captions.csv", "output-dir": mine},
                "and would replace it",
            ),
            (
                "eval",
                {"model-file": model, "test-csv-path": mine / "captions.csv", "output-dir": mine},
                "and would replace it",
            ),
            (
                "augment",
                {"data-csv": mine / "augmented_captions.csv", "model": TINY / "llama", "output-dir": mine},
                "and would replace it",
            ),
            (
                "synthesize",
                {"data-csv": mine / "synthetic_captions.csv", "model": TINY / "sd15", "output-dir": mine},
                "and would replace it",
            ),
        )
    ):
        code, _, err = stage(name, **{"output-dir": tmp_path / str(i)} | options)
        assert code == 2 and said in err and "Traceback" not in err, (name, said, err)
        assert len([x for x in err.splitlines() if x.startswith("error:")]) <= 1


def test_a_broken_picture_may_be_left_out(home, trained, tmp_path):
    folder = shutil.copytree(home / "images", tmp_path / "some")
    (folder / "dish_00.jpg").write_bytes(b"nothing")
    Image.new("L", (30, 30), 90).save(folder / "dish_01.jpg")  # grey, and with transparency: brought to RGB
    Image.new("RGBA", (30, 30), (9, 9, 9, 60)).save(folder / "extra.png")
    options = {
        "model-file": trained[0] / "checkpoints" / "best_model",
        "infer-image-path": folder,
        "max-new-tokens": 2,
        "output-dir": tmp_path / "out",
    }
    code, _, err = stage("infer", **options)
    assert code == 2 and "dish_00.jpg" in err
    code, out, err = stage("infer", **options | {"skip-bad": True})
    assert code == 0 and "1 of 25 pictures cannot be read" in err and out.count("\n") == 24


def test_a_path_ending_in_pt_means_the_folder(trained):
    assert hub.trained(f"{trained[0]}/checkpoints/best_model.pt") == trained[0] / "checkpoints" / "best_model"


def test_recomputation_draws_the_same_dropout(home, parts):
    """--gradient-checkpointing changes no gradient, also where the ViT's adapters alone have dropout."""
    options = (
        parts
        | SMALL
        | {"lora-dropout": 0, "vit-lora-dropout": 0.5, "epochs": 1, "batch-size": 10, "samples": 0, "num-workers": 0}
    )
    for name, more in (("kept", {}), ("again", {"gradient-checkpointing": True})):
        assert stage("train", **options | more | {"output-dir": home / name})[0] == 0
    for file in ("projector.safetensors", "vit_adapter/adapter_model.safetensors"):
        a, b = (load_tensors(home / n / "checkpoints" / "last_checkpoint" / file) for n in ("kept", "again"))
        assert max(rms_ratio(b[k], a[k]) for k in a if a[k].any()) < 1e-3, file


def test_a_run_that_ends_within_an_epoch(home, parts, monkeypatch):
    """It is judged and written at its end; and a validation that is no number ends nothing."""
    code, _, err = stage("train", **parts, **SMALL, output_dir=home / "short", max_steps=1, batch_size=4)
    assert code == 0 and training(home / "short" / "checkpoints" / "last_checkpoint")["step"] == 1, err
    monkeypatch.setattr(captioner, "validate", lambda *args: float("nan"))
    code, _, err = stage("train", **parts, **SMALL, output_dir=home / "nan", max_steps=1, batch_size=4)
    assert code == 0 and "validation loss nan" in err, err
    assert training(home / "nan" / "checkpoints" / "last_checkpoint")["val_loss"] is None
    assert not (home / "nan" / "checkpoints" / "best_model").exists()


def test_two_runs_do_not_mix(home, parts):
    options = parts | SMALL | {"output-dir": home / "again-and-again", "max-steps": 2, "batch-size": 10}
    assert stage("train", **options)[0] == 0
    refused = run("caption.py", "train", *words(options))  # in a process of its own, whose end lets go of the folder
    assert "earlier run" in error_line(refused)
    code, _, err = stage("train", **options, overwrite_output_dir=True)
    assert code == 0, err
    assert {x["epoch"] for x in lines(home / "again-and-again" / "samples.jsonl")} == {1}
    assert len(lines(home / "again-and-again" / "samples.jsonl")) == 2


def test_broken_pictures_in_training(home, parts, tmp_path):
    folder = shutil.copytree(home / "images", tmp_path / "some")
    for row in (*captionset.read(parts["train-csv-path"])[:2], *captionset.read(parts["val-csv-path"])[:1]):
        (folder / f"{row.name}.jpg").write_bytes(b"junk")
    options = parts | SMALL | {"image-path": folder, "epochs": 1, "batch-size": 10}
    code, _, err = stage("train", **options, output_dir=tmp_path / "one")
    assert code == 2 and "not a readable image" in err
    code, _, err = stage("train", **options, output_dir=tmp_path / "two", skip_bad=True)
    assert code == 0 and "2 pictures cannot be read and were replaced" in err, err
    assert len(lines(tmp_path / "two" / "bad_images.jsonl")) == 2


def test_a_csv_has_its_own_pictures(home, tmp_path):
    """Two runs of synthesize have the same names; without --image-path each CSV is read with the pictures beside it."""
    for k, colour in ((1, "red"), (2, "blue")):
        (tmp_path / f"s{k}" / "images").mkdir(parents=True)
        captionset.write(tmp_path / f"s{k}" / "synthetic_captions.csv", [captionset.Row("dish_00_v1", (f"{colour} thing",), "", "dish_00")],
                         {captionset.SOURCE: lambda row: row.source})  # fmt: skip
        Image.new("RGB", (9, 9), colour).save(tmp_path / f"s{k}" / "images" / "dish_00_v1.png")
    both = [tmp_path / f"s{k}" / "synthetic_captions.csv" for k in (1, 2)]
    code, _, err = stage("split", original_csv=home / "titles.csv", synthetic_csv=both, output_dir=tmp_path / "out")
    assert code == 2 and "two different pictures are called dish_00_v1" in err
    code, _, err = stage("split", original_csv=home / "titles.csv", synthetic_csv=both, output_dir=tmp_path / "out",
                         image_path=[home / "images", tmp_path / "s1" / "images", tmp_path / "s2" / "images"])  # fmt: skip
    assert code == 2 and "different pictures of one name" in err
