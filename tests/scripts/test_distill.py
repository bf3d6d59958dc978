"""distill.py: generations of a model that learns from its own pictures."""

import json
import shutil

import pytest
from util import ROOT, in_process

import distill
from nanodiff import commandline, data, pipeline
from nanodiff.output import images
from nanodiff.stories import gallery


def script(*argv):
    return in_process(distill, "distill.py", *argv)


def number(i):
    """COCO's numbers go up to 581,929."""
    return 320_009 + 10 * i


def arguments(folder, **more):
    """A study of seconds on the embedded model."""
    coco = folder / "captions.json"
    if not coco.exists():
        texts = ("red apple", "fire", "crescent moon", "cat face", "strawberry")
        rows = [{"image_id": number(i), "caption": t} for i, t in enumerate(texts)]
        coco.write_text(
            json.dumps({"images": [], "annotations": [*reversed(rows), {"image_id": number(0), "caption": "second"}]})
        )
    options = {"model": ROOT / "assets" / "nano", "captions": coco, "data-root": folder / "data", "models-root": folder / "models",
               "output-dir": folder / "out", "target-gen": 2, "steps": 2, "num-images": 4, "gen0-images": 5, "epochs": 1, "lr": 1e-4,
               "features": "pixels", "nearest-k": 1, "cfg-scale": 1.5, "mixed-precision": "no"} | more  # fmt: skip
    return ["recursive", *(a for k, v in options.items() if v is not None for a in (f"--{k}", v))]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    code, out, err = script(*arguments(folder))
    assert code == 0, err
    return folder, out, err


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix in (".jpg", ".safetensors")
    }


def test_folders_and_names(study):
    folder, out, err = study
    base = "sd_to_sd_cfg_1.5_steps_2_gen_"
    assert {p.name for p in (folder / "data").iterdir()} == {f"{base}{k}" for k in range(3)}
    assert {p.name for p in (folder / "models").iterdir()} == {f"{base}{k}" for k in (1, 2)}
    names = [f"COCO_train2014_{number(i):012d}.jpg" for i in range(5)]
    for k, n in ((0, 5), (1, 4), (2, 4)):
        pictures = data.load(folder / "data" / f"{base}{k}")
        assert pictures.keys == names[:n] and pictures.captions[0] == "red apple"
        assert gallery.planned(folder / "data" / f"{base}{k}")[names[1]].seed == 19, "S0-14: 320019 % 10000"
    assert pipeline.load(folder / "models" / f"{base}2").net is not None
    assert json.loads((folder / "models" / f"{base}1" / "training.json").read_text())["updates"] == 5
    assert json.loads((folder / "models" / f"{base}2" / "training.json").read_text())["updates"] == 4
    assert "target_gen: 2" in err and "cfg_scale: 1.5" in err and "generation\tcfg\tsteps\tloss\tpixels_fid" in out


def test_the_table_and_the_report(study):
    folder, out, _ = study
    rows = json.loads((folder / "out" / "cfg_1.5" / "table.json").read_text())
    assert [r["generation"] for r in rows] == [0, 1, 2] and rows[0]["loss"] is None and rows[2]["loss"] > 0
    assert "FID" not in rows[0], "S0-20: without Inception's weights it is not called FID"
    assert abs(rows[0]["pixels_fid"]) < 1e-6 < rows[2]["pixels_fid"], "generation 0 against itself"
    for name in ("report.html", "generations.png", "across.png", "table.csv", "metrics.json"):
        assert (folder / "out" / "cfg_1.5" / name).exists()
    record = json.loads((folder / "out" / "run.json").read_text())
    assert record["results"]["gen_2.pixels_fid"] == rows[2]["pixels_fid"] and "gen_1.pixels_fid" in out


def test_going_on_changes_nothing_that_is_there(study, tmp_path):
    """A picture that was lost comes back the same; a model that was lost is trained again to the same bytes."""
    folder, _, _ = study
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    want = {part: files(folder / part) for part in ("data", "models")}
    base = "sd_to_sd_cfg_1.5_steps_2_gen_"
    (again / "data" / f"{base}1" / "COCO_train2014_000000320019.jpg").write_bytes(b"half")
    shutil.rmtree(again / "models" / f"{base}2")
    code, _, err = script(*arguments(again, captions=folder / "captions.json"))
    assert code == 0 and "3 of 4 pictures are there already" in err, err
    assert {part: files(again / part) for part in want} == want


@pytest.mark.parametrize(("more", "says"), [
    ({"epochs": 2}, "gen_1: was made with epochs 1, not 2"), ({"lr": 2e-4}, "gen_1: was made with lr 0.0001, not 0.0002"),
    ({"seed": 1}, "gen_1: was made with seed 0, not 1"), ({"num-images": 3}, "gen_1: holds 4 pictures, 3 are asked for"),
    ({"gen0-images": 4}, "gen_0: holds 5 pictures, 4 are asked for"), ({"captions": "other"}, "was drawn from 'red apple', seed"),
    ({"model": "trained"}, "gen_0: holds pictures of another model"), ({"scheduler": "euler"}, "gen_0: holds pictures of another scheduler"),
])  # fmt: skip
def test_runs_are_never_mixed(study, tmp_path, more, says):
    """S0-10, S0-30: what was made by other settings is refused by its name, or made again with all that depends on it."""
    folder, _, _ = study
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    if more == {"captions": "other"}:
        rows = json.loads((again / "captions.json").read_text())
        rows["annotations"][-2]["caption"] = "green apple"
        (again / "captions.json").write_text(json.dumps(rows))
        more = {}
    if more == {"model": "trained"}:
        more = {"model": folder / "models" / "sd_to_sd_cfg_1.5_steps_2_gen_1"}
    before = files(again)
    line = refused(*arguments(again, **more), "--no-evaluate")
    assert says in line and "--overwrite-output-dir" in line and files(again) == before


@pytest.mark.slow  # three studies
@pytest.mark.parametrize("more", [{"epochs": 2}, {"num-images": 3}])
def test_overwrite_makes_again_what_depends_on_a_setting(study, tmp_path, more):
    folder, _, _ = study
    shutil.copytree(folder, again := tmp_path / "again")
    (fresh := tmp_path / "fresh").mkdir()
    shutil.copy(again / "captions.json", fresh)
    code, _, err = script(*arguments(again, **more), "--no-evaluate", "--overwrite")
    assert code == 0 and script(*arguments(fresh, **more), "--no-evaluate")[0] == 0, err
    for part in ("data", "models"):
        assert files(again / part) == files(fresh / part), "as if nothing had been there"


def test_overwrite_makes_a_lost_setting_again(study, tmp_path):
    """The last generation's model alone was made by another setting: it alone is made again."""
    folder, _, _ = study
    shutil.copytree(folder, again := tmp_path / "again")
    told = again / "models" / "sd_to_sd_cfg_1.5_steps_2_gen_2" / "training.json"
    facts = json.loads(told.read_text())
    told.write_text(json.dumps(facts | {"settings": facts["settings"] | {"lr": 1.0}}))
    assert "gen_2: was made with lr 1.0, not 0.0001" in refused(*arguments(again), "--no-evaluate")
    code, _, err = script(*arguments(again), "--no-evaluate", "--overwrite")
    assert code == 0 and "it is made again" in err and files(again / "models") == files(folder / "models"), err


@pytest.mark.parametrize("more, suffix, size", [
    ({"baseline": ""}, "_baseline", 5), ({"accumulate": ""}, "_all", 9), ({"real-fraction": 0.5, "real": "assets/emoji/emoji.tar"}, "_real_0.5", 4),
])  # fmt: skip
def test_what_a_generation_learns_from(study, tmp_path, more, suffix, size):
    folder, _, _ = study
    shutil.copytree(folder / "data", tmp_path / "data")
    argv = [a for a in arguments(tmp_path, **more) if a != ""]
    code, _, err = script(*argv, "--no-evaluate")
    assert code == 0, err
    told = json.loads((tmp_path / "models" / f"sd_to_sd_cfg_1.5_steps_2_gen_2{suffix}" / "training.json").read_text())
    assert told["settings"]["pictures"] == size


@pytest.mark.parametrize("argv", [
    "", "--cfg_scale 7.5", "--target_gen 5", "--num_images 1 --steps 1 --epochs 1", "--cfg_scale 7.5 --target_gen 5 --steps 100 --epochs 10",
    "--cfg_scales 1.0 7.5", "--baseline", "--finetune --real x",
])  # fmt: skip
def test_the_documents_commands_parse(argv):
    cfg = commandline.parse(distill.Recursive, argv.split())
    cfg.check()
    assert cfg.cfg_scales == ([1.0, 7.5] if "scales" in argv else []) and cfg.model == "CompVis/stable-diffusion-v1-4"


def refused(*argv):
    code, _, err = script(*argv)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, (code, err)
    return lines[0]


def test_mistakes(study, tmp_path):
    folder, _, _ = study
    plain = arguments(tmp_path)
    assert "give one of the two" in refused(*plain, "--baseline", "--finetune")
    assert "--finetune needs --real" in refused(*plain, "--finetune")
    assert "5 pictures have captions, 9 are wanted" in refused(*arguments(tmp_path, **{"gen0-images": 9}))
    assert "gone.json" in refused(*arguments(tmp_path, captions=tmp_path / "gone.json"))
    assert "--target-gen must be at least 0" in refused(*arguments(tmp_path, **{"target-gen": -1}))
    assert "--real-fraction 1 must be" in refused(*arguments(tmp_path, **{"real-fraction": 1}))
    real = {"real": ROOT / "assets" / "emoji" / "emoji.tar", "real-fraction": 0.1}
    assert "--finetune trains on real pictures alone" in refused(*arguments(tmp_path, **real), "--finetune")
    shutil.copytree(folder / "data", tmp_path / "data")
    told = refused(*arguments(tmp_path, **real), "--no-evaluate")
    assert "--real-fraction 0.1 of 5 pictures is none of them" in told
    told = refused(*arguments(tmp_path, real=tmp_path))
    assert "--data-root" in told and "lies in --real" in told and "generated pictures" in told
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").mkdir()
    shutil.copytree(
        folder / "data" / "sd_to_sd_cfg_1.5_steps_2_gen_0", tmp_path / "data" / "sd_to_sd_cfg_1.5_steps_2_gen_0"
    )
    told = refused(*arguments(tmp_path, scheduler="euler"))
    assert "holds pictures of another scheduler" in told and "gen_0" in told
    (tmp_path / "data" / "sd_to_sd_cfg_1.5_steps_2_gen_0" / "mine.png").write_bytes(b"")
    assert "mine.png: is no picture of this run" in refused(*plain)


def test_a_sheet_across_generations(study, tmp_path):
    """Of pictures that are there, by number; of a caption of one's own, drawn by every generation."""
    folder, _, _ = study
    sheet = tmp_path / "s" / "sheet.png"
    argv = arguments(folder, **{"output-dir": tmp_path / "o"})[1:]
    code, out, err = script("recursive", "grid", *argv, "--index", 0, 2, "--output", sheet)
    assert code == 0 and f"the sheet: {sheet}" in out, err
    wide, high = images.open_image(sheet).size
    assert wide > 3 * 192 and 2 * 192 < high < 3 * 192
    code, _, err = script("recursive", "grid", *argv, "--prompt", "fire", "--prompt-seed", 5)
    assert code == 0 and (tmp_path / "o" / "generations.png").exists(), err
    for more, said in ((("--index", 4), "--index 4: "), ((), "give --index N"), (("--index", 0, "--target-gen", 3), "is no folder of generated"),
                       (("--prompt", "a", "--target-gen", 3), "gen_3: is not there")):  # fmt: skip
        code, _, err = script("recursive", "grid", *argv, *more)
        assert code == 2 and said in err, err
