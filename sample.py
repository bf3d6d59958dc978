"""Make pictures from words.

    python sample.py --prompt "red apple" --output-dir out                          # the embedded model
    python sample.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a corgi on a beach" --output-dir out
    python sample.py --prompt "red apple" --study "scheduler=ddpm,ddim;guidance_scale=1,3,7.5" --output-dir out
    python sample.py --model stable-diffusion-3.5-medium --dry-run                  # how much memory it would take

The same model, prompt, seed and settings give the picture that diffusers gives with CPU generators.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from nanodiff.commandline import DEVICES, arg, check_bounds, check_needs, is_given, script
from nanodiff.config import UserError

# torch is imported inside main(), so that --help answers at once.

LESS_MEMORY = (
    "try --batch-size 1, a smaller --height and --width, --dtype bf16, --vae-tiling, --offload model or --quantize nf4 "
    "(--dry-run predicts what fits)"
)
EMBEDDED = Path(__file__).parent / "assets" / "nano"


@dataclass
class Config:
    model: str | None = arg(
        None,
        "folder, single-file checkpoint or Hub id org/name[@revision]; default: the embedded model",
        group="model",
        often=True,
    )
    vae_checkpoint: str | None = arg(None, "folder or file of another VAE")
    components: str | None = arg(None, "folder or Hub id for what a single file or a single component lacks")
    prediction_type: str | None = arg(
        None, "what a single-file model predicts", choices=("epsilon", "v_prediction", "sample")
    )
    allow_pickle: bool = arg(False, "read .ckpt, .pt and .bin files, which may be hostile")
    t5: bool = arg(True, "use SD 3's third text encoder, where the model has it")
    variant: str | None = arg(None, "file variant, such as fp16")
    revision: str | None = arg(None, "branch, tag or commit of a Hub id")
    token: str | None = arg(None, "Hub token (better: the variable HF_TOKEN)")
    prompt: list[str] = arg([], "what to draw; repeatable", group="words", often=True)
    prompts_file: str | None = arg(None, "text file with one prompt a line, or a .csv or .tsv with a column `prompt`")
    prompt_2: str | None = arg(None, "for the second text encoder (SDXL, SD 3); default: --prompt")
    prompt_3: str | None = arg(None, "for the third text encoder (SD 3); default: --prompt")
    negative_prompt: str | None = arg(None, "what to keep away from", often=True)
    negative_prompt_2: str | None = arg(None, "for the second text encoder; default: --negative-prompt")
    negative_prompt_3: str | None = arg(None, "for the third text encoder; default: --negative-prompt")
    max_sequence_length: int | None = arg(None, "T5's tokens (SD 3), up to 512; default 256")
    long_prompts: bool = arg(False, "no limit of 75 tokens: encode longer prompts in chunks")
    prompt_weights: bool = arg(
        False, "(word:1.2), ((word)) and [word] weigh words; BREAK begins a chunk of --long-prompts"
    )
    prompt_syntax: str | None = arg(
        None,
        "read prompts as that program does: a1111 (weights, [a:b:0.5], [a|b], AND, BREAK, {a|b}, __name__, <lora:name:0.8>), comfyui (weights, {a|b})",
        choices=("a1111", "comfyui"),
    )
    wildcards: str | None = arg(None, "folder of NAME.txt, a line of which stands for __NAME__ in a prompt")
    embedding: list[str] = arg([], "file of a learned word (textual inversion), used by its name; repeatable")
    lora: list[str] = arg([], "FILE or FILE:SCALE of a LoRA; repeatable", group="LoRA", often=True)
    lora_dir: str | None = arg(None, "folder of the LoRAs that <lora:name:scale> in a prompt names")
    lora_scale: float = arg(1.0, "multiplies the scale of every --lora", needs="lora")
    lora_fuse: bool = arg(False, "add LoRAs into the weights: no cost per step, but not for --quantize", needs="lora")
    allow_partial: bool = arg(
        False, "use a LoRA although layers of it are not in this model", needs=("lora", "lora_dir")
    )
    steps: int | None = arg(
        None,
        "sampling steps; default: what the model was made for",
        group="how it is drawn",
        often=True,
    )
    ddim_steps: int | None = arg(None, "short for --scheduler ddim --steps N")
    guidance_scale: float | None = arg(
        None,
        "classifier-free guidance; 1 or less = off; default: what the model was made for",
        often=True,
        low=0,
        high=100,
    )
    guidance_rescale: float = arg(0.0, "std correction of the guidance, 0 to 1", low=0, high=1)
    skip_layers: str | None = arg(None, "skip-layer guidance of SD 3.5 medium: blocks, such as 7,8,9")
    skip_layer_scale: float = arg(2.8, "strength of --skip-layers", needs="skip_layers")
    skip_layer_start: float = arg(0.01, "part of the steps after which --skip-layers begins", needs="skip_layers")
    skip_layer_stop: float = arg(0.2, "part of the steps after which --skip-layers ends", needs="skip_layers")
    perturbed_scale: float = arg(0.0, "perturbed-attention guidance of a UNet; 3 is usual, 0 = none", low=0, high=100)
    perturbed_layers: str = arg(
        "mid",
        "its self-attentions: parts of their names, such as mid,up_blocks.1",
        needs="perturbed_scale",
    )
    freeu: str | None = arg(None, "B1,B2,S1,S2 of FreeU, such as 1.5,1.6,0.9,0.2 (SD 1.5) or 1.3,1.4,0.9,0.2 (SDXL)")
    ip_adapter: list[str] = arg(
        [],
        "FILE[:SCALE] of an IP-Adapter (plain or plus), or org/name/path/in/it.safetensors of the Hub: a picture as a prompt; repeatable",
        group="picture as a prompt",
    )
    ip_adapter_image: list[str] = arg(
        [], "picture that it is shown; repeatable: several for one --ip-adapter, or one for each", needs="ip_adapter"
    )
    image_encoder: str | None = arg(
        None,
        "folder or Hub id of its CLIP vision tower; default: image_encoder beside the adapter's file",
        needs="ip_adapter",
    )
    refiner: str | None = arg(
        None, "SDXL: folder, file or Hub id of a refiner that draws the last steps", group="SDXL's refiner and sizes"
    )
    refiner_start: float = arg(
        0.8,
        "part of the timesteps that is behind when --refiner takes over",
        low=0.01,
        high=0.99,
        needs="refiner",
    )
    aesthetic_score: float | None = arg(
        None, "the refiner's: how much people like such a picture, 1 to 10; default 6", low=0, high=10
    )
    negative_aesthetic_score: float | None = arg(
        None, "the same of what it is led away from; default 2.5", low=0, high=10
    )
    original_size: str | None = arg(None, "SDXL: WIDTHxHEIGHT the picture is said to come from; default: its own")
    target_size: str | None = arg(None, "SDXL: WIDTHxHEIGHT the picture is said to be for; default: its own")
    crop: str | None = arg(None, "SDXL: LEFTxTOP corner it is said to be cropped at; default 0x0")
    negative_original_size: str | None = arg(None, "SDXL: the same for the negative prompt")
    negative_target_size: str | None = arg(None, "SDXL: the same for the negative prompt")
    negative_crop: str | None = arg(None, "SDXL: the same for the negative prompt")
    denoising_end: float | None = arg(
        None, "stop when this part of the timesteps is behind, between 0 and 1", group="noise and size"
    )
    scheduler: str | None = arg(
        None,
        "sampler, such as ddim, euler or dpmpp_2m_karras (an unknown name lists all); default: the model's own",
        often=True,
    )
    sigmas: str | None = arg(
        None,
        "grid of noise levels: karras, exponential, beta, lu, sgm_uniform, simple, normal, beta_times (ComfyUI's beta) or ays (Align Your Steps); "
        "default: the sampler's own",
    )
    timestep_spacing: str | None = arg(
        None,
        "where the steps lie among the training's timesteps (diffusers' field of that name); default: the model's",
        choices=("linspace", "leading", "trailing"),
    )
    eta: float = arg(0.0, "noise of ddim and tcd, 0 to 1", low=0, high=1)
    s_churn: float = arg(
        0.0, "euler: fresh noise before each step, as much as Karras et al.'s S_churn says", low=0, high=1000
    )
    s_tmin: float = arg(0.0, "--s-churn only where sigma is at least this", low=0, needs="s_churn")
    s_tmax: float | None = arg(
        None, "--s-churn only where sigma is at most this", low=0, high=float("inf"), needs="s_churn"
    )
    s_noise: float = arg(1.0, "multiplies the noise of --s-churn", low=0, high=10, needs="s_churn")
    height: int | None = arg(None, "pixels; default: the model's own", often=True, low=1)
    width: int | None = arg(None, "pixels; default: the model's own", often=True, low=1)
    num_images: int = arg(1, "pictures per prompt", often=True, low=1)
    batch_size: int = arg(4, "pictures at a time", low=1)
    seed: int | None = arg(
        None, "picture i uses seed + i; default: random, printed", often=True, low=0, high=(1 << 64) - 1
    )
    clip_skip: int = arg(0, "leave out the last N layers of the text encoder")
    init_image: str | None = arg(None, "start from this picture (image-to-image)", group="from a picture", often=True)
    strength: float | None = arg(
        None,
        "how much of --init-image is repainted, above 0 to 1; default 0.8, of an inpainting model 1",
        needs="init_image",
    )
    mask: str | None = arg(None, "white where --init-image is repainted (inpainting)", needs="init_image")
    mask_blur: int = arg(
        0,
        "pixels over which the mask's edge is softened; what is outside stays --init-image's",
        low=0,
        high=256,
        needs="mask",
    )
    mask_padding: int | None = arg(
        None,
        "repaint only the masked part and so many pixels around it, enlarged to the model's size",
        low=0,
        high=4096,
        needs="mask",
    )
    hires: float | None = arg(
        None,
        "draw again so many times as large, from what was drawn: 1.5, 2 (hires fix)",
        low=1,
        high=8,
        group="larger",
        often=True,
        unit="x",
    )
    hires_strength: float = arg(
        0.6, "how much of it the second pass repaints, above 0 to 1", low=0.01, high=1, needs="hires"
    )
    hires_steps: int | None = arg(
        None,
        "steps of the second pass, of which it takes that part; default: as many as the first has",
        low=1,
        high=1000,
        needs="hires",
    )
    hires_latent: bool = arg(
        False,
        "enlarge the latents (bicubic), not the picture (Lanczos): sharper, and less like the first",
        needs="hires",
    )
    control: list[str] = arg(
        [],
        "FILE_OR_ID[:SCALE[:START-END]] of a ControlNet, at work from START to END of the steps (0 to 1); repeatable",
        group="ControlNet",
    )
    control_image: list[str] = arg(
        [],
        "what the ControlNet is shown, in the order of --control: a picture, or canny:PICTURE for its edges; repeatable",
    )
    control_guess: bool = arg(
        False, "draw what the ControlNet sees, also without a prompt (guess mode)", needs="control"
    )
    output_dir: str = arg(
        "out", "folder of the pictures 00000.png, 00001.png, … and run.json", group="what is written", often=True
    )
    overwrite: bool = arg(
        False, "begin again in a folder that holds pictures (or a study), in place of counting on (or finishing it)"
    )
    output: str | None = arg(
        None, "also write one sheet of all pictures here (and up to 16 of them one by one beside it)", often=True
    )
    base_dir: str = arg(".", "folder that relative --output, --output-dir and model paths start from")
    nrow: int | None = arg(None, "pictures in a row of the sheet", low=1, needs=("output", "study"))
    named: bool = arg(False, "file names from prompt, model and settings instead of numbers")
    labels: bool = arg(False, "write each prompt above its picture in the sheet", needs="output")
    save_latents: bool = arg(False, "write latents.safetensors")
    progress_strip: bool = arg(False, "write a strip of the x0 estimates over the steps for each picture")
    resize: str | None = arg(None, "WIDTHxHEIGHT of the written pictures")
    metadata: bool = arg(True, "write the settings into each PNG")
    txt: bool = arg(False, "write the prompt and the settings of each picture beside it, as NAME.txt")
    from_image: str | None = arg(None, "repeat a picture from the settings inside it")
    study: str | None = arg(
        None,
        'every combination of settings as a labelled sheet and study.csv: "steps=5,25,50;scheduler=ddpm,ddim"',
        often=True,
    )
    offload: str = arg(
        "none",
        "models on the device: all (none), one at a time, block by block",
        choices=("none", "model", "sequential"),
        group="memory and speed",
    )
    quantize: str | None = arg(
        None,
        "weights of denoiser and T5 in 8 or 4 bits (int8 on a CPU with VNNI: the denoiser's products, too)",
        choices=("int8", "nf4"),
    )
    vae_tiling: bool = arg(False, "decode in tiles: less memory for large pictures, the same picture")
    fast_vae: str | None = arg(None, "decode drafts with this TAESD decoder (file or folder)")
    preview: str | None = arg(None, "write preview.png after every step with this TAESD decoder (file or folder)")
    dry_run: bool = arg(
        False, "print parameters, bytes and peak memory, and make nothing (needs no weights)", often=True
    )
    compile: bool = arg(False, "torch.compile the denoiser: slow first step, faster many steps")
    cuda_graph: str = arg(
        "auto",
        "record a denoising step once and replay it; auto: on a GPU, for up to two guided pictures at a time",
        choices=("auto", "on", "off"),
        const="on",
    )
    diffusers_quirks: bool = arg(
        False, 'repeat diffusers\' DDIM error off "leading" spacing (see samplers.py)', group="where it computes"
    )
    device: str = arg("auto", "where to compute", choices=DEVICES)
    dtype: str = arg(
        "auto",
        "weights: auto is fp16 (SD 3: bf16) on a GPU; on a CPU bf16 for large models where it is fast, else fp32",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    kernels: str = arg(
        "auto",
        "our Triton kernels on a GPU: auto falls back to PyTorch and says why, triton never falls back, torch uses none",
        choices=("auto", "triton", "torch"),
    )

    def check(self):
        """Settings that make no sense are refused before anything is loaded."""
        check_bounds(self)  # also of those that a picture or a study brought
        check_needs(self)
        if self.ddim_steps is not None:
            if self.steps is not None or self.scheduler not in (None, "ddim"):
                raise UserError("--ddim-steps is --scheduler ddim --steps N; do not give them together")
            self.scheduler, self.steps, self.ddim_steps = "ddim", self.ddim_steps, None
        if self.steps == 0:
            raise UserError("--steps 0 makes no picture; use 1 or more")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UserError(f"--strength {self.strength:g} must be above 0 and at most 1")
        if self.denoising_end is not None and not 0 < self.denoising_end < 1:
            raise UserError(f"--denoising-end {self.denoising_end:g} must be between 0 and 1")
        self.check_words()
        self.check_pairs()
        self.check_together()

    def check_words(self):
        """What --prompt-syntax decides."""
        if self.prompt_weights and self.prompt_syntax:
            raise UserError("--prompt-weights is part of --prompt-syntax; do not give them together")
        a1111 = self.prompt_syntax == "a1111"
        for name in ("wildcards", "lora_dir"):
            if getattr(self, name) and not a1111:
                raise UserError(f"--{name.replace('_', '-')} does nothing without --prompt-syntax a1111")
        for name in ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"):
            if a1111 and getattr(self, name) is not None:
                raise UserError(
                    f"--{name.replace('_', '-')} is not for --prompt-syntax a1111, which has one prompt for all text encoders"
                )

    def check_pairs(self):
        """Lists whose members belong together."""
        if len(self.control) != len(self.control_image):
            raise UserError(
                f"{len(self.control)} --control and {len(self.control_image)} --control-image: one of each makes a pair"
            )
        if self.ip_adapter and not self.ip_adapter_image:
            raise UserError("--ip-adapter needs a picture: --ip-adapter-image")
        if 1 < len(self.ip_adapter) != len(self.ip_adapter_image):
            raise UserError(
                f"{len(self.ip_adapter_image)} --ip-adapter-image for {len(self.ip_adapter)} --ip-adapter: one for each, or several for one"
            )

    def check_together(self):
        """Options that exclude each other."""
        for name, others in (("refiner", ("hires", "mask", "denoising_end")), ("hires", ("mask", "denoising_end"))):
            if is_given(self, name) and any(is_given(self, other) for other in others):
                flags = [f"--{other.replace('_', '-')}" for other in others]
                raise UserError(f"--{name} is not for {', '.join(flags[:-1])} or {flags[-1]}")
        if self.cuda_graph == "on" and self.control:
            raise UserError("--cuda-graph is not for --control")
        if self.cuda_graph == "on" and (self.offload != "none" or self.quantize):
            raise UserError("--cuda-graph is not for --offload or --quantize")
        if self.ip_adapter and self.offload == "sequential":
            raise UserError("--ip-adapter is not for --offload sequential; use --offload model")
        if self.compile and self.offload == "sequential":
            raise UserError("--compile needs the whole model in one place; use --offload model or none")
        if self.fast_vae and self.vae_tiling:
            raise UserError("--fast-vae decodes instead of the VAE; --vae-tiling has nothing to do")


@dataclass
class Corel(Config):
    """The last step of the Corel document (S2): 16 pictures in rows of 4 by 1000 steps of DDPM, or --ddim-steps."""

    def check(self):
        for name, flag in (("model", "diffusion-checkpoint"), ("vae_checkpoint", "vae-checkpoint")):
            if not getattr(self, name):
                raise UserError(
                    f"--{flag} is required: what train.py corel-{'diffusion' if name == 'model' else 'vae'} wrote, best_model.pt"
                )
        if self.ddim_steps is None and self.steps is None and self.scheduler is None:
            self.scheduler, self.steps = "ddpm", 1000
        if self.device == "cuda":  # the document's default, which falls back
            import torch

            if not torch.cuda.is_available():
                print("warning: --device cuda: no CUDA device here; on the CPU", file=sys.stderr)
                self.device = "cpu"
        super().check()


PRESETS = {"corel": {"": {"num_images": 16, "batch_size": 16, "nrow": 4, "output": "generated_images.png",
                          "output_dir": "generated_images"}}}  # fmt: skip
STAGES = {"": (Config, "nanodiff.stories.sampling:main"), "corel": (Corel, "nanodiff.stories.sampling:main")}

if __name__ == "__main__":
    sys.exit(script(STAGES, __doc__, PRESETS, LESS_MEMORY))
