"""Commands that would replace what somebody has, or mean two things: one line, and nothing is lost."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from util import TINY, in_process

import caption
import distill
import eval as judge
import sample
import train
from nanodiff.commandline import check_bounds, parse
from nanodiff.config import ASSETS, UserError
from nanodiff.output import images
from nanodiff.stories import inputs, sampling, wording

CLASSES = {
    c
    for m in (caption, distill, sample, train, judge)
    for c in vars(m).values()
    if isinstance(c, type) and dataclasses.is_dataclass(c)
}
SAMPLE = ("--steps", 1, "--seed", 0, "--prompt", "apple")


def pixels(path):
    return np.asarray(Image.open(path))


def draw(*argv):
    return in_process(sample, "sample.py", *SAMPLE, *argv)


def tables_of(root, names=("titles",), count=12):
    (root / "images").mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (20 * i, 9, 9)).save(root / "images" / f"{i}.png")
    for name in names:
        (root / f"{name}.csv").write_text("Image_Name,Title\n" + "".join(f"{i},a {i}\n" for i in range(count)))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("--original-csv", "{}/train.csv", "--output-dir", "{}"), "would replace what --original-csv names"),
        (("--original-csv", "{}/titles.csv", "--val-csv-path", "{}/titles.csv", "--output-dir", "{}/out"), "the val part would replace what --original-csv names"),
        (("--original-csv", "{}/titles.csv", "--val-csv-path", "{0}/x.csv", "--test-csv-path", "{}/x.csv", "--output-dir", "{}/out"), "the test part would replace the val part"),
    ],
)  # fmt: skip
def test_a_split_replaces_no_table_that_it_reads(tmp_path, argv, line):
    tables_of(tmp_path, ("titles", "train"))
    before = (tmp_path / "train.csv").read_bytes(), (tmp_path / "titles.csv").read_bytes()
    code, _, err = in_process(caption, "caption.py", "split", *(str(a).format(tmp_path) for a in argv))
    assert code == 2 and line in err, err
    assert before == ((tmp_path / "train.csv").read_bytes(), (tmp_path / "titles.csv").read_bytes())


def test_another_split_in_the_same_folder_is_said(tmp_path):
    tables_of(tmp_path)
    split = ("split", "--original-csv", tmp_path / "titles.csv", "--output-dir", tmp_path / "out")
    assert in_process(caption, "caption.py", *split)[0] == 0
    code, _, err = in_process(caption, "caption.py", *split)
    assert code == 0 and "replaces another split" not in err
    code, _, err = in_process(caption, "caption.py", *split, "--seed", 7)
    assert code == 0 and "train.csv: replaces another split" in err, err


def test_a_sheet_replaces_nothing_that_is_read_or_written_besides(tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64), (1, 2, 3)).save(photo)
    kept = photo.read_bytes()
    out = ("--output-dir", tmp_path / "out")
    for argv, line in (
        (("--output", photo, "--init-image", photo), "is what --init-image reads"),
        (("--output", tmp_path / "out" / "00000.png"), "is a name of the run's own files"),
        (("--output", tmp_path / "out" / "run.json"), "is a name of the run's own files"),
    ):
        code, _, err = draw(*out, *argv)
        assert code == 2 and line in err, err
    assert photo.read_bytes() == kept
    code, _, err = draw(*out, "--output", photo)
    assert code == 0 and "photo.png: replaces what was there" in err, err


def test_a_study_beside_other_pictures(tmp_path):
    """The run before keeps its record, and what --overwrite may replace is said."""
    out = ("--output-dir", tmp_path)
    assert draw(*out, "--num-images", 2)[0] == 0
    first = (tmp_path / "run.json").read_bytes()
    assert draw(*out, "--study", "steps=1,2")[0] == 0
    assert (tmp_path / "run-1.json").read_bytes() == first
    assert sorted(p.name for p in tmp_path.glob("0*.png")) == [f"{i:05d}.png" for i in range(4)]
    assert draw(*out, "--study", "steps=1,2")[0] == 0
    assert not (tmp_path / "run-2.json").exists()  # the study's own record is written anew
    code, _, err = draw(*out, "--overwrite")
    assert code == 0 and "2 pictures of the run before are deleted" in err, err
    assert "2 pictures of earlier runs stay, but for those whose numbers are drawn again" in err, err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("--study", ""), "--study is empty"),
        (("--output-dir", "", "--prompt", "a"), "--output-dir is empty"),
        (("--prompts-file", "{}/empty.txt"), "empty.txt: has no prompts"),
        (("--prompts-file", "{}/some.jsonl"), "some.jsonl: is no text with a prompt a line"),
        (("--prompts-file", "{}/bare.csv"), "bare.csv: its first line names no column prompt"),
        (("--prompt", "a", "--model", ""), "--model is given an empty name"),
        (("--prompt", "a", "--lora", ""), "--lora is given an empty name"),
        (
            ("--prompt", "a", "--model", TINY / "sd15", "--revision", "fp16"),
            "--revision fp16: is of a repository on the Hub",
        ),
        (("--prompts-file", "{}/nul.txt"), "nul.txt: 'a\\x00b' is no text"),
    ],
)
def test_what_is_empty_is_named(tmp_path, argv, line):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "nul.txt").write_text("a\0b\n")
    (tmp_path / "bare.csv").write_text("a cat,ink\na dog,oil\n")
    code, _, err = in_process(
        sample, "sample.py", "--output-dir", tmp_path / "o", *(str(a).format(tmp_path) for a in argv)
    )
    assert code == 2 and line in err, err


def test_numbers_of_every_option_are_numbers():
    """None of the scripts' options takes NaN, infinity, or an integer of 400 digits."""
    tried = 0
    for cls in CLASSES:
        for field in dataclasses.fields(cls):
            kind = str(field.type)
            if field.metadata.get("high") == float("inf"):  # infinity means something there
                continue
            for value in (
                (float("nan"), float("inf"), -float("inf"))
                if "float" in kind
                else (10**400, -(10**400))
                if "int" in kind
                else ()
            ):
                if "list" in kind:
                    value = [value]
                cfg = cls()
                setattr(cfg, field.name, value)
                tried += 1
                with pytest.raises(UserError, match=f"--{field.name.replace('_', '-')} "):
                    check_bounds(cfg)
    assert tried > 500


def test_a_captioner_chosen_by_what_it_learned_is_said(tmp_path):
    tables_of(tmp_path, ("train", "val"))
    argv = ("train", "--model-size", "tiny", "--image-path", tmp_path / "images", "--train-csv-path", tmp_path / "train.csv", "--val-csv-path",
            tmp_path / "val.csv", "--max-steps", 1, "--batch-size", 2, "--output-dir", tmp_path / "cap", "--samples", 0)  # fmt: skip
    code, _, err = in_process(caption, "caption.py", *argv)
    assert code == 0 and "12 of 12 validation pictures are also learned from" in err, err
    told = (
        "infer",
        "--model-file",
        tmp_path / "cap" / "checkpoints" / "best_model",
        "--output-dir",
        tmp_path / "told",
        "--max-new-tokens",
        2,
    )
    assert in_process(caption, "caption.py", *told, "--infer-image-path", tmp_path / "images")[0] == 0
    code, _, err = in_process(caption, "caption.py", *told, "--infer-image-path", tmp_path / "images" / "3.png")
    assert code == 0 and "captions.csv: replaces an earlier run's captions" in err, err


def test_generations_keep_what_the_next_one_learned_from(tmp_path):
    """A study with more pictures is refused before it draws any, so that the one that was there goes on."""

    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({str(i): [f"a {i}"] for i in range(8)}))
    common = ("recursive", "--model", TINY / "sd15", "--captions", captions, "--data-root", tmp_path / "d", "--models-root", tmp_path / "m",
              "--output-dir", tmp_path / "o", "--steps", 1, "--max-steps", 1, "--no-evaluate", "--scheduler", "ddim", "--batch-size", 2, "--resolution", 32)  # fmt: skip
    few = ("--num-images", 2, "--gen0-images", 2, "--target-gen", 1)
    code, _, err = in_process(distill, "distill.py", *common, *few)
    assert code == 0, err
    there = sorted(p.relative_to(tmp_path).as_posix() for p in (tmp_path / "d").rglob("*.jpg"))
    code, _, err = in_process(distill, "distill.py", *common, "--num-images", 3, "--gen0-images", 3, "--target-gen", 2)
    assert code == 2 and "holds 2 pictures, 3 are asked for, and" in err, err
    assert sorted(p.relative_to(tmp_path).as_posix() for p in (tmp_path / "d").rglob("*.jpg")) == there
    assert in_process(distill, "distill.py", *common, *few)[0] == 0
    for value in ("nan", "inf", "-5", "1e300"):
        assert "--cfg-scale" in in_process(distill, "distill.py", *common, *few, "--cfg-scale", value)[2]


def test_pictures_whose_exif_pillow_cannot_write(tmp_path):
    """They are turned as it says, without writing it."""
    flat = np.zeros((4, 6, 3), np.uint8)
    flat[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x0100] = 7  # ImageWidth, an integer
    Image.fromarray(flat).save(tmp_path / "a.jpg", exif=exif, quality=95)
    data = bytearray((tmp_path / "a.jpg").read_bytes())
    at = data.index(b"Exif\0\0") + 6
    order = "little" if data[at : at + 2] == b"II" else "big"
    count = int.from_bytes(data[at + 8 : at + 10], order)
    for i in range(count):  # the width becomes an ASCII text
        entry = at + 10 + 12 * i
        if int.from_bytes(data[entry : entry + 2], order) == 0x0100:
            data[entry + 2 : entry + 4] = (2).to_bytes(2, order)
            data[entry + 4 : entry + 8] = (4).to_bytes(4, order)
            data[entry + 8 : entry + 12] = b"abc\0"
    (tmp_path / "b.jpg").write_bytes(data)
    for name in "ab":
        found = images.open_image(tmp_path / f"{name}.jpg")
        assert found.size == (4, 6) and found.getpixel((0, 0))[0] > 200 and found.getpixel((0, 5))[0] < 60


@pytest.mark.parametrize(("bits", "inverted"), [(16, False), (16, True), (12, False)])
def test_grey_tiffs_of_many_bits(tmp_path, bits, inverted):
    values = np.linspace(0, (1 << bits) - 1, 64).astype(np.uint16).reshape(8, 8)
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(values, bits, 0 if inverted else 1))
    want = np.rint(values * (255 / ((1 << bits) - 1)))
    got = np.asarray(images.open_image(path))[..., 0]
    assert np.abs(got - (255 - want if inverted else want)).max() <= 1


def test_grey_tiffs_of_32_bits_have_no_known_range(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(np.arange(64, dtype=np.uint32).reshape(8, 8), 32, 1))
    with pytest.raises(UserError, match="32 bits a pixel, whose range nobody knows"):
        images.open_image(path)


def tiff(values, bits, photometric):
    """Bytes of an uncompressed grey TIFF in one strip (TIFF 6.0; 12 bits are packed, most significant first)."""
    if bits == 12:
        text = "".join(f"{v:012b}" for v in values.ravel().tolist())
        data = int(text, 2).to_bytes(len(text) // 8, "big")
    else:
        data = values.astype(f"<u{bits // 8}").tobytes()
    tags = [
        (256, 8),
        (257, 8),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8 + 2 + 12 * 9 + 4),
        (277, 1),
        (278, 8),
        (279, len(data)),
    ]
    head = b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little")
    entries = b"".join(
        t.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + v.to_bytes(4, "little")
        for t, v in tags
    )
    return head + entries + bytes(4) + data


def test_a_long_word_is_cut_to_its_label():
    font = images.ImageFont.load_default(10)
    pen = images.ImageDraw.Draw(Image.new("RGB", (1, 1)))
    for width in (8, 64, 200):
        (row,) = images._wrapped("x" * 3000, width, font)
        assert pen.textlength(row, font) <= max(width, pen.textlength("x", font)) < pen.textlength(row + "xx", font) + 8


def test_training_among_its_pictures_is_said(tmp_path):
    tables_of(tmp_path / "p")
    argv = (
        "vae",
        "--preset",
        "tiny",
        "--max-steps",
        1,
        "--data",
        tmp_path / "p",
        "--no-perceptual",
        "--output-dir",
        tmp_path / "p" / "run",
    )
    code, _, err = in_process(train, "train.py", *argv)
    assert (
        code == 0 and "warning: --output-dir" in err and "so the next run would count its figures as pictures" in err
    ), err


# -- sample.py ----------------------------------------------------------------------------------------------


def test_loras_of_one_name(tmp_path, capsys):
    folder = tmp_path / "loras"
    (folder / "sub").mkdir(parents=True)
    (folder / "other").mkdir()
    for path in ("k", "sub/k", "sub/p", "other/p"):
        (folder / f"{path}.safetensors").write_bytes(b"")
    tagged = wording.Tagged(folder)
    assert (
        tagged._file("k") == folder / "k.safetensors"
        and f"not {folder / 'sub' / 'k.safetensors'}" in capsys.readouterr().err
    )
    assert tagged._file("sub/p") == folder / "sub" / "p.safetensors"
    with pytest.raises(UserError, match=r"<lora:p> could be .*other/p.* or .*sub/p.*; name its folder"):
        tagged._file("p")


def test_an_embedding_that_no_file_gives(tmp_path):
    code, _, err = draw(
        "--model",
        TINY / "sd15",
        "--output-dir",
        tmp_path,
        "--prompt-syntax",
        "comfyui",
        "--prompt",
        "a embedding:nosuch apple",
    )
    assert code == 2 and "embedding:nosuch in a prompt: no --embedding teaches this word" in err, err


@pytest.mark.parametrize("kind", ["black", "hole", "sixteen bits", "label"])
def test_a_mask_that_marks_nothing(tmp_path, kind):
    rng = np.random.default_rng(0)
    Image.fromarray((rng.random((64, 64, 3)) * 255).astype("uint8")).save(tmp_path / "in.png")
    if kind == "hole":
        mask = np.zeros((64, 64, 4), "uint8")
        mask[..., 3] = 255
        mask[16:32, 16:32, 3] = 0
    else:
        mask = np.zeros((64, 64), "uint16" if kind == "sixteen bits" else "uint8")
        mask[16:32, 16:32] = {"black": 0, "sixteen bits": 255, "label": 1}[kind]
    Image.fromarray(mask).save(tmp_path / "mask.png")
    code, _, err = draw("--model", TINY / "sd15", "--output-dir", tmp_path / "o", "--init-image", tmp_path / "in.png", "--mask", tmp_path / "mask.png",
                        "--strength", 0.7, "--steps", 3)  # fmt: skip
    assert code == 2 and "mask.png: marks nothing to repaint" in err, err


@pytest.mark.parametrize("more", [("--mask-blur", 20), ()], ids=["blurred", "one pixel"])
def test_a_mask_that_vanishes_on_its_way(tmp_path, more):
    """Softened, or among the latents, nothing is left of it: that is said, and not drawn in silence."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    mask = np.zeros((64, 64), "uint8")
    mask[31 : 34 if more else 32, 31:34] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    argv = (
        "--model",
        TINY / "sd15",
        "--init-image",
        tmp_path / "in.png",
        "--mask",
        tmp_path / "mask.png",
        "--strength",
        0.7,
        "--steps",
        3,
    )
    code, _, err = draw(*argv, *more, "--output-dir", tmp_path / "o")
    assert code == 2 and "mask.png: marks nothing to repaint at " in err and "too small" in err, err


def test_overwriting_waits_for_what_can_be_known(tmp_path):
    assert draw("--output-dir", tmp_path)[0] == 0
    code, _, err = draw("--output-dir", tmp_path, "--overwrite", "--lora", "x.safetensors:nan")
    assert code == 2 and "'nan' is no scale" in err and (tmp_path / "00000.png").is_file(), err
    code, _, err = draw("--output-dir", tmp_path, "--overwrite", "--lora-scale", "nan")
    assert code == 2 and "--lora-scale" in err and (tmp_path / "00000.png").is_file(), err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("--height", 12), "--height 12 must be a positive multiple of 8"),
        (("--lora", "nosuch.safetensors:0.5"), "--lora nosuch.safetensors: no such file"),
        (("--init-image", "nosuch.png"), "--init-image nosuch.png: no such file"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path, argv, line):
    code, _, err = draw("--model", TINY / "sd15", "--output-dir", tmp_path, "--dry-run", *argv)
    assert code == 2 and line in err, err


def test_marks_of_embeddings_as_comfyui_reads_them():
    known = SimpleNamespace(tokenizers=[SimpleNamespace(words={"EasyNegative": [1], "ng": [2]})])
    cfg = SimpleNamespace(
        prompt_syntax="comfyui", prompt_2=None, prompt_3=None, negative_prompt_2=None, negative_prompt_3=None
    )
    for text in (
        "embedding:easynegative, x",
        "embedding:SD15/EasyNegative",
        r"embedding:SD15\EasyNegative.pt.",
        "(embedding:EasyNegative.safetensors:1.2)",
    ):
        wording.check_words(cfg, known, [text], None)
        assert "<easynegative>" in wording.EMBEDDING.sub(r"<\1>", text).lower()
        assert wording.EMBEDDING.findall(text)[0].casefold() == "easynegative"
    for text in ("embedding:EasyNegativeV2", "embedding:ng_deep"):
        with pytest.raises(UserError, match="no --embedding teaches this word"):
            wording.check_words(cfg, known, [text], None)


def test_the_largest_sigma_may_be_infinity(tmp_path):
    code, _, err = draw("--output-dir", tmp_path, "--scheduler", "euler", "--s-churn", 1, "--s-tmax", "inf")
    assert code == 0, err


def test_flags_of_messages_are_flags(tmp_path):
    for argv, flag in (
        (("--s-churn", 1), "--s-churn is Euler's"),
        (("--perturbed-scale", 3), "--perturbed-scale is for UNets"),
    ):
        code, _, err = draw("--model", TINY / "sd35-medium", "--output-dir", tmp_path, *argv)
        assert code == 2 and flag in err, err


def test_a_transparent_map_is_shown_on_black(tmp_path):
    """White lines on nothing, as editors of poses write them, are no blank sheet."""
    lines = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    lines.paste((255, 255, 255, 255), (20, 0, 24, 64))
    lines.save(tmp_path / "clear.png")
    assert inputs.control_image(str(tmp_path / "clear.png"))[0].getpixel((0, 0)) == (0, 0, 0)
    assert inputs.control_image(str(tmp_path / "clear.png"))[0].getpixel((21, 9)) == (255, 255, 255)


def test_a_dry_run_plans_the_size_that_is_drawn(tmp_path):
    Image.new("RGB", (2048, 1025)).save(tmp_path / "wide.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    plan = lambda *argv: draw("--model", TINY / "sd15", "--steps", 2, "--output-dir", tmp_path, "--dry-run", *argv)  # noqa: E731
    code, picture, _ = plan("--init-image", tmp_path / "wide.png")
    assert code == 0 and picture == plan("--height", "1024", "--width", "2048")[1] != plan()[1]
    code, _, err = plan("--init-image", tmp_path / "wide.png", "--mask", tmp_path / "mask.png")
    assert code == 2 and "is 64x64, --init-image is 2048x1025" in err


def test_a_picture_that_is_squeezed_is_said_and_a_controlnet_keeps_its_size(tmp_path):
    size = lambda control, mask: inputs.canvas(  # noqa: E731
        SimpleNamespace(mask=mask, control=control, mask_padding=None, height=None, width=None),
        Image.new("RGB", (128, 96)),
        (64, 64),
        8,
        True,
    )
    assert size([], None) == (96, 128) and size([], "m") == (64, 64) and size(["c"], "m") == (96, 128)
    Image.new("RGB", (128, 96), "green").save(tmp_path / "wide.png")
    Image.new("L", (128, 96), 255).save(tmp_path / "mask.png")
    argv = ("--model", TINY / "sd15", "--steps", "2", "--seed", "1", "--init-image", tmp_path / "wide.png")
    _, _, err = draw(*argv, "--output-dir", tmp_path / "a", "--mask", tmp_path / "mask.png")
    assert "is 128x96, drawn as 128x128: its proportions change" in err
    _, _, err = draw(*argv, "--output-dir", tmp_path / "b")
    assert "proportions" not in err


def test_a_picture_from_a_picture_is_repeated(tmp_path):
    Image.new("RGB", (64, 64), "green").save(tmp_path / "in.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    argv = ("--init-image", tmp_path / "in.png", "--strength", "0.6", "--mask", tmp_path / "mask.png", "--mask-blur", 2)
    code, _, err = draw("--model", TINY / "sd15", "--steps", 4, "--seed", 1, *argv, "--output-dir", tmp_path / "a")
    assert code == 0, err
    first = tmp_path / "a" / "00000.png"
    code, _, err = in_process(sample, "sample.py", "--from-image", first, "--output-dir", tmp_path / "b")
    assert code == 0 and (tmp_path / "b" / "00000.png").read_bytes() == first.read_bytes(), err
    (tmp_path / "in.png").rename(tmp_path / "moved.png")
    code, _, err = in_process(sample, "sample.py", "--from-image", first, "--output-dir", tmp_path / "c")
    assert code == 2 and "name it with --init-image" in err
    named = ("--from-image", first, "--init-image", tmp_path / "moved.png", "--output-dir", tmp_path / "c")
    code, _, err = in_process(sample, "sample.py", *named)
    assert code == 0 and (pixels(tmp_path / "c" / "00000.png") == pixels(first)).all(), err


def test_a_turbo_takes_a_step_from_a_picture(tmp_path):
    """Its one step at our strength of 0.8 would be none; nobody said either number."""
    Image.new("RGB", (64, 64), "green").save(tmp_path / "in.png")

    def turbo(*argv):
        return in_process(sample, "sample.py", "--model", TINY / "sd-turbo", "--prompt", "a", "--seed", 1, *argv)

    code, out, err = turbo("--init-image", tmp_path / "in.png", "--output-dir", tmp_path / "a")
    assert code == 0 and "steps=2" in out, err
    code, _, err = turbo("--hires", "1.5", "--output-dir", tmp_path / "b")
    assert code == 0, err
    code, _, err = turbo("--steps", 1, "--init-image", tmp_path / "in.png", "--output-dir", tmp_path / "c")
    assert code == 2 and "leaves no step to take" in err


def test_parts_of_the_steps_that_hold_none_are_said(tmp_path):
    flow = ("--model", TINY / "sd35-medium", "--seed", 1, "--skip-layers", "0")
    _, _, err = draw(*flow, "--steps", 5, "--output-dir", tmp_path / "a")
    assert "skip-layer guidance from 0.01 to 0.2 of the steps: does nothing in 5 steps" in err
    _, _, err = draw(*flow, "--steps", 5, "--skip-layer-stop", "0.9", "--output-dir", tmp_path / "b")
    assert "does nothing" not in err
    code, _, err = draw(*flow, "--skip-layer-start", "0.3", "--output-dir", tmp_path / "c")
    assert code == 2 and "from 0.3 to 0.2 of the steps is no part of them" in err


def test_what_is_written_and_what_is_overwritten(tmp_path):
    """Names without a seed never write over this run's own; numbers go on after whatever has one; --overwrite takes all its run wrote."""
    argv = ("--model_id", str(TINY / "sd15"), "--prompt", "a", "--steps", "1", "--seed", "1", "--num-images", "3")
    for _ in range(2):
        code, _, err = in_process(sample, "sample.py", *argv, "--output_dir", tmp_path / "named", "--overwrite")
        assert code == 0 and len(list((tmp_path / "named").glob("*.png"))) == 3, err
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "00000.jpg").write_bytes(b"")
    (tmp_path / "ds" / "00000.txt").write_text("my own caption")
    tiny = ("--model", TINY / "sd15", "--steps", 1, "--seed", 1)
    code, _, err = draw(*tiny, "--txt", "--output-dir", tmp_path / "ds")
    assert code == 0 and (tmp_path / "ds" / "00000.txt").read_text() == "my own caption", err
    assert (tmp_path / "ds" / "00001.png").exists() and (tmp_path / "ds" / "00001.txt").exists()
    draw(*tiny, "--txt", "--save-latents", "--num-images", 2, "--output-dir", tmp_path / "o")
    draw(*tiny, "--overwrite", "--output-dir", tmp_path / "o")
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"00000.png", "run.json"}


def test_what_a_training_says_of_its_settings(tmp_path):
    """Options that do nothing to a model are refused wherever it is trained; a warm-up that the run does not outlast is said; --epochs wins over a
    preset's updates."""
    emoji = images_folder(tmp_path / "data")
    tiny = ("--model", TINY / "sd15", "--data", emoji, "--resolution", 64, "--sample-every", 0, "--max-steps", 2)
    run = lambda *argv: in_process(train, "train.py", "diffusion", *tiny, *argv)  # noqa: E731
    code, _, err = run("--lr", "1e-4", "--lr-min", "1e-2", "--output-dir", tmp_path / "a")
    assert code == 2 and "--lr-min 0.01 is above --lr 0.0001" in err
    code, out, err = run("--lr-warmup-steps", 100, "--output-dir", tmp_path / "b")
    assert code == 0 and "2 updates are no more than the warm-up's 100" in out + err, err
    code, out, err = run("--lr-warmup-steps", 1, "--output-dir", tmp_path / "c")
    assert code == 0 and "warm-up's" not in out + err
    study = ("--model", TINY / "sd15", "--captions", emoji, "--target-gen", 1, "--num-images", 2, "--steps", 1)
    for flags, says in (
        (("--timestep-sampling", "logit_normal"), "--timestep-sampling is for flows; this model predicts epsilon"),
        (("--snr-weighting",), "--snr-weighting is for --prediction-type sample"),
        (("--snr-clip", 5), "--snr-clip is for --snr-weighting"),
    ):
        where = ("--data-root", tmp_path / "d", "--models-root", tmp_path / "m", "--output-dir", tmp_path / "r")
        code, _, err = in_process(distill, "distill.py", "recursive", *study, *where, *flags)
        assert code == 2 and says in err and not (tmp_path / "d").exists(), err
    cfg = parse(train.DiffusionConfig, ["--preset", "tiny", "--epochs", "3"], presets=train.PRESETS["diffusion"])
    cfg.check_ranges()
    assert cfg.max_steps == 0 and cfg.epochs == 3


def images_folder(path, count=4):
    path.mkdir()
    for i in range(count):
        Image.new("RGB", (64, 64), (40 * i, 9, 9)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"number {i}")
    return path


def test_seeds_of_64_bits(tmp_path):
    """ComfyUI's are drawn from all of them."""
    most = (1 << 64) - 1
    code, _, err = draw("--model", TINY / "sd15", "--seed", most, "--output-dir", tmp_path / "a")
    assert code == 0 and images.read_record(tmp_path / "a" / "00000.png")["seed"] == most, err
    again = ("--from-image", tmp_path / "a" / "00000.png", "--output-dir", tmp_path / "b")
    code, _, err = in_process(sample, "sample.py", *again)
    assert code == 0 and (pixels(tmp_path / "a" / "00000.png") == pixels(tmp_path / "b" / "00000.png")).all(), err
    code, _, err = draw("--model", TINY / "sd15", "--seed", most + 1, "--output-dir", tmp_path / "c")
    assert code == 2 and "must be between 0 and 2^64 - 1" in err


def test_pictures_of_before_they_told_their_init_image(tmp_path):
    """An older record says only whether there was one, and nothing of a mask."""
    Image.new("RGB", (64, 64), "green").save(tmp_path / "in.png")
    assert draw("--model", TINY / "sd15", "--output-dir", tmp_path / "a")[0] == 0
    record = images.read_record(tmp_path / "a" / "00000.png")
    for was, argv, want in ((False, (), 0), (True, (), 2), (True, ("--init-image", tmp_path / "in.png"), 0)):
        images.save_png(Image.new("RGB", (64, 64)), tmp_path / "old.png", record | {"init_image": was, "mask": None})
        again = ("--from-image", tmp_path / "old.png", "--steps", 2, "--output-dir", tmp_path / "b")
        code, _, err = in_process(sample, "sample.py", *again, *argv)
        assert code == want, err
        assert ("does not tell whether there was a mask" in err) == (was and not want)
    assert "name it with --init-image" in in_process(sample, "sample.py", "--from-image", tmp_path / "old.png")[2]


def test_another_model_than_a_pictures_takes_not_its_revision(tmp_path):
    assert draw("--model", TINY / "sd15", "--output-dir", tmp_path / "a")[0] == 0
    record = images.read_record(tmp_path / "a" / "00000.png") | {
        "model": "org/name",
        "revision": "fp16",
        "variant": "fp16",
    }
    images.save_png(Image.new("RGB", (64, 64)), tmp_path / "other.png", record)
    again = ("--from-image", tmp_path / "other.png", "--output-dir", tmp_path / "b")
    code, _, err = in_process(sample, "sample.py", *again, "--model", TINY / "sd15")
    assert code == 0 and (pixels(tmp_path / "a" / "00000.png") == pixels(tmp_path / "b" / "00000.png")).all(), err


def test_a_strength_that_leaves_no_step_is_refused_at_once(tmp_path):
    Image.new("RGB", (64, 64), "green").save(tmp_path / "in.png")
    argv = (
        "--model",
        TINY / "sd15",
        "--prompt",
        "a",
        "--init-image",
        tmp_path / "in.png",
        "--strength",
        "1e-12",
        "--output-dir",
        tmp_path / "a",
    )
    code, _, err = in_process(sample, "sample.py", *argv)
    assert code == 2 and "--strength 1e-12" in err and "--steps" not in err.split("--strength")[0], err


def test_a_date_is_no_number(tmp_path):
    (tmp_path / "20240101.jpg").write_bytes(b"")
    assert draw("--model", TINY / "sd15", "--output-dir", tmp_path)[0] == 0
    assert (tmp_path / "00000.png").is_file()


def test_what_comes_with_the_program_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = draw("--model", "assets/nano", "--output-dir", tmp_path / "a")
    assert code == 0, err
    assert parse(distill.Transfer, []).prompt_source == str(ASSETS / "prompts" / "dogs.json")
    (tmp_path / "assets" / "prompts").mkdir(parents=True)
    (tmp_path / "assets" / "prompts" / "dogs.json").write_text("{}")
    assert parse(distill.Transfer, []).prompt_source == "assets/prompts/dogs.json"


def test_a_stage_refuses_what_it_needs_alone(tmp_path):
    """The teacher's pictures can be drawn before there is a student."""
    (tmp_path / "p.TXT").write_text("#1 dog\n# a comment\n")
    argv = ("--teacher", TINY / "sd15", "--model", tmp_path / "none-yet", "--prompt-source", tmp_path / "p.TXT", "--num-images", 2,
            "--steps", 1, "--method", "data", "--output-dir", tmp_path / "out")  # fmt: skip
    code, out, err = in_process(distill, "distill.py", "transfer", "generate", *argv)
    assert code == 0 and "teacher_images: 2" in out and "2 pictures of 1 different prompts" in err, err


def test_one_guidance_or_several():
    with pytest.raises(UserError, match="--cfg-scale is one study's guidance"):
        parse(distill.Recursive, ["--cfg-scale", "5", "--cfg-scales", "1"]).check()


def test_loras_in_linked_folders_and_in_capitals(tmp_path):
    from nanodiff import files

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "loras" / "deep").mkdir(parents=True)
    (tmp_path / "loras" / "styles").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "loras")
    for path in ("elsewhere/ink.safetensors", "loras/deep/UP.SAFETENSORS", "loras/deep/no.txt"):
        (tmp_path / path).write_bytes(b"")
    found = sorted(
        p.relative_to(tmp_path / "loras").as_posix() for p in files.inside(tmp_path / "loras", ".safetensors")
    )
    assert found == ["deep/UP.SAFETENSORS", "styles/ink.safetensors"]
    assert wording.Tagged(tmp_path / "loras")._file("UP").name == "UP.SAFETENSORS"
    assert wording.Tagged(tmp_path / "loras")._file("ink").name == "ink.safetensors"


def test_folders_of_loras_under_their_own_names_and_linked_ones(tmp_path):
    from nanodiff import files

    (tmp_path / "l" / "zreal").mkdir(parents=True)
    (tmp_path / "l" / "zreal" / "ink.safetensors").write_bytes(b"")
    for i in range(5):
        (tmp_path / "l" / f"a{i}").symlink_to(tmp_path / "l" / "zreal")
    (tmp_path / "l" / "b").mkdir()
    (tmp_path / "l" / "b" / "up").symlink_to(tmp_path / "l")
    (tmp_path / "l" / "zreal" / "b").symlink_to(tmp_path / "l" / "b")
    found = sorted(p.relative_to(tmp_path / "l").as_posix() for p in files.inside(tmp_path / "l", ".safetensors"))
    assert found == [*(f"a{i}/ink.safetensors" for i in range(5)), "zreal/ink.safetensors"]
    tagged = wording.Tagged(tmp_path / "l")
    assert tagged._file("zreal/ink") == tmp_path / "l" / "zreal" / "ink.safetensors"
    assert tagged._file("a3/ink").resolve() == tagged._file("ink").resolve(), "a file and links to it are one"
    assert list(files.inside(tmp_path / "none")) == []


def test_what_is_read_may_have_come_with_the_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = parse(
        train.DiffusionConfig,
        [
            "--text-encoder",
            "assets/nano",
            "--model-config",
            "assets/nano/half.json",
            "--data",
            "assets/emoji/emoji.tar",
        ],
    )
    assert {cfg.text_encoder, cfg.model_config, cfg.data} == {
        str(ASSETS / n) for n in ("nano", "nano/half.json", "emoji/emoji.tar")
    }
    assert parse(sample.Config, ["--init-image", "assets/demo.png"]).init_image == str(ASSETS / "demo.png")
    (tmp_path / "B" / "assets" / "nano").mkdir(parents=True)
    cfg = parse(sample.Config, ["--base-dir", "B", "--study", "model=assets/nano", "--prompt", "a"])
    assert [v.model for v in sampling.parsed(cfg)[2]] == ["B/assets/nano"]
    cfg = parse(sample.Config, ["--study", "model=assets/nano", "--prompt", "a"])
    assert [v.model for v in sampling.parsed(cfg)[2]] == [str(ASSETS / "nano")]


def test_marks_of_dynamic_prompts_are_plain_text_for_comfyui():
    cfg = parse(sample.Config, ["--prompt-syntax", "comfyui", "--prompt", "a {@home}", "--prompt-2", "b {@home}"])
    made = wording.job(cfg, "a {@home}", None, 1)
    assert made.text == "a {@home}".replace("{@home}", "@home") and dict(made.others)["prompt_2"] == "b @home"
