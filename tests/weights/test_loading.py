"""Loading is strict and names its faults; saving is atomic and readable. One test per row of the fault table."""

import json
import os
import stat
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from util import TINY, copy_model, error_line, run

from nanodiff import weights
from nanodiff.config import UserError
from nanodiff.models.clip import CLIPTextModel
from nanodiff.models.unet import UNet2DConditionModel
from nanodiff.models.vae import AutoencoderKL

UNET = "unet/diffusion_pytorch_model.safetensors"


def packed(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FAULTS = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS"),
    "html": (b"<!DOCTYPE html><html>404</html>", "HTML"),
    "zip pickle": (b"PK\x03\x04" + b"0" * 40, "pickle"),
    "old pickle": (b"\x80\x02}q\x00." + b"0" * 40, "pickle"),
    "length 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "not a safetensors file"),
    "length 100 MB + 1": (struct.pack("<Q", 100_000_001) + b"{}", "not a safetensors file"),
    "length over the file": (struct.pack("<Q", 500) + b"{}", "truncated"),
    "body cut": (packed({"a": F32}, b"1234"), "truncated"),
    "one byte too much": (packed({"a": F32}, b"123456789"), "over-long"),
    "overlap": (packed({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, b"0" * 12), "invalid offset"),
    "hole": (packed({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, b"0" * 20), "invalid offset"),
    "negative offset": (packed({"a": F32 | {"data_offsets": [-1, 7]}}, b"0" * 8), "JSON"),
    "unknown dtype": (packed({"a": F32 | {"dtype": "F33"}}, b"0" * 8), "JSON"),
    "metadata not text": (packed({"__metadata__": {"a": 1}, "a": F32}, b"0" * 8), "JSON"),
    "not JSON": (packed(b"{nonsense}"), "JSON"),
    "shape mismatch": (packed({"a": F32 | {"shape": [3]}}, b"0" * 8), "invalid"),
    "shape overflow": (packed({"a": F32 | {"shape": [2**40, 2**40]}}, b"0" * 8), "overflow|invalid"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_one_clear_line(tmp_path, name):
    data, says = FAULTS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=says) as e:
        weights.load_tensors(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        weights.load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        weights.load_tensors(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        weights.find_files(tmp_path / "unet")
    with pytest.raises(UserError, match="no weights"):
        weights.find_files(tmp_path)


def test_accepted_oddities(tmp_path):
    """NaN, 0-d, empty tensors and hostile names are data."""
    tensors = {"../../x": torch.tensor([float("nan")]), "zero-d": torch.tensor(1.0), "empty": torch.zeros(0, 3)}
    weights.save_tensors(tmp_path / "a.safetensors", tensors)
    got = weights.load_tensors(tmp_path / "a.safetensors")
    assert set(got) == set(tensors) and not (tmp_path.parent.parent / "x").exists()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_bytes_load_or_fail_clearly(tmp_path, data):
    whole = packed({"a": F32, "b": F32 | {"data_offsets": [8, 16]}}, bytes(16))
    position = data.draw(st.integers(0, len(whole) - 1))
    mutated = whole[:position] + bytes([data.draw(st.integers(0, 255))]) + whole[position + 1 :]
    cut = data.draw(st.integers(0, len(mutated)))
    path = tmp_path / "m.safetensors"
    path.write_bytes(mutated[:cut] if data.draw(st.booleans()) else mutated)
    try:
        weights.load_tensors(path)
    except UserError:
        return


# -- strict names -----------------------------------------------------------------------------------------------


def edited(tmp_path, edit):
    folder = copy_model("sd15", tmp_path / "m")
    state = weights.load_tensors(folder / UNET)
    edit(state)
    save_file(state, folder / UNET)
    return folder / "unet"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda s: s.pop("conv_in.weight"), "misses tensor conv_in.weight"),
        (
            lambda s: s.update({"conv_inn.weight": torch.zeros(1)}),
            "unknown tensor conv_inn.weight; did you mean conv_in.weight",
        ),
        (lambda s: s.update({"conv_in.weight": torch.zeros(3, 3)}), r"conv_in.weight has shape \[3, 3\]"),
        (lambda s: s.update({"\x1b[2J": torch.zeros(1)}), r"\\x1b\[2J"),
    ],
)
def test_names_are_strict(tmp_path, edit, says):
    with pytest.raises(UserError, match=says) as e:
        weights.load(UNet2DConditionModel, edited(tmp_path, edit))
    assert "\x1b" not in str(e.value)


def test_old_vae_names_and_1x1_convolutions(tmp_path):
    folder = copy_model("sd15", tmp_path / "m") / "vae"
    path = folder / "diffusion_pytorch_model.safetensors"
    state = weights.load_tensors(path)
    assert any(".query." in k for k in state), "the recording has the old names"
    want = weights.load(AutoencoderKL, folder).state_dict()
    state = {k: v[:, :, None, None] if ".query.weight" in k else v for k, v in state.items()}
    save_file(state, path)
    got = weights.load(AutoencoderKL, folder).state_dict()
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_text_encoder_without_prefix(tmp_path):
    folder = copy_model("sd15", tmp_path / "m") / "text_encoder"
    path = folder / "model.safetensors"
    state = weights.load_tensors(path)
    assert any("position_ids" in k for k in state)
    want = weights.load(CLIPTextModel, folder).state_dict()
    save_file({k.removeprefix("text_model."): v for k, v in state.items()}, path)
    got = weights.load(CLIPTextModel, folder).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_types(tmp_path):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = weights.load(UNet2DConditionModel, TINY / "sd15" / "unet", dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.dtype for p in weights.load(UNet2DConditionModel, TINY / "sd21-v" / "unet").parameters()} == {
        torch.float16
    }


def test_config_cannot_make_us_build_forever(tmp_path):
    folder = copy_model("sd15", tmp_path / "m") / "unet"
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"layers_per_block": 10**6}))
    with pytest.raises(UserError, match="layers_per_block"):
        weights.load(UNet2DConditionModel, folder)


# -- variants and shards ----------------------------------------------------------------------------------------


def sharded(tmp_path, change=lambda index, folder: None):
    folder = copy_model("sd15", tmp_path / "m") / "unet"
    single = folder / "diffusion_pytorch_model.safetensors"
    state = weights.load_tensors(single)
    single.unlink()
    keys = sorted(state)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for name, part in zip(names, parts, strict=True):
        save_file({k: state[k] for k in part}, folder / name)
    index = {"metadata": {}, "weight_map": {k: n for n, part in zip(names, parts, strict=True) for k in part}}
    change(index, folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards(tmp_path):
    got = weights.load(UNet2DConditionModel, sharded(tmp_path)).state_dict()
    want = weights.load(UNet2DConditionModel, TINY / "sd15" / "unet").state_dict()
    assert all(torch.equal(got[k], want[k]) for k in want)


def rename_all(to):
    return lambda index, folder: index["weight_map"].update(dict.fromkeys(index["weight_map"], to))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "", ".x.safetensors"]
)
def test_shard_names_are_plain(tmp_path, name):
    with pytest.raises(UserError, match="not a plain file name"):
        weights.find_files(sharded(tmp_path, rename_all(name)))


def test_shard_faults(tmp_path):
    with pytest.raises(UserError, match="missing"):
        weights.find_files(
            sharded(tmp_path / "1", lambda i, f: (f / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink())
        )
    with pytest.raises(UserError, match="ghost"):
        weights.find_files(
            sharded(tmp_path / "2", lambda i, f: i["weight_map"].update(ghost=next(iter(i["weight_map"].values()))))
        )
    with pytest.raises(UserError, match="the index says None"):
        weights.find_files(sharded(tmp_path / "3", lambda i, f: i["weight_map"].pop("conv_in.weight")))
    with pytest.raises(UserError, match="weight_map"):
        weights.find_files(sharded(tmp_path / "4", lambda i, f: i.update(weight_map={})))


def test_variant_falls_back_with_a_line(tmp_path, capsys):
    folder = copy_model("sd15", tmp_path / "m") / "unet"
    assert weights.find_files(folder, "fp16")[0].name == "diffusion_pytorch_model.safetensors"
    assert "no fp16 files" in capsys.readouterr().err
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(
        (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert weights.find_files(folder, "fp16")[0].name == "diffusion_pytorch_model.fp16.safetensors"
    assert capsys.readouterr().err == ""


# -- pickles ----------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "model.safetensors"])
def test_pickles_are_refused_and_never_run(tmp_path, name):
    marker = tmp_path / "ran"
    torch.save({"a": Evil(marker)}, tmp_path / name)
    with pytest.raises(UserError):
        weights.load_tensors(tmp_path / name)
    done = run("-m", "nanodiff.weights", "convert", tmp_path / name, tmp_path / "out.safetensors", "--allow-pickle")
    assert done.returncode == 2 and not marker.exists() and not (tmp_path / "out.safetensors").exists()


def test_pickle_beside_nothing_else_names_the_way(tmp_path):
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="--allow-pickle"):
        weights.find_files(tmp_path)


def test_a_header_may_be_as_long_as_a_page_begins(tmp_path):
    """Its length, 0x3C20 bytes, is written as " <", and is no HTML."""
    path = tmp_path / "x.safetensors"
    for n in range(9000):
        weights.save_tensors(path, {"x": torch.zeros(1)}, {"note": "y" * (15200 + n % 400)})
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        if length == 0x3C20:
            break
    assert path.read_bytes()[:2] == b" <" and torch.equal(weights.load_tensors(path)["x"], torch.zeros(1))


def test_a_model_in_place_of_a_sharded_one_is_the_one_that_is_loaded(tmp_path):
    folder = copy_model("sd15", tmp_path / "m") / "unet"
    path = folder / "diffusion_pytorch_model.safetensors"
    names = sorted(weights.load_tensors(path))
    parts = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": names[:100],
        "diffusion_pytorch_model-00002-of-00002.safetensors": names[100:],
    }
    tensors = weights.load_tensors(path)
    for part, some in parts.items():
        weights.save_tensors(folder / part, {k: tensors[k] for k in some})
    index = {"metadata": {}, "weight_map": {k: part for part, some in parts.items() for k in some}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()
    net = weights.load(UNet2DConditionModel, folder, torch.float32)
    with torch.no_grad():
        net.conv_in.weight.add_(1)
    weights.save(net, folder)
    assert torch.equal(weights.load(UNet2DConditionModel, folder, torch.float32).conv_in.weight, net.conv_in.weight)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_what_has_no_numbers_is_not_written(tmp_path):
    for tensor, says in (
        (torch.empty(2, device="meta"), r"without numbers \(meta\)"),
        (torch.eye(3).to_sparse(), "sparse_coo"),
    ):
        with pytest.raises(UserError, match=says):
            weights.save_tensors(tmp_path / "x.safetensors", {"x": tensor})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        weights.save_tensors(tmp_path / "file" / "x.safetensors", {"x": torch.zeros(1)})


def test_convert_needs_the_flag(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(3), "epoch": 3}}, tmp_path / "m.ckpt")
    argv = ("-m", "nanodiff.weights", "convert", tmp_path / "m.ckpt", tmp_path / "m.safetensors")
    assert "--allow-pickle" in error_line(run(*argv))
    assert run(*argv, "--allow-pickle").returncode == 0
    assert torch.equal(weights.load_tensors(tmp_path / "m.safetensors")["a"], torch.ones(3))


def test_torn_pickle(tmp_path):
    torch.save({"a": torch.ones(300)}, tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "m.pt").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not readable"):
            weights.load_pickle(tmp_path / "m.pt")


# -- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_mode_follows_the_umask(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        weights.save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode


def test_saving_over_a_mapped_file_leaves_the_mapping_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.save_tensors(path, {"a": torch.full((1000,), 7.0)})
    mapped = weights.open_file(path).get_tensor("a")
    weights.save_tensors(path, {"a": torch.zeros(1000)})
    assert (mapped == 7).all() and (weights.load_tensors(path)["a"] == 0).all()


def test_links_stay_links_and_folders_stay_folders(tmp_path):
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    weights.save_tensors(real, {"a": torch.ones(1)})
    link.symlink_to(real)
    weights.save_tensors(link, {"a": torch.zeros(1)})
    assert link.is_symlink() and weights.load_tensors(real)["a"] == 0
    with pytest.raises(UserError, match="not a regular file"):
        weights.save_tensors(tmp_path, {"a": torch.ones(1)})


def test_full_disk_keeps_the_old_file(tmp_path):
    code = (
        "import resource, sys, torch; sys.path.insert(0, '.');"
        "from nanodiff import weights; from nanodiff.config import UserError;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);\n"
        "try: weights.save_tensors(sys.argv[1], {'a': torch.zeros(9999)})\n"
        "except UserError as e: print('said', e)"
    )
    path = tmp_path / "a.safetensors"
    weights.save_tensors(path, {"a": torch.ones(3)})
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    assert "said" in done.stdout, done.stderr
    assert torch.equal(weights.load_tensors(path)["a"], torch.ones(3)) and os.listdir(tmp_path) == ["a.safetensors"]


def test_save_and_load_a_component(tmp_path):
    model = weights.load(UNet2DConditionModel, TINY / "sd15" / "unet")
    weights.save(model, tmp_path / "unet")
    again = weights.load(UNet2DConditionModel, tmp_path / "unet")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert again.cfg == model.cfg


def test_inspect_tool():
    done = run("-m", "nanodiff.weights", "inspect", TINY / "sd15" / UNET)
    assert done.returncode == 0 and "conv_in.weight [16, 4, 3, 3]" in done.stdout


def test_files_are_those_of_the_reference_writer(tmp_path):
    """Byte for byte, for every type, layout and an empty tensor; without a copy of the file in memory."""
    from safetensors.torch import save

    made = {
        "b/é": torch.randn(3, 4), "a": torch.randn(5).half(), "z": torch.tensor(3.0), "i": torch.arange(6).view(2, 3),
        "i32": torch.arange(3, dtype=torch.int32), "u": torch.arange(7, dtype=torch.uint8), "yes": torch.tensor([True, False]),
        "bf": torch.randn(2, 2).bfloat16(), "empty": torch.empty(0, 3), "d": torch.randn(3).double(), "t": torch.randn(4, 6).t(),
        "cl": torch.randn(2, 3, 1, 1).to(memory_format=torch.channels_last),
    }  # fmt: skip
    weights.save_tensors(tmp_path / "x.safetensors", made)
    want = save({k: v.contiguous() for k, v in made.items()}, {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == want
    with pytest.raises(UserError, match=r"x: tensors of torch\.complex64 are not written"):
        weights.save_tensors(tmp_path / "y.safetensors", {"x": torch.zeros(2, dtype=torch.complex64)})
