"""Studies: axes from text, all combinations, sheets, what a stopped one takes over; the script around it."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from util import TINY, error_line, run

import sample
from nanodiff import commandline
from nanodiff.config import UserError
from nanodiff.stories import drawing, sampling, study

MODEL = ("--model", str(TINY / "sd15"), "--prompt", "a cat", "--seed", "3")


def parse(text):
    return study.parse(text, sample.Config)


def test_axes_have_the_types_of_their_flags():
    axes = parse("scheduler=ddpm,ddim; guidance-scale=1,7.5;steps=5,25;prompt_weights=true,false")
    assert axes == [
        ("scheduler", ["ddpm", "ddim"]),
        ("guidance_scale", [1.0, 7.5]),
        ("steps", [5, 25]),
        ("prompt_weights", [True, False]),
    ]
    assert parse("cfg-scale=3") == [("guidance_scale", [3.0])] and parse("num_inference_steps=3") == [("steps", [3])]
    assert parse("lora scale=0,0.5") == [("lora_scale", [0.0, 0.5])]


def test_texts_with_commas_and_nothing():
    axes = parse('negative_prompt=none,"blurry, low resolution; grey";prompt="a cat, red",a dog;lora=,x.safetensors')
    assert axes == [
        ("negative_prompt", [None, "blurry, low resolution; grey"]),
        ("prompt", [["a cat, red"], ["a dog"]]),
        ("lora", [[], ["x.safetensors"]]),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("guidence_scale=1", "guidance_scale"),
        ("output_dir=a", "does not change the picture"),
        ("steps", "no values"),
        ("steps=x", "not of type int"),
        ("scheduler=ddpn", "ddpm"),
        ("steps=1;steps=2", "twice"),
        ("", "empty"),
        ("prompt_weights=maybe", "not of type bool"),
    ],
)
def test_refusals(text, says):
    with pytest.raises(UserError, match=says):
        parse(text)


def test_cells_are_all_combinations_last_axis_fastest():
    cells = study.cells([("a", [1, 2]), ("b", [3, 4, 5])])
    assert [tuple(c.values()) for c in cells] == [(1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5)]
    assert study.label({"guidance_scale": 7.5, "negative_prompt": None}) == "guidance scale 7.5, negative prompt none"


def do(out, *argv):
    sampling.main(commandline.parse(sample.Config, [*MODEL, "--output-dir", str(out), *argv]))
    return list(csv.DictReader((out / "study.csv").open()))


def test_a_study_shares_noise_and_text(tmp_path, monkeypatch):
    from nanodiff import pipeline

    encoded = []
    original = pipeline.Pipeline.encode_uniques
    monkeypatch.setattr(
        pipeline.Pipeline, "encode_uniques", lambda self, texts, *a: encoded.append(texts) or original(self, texts, *a)
    )
    rows = do(tmp_path / "s", "--study", "scheduler=ddim,euler;guidance_scale=1,5", "--steps", "2", "--prompt", "a dog")
    assert len(rows) == 8 and sum(len(t) for t in encoded) == 3, "two prompts and the empty one, once each"
    assert {(r["prompt"], r["seed"]) for r in rows} == {("a cat", "3"), ("a dog", "4")}
    for row in rows:  # each is the picture that the plain command makes
        alone = tmp_path / "alone"
        argv = [
            "--model",
            str(TINY / "sd15"),
            "--prompt",
            row["prompt"],
            "--seed",
            row["seed"],
            "--steps",
            "2",
            "--output-dir",
            str(alone),
            "--overwrite",
        ]
        argv += ["--scheduler", row["scheduler"], "--guidance-scale", row["guidance_scale"]]
        sampling.main(commandline.parse(sample.Config, argv))
        assert Image.open(alone / "00000.png").tobytes() == Image.open(tmp_path / "s" / row["file"]).tobytes()
    sheet = Image.open(tmp_path / "s" / "study.png")
    assert sheet.width == 2 * (192 + 4) + 4 and sheet.height > 4 * 192


def test_a_stopped_study_goes_on(tmp_path, capsys):
    out, text = tmp_path / "s", "steps=1,2,3"
    first = do(out, "--study", text)
    (out / first[1]["file"]).unlink()  # as if it had been stopped before this one
    before = (out / first[2]["file"]).stat().st_mtime_ns
    again = do(out, "--study", text)
    assert "2 of them finished before" in capsys.readouterr().out
    assert (out / first[2]["file"]).stat().st_mtime_ns == before and len(again) == 3
    more = do(out, "--study", "steps=1,2,3,4")  # a larger study takes over what is there
    assert len(more) == 4 and (out / first[0]["file"]).exists()
    assert len({row["file"] for row in more}) == 4
    results = json.loads((out / "run.json").read_text())["results"]
    assert results["taken_over"] == 3
    do(out, "--study", text, "--guidance-scale", "2")
    assert json.loads((out / "run.json").read_text())["results"]["taken_over"] == 0, "other settings, other pictures"


def test_a_random_seed_is_kept(tmp_path, capsys):
    argv = ["--model", str(TINY / "sd15"), "--prompt", "a", "--output-dir", str(tmp_path), "--study", "steps=1,2"]
    for _ in range(2):
        sampling.main(commandline.parse(sample.Config, argv))
    out = capsys.readouterr().out.splitlines()
    seeds = [line for line in out if line.startswith("seed:")]
    assert seeds[0] == seeds[1] and "2 of them finished before" in out[-1]


def test_studies_of_lora_scale_and_negative_prompts(tmp_path):
    lora = TINY.parent / "lora" / "sd15.kohya.safetensors"
    rows = do(tmp_path / "l", "--lora", str(lora), "--study", "lora_scale=0,0.5,1", "--steps", "1")
    pictures = [Image.open(tmp_path / "l" / r["file"]).tobytes() for r in rows]
    assert len(set(pictures)) == 3
    plain = tmp_path / "plain"
    sampling.main(commandline.parse(sample.Config, [*MODEL, "--steps", "1", "--output-dir", str(plain)]))
    assert Image.open(plain / "00000.png").tobytes() == pictures[0], "scale 0 is no LoRA"
    rows = do(tmp_path / "n", "--study", 'negative_prompt=none,"a, b"', "--steps", "1", "--guidance-scale", "5")
    assert [r["negative_prompt"] for r in rows] == ["", "a, b"]
    assert len({Image.open(tmp_path / "n" / r["file"]).tobytes() for r in rows}) == 2


def test_a_study_of_models_loads_each(tmp_path):
    """Settings that need another model are settings too."""
    models = f"{TINY / 'sd15'},{TINY / 'sd-turbo'}"
    rows = do(tmp_path, "--study", f"model={models};steps=1,2")
    assert len({Image.open(tmp_path / r["file"]).tobytes() for r in rows}) == 4


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--study", "guidnce_scale=1"], "guidance_scale"),
        (["--study", "steps=1,0"], "--steps 0"),
        (["--study", "steps=1", "--output", "x.png"], "--output"),
        (["--study", "scheduler=flow_euler"], "not a flow"),
    ],
)
def test_the_script_refuses_before_work(tmp_path, argv, says):
    assert says in error_line(run("sample.py", *MODEL, "--output-dir", tmp_path / "o", *argv))


def test_a_formula_in_a_prompt_is_text_in_the_table(tmp_path):
    rows = do(tmp_path, "--study", 'prompt="=cmd()"', "--steps", "1")
    assert rows[0]["prompt"] == "'=cmd()"


def test_another_axis_takes_over_what_fits(tmp_path):
    """A study that gets one more axis: its first cells are the old ones, and the sheet labels them all."""
    do(tmp_path, "--scheduler", "ddim", "--steps", "1", "--study", "guidance_scale=1,3")
    rows = do(tmp_path, "--scheduler", "ddim", "--steps", "1", "--study", "scheduler=ddpm,ddim;guidance_scale=1,3")
    assert [(r["scheduler"], r["guidance_scale"]) for r in rows] == [
        ("ddpm", "1.0"),
        ("ddpm", "3.0"),
        ("ddim", "1.0"),
        ("ddim", "3.0"),
    ]
    assert json.loads((tmp_path / "run.json").read_text())["results"]["taken_over"] == 2
    do(tmp_path, "--scheduler", "ddim", "--steps", "1", "--study", "guidance_scale=1,3", "--offload", "model")
    results = json.loads((tmp_path / "run.json").read_text())["results"]
    assert results["taken_over"] == 2, "how a picture is made does not make it another one"


def test_ways_that_are_compared_are_all_gone(tmp_path):
    """What is asked for as an axis is drawn, though it is the same picture: its seconds are its own."""
    rows = do(tmp_path, "--steps", "1", "--study", "offload=none,model")
    assert [r["offload"] for r in rows] == ["none", "model"] and len({r["file"] for r in rows}) == 2
    first, second = (np.asarray(Image.open(tmp_path / r["file"])).astype(int) for r in rows)
    assert abs(first - second).max() <= 1


def test_a_cell_that_cannot_be_drawn_names_flags(tmp_path, capsys):
    with pytest.raises(UserError):
        do(tmp_path, "--steps", "1", "--study", "eta=0,1", "--scheduler", "heun")
    assert "`" not in capsys.readouterr().err


def test_fused_loras_are_fused_anew_for_each_scale(tmp_path):
    lora = TINY.parent / "lora" / "sd15.kohya.safetensors"
    rows = do(tmp_path, "--lora", str(lora), "--lora-fuse", "--study", "lora_scale=0,1", "--steps", "1")
    assert len({Image.open(tmp_path / r["file"]).tobytes() for r in rows}) == 2


def test_axes_that_are_columns_too(tmp_path):
    rows = do(tmp_path, "--study", 'seed=none,9;prompt=a cat,"a, dog"', "--steps", "1")
    assert [(r["seed"], r["prompt"]) for r in rows] == [
        ("3", "a cat"),
        ("3", "a, dog"),
        ("9", "a cat"),
        ("9", "a, dog"),
    ]


@pytest.mark.parametrize(
    "pictures", ['{"k": {"file": "../../x.png"}}', '{"k": {"file": "a.png"}}', "[]", '{"k": 3}', "3"]
)
def test_a_record_is_data_not_paths(tmp_path, pictures):
    (tmp_path / "study.json").write_text(f'{{"seed": 3, "pictures": {pictures}}}')
    if pictures == "[]":
        assert do(tmp_path, "--study", "steps=1")
        return
    with pytest.raises(UserError, match=r"study\.json"):
        do(tmp_path, "--study", "steps=1")


@pytest.mark.parametrize(
    ("text", "more", "different"),
    [
        ("hires=none,1.5", ("--hires-steps", "2", "--hires-strength", "0.9"), 2),
        ("init-image=none,IN", ("--strength", "0.9"), 2),
        ("perturbed_scale=0,3", ("--perturbed-layers", "up_blocks.1"), 2),
        ("lora=none,LORA", ("--lora-scale", "0.5"), 2),
        ("hires_steps=2,3;hires=none,1.5", ("--hires-strength", "0.9"), 3),
    ],
)
def test_what_an_option_needs_may_be_an_axis(tmp_path, text, more, different):
    """Only the cells are checked, and what one does not need there is as if it had not been given."""
    Image.new("RGB", (64, 64), "green").save(tmp_path / "in.png")
    text = text.replace("IN", str(tmp_path / "in.png")).replace(
        "LORA", str(TINY.parent / "lora/sd15.kohya.safetensors")
    )
    rows = do(tmp_path / "s", "--study", text, "--steps", "2", "--guidance-scale", "2", *more, "--nrow", "1")
    assert len({Image.open(tmp_path / "s" / r["file"]).tobytes() for r in rows}) == different
    assert Image.open(tmp_path / "s" / "study.png").width < 300, "--nrow"


def test_an_option_without_its_need_in_any_cell_is_refused(tmp_path):
    with pytest.raises(UserError, match="--hires-steps does nothing without --hires"):
        do(tmp_path, "--study", "steps=1,2", "--hires-steps", "3")


def test_an_impossible_cell_does_not_stop_the_others(tmp_path, capsys):
    with pytest.raises(UserError, match=r"1 of 3 cells cannot be drawn, such as height 100: --height 100"):
        do(tmp_path, "--study", "height=64,100,72", "--steps", "1")
    rows = list(csv.DictReader((tmp_path / "study.csv").open()))
    assert [r["height"] for r in rows] == ["64", "72"] and "note: height 100: not drawn" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "run.json").read_text())["results"]["refused"]) == ["height 100"]
    with pytest.raises(UserError, match="none of 2 cells can be drawn"):
        do(tmp_path / "none", "--study", "height=100,101", "--steps", "1")
    assert not (tmp_path / "none" / "run.json").exists()


def test_a_file_that_changed_is_drawn_again(tmp_path):
    path, out = tmp_path / "in.png", tmp_path / "s"
    argv = ("--study", "strength=0.5,0.9", "--init-image", str(path), "--steps", "2")
    taken = lambda: json.loads((out / "run.json").read_text())["results"]["taken_over"]  # noqa: E731
    Image.new("RGB", (64, 64), "green").save(path)
    do(out, *argv)
    path.write_bytes(path.read_bytes())  # the same again, at another time
    do(out, *argv)
    assert taken() == 2
    Image.new("RGB", (72, 64), "green").save(path)
    rows = do(out, *argv)
    assert taken() == 0 and {Image.open(out / r["file"]).width for r in rows} == {72}


def test_a_dry_run_plans_the_cell_that_takes_most(tmp_path, capsys):
    plan = lambda *argv: (  # noqa: E731
        sampling.main(commandline.parse(sample.Config, [*MODEL, "--output-dir", str(tmp_path), "--dry-run", *argv])),
        capsys.readouterr().out,
    )[1]
    found = plan("--study", "height=64,2048,128;width=64,1024")
    assert "of 6 cells the one that takes most: height 2048, width 1024" in found
    assert found.splitlines()[1:] == plan("--height", "2048", "--width", "1024").splitlines()


def test_a_study_inside_a_folder_that_it_names_goes_on(tmp_path, capsys):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "fruit.txt").write_text("apple\npear\n")
    syntax = ("--prompt-syntax", "a1111", "--wildcards", str(tmp_path / "w"))
    for again in ("2 pictures,", "2 pictures (2 of them finished before)"):
        do(tmp_path / "w" / "out", "--steps", "1", *syntax, "--study", "guidance_scale=1,2")
        assert again in capsys.readouterr().out


def test_a_study_of_before_files_were_kept_goes_on(tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    argv = ("--steps", "2", "--init-image", str(tmp_path / "in.png"), "--study", "guidance_scale=1,2")
    do(tmp_path / "out", *argv)
    record = tmp_path / "out" / "study.json"
    raw = json.loads(record.read_text())
    for row in raw["pictures"].values():
        assert str(tmp_path / "in.png") in row.pop("files")
    record.write_text(json.dumps(raw))
    capsys.readouterr()
    do(tmp_path / "out", *argv)
    assert "(2 of them finished before)" in capsys.readouterr().out


def test_what_hangs_on_what_is_off_is_off(tmp_path):
    """--mask needs --init-image, --mask-blur needs --mask."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    argv = ("--steps", "2", "--mask", str(tmp_path / "mask.png"), "--mask-blur", "2")
    assert len(do(tmp_path / "out", *argv, "--study", f"init_image=none,{tmp_path / 'in.png'}")) == 2


def test_a_dry_run_goes_on_past_an_impossible_cell(tmp_path, capsys):
    with pytest.raises(UserError, match="3 of 6 cells cannot be drawn, such as height 65, guidance scale 1"):
        do(tmp_path, "--dry-run", "--study", "height=64,65;guidance_scale=1,2,3")
    assert "of 6 cells the one that takes most: height 64, guidance scale 1" in capsys.readouterr().out


def test_what_is_named_is_looked_at_wherever_it_lies(tmp_path):
    """Also beneath the folder of the study's own pictures; and a folder that is named twice is looked at for both."""
    (tmp_path / "in.png").write_bytes(b"a")
    (tmp_path / "00000.png").write_bytes(b"a")
    (tmp_path / "fruit.txt").write_text("apple")
    cfg = lambda **more: dataclasses.replace(commandline.parse(sample.Config, []), **more)  # noqa: E731
    named = cfg(init_image=str(tmp_path / "in.png"), wildcards=str(tmp_path), lora_dir=str(tmp_path))
    before = drawing.Marks(tmp_path).of(named)
    assert set(before) == {str(tmp_path / "in.png"), str(tmp_path)}
    (tmp_path / "00000.png").write_bytes(b"b")
    (tmp_path / "study.json").write_text("{}")
    assert drawing.Marks(tmp_path).of(named) == before
    for path, kind in (("in.png", "init_image"), ("fruit.txt", "wildcards"), ("l.safetensors", "lora_dir")):
        (tmp_path / path).write_bytes(b"other")
        after = drawing.Marks(tmp_path).of(named)
        assert after != before, kind
        before = after


def test_one_file_for_two_options_is_one(tmp_path):
    (tmp_path / "in.png").write_bytes(b"a")
    cfg = dataclasses.replace(
        commandline.parse(sample.Config, []), init_image=str(tmp_path / "in.png"), mask=str(tmp_path / "in.png")
    )
    assert [len(held) for held in drawing.Marks(tmp_path / "out").of(cfg).values()] == [1]
