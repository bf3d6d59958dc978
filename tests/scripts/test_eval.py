"""eval.py: every stage from the command line, the same numbers however it is run, one line for each mistake."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter
from util import GOLDEN, ROOT, TINY, error_line, in_process, launch, recipe, run

import eval as evaluation
from nanodiff import config, data
from nanodiff.config import UserError
from nanodiff.data import tools
from nanodiff.evaluation import image_sets, pages
from nanodiff.models.inception import InceptionV3
from nanodiff.models.lpips import VGG16
from nanodiff.stories import judging
from nanodiff.weights import save_tensors


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """20 emoji as they are (with their captions), slightly and much blurred, in two categories."""
    root, emoji = tmp_path_factory.mktemp("sets"), data.load(ROOT / "assets/emoji/emoji.tar")
    for label, radius in (("teacher", 0), ("finetuned", 1), ("original", 3)):
        for i in range(20):
            folder = root / label / ("standard" if i % 2 else "closeup")
            folder.mkdir(parents=True, exist_ok=True)
            emoji.image(25 * i).filter(ImageFilter.GaussianBlur(radius)).save(folder / f"{i:02d}.png")
            if label == "teacher":
                (folder / f"{i:02d}.txt").write_text(emoji.captions[25 * i])
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Made-up weights of every network, under the published names."""
    root = tmp_path_factory.mktemp("weights")
    save_tensors(root / "pt_inception-2015-12-05-6726825d.safetensors", recipe(InceptionV3(), "inception"))
    save_tensors(root / "vgg16-397923af.safetensors", recipe(VGG16(), "vgg16"))
    (root / "clip-vit-base-patch32").symlink_to(TINY / "clip")
    return root


def script(*argv):
    return in_process(evaluation, "eval.py", *argv)


def evaluate(stage, out, *argv, n=1):
    """({metric: entry}, stdout, stderr) of a run, on n processes."""
    argv = [stage, "--output-dir", out, *argv]
    if n == 1:
        code, *said = script(*argv)
    else:
        done = launch(n, "eval.py", *argv)
        code, said = done.returncode, (done.stdout, done.stderr)
    assert code == 0, said
    return json.loads((out / "metrics.json").read_text()), *said


def values(found):
    return {k: m["value"] for k, m in found.items()}


@pytest.fixture(scope="module")
def alone(sets, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "o"
    return *evaluate("images", out, "--generated", sets / "finetuned", "--real", sets / "teacher", "--weights-dir", weights,
                     "--prompts", prompts(sets, out.parent), "--features", "inception,pixels", "--nearest-k", 3), out  # fmt: skip


def prompts(sets, folder):
    keys = data.load(sets / "teacher")
    (folder / "prompts.json").write_text(json.dumps(dict(zip(keys.keys, keys.captions, strict=True))))
    return folder / "prompts.json"


def test_images_computes_all(alone):
    found, printed, said, out = alone
    want = {"fid", "kid", "is", "precision", "recall", "density", "coverage", "memorisation", "diversity", "clip_score", "clip_fid",
            "cosd", "l2m", "rmg", "colourfulness", "pixels_fid", "pixels_memorisation"}  # fmt: skip
    assert want <= set(found)
    for name, m in found.items():
        assert (
            m["n"] == 20
            and m["provenance"]["versions"]["torch"]
            and m["provenance"]["command"].startswith("eval.py images")
        ), name
        if not name.startswith("pixels") and name in want - {"colourfulness"}:
            assert len(m["provenance"]["weights_sha256"]) == 64
    assert found["fid"]["provenance"]["resize"] == "torch-fidelity" and found["fid"]["provenance"]["n_real"] == 20
    assert found["fid"]["ci"][0] < found["fid"]["value"] < found["fid"]["ci"][1] and "biased" in said
    page = (out / "report.html").read_text()
    assert "data:image/png" in page and "http" not in page.replace("https://github.com", "")
    record = json.loads((out / "run.json").read_text())
    assert record["results"]["fid"] == found["fid"]["value"] and "fid: " in printed
    assert {"report.html", "report.md", "metrics.csv"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize("how", ["batches and threads", "two processes"])
def test_the_same_however_it_is_run(alone, sets, weights, tmp_path, how):
    found, _, _, out = alone
    argv = ["--generated", sets / "finetuned", "--real", sets / "teacher", "--weights-dir", weights, "--nearest-k", 3,
            "--prompts", out.parent / "prompts.json", "--features", "inception,pixels", "--no-cache"]  # fmt: skip
    more = ["--batch-size", 7, "--num-workers", 1] if how == "batches and threads" else []
    again, *_ = evaluate("images", tmp_path / "o", *argv, *more, n=1 if more else 2)
    assert set(again) == set(found)
    for name, value in values(found).items():
        assert again[name]["value"] == pytest.approx(value, rel=2e-4, abs=1e-6), name


def test_containers_and_order(sets, tmp_path):
    """Lossless copies in another container and order give the same numbers; identical sets an FID of 0."""
    emoji = data.load(sets / "teacher")
    tools.pack(sets / "finetuned", tmp_path / "x.tar")
    argv = ["--real", sets / "teacher", "--features", "pixels", "--metrics", "fid,kid,prdc,diversity,colours"]
    a, *_ = evaluate("images", tmp_path / "a", "--generated", sets / "finetuned", *argv)
    b, *_ = evaluate("images", tmp_path / "b", "--generated", tmp_path / "x.tar", *argv)
    assert values(a) == pytest.approx(values(b), rel=1e-9)
    turned = tmp_path / "turned"
    turned.mkdir()
    for i in range(len(emoji)):
        emoji.image(i).save(turned / f"{99 - i}.bmp")
    c, *_ = evaluate("images", tmp_path / "c", "--generated", turned, *argv)
    assert abs(c["pixels_fid"]["value"]) < 1e-8 and c["pixels_precision"]["value"] == 1
    moved, other = tmp_path / "moved", data.load(sets / "finetuned", captions=False)
    moved.mkdir()
    for i in range(len(other)):
        other.image(i).save(moved / f"{99 - i}.png")
    d, *_ = evaluate("images", tmp_path / "d", "--generated", moved, *argv)
    assert values(d) == pytest.approx(values(a), rel=1e-9)


def test_fid_grows_with_blur_over_sets(sets, weights, tmp_path):
    out = tmp_path / "o"
    argv = [a for label in ("teacher", "finetuned", "original") for a in ("--generated", sets / label)]
    evaluate("images", out, *argv, "--real", sets / "teacher", "--weights-dir", weights, "--metrics", "fid", "--fid-dims", 192,
             "--features", "inception,pixels")  # fmt: skip
    over = json.loads((out / "generations.json").read_text())
    assert json.loads((out / "metrics.json").read_text())["original.fid"] == over["original"]["fid"]
    assert Image.open(out / "across.png").size[0] < Image.open(out / "across.png").size[1], (
        "3 sets across, 8 pictures down"
    )
    for name in ("fid", "pixels_fid"):
        series = [over[label][name]["value"] for label in ("teacher", "finetuned", "original")]
        assert series == sorted(series) and abs(series[0]) < 1e-6 < series[1]
    assert (out / "generations.png").exists() and (out / "generations.csv").read_text().startswith(
        "metric,teacher,finetuned,original"
    )


def test_streamed_fid_is_the_same(sets, weights, tmp_path):
    argv = ["--generated", sets / "original", "--real", sets / "teacher", "--weights-dir", weights, "--metrics", "fid", "--bootstrap", 0,
            "--fid-dims", 64]  # fmt: skip
    kept, *_ = evaluate("images", tmp_path / "a", *argv)
    streamed, *_ = evaluate("images", tmp_path / "b", *argv, "--no-cache")
    assert streamed["fid"]["value"] == pytest.approx(kept["fid"]["value"], rel=1e-6)
    both, _, said = evaluate("images", tmp_path / "c", *argv, "--no-cache", n=2)
    assert both["fid"]["value"] == pytest.approx(kept["fid"]["value"], rel=2e-4) and "biased" in said
    assert (tmp_path / "a" / "cache").exists() and not (tmp_path / "b" / "cache").exists()


def test_drawing_first(tmp_path):
    (tmp_path / "p.txt").write_text("red apple\nfire\ncrescent moon\n")
    argv = [
        "--prompts",
        tmp_path / "p.txt",
        "--num-images",
        2,
        "--steps",
        2,
        "--real",
        "assets/emoji/emoji.tar",
        "--features",
        "pixels",
    ]
    found, *_ = evaluate("images", tmp_path / "o", *argv)
    files = sorted((tmp_path / "o" / "generated").iterdir())
    assert [f.name for f in files] == [*(f"{i:05d}.png" for i in range(6)), "drawn.json"] and found["pixels_fid"][
        "n"
    ] == 6
    first = files[3].read_bytes()
    files[3].unlink()
    again, *_ = evaluate("images", tmp_path / "o", *argv)
    assert files[3].read_bytes() == first and values(again) == values(found), "the same batch, the same bytes"
    picture = np.asarray(Image.open(files[3])).astype(int)
    files[3].unlink()
    evaluate("images", tmp_path / "o", *argv, "--batch-size", 1, n=2)
    assert np.abs(np.asarray(Image.open(files[3])) - picture).max() <= 1, (
        "another batch and another process: but for rounding"
    )
    asked = json.loads((tmp_path / "o" / "prompts_generated.json").read_text())
    assert (
        asked["00002.png"] == "fire"
        and json.loads((tmp_path / "o" / "nearest_pixels_generated.json").read_text()).keys() == asked.keys()
    )


def test_drawn_pictures_are_of_these_weights(tmp_path):
    """The same command after the weights at that path have changed draws anew; prompts may be a JSON or a CSV."""
    import shutil

    import torch

    from nanodiff.weights import load_tensors

    shutil.copytree(ROOT / "assets" / "nano", tmp_path / "model")
    (tmp_path / "p.json").write_text('{"a": "red apple", "b": "fire"}')
    argv = ["--prompts", tmp_path / "p.json", "--model", tmp_path / "model", "--steps", 1, "--metrics", "colours"]
    found, *_ = evaluate("images", tmp_path / "o", *argv)
    _, _, said = evaluate("images", tmp_path / "o", *argv)
    assert "2 of 2 pictures are there already" in said and found["brightness"]["n"] == 2
    drawn_with = found["brightness"]["provenance"]["drawn_with"]
    assert drawn_with["steps"] == 1 and len(drawn_with["model_sha256"]) == 64
    file = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    tensors = {k: v.clone() for k, v in load_tensors(file).items()}
    key = max(tensors, key=lambda k: tensors[k].numel())
    save_tensors(file, tensors | {key: torch.zeros_like(tensors[key])})
    other, _, said = evaluate("images", tmp_path / "o", *argv)
    assert "are there already" not in said and values(other) != values(found)


def test_names_of_sets():
    """Dots belong to a name (the folders of a study by guidance scale); only containers' suffixes do not."""
    base = "/x/sd_to_sd_cfg_1.5_steps_50_gen_"
    assert judging._names([f"{base}{i}" for i in range(3)], "generated") == [
        f"sd_to_sd_cfg_1.5_steps_50_gen_{i}" for i in range(3)
    ]
    assert judging._names(["/a/x.tar", "/b/x"], "generated") == ["a/x", "b/x"]
    assert judging._names(["."], "inputs") == [os.path.basename(os.getcwd())]
    assert len(set(pages.distinct(["a b", "a_b", "a-b"]).values())) == 3


def test_which_clip(tmp_path, weights):
    """A path is that path, whatever else lies in --weights-dir; a bare name is looked for there."""
    from nanodiff.evaluation import image_sets

    mine = tmp_path / "clip-vit-base-patch32"
    mine.symlink_to(TINY / "clip")
    assert image_sets.clip_path(image_sets.Settings(clip=str(mine), weights_dir=weights)) == str(mine)
    assert image_sets.clip_path(image_sets.Settings(weights_dir=weights)) == weights / "clip-vit-base-patch32"
    with pytest.raises(config.UserError, match="other/clip-vit-base-patch32"):
        image_sets.clip_path(image_sets.Settings(clip="other/clip-vit-base-patch32", weights_dir=weights))


def test_prompts_by_name(sets, tmp_path):
    """COCO annotations name pictures by id; captions of others are no harm, and said."""
    from nanodiff.evaluation import image_sets

    for name in ("COCO_1.jpg", "COCO_2.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    coco = {"images": [{"id": i, "file_name": f"COCO_{i}.jpg"} for i in (1, 2, 3)],
            "annotations": [{"image_id": i, "caption": f"picture {i}"} for i in (3, 2, 1)]}  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    dataset = data.load(tmp_path, captions=False)
    assert image_sets.prompts_for(dataset, tmp_path / "coco.json") == (["picture 1", "picture 2"], None)
    Image.new("RGB", (8, 8)).save(tmp_path / "COCO_1.png")
    (tmp_path / "stems.json").write_text('{"COCO_1": "x", "COCO_2": "y"}')
    with pytest.raises(config.UserError, match="differ by suffix only"):
        image_sets.prompts_for(data.load(tmp_path, captions=False), tmp_path / "stems.json")
    lines = '{"file_name": "COCO_2.jpg", "text": "second"}\n{"file_name": "COCO_1.jpg", "caption": "first"}\n'
    (tmp_path / "metadata.jsonl").write_text(lines)
    assert image_sets.prompts_for(dataset, tmp_path / "metadata.jsonl") == (["first", "second"], None)
    (tmp_path / "metadata.jsonl").write_text("[1]\n")
    with pytest.raises(config.UserError, match=r"metadata\.jsonl:1: no JSON object"):
        image_sets.prompts_for(dataset, tmp_path / "metadata.jsonl")
    half = data.load(sets / "teacher", captions=False)
    half = data.Dataset([item if i else item._replace(captions=()) for i, item in enumerate(half.items)], half.root)
    assert image_sets.prompts_for(half)[0] is None and "1 of 20 have none" in image_sets.prompts_for(half)[1]


def test_lines_stand_for_pictures_as_they_are_listed(tmp_path, monkeypatch):
    """Also where pairs are matched by stem, whose order is another: "img" before "img (1)", and its file after."""
    from nanodiff.evaluation import image_pairs, image_sets

    names = ["img.png", "img (1).png", "img-2.png"]
    for part in "ab":
        (tmp_path / part).mkdir()
        for i, name in enumerate(names):
            Image.new("RGB", (8 + i, 8)).save(tmp_path / part / name)
    folders = {part: data.load(tmp_path / part, captions=False) for part in "ab"}
    listed = folders["a"].keys
    told = {name: str(Image.open(tmp_path / "a" / name).width) for name in names}
    (tmp_path / "lines.txt").write_text("".join(f"{told[key]}\n" for key in listed))
    seen = {}

    def images(pictures, settings, real, texts, what, why):
        seen[what] = [(str(pictures.image(i).width), text) for i, text in enumerate(texts)]
        return SimpleNamespace(metrics={}, skipped={})

    monkeypatch.setattr(image_pairs, "images", images)
    image_pairs.of_sets(folders, [], image_sets.Settings(groups=("clip_score",)), tmp_path / "lines.txt")
    assert set(seen) == {"a", "b"} and all(a == b for rows in seen.values() for a, b in rows), seen


@pytest.mark.slow
def test_compare_triples(sets, weights, tmp_path):
    out = tmp_path / "o"
    found, *_ = evaluate("compare", out, "--original", sets / "original", "--finetuned", sets / "finetuned", "--teacher",
                           sets / "teacher", "--weights-dir", weights, "--panels", 2)  # fmt: skip
    assert found["finetuned_vs_teacher.ssim"]["value"] > found["original_vs_teacher.ssim"]["value"]
    assert found["finetuned_vs_teacher.lpips"]["value"] < found["original_vs_teacher.lpips"]["value"]
    assert (
        found["original_vs_teacher.lpips"]["provenance"]["weights_sha256"]
        and found["original_vs_teacher.mse"]["n"] == 20
    )
    assert "original_vs_teacher.ms_ssim" not in found, "64-pixel pictures are too small"
    rows = (out / "metrics" / "significance.csv").read_text().splitlines()
    table = {r.split(",")[0]: r.split(",") for r in rows[1:]}
    assert (
        table["ssim"][1] == "20"
        and float(table["ssim"][2]) > 0
        and float(table["ssim"][6]) < 1e-4
        and "Holm" in rows[0]
    )
    assert (
        table["ssim"][-1] == table["mse"][-1] == table["sharpness_ratio"][-1] == "nearer" and float(table["mse"][2]) < 0
    )
    one = json.loads((out / "metrics" / "metrics_standard_3.json").read_text())
    assert one["name"] == "standard/07" and set(one) == {
        "name",
        "original_vs_finetuned",
        "original_vs_teacher",
        "finetuned_vs_teacher",
    }
    table = (out / "metrics" / "metrics_closeup_0.csv").read_text().splitlines()
    assert (
        table[0]
        == "Comparison,SSIM,MSE,Histogram Similarity,Hash Similarity,Sharpness Ratio (first/second),Color Similarity"
        and len(table) == 4
    )
    averages = json.loads((out / "metrics" / "category_averages.json").read_text())
    assert set(averages) == {"closeup", "standard"} and (out / "metrics" / "overall_metrics.json").exists()
    drawn = {p.name for p in (out / "visualization").iterdir()}
    assert {
        "radar_chart.png",
        "ssim_comparison.png",
        "improvement_percentage_chart.png",
        "improvement_table.png",
    } <= drawn
    assert len(list((out / "comparison_output").glob("comparison_all_*.png"))) == 2
    assert sum(n.startswith("difference_") for n in drawn) == 6
    for name in drawn:
        assert Image.open(out / "visualization" / name).size[0] > 300
    assert "say nothing about which is better" in (out / "report.md").read_text()
    assert found["finetuned_vs_teacher.fid"]["value"] < found["original_vs_teacher.fid"]["value"]
    assert found["teacher.clip_score"]["n"] == 20 and found["original.clip_score"]["provenance"]["weights_sha256"]
    summary = (out / "research_paper_materials" / "research_summary.md").read_text()
    assert "ssim against the teacher" in summary and "significant at 5 %" in summary and "teacher.fid" in summary
    for name in ("radar_chart.png", "improvement_table.png"):
        assert f"({name})" in summary and (out / "research_paper_materials" / name).exists()


def test_compare_two_processes_and_sizes(sets, tmp_path):
    half = tmp_path / "half"
    for path in sorted((sets / "finetuned").rglob("*.png")):
        target = half / path.relative_to(sets / "finetuned").with_suffix(".bmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((32, 32)).save(target)
    argv = ["--a", half, "--b", sets / "teacher", "--metrics", "ssim,mse,phash", "--panels", 0]
    one, _, said = evaluate("compare", tmp_path / "one", *argv)
    two, *_ = evaluate("compare", tmp_path / "two", *argv, n=2)
    assert values(one) == values(two) and set(one) == {"ssim", "mse", "phash"}
    assert "20 pairs differ in size" in said and "20 pairs" in one["ssim"]["provenance"]["resized"]


def test_each_pairing_is_resized_for_itself(sets, tmp_path):
    """A larger teacher leaves before and after as they are."""
    for label, side in (("finetuned", 32), ("original", 32), ("teacher", 64)):
        for i in range(4):
            (tmp_path / label).mkdir(exist_ok=True)
            path = sets / label / ("standard" if i % 2 else "closeup") / f"{i:02d}.png"
            Image.open(path).resize((side, side)).save(tmp_path / label / f"{i}.png")
    argv = [a for label in ("original", "finetuned", "teacher") for a in (f"--{label}", tmp_path / label)]
    found, *_ = evaluate("compare", tmp_path / "o", *argv, "--metrics", "ssim,sharpness_ratio", "--panels", 0)
    assert found["original_vs_finetuned.ssim"]["provenance"]["resized"] == "none"
    assert found["original_vs_teacher.ssim"]["provenance"]["resized"].startswith("4 pairs")
    pair, *_ = evaluate(
        "compare",
        tmp_path / "p",
        "--a",
        tmp_path / "original",
        "--b",
        tmp_path / "finetuned",
        "--metrics",
        "ssim",
        "--panels",
        0,
    )
    assert found["original_vs_finetuned.ssim"]["value"] == pair["ssim"]["value"]


def test_captions(tmp_path):
    facts = json.loads((GOLDEN / "captions" / "coco_fakecap_1000.json").read_text())
    ids = list(facts["refs"])[:60]
    (tmp_path / "c.json").write_text(json.dumps([{"image_id": i, "caption": facts["raw_hyps"][i][0]} for i in ids]))
    (tmp_path / "r.json").write_text(json.dumps({i: facts["refs"][i] for i in ids}))
    found, *_ = evaluate(
        "captions", tmp_path / "o", "--candidates", tmp_path / "c.json", "--references", tmp_path / "r.json"
    )
    assert {"bleu1", "bleu4", "bleu4_mean", "rouge_l", "meteor", "cider"} <= set(found)
    assert found["bleu4"]["ci"][0] <= found["bleu4"]["value"] <= found["bleu4"]["ci"][1]
    assert "no synonyms" in found["meteor"]["provenance"]["form"] and found["bleu1"]["provenance"]["tokenizer"] == "ptb"
    assert len((tmp_path / "o" / "captions.csv").read_text().splitlines()) == 61


def test_a_bad_picture_on_one_of_two_processes(sets, tmp_path):
    """Both end, with the cause in one line."""
    import shutil

    shutil.copytree(sets / "finetuned", tmp_path / "p")
    (tmp_path / "p" / "standard" / "07.png").write_bytes(b"no picture")
    argv = [
        "--generated",
        tmp_path / "p",
        "--real",
        sets / "teacher",
        "--features",
        "pixels",
        "--output-dir",
        tmp_path / "o",
    ]
    done = launch(2, "eval.py", "images", *argv)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode and len(lines) == 1 and "07.png: not a readable image" in lines[0], done.stderr


def test_report_of_runs(sets, tmp_path):
    for name in ("a", "b"):
        evaluate(
            "compare",
            tmp_path / name,
            "--a",
            sets / "original",
            "--b",
            sets / "teacher",
            "--panels",
            0,
            "--metrics",
            "ssim,mse",
        )
    found, *_ = evaluate(
        "report", tmp_path / "o", "--inputs", tmp_path / "a", "--inputs", tmp_path / "b", "--title", "Two runs"
    )
    assert (
        found["a.ssim"]["value"] == found["b.ssim"]["value"]
        and "Two runs" in (tmp_path / "o" / "report.html").read_text()
    )


def test_without_matplotlib(sets, tmp_path):
    """Numbers and reports are still written, and one line says what is missing."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = subprocess.run([sys.executable, "eval.py", "compare", "--a", sets / "original", "--b", sets / "teacher", "--output-dir",
                           tmp_path / "o", "--panels", "1"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no chart without matplotlib") == 1 and (tmp_path / "o" / "report.html").exists()


# ---------------------------------------------------------------------------------------------------------
# Mistakes


def refused(*argv):
    """The one line of a refusal."""
    code, _, err = script(*argv)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, (code, err)
    return lines[0]


def test_as_a_program(tmp_path):
    (tmp_path / "none").mkdir()
    assert "No images found" in error_line(
        run("eval.py", "images", "--generated", tmp_path / "none", "--output-dir", tmp_path / "o")
    )


def test_bad_input_of_images(sets, tmp_path):
    out = ["--output-dir", tmp_path / "o"]
    teacher = ["--real", sets / "teacher", "--features", "pixels", *out]
    (tmp_path / "empty").mkdir()
    assert "No images found" in refused("images", "--generated", tmp_path / "empty", *teacher)
    (tmp_path / "one").mkdir()
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "one" / "a.png")
    assert "at least 2 are needed" in refused("images", "--generated", tmp_path / "one", "--metrics", "fid", *teacher)
    (tmp_path / "one" / "b.png").write_bytes((tmp_path / "one" / "a.png").read_bytes()[:500])
    assert "b.png: not a readable image" in refused("images", "--generated", tmp_path / "one", *teacher)
    (tmp_path / "one" / "a.png").write_bytes(b"")
    told = refused("images", "--generated", tmp_path / "one", *teacher)
    assert "a.png: not a readable" in told
    plain = ["images", "--generated", sets / "finetuned", *out]
    assert "--bootstrap 1 has no spread" in refused(*plain, "--bootstrap", "1")
    assert "lies in --generated" in refused("images", "--generated", sets, "--output-dir", sets / "closeup" / "eval")
    assert "--steps is for drawing" in refused(*plain, "--steps", "3")
    assert "--across x" in refused(*plain, "--across", "x")
    assert "needs real pictures (--real)" in refused(*plain, "--metrics", "fid")
    assert "needs the prompts" in refused(*plain, "--metrics", "clip_score")
    assert "pt_inception-2015-12-05-6726825d.pth is not there" in refused(*plain, "--metrics", "is")
    assert "'fld' is unknown; did you mean fid" in refused(*plain, "--metrics", "fld")
    (tmp_path / "p.txt").write_text("just one\n")
    assert "1 lines for 20 pictures" in refused(*plain, "--prompts", tmp_path / "p.txt")
    (tmp_path / "p.json").write_text('{"standard/01": "x"}')
    assert "has no caption for 19 of 20 pictures" in refused(*plain, "--prompts", tmp_path / "p.json")
    assert "--generated FOLDER is required" in refused("images", *out)
    assert "no such folder" in refused("images", "--generated", tmp_path / "gone", *out)
    assert "--fid-dims 100" in refused(*plain, "--fid-dims", "100")
    assert "given twice" in refused(*plain, "--generated", sets / "finetuned")


def test_bad_input_of_the_others(sets, tmp_path):
    out = ["--output-dir", tmp_path / "o"]
    one = tmp_path / "one.json"
    one.write_text('{"a": "x"}')
    (tmp_path / "less").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "less" / "x.png")
    told = refused("compare", "--a", sets / "teacher", "--b", tmp_path / "less", *out)
    assert "(1 pictures) lacks 20 of" in told and "closeup/00" in told
    assert "give --a and --b" in refused("compare", "--a", sets / "teacher", *out)
    assert "'ssm' is none of" in refused(
        "compare", "--a", sets / "teacher", "--b", sets / "teacher", "--metrics", "ssm", *out
    )
    same = ["compare", "--a", sets / "teacher", "--b", sets / "teacher", *out]
    assert "smaller than 161 pixels" in refused(*same, "--metrics", "ms_ssim")
    assert "pt_inception-2015-12-05-6726825d.pth is not there" in refused(*same, "--metrics", "fid")
    assert "needs more than one picture" in refused(
        "captions", "--candidates", one, "--references", one, "--metrics", "cider", *out
    )
    (tmp_path / "metrics.json").write_text('{"fid": {"value": 1, "n": 2}}')
    assert "fid lacks a right provenance" in refused("report", "--inputs", tmp_path, *out)
    (tmp_path / "metrics.json").write_text("{}")
    assert "no numbers in it" in refused("report", "--inputs", tmp_path, *out)
    assert "vgg16-397923af.pth is not there" in refused(
        "compare", "--a", sets / "teacher", "--b", sets / "teacher", "--metrics", "lpips", *out
    )
    (tmp_path / "c.json").write_text('{"a": "x"}')
    (tmp_path / "r.json").write_text('{"b": ["x"]}')
    both = ["captions", "--candidates", tmp_path / "c.json", "--references", tmp_path / "r.json", *out]
    assert "1 of 1 ids of --candidates are not in --references, such as a" in refused(*both)
    assert "spice needs" in refused(*both[:3], "--references", tmp_path / "c.json", "--metrics", "spice", *out)
    assert "--candidates FILE is required" in refused("captions", *out)
    assert "no such file" in refused("report", "--inputs", tmp_path / "gone", *out).lower()
    assert "the first word must be one of" in refused("imges", *out)
    shutil.copy(tmp_path / "c.json", own := tmp_path / "o" / "captions.csv")
    assert "and would replace it" in refused("captions", "--candidates", own, "--references", tmp_path / "r.json", *out)
    assert "--output-dir" in (told := refused("report", "--inputs", tmp_path / "o", *out)) and "one of --inputs" in told
    shutil.copy(tmp_path / "metrics.json", tmp_path / "o" / "metrics.json")
    assert "and would replace it" in refused("report", "--inputs", tmp_path / "o" / "metrics.json", *out)


def test_numbers_are_those_of_the_library(alone, sets):
    """The script adds nothing of its own: features of one, formula of the other."""
    from nanodiff.evaluation import features, metrics

    found, *_ = alone
    net = features.colour_pixels()
    a, b = (features.extract(net, data.load(sets / label, captions=False)) for label in ("teacher", "finetuned"))
    assert found["pixels_fid"]["value"] == pytest.approx(metrics.fid(a, b), rel=1e-9)
    assert found["pixels_diversity"]["value"] == pytest.approx(metrics.diversity(b), rel=1e-9)
    assert np.isfinite(list(values(found).values())).all()


def test_names_with_dots_are_whole(tmp_path):
    for name in ("dish_0.5", "dish_0.7", "dish_0"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    pictures = data.load(tmp_path, captions=False)
    table = tmp_path.with_suffix(".csv")
    table.write_text("Image_Name,Title\ndish_0.5,half\ndish_0.7,more\ndish_0,none\n")
    assert image_sets.prompts_for(pictures, table)[0] == [
        "half" if "5" in k else "more" if "7" in k else "none" for k in pictures.keys
    ]
    table.write_text("Image_Name,Title\ndish_0.5,half\ndish_0.7,more\n")
    with pytest.raises(UserError, match=r"has no caption for 1 of 3 pictures, such as dish_0\.png"):
        image_sets.prompts_for(pictures, table)


def test_lines_cannot_tell_numbered_pictures(tmp_path):
    for i in range(11):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    lines = tmp_path.with_suffix(".txt")
    lines.write_text("".join(f"prompt {i}\n" for i in range(11)))
    with pytest.raises(UserError, match=r"is in the order of 0\.png, 1\.png, 10\.png, …, not of their numbers"):
        image_sets.prompts_for(data.load(tmp_path, captions=False), lines)
    (tmp_path / "10.png").rename(tmp_path / "9a.png")
    assert image_sets.prompts_for(data.load(tmp_path, captions=False), lines)[0][9] == "prompt 9"


def test_a_comparison_replaces_the_one_before(sets, tmp_path):
    for count in (6, 3):
        for label in ("a", "b"):
            shutil.rmtree(tmp_path / label, ignore_errors=True)
            (tmp_path / label).mkdir()
            for i in range(count):
                Image.new("RGB", (16, 16), (20 * i, 9, 30 if label == "a" else 60)).save(tmp_path / label / f"{i}.png")
        argv = (
            "compare",
            "--before",
            tmp_path / "a",
            "--after",
            tmp_path / "b",
            "--metrics",
            "mse",
            "--output-dir",
            tmp_path / "out",
        )
        code, _, err = in_process(evaluation, "eval.py", *argv)
        assert code == 0, err
        assert len(list((tmp_path / "out" / "metrics").glob("metrics_*.json"))) == count
    assert len(list((tmp_path / "out").rglob("comparison_all_*"))) == 3


def test_too_few_is_said_of_what(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    argv = (
        "images",
        "--generated",
        tmp_path,
        "--real",
        tmp_path,
        "--features",
        "pixels",
        "--output-dir",
        tmp_path.with_suffix(".out"),
    )
    code, _, err = in_process(evaluation, "eval.py", *argv, "--metrics", "fid")
    assert code == 2 and "pixels_fid: the" in err and "1 pictures, at least 2 are needed" in err, err
    code, _, err = in_process(evaluation, "eval.py", *argv, "--metrics", "prdc")
    assert code == 2 and "pixels_prdc: " in err and "(one more than --nearest-k)" in err, err
    other = tmp_path.with_name("other")
    other.mkdir()
    Image.new("RGB", (16, 16), "red").save(other / "a.png")
    code, _, err = in_process(
        evaluation,
        "eval.py",
        *argv[:3],
        "--generated",
        other,
        "--metrics",
        "colours",
        "--across",
        "50",
        "--output-dir",
        tmp_path.with_suffix(".o2"),
    )
    assert code == 2 and "--across 50: " in err and "has 1 pictures, counted from 0" in err, err


def test_lines_stand_for_pictures_that_are_no_numbers(tmp_path):
    """Names that are digits among others have one order; two numbered pictures are too few to be named three."""
    for names, refused in (
        (("10.png", "9.png"), True),
        (("3fa9.png", "3fb10.png", "c7.png"), False),
        (("a_cfg10_1.png", "a_cfg7_5_1.png"), False),
        (("sd15_0.png", "sd15_1.png", "sd15_10.png", "sd15_2.png"), True),
        (("0.png", "10.jpg", "9.png"), True),
    ):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            Image.new("RGB", (8, 8)).save(folder / name)
        lines = folder.with_suffix(".txt")
        lines.write_text("one\n" * len(names))
        pictures = data.load(folder, captions=False)
        if refused:
            with pytest.raises(UserError, match="…, not of their numbers"):
                image_sets.prompts_for(pictures, lines)
        else:
            assert image_sets.prompts_for(pictures, lines)[0] == ["one"] * len(names)
