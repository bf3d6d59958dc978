"""Offloading changes where weights are, never the picture; the prediction agrees with what a run really takes."""

from pathlib import Path

import pytest
import torch
from util import TINY, max_error, run

from nanodiff import pipeline, weights
from nanodiff.device import int8, memory, quantize
from nanodiff.models.unet import UNet2DConditionModel
from nanodiff.pipeline import conditions
from nanodiff.weights import original_names

NAMES = ["sd15", "sdxl", "sd35-medium"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_picture(name, offload, dtype):
    here, away = (pipeline.load(TINY / name, dtype, offload=o) for o in ("none", offload))
    options = {"steps": 2, "seeds": [0], "guidance_scale": 3.0, "image": torch.zeros(1, 3, 128, 128), "strength": 0.9}
    a, b = (sd.generate(["a cat"], **options) for sd in (here, away))
    assert away.dtype == dtype and max_error(b.latents, a.latents) < (1e-5 if dtype == torch.float32 else 0.05)
    assert max_error(b.pixels, a.pixels) < (1e-5 if dtype == torch.float32 else 0.1)


def addresses(module):
    return {k: t.data_ptr() for k, t in module.state_dict().items()}


def test_weights_come_and_go():
    sd = pipeline.load(TINY / "sd21-v", offload="model")  # stored in fp16, computed in fp32
    home = {n: addresses(m) for n, m in sd.models().items()}
    seen = []
    hook = sd.net.conv_in.register_forward_hook(
        lambda m, a, o: seen.append(
            (m.weight.dtype, next(sd.text_encoder.parameters()).dtype, next(sd.vae.parameters()).dtype)
        )
    )
    sd.generate(["a cat"], steps=2, seeds=[0])
    hook.remove()
    assert set(seen) == {(torch.float32, torch.float16, torch.float16)}, "only the denoiser is at work"
    assert {n: addresses(m) for n, m in sd.models().items()} == home, "all are at home again"


def test_one_block_at_a_time():
    sd = pipeline.load(TINY / "sd21-v", offload="sequential")
    blocks = [m for m in sd.net.modules() if type(m).__name__ in memory.BLOCKS]
    away, most = set(), 0

    def come(m, args):
        nonlocal most
        away.add(id(m))
        most = max(most, sum(next(b.parameters()).dtype == torch.float32 for b in blocks))

    hooks = [b.register_forward_pre_hook(come) for b in blocks]
    sd.generate(["a cat"], steps=1, seeds=[0])
    for hook in hooks:
        hook.remove()
    assert len(away) == len(blocks) and most == 1 and not memory.whole(sd.net)


def test_an_error_brings_them_home():
    sd = pipeline.load(TINY / "sd21-v", offload="model")
    with pytest.raises(ZeroDivisionError), memory.at_work(sd.net):
        assert next(sd.net.parameters()).dtype == torch.float32
        raise ZeroDivisionError
    assert next(sd.net.parameters()).dtype == torch.float16


def test_at_work_in_another_type():
    """The VAE's second try in fp32, also when its home is fp16."""
    for sd in (
        pipeline.load(TINY / "sd15", torch.bfloat16),
        pipeline.load(TINY / "sd15", torch.bfloat16, offload="model"),
    ):
        with memory.at_work(sd.vae, torch.float32):
            assert next(sd.vae.parameters()).dtype == torch.float32
        assert memory.dtype_of(sd.vae) == torch.bfloat16


def test_the_text_encoders_work_once_for_all_prompts():
    sd = pipeline.load(TINY / "sdxl", offload="model")
    calls = []
    hook = sd.encoders[1].register_forward_hook(lambda *a: calls.append(1))
    sd.prepare(["a cat", "a dog"], "blurry")
    for text in ("a cat", "a dog"):
        sd.generate([text], "blurry", steps=1, seeds=[0], guidance_scale=3.0)
    hook.remove()
    assert len(calls) == 2, "prompts, negative prompt; nothing while sampling"


def test_kept_prompts_are_bounded(monkeypatch):
    sd = pipeline.load(TINY / "sd15")
    monkeypatch.setattr(conditions, "CACHE_BYTES", 3 * 77 * 32 * 4)
    first = sd.encode([f"prompt {i}" for i in range(10)]).states
    assert len(sd.kept) <= 3
    assert max_error(sd.encode([f"prompt {i}" for i in range(10)]).states, first) < 1e-6


# -- prediction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_predicted_activations_are_the_real_ones(name):
    """The same follower on real tensors: what meta predicts is what is allocated."""
    sd = pipeline.load(TINY / name)
    stages = {
        s.name: s
        for s in pipeline.plan(pipeline.source(TINY / name), torch.float32, None, None, 2, True, None, True, 256, False)
    }
    latents = torch.randn(2, sd.net.cfg.in_channels, *(s // sd.downscale for s in sd.size))
    real = memory.activations(sd.vae, lambda: sd.vae.decode(latents.clone()))
    assert stages["vae"].activations == pytest.approx(real, rel=0.02)
    assert stages["vae"].weights == sum(p.numel() * 4 for p in sd.vae.parameters())
    assert {n: s.parameters for n, s in stages.items()} == {n: memory.count(m) for n, m in sd.models().items()}


def test_quantized_and_offloaded_sizes():
    src = pipeline.source(TINY / "sd35-medium")
    plan = lambda kind: pipeline.plan(src, torch.bfloat16, None, None, 1, True, kind, True, 256, False)  # noqa: E731
    plain, int8, nf4 = ({s.name: s for s in plan(kind)} for kind in (None, "int8", "nf4"))
    assert nf4["transformer"].weights < int8["transformer"].weights < plain["transformer"].weights
    assert int8["text_encoder_3"].weights < plain["text_encoder_3"].weights
    assert nf4["vae"] == plain["vae"]
    peaks = memory.peaks(plan(None))
    assert peaks["sequential"] <= peaks["model"] < peaks["none"]
    sd = pipeline.load(TINY / "sd35-medium", torch.bfloat16, quantized="nf4")
    real = sum(t.numel() * t.element_size() for t in [*sd.net.parameters(), *sd.net.buffers()])
    assert nf4["transformer"].weights == pytest.approx(real, rel=0.01)


def test_convolutions_in_8_bits_are_counted(monkeypatch):
    """On a CPU that multiplies 8 bits int8 holds convolutions, too, and there alone."""
    monkeypatch.setattr(int8, "LEAST", 0)
    src = pipeline.source(TINY / "sd15")
    counted = {}
    for device, can in (("cuda", True), ("cpu", False), ("cpu", True)):
        monkeypatch.setattr(int8, "usable", lambda can=can: can)
        plan = pipeline.plan(src, torch.bfloat16, None, None, 1, True, "int8", True, 256, False, device=device)
        counted[device, can] = next(s.weights for s in plan if s.name == "unet")
    assert counted["cuda", True] == counted["cpu", False] > counted["cpu", True]
    net = pipeline.load(TINY / "sd15").net
    saved = sum(
        layer.weight.numel() - 4 * layer.weight.shape[0]
        for layer, _ in quantize.after_norm(net)
        if layer.weight.dim() == 4
    )
    assert counted["cpu", False] - counted["cpu", True] == saved, "two bytes a weight were one, and four a channel"


PUBLISHED = {  # millions of parameters, as their makers give them
    "stable-diffusion-v1-5": ("unet", 859.5),
    "stable-diffusion-2-1": ("unet", 865.9),
    "sd-turbo": ("unet", 865.9),
    "stable-diffusion-xl-base-1.0": ("unet", 2567.5),
    "sdxl-turbo": ("unet", 2567.5),
    "stable-diffusion-3.5-medium": ("transformer", 2243.2),
    "stable-diffusion-3.5-large-turbo": ("transformer", 8056.6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_dry_run_of_the_released_models(name):
    """S3-01: all of them by their short names, in seconds, without a file."""
    part, millions = PUBLISHED[name]
    done = run("sample.py", "--model", name, "--dry-run", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith(part))
    assert float(row.split()[1]) == pytest.approx(millions, abs=0.1)
    assert "--offload model" in done.stdout


def peak_of(stdout, mode):
    return float(next(line for line in stdout.splitlines() if f"--offload {mode}:" in line).split()[4])


def test_what_fits_where():
    """SDXL in 8 GB with offloading; SD 3.5 large-turbo in 16 GB with nf4."""
    done = run(
        "sample.py", "--model", "stable-diffusion-xl-base-1.0", "--dry-run", "--dtype", "bf16", "--offload", "model"
    )
    assert peak_of(done.stdout, "model") < 8 and "*" in done.stdout
    done = run(
        "sample.py", "--model", "stable-diffusion-3.5-large-turbo", "--dry-run", "--dtype", "bf16", "--quantize", "nf4"
    )
    assert peak_of(done.stdout, "none") < 16


def test_dry_run_needs_no_weights(tmp_path):
    import shutil

    shutil.copytree(TINY / "sdxl", tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    done = run("sample.py", "--model", tmp_path / "m", "--dry-run", "--vae-tiling", "--guidance-scale", "1")
    assert done.returncode == 0 and "text_encoder_2" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_on_a_gpu(name, offload):
    want = pipeline.load(TINY / name).generate(["a cat"], steps=3, seeds=[1], guidance_scale=3.0).latents
    sd = pipeline.load(TINY / name, torch.float32, "cuda", offload=offload)
    for _ in range(2):  # the second time with prefetched blocks
        got = sd.generate(["a cat"], steps=3, seeds=[1], guidance_scale=3.0).latents
        assert max_error(got.cpu(), want) < 1e-3
    if offload != "none":
        assert not next(sd.net.parameters()).is_cuda


def test_blocks_are_found_in_every_model():
    model = weights.skeleton(UNet2DConditionModel, UNet2DConditionModel.Config())
    _, block, outside = memory.weight_bytes(model, torch.float32, {})
    assert block > 0 and outside < 0.1 * memory.count(model) * 4


def test_pages_of_weights_at_home_are_let_go(tmp_path):
    """On a CPU a model that is not at work takes no resident memory: its file's pages are given back. Memory that is no
    file's keeps its content."""
    big = {"w": torch.randn(8 << 20), "small": torch.randn(3)}
    weights.save_tensors(tmp_path / "x.safetensors", big)
    mapped = weights.open_file(tmp_path / "x.safetensors").get_tensor("w")
    own = torch.ones(1 << 20)

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":") for line in lines if line.startswith("Rss"))
        return int(fields["RssFile"].split()[0])

    assert mapped.sum() == big["w"].sum()
    before = resident()
    memory.let_go([mapped, own, torch.zeros(2, 2).T])
    assert before - resident() > 30_000, "32 MB of file pages"
    assert torch.equal(mapped, big["w"]) and (own == 1).all()


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_learned_words_travel_with_the_others(offload):
    """A table that grew after Resident began is still the one that Resident moves."""
    word = TINY.parent / "lora" / "sd15.embedding.safetensors"
    here, away = (pipeline.load(TINY / "sd15", torch.bfloat16, offload=o) for o in ("none", offload))
    for sd in (here, away):
        sd.learn(word)
    with memory.at_work(away.text_encoder):
        tables = away.text_encoder.text_model.embeddings
        assert tables.token_embedding.weight.dtype == tables.position_embedding.weight.dtype == torch.bfloat16
    a, b = (sd.encode(["a <corgi>"]).states for sd in (here, away))
    assert max_error(b, a) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sequential_offload_is_bounded_on_a_gpu():
    """Whatever the host runs ahead, reserved memory stays near two blocks and what is outside them."""
    sd = pipeline.load(TINY / "sdxl", torch.float16, "cuda", offload="sequential")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    sd.generate(["a cat"], steps=20, seeds=[0], guidance_scale=3.0)
    assert torch.cuda.max_memory_reserved() < 256 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantized", ["int8", "nf4"])
@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_quantized_on_a_gpu(quantized, offload):
    want = pipeline.load(TINY / "sd35-medium", quantized=quantized).generate(["a cat"], steps=2, seeds=[1]).latents
    sd = pipeline.load(TINY / "sd35-medium", torch.float32, "cuda", offload=offload, quantized=quantized)
    assert max_error(sd.generate(["a cat"], steps=2, seeds=[1]).latents.cpu(), want) < 1e-2
    tiled = sd.generate(["a cat"], steps=2, seeds=[1], tiled=True).pixels
    assert torch.isfinite(tiled).all()


def test_dry_run_takes_the_flags_of_a_run(tmp_path):

    state = original_names.export(pipeline.load(TINY / "sd15").models(), "SD 1", tmp_path / "x.safetensors")
    torch.save({k: v.clone() for k, v in state.items()}, tmp_path / "x.ckpt")
    argv = ("sample.py", "--dry-run", "--components", TINY / "sd15", "--model", tmp_path / "x.ckpt")
    done = run(*argv, "--allow-pickle")
    assert done.returncode == 0 and "unet" in done.stdout, done.stderr
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    one, two = (
        run("sample.py", "--dry-run", *more).stdout for more in ((), ("--prompts-file", tmp_path / "prompts.txt"))
    )
    assert one != two, "two pictures at a time take more"
