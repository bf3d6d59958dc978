"""Nothing changes for users: the bytes of what some sixty commands make, before a change that should change none, and after it.

    python -m tests.unchanged record before.json         # on the tree as it was (minutes, on a CPU)
    python -m tests.unchanged compare before.json        # on the tree as it is: names every command whose files differ

Bytes depend on processor, PyTorch and threads, so a recording is good for the machine it was made on and is not kept. Of texts the folder,
times and versions are left out; of run.json the results are kept, since everything else in it is about the run.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAMILIES = ("sd15", "sd21-v", "sd-turbo", "sdxl", "sdxl-turbo", "sd35-medium", "sd35-large-turbo")
SCHEDULERS = ("ddpm", "ddim", "pndm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "heun", "lcm")
VOLATILE = re.compile(
    r'"(seconds|total|argv|command|versions|git_commit|tokens_per_s|peak_memory_mb|images_per_s|data_wait|cpu|device)"'
)


def commands():
    """{name: words}: `OUT` is the command's own folder, `ALL/name` that of an earlier one; names with spaces stand in quotes."""
    tiny, lora = "tests/golden/tiny", "tests/golden/lora"
    made = {}
    draw = f"sample.py --model {tiny}/{{}} --prompt 'a red cat' --seed 3 --steps 3 {{}}".format
    made |= {f"draw {m}": draw(m, "") for m in FAMILIES}
    made |= {f"own settings {m}": f"sample.py --model {tiny}/{m} --prompt 'a cat' --seed 1" for m in FAMILIES}
    made["own settings embedded"] = (
        "sample.py --prompt 'red apple' --prompt fire --seed 7 --output OUT/sheet.png --labels"
    )
    made |= {f"scheduler {s}": draw("sd15", f"--scheduler {s}") for s in SCHEDULERS}
    made["scheduler flow_heun"] = draw("sd35-medium", "--scheduler flow_heun")
    made["guidance"] = draw(
        "sd15",
        "--guidance-scale 5 --guidance-rescale 0.7 --negative-prompt grey --num-images 3 --batch-size 2 --save-latents --progress-strip",
    )
    made["words"] = draw(
        "sdxl",
        f"--long-prompts --prompt-weights --prompt-2 '(blue:1.3) [cat] {'and more ' * 40}' --negative-prompt b --clip-skip 1",
    )
    made["sizes"] = draw("sdxl", "--original-size 64x32 --crop 4x8 --height 32 --width 48 --denoising-end 0.7")
    made["skip layers"] = draw("sd35-medium", "--skip-layers 1 --skip-layer-stop 0.9 --max-sequence-length 16 --no-t5")
    made["image to image"] = draw("sd15", "--init-image assets/demo.png --strength 0.7 --height 64 --width 64")
    made["inpainting"] = draw(
        "sd35-medium", "--init-image assets/nano/loss.png --mask assets/nano/loss.png --strength 0.9"
    )
    made["named"] = draw("sd15", "--named --resize 40x30 --scheduler ddim --eta 0.5")
    made["study"] = draw("sd15", "--study 'scheduler=ddpm,ddim;guidance_scale=1,3'")
    made["dry run"] = "sample.py --model stable-diffusion-v1-5 --dry-run"
    made["quantize"] = draw("sd35-medium", "--quantize int8")
    made["tiled"] = draw("sd15", "--vae-tiling --height 96 --width 96")
    made["lora sd15 kohya"] = draw("sd15", f"--lora {lora}/sd15.kohya.safetensors:0.8")
    made["lora sd15 peft"] = draw("sd15", f"--lora {lora}/sd15.peft.safetensors:0.8")
    made["lora sd15 peft_metadata"] = draw("sd15", f"--lora {lora}/sd15.peft_metadata.safetensors:0.8")
    made["lora fused"] = draw("sdxl", f"--lora {lora}/sdxl.kohya.safetensors --lora-fuse")
    made["learned word"] = draw("sd15", f"--embedding {lora}/sd15.embedding.safetensors")
    made["convert lora kohya"] = (
        f"-m nanodiff.lora convert {lora}/sd15.peft.safetensors OUT/made.safetensors --to kohya --model {tiny}/sd15"
    )
    made["convert lora diffusers"] = (
        f"-m nanodiff.lora convert {lora}/sd15.kohya.safetensors OUT/made.safetensors --to diffusers --model {tiny}/sd15"
    )
    made["convert lora peft"] = (
        f"-m nanodiff.lora convert {lora}/sd15.kohya.safetensors OUT/made --to peft --model {tiny}/sd15"
    )
    made["merge lora"] = f"-m nanodiff.lora merge --model {tiny}/sd15 --lora {lora}/sd15.kohya.safetensors OUT/made"
    made["inspect lora"] = f"-m nanodiff.lora inspect {lora}/sdxl.kohya.safetensors"
    made["single file sd15"] = f"-m nanodiff.weights convert {tiny}/sd15 OUT/sd15.safetensors"
    made["folder again sd15"] = (
        f"-m nanodiff.weights convert 'ALL/single file sd15/sd15.safetensors' OUT/sd15 --components {tiny}/sd15"
    )
    made["draw file sd15"] = (
        f"sample.py --model 'ALL/single file sd15/sd15.safetensors' --components {tiny}/sd15 --prompt a --seed 2 --steps 2"
    )
    made["single file sdxl"] = f"-m nanodiff.weights convert {tiny}/sdxl OUT/sdxl.safetensors"
    made["folder again sdxl"] = (
        f"-m nanodiff.weights convert 'ALL/single file sdxl/sdxl.safetensors' OUT/sdxl --components {tiny}/sdxl"
    )
    made["draw file sdxl"] = (
        f"sample.py --model 'ALL/single file sdxl/sdxl.safetensors' --components {tiny}/sdxl --prompt a --seed 2 --steps 2"
    )
    made["single file sd35-medium"] = f"-m nanodiff.weights convert {tiny}/sd35-medium OUT/sd35-medium.safetensors"
    made["folder again sd35-medium"] = (
        f"-m nanodiff.weights convert 'ALL/single file sd35-medium/sd35-medium.safetensors' OUT/sd35-medium --components {tiny}/sd35-medium"
    )
    made["draw file sd35-medium"] = (
        f"sample.py --model 'ALL/single file sd35-medium/sd35-medium.safetensors' --components {tiny}/sd35-medium --prompt a --seed 2 --steps 2"
    )
    made["inspect weights"] = f"-m nanodiff.weights inspect {tiny}/sd15/unet"
    made["check data"] = "-m nanodiff.data check assets/emoji/emoji.tar"
    made["stand-in"] = "-m nanodiff.corel stand-in OUT/corel"
    made["prepare corel"] = (
        "-m nanodiff.data prepare-corel --data-dir ALL/stand-in/corel --output-dir OUT/data --figs-dir OUT/figs"
    )
    made["train vae"] = (
        "train.py vae --data assets/emoji/emoji.tar --preset tiny --max-steps 3 --seed 4 --mixed-precision no"
    )
    made["train flat vae"] = (
        "train.py vae --data assets/emoji/emoji.tar --preset tiny --latent-dim 16 --max-steps 3 --seed 4 --mixed-precision no"
    )
    made["train pixels"] = (
        "train.py diffusion --data assets/emoji/emoji.tar --preset tiny --sample-every 2 --sample-steps 2 --max-steps 3 --seed 4 --mixed-precision no"
    )
    made["train latents"] = (
        "train.py diffusion --data assets/emoji/emoji.tar --preset tiny --vae 'ALL/train vae/model' --resolution 32 --max-steps 3 --seed 4 --mixed-precision no"
    )
    made["train flow"] = (
        "train.py diffusion --data assets/emoji/emoji.tar --preset tiny --model-size mmdit-tiny --prediction-type flow --max-steps 3 --seed 4 --mixed-precision no"
    )
    made["train lora"] = (
        "train.py diffusion --data assets/emoji/emoji.tar --model assets/nano --lora --batch-size 2 --max-steps 3 --seed 4 --mixed-precision no"
    )
    made["train on"] = (
        "train.py diffusion --data assets/emoji/emoji.tar --model assets/nano --batch-size 2 --min-snr 5 --max-steps 3 --seed 4 --mixed-precision no"
    )
    made["plan"] = "train.py diffusion --preset sd15 --dry-run"
    made["draw trained"] = "sample.py --model 'ALL/train pixels/model' --prompt fire --seed 1"
    made["recursive"] = (
        "distill.py recursive --model assets/nano --captions assets/emoji/emoji.tar --data-root OUT/data --models-root OUT/models --target-gen 1 --steps 2 --num-images 3 --gen0-images 3 --epochs 1 --features pixels --mixed-precision no --cfg-scale 3"
    )
    made["transfer"] = (
        "distill.py transfer all --model assets/nano --teacher assets/nano --prompt-source assets/demo_prompts.txt --num-images 3 --steps 2 --guidance-scale 3 --epochs 1 --lr 0.001 --lora-rank 2 --mixed-precision no --num-evaluation-prompts 3 --panels 1 --method both"
    )
    made["few steps consistency"] = (
        "distill.py few-step --model assets/nano --data assets/emoji/emoji.tar --method consistency --max-steps 2 --batch-size 2 --student-steps 2 --num-images 2 --check-steps 2 --teacher-steps 3 --guidance-scale 3 --seed 3 --mixed-precision no"
    )
    made["few steps progressive"] = (
        "distill.py few-step --model assets/nano --data assets/emoji/emoji.tar --method progressive --max-steps 2 --batch-size 2 --student-steps 2 --num-images 2 --check-steps 2 --teacher-steps 3 --guidance-scale 3 --seed 3 --mixed-precision no"
    )
    made["few steps dmd"] = (
        "distill.py few-step --model assets/nano --data assets/emoji/emoji.tar --method dmd --max-steps 2 --batch-size 2 --student-steps 2 --num-images 2 --check-steps 2 --teacher-steps 3 --guidance-scale 3 --seed 3 --mixed-precision no"
    )
    made["few steps guidance"] = (
        "distill.py few-step --model assets/nano --data assets/emoji/emoji.tar --method guidance --max-steps 2 --batch-size 2 --student-steps 2 --num-images 2 --check-steps 2 --teacher-steps 3 --guidance-scale 3 --seed 3 --mixed-precision no"
    )
    made["measure"] = (
        "eval.py images --generated 'ALL/own settings embedded' --real assets/emoji/emoji.tar --features pixels"
    )
    made["draw and measure"] = "eval.py images --prompts assets/demo_prompts.txt --features pixels --steps 2"
    made["compare"] = "eval.py compare --a 'ALL/few steps dmd/check/student-2' --b 'ALL/few steps dmd/check/teacher-2'"
    made["report"] = "eval.py report --inputs ALL/measure --inputs ALL/compare"
    made["export captions"] = "-m nanodiff.captionset export assets/emoji/emoji.tar OUT/emoji"
    made["split"] = "caption.py split --original-csv 'ALL/export captions/emoji/titles.csv'"
    made["train captioner"] = (
        "caption.py train --model-size tiny --max-steps 3 --max-new-tokens 6 --mixed-precision no --train-csv-path ALL/split/train.csv --val-csv-path ALL/split/val.csv --image-path 'ALL/export captions/emoji/images'"
    )
    made["judge captions"] = (
        "caption.py eval --model-file 'ALL/train captioner/checkpoints/best_model' --max-new-tokens 6 --eval-set val --max-samples 6 --bootstrap 20 --train-csv-path ALL/split/train.csv --val-csv-path ALL/split/val.csv --image-path 'ALL/export captions/emoji/images'"
    )
    made["tell"] = (
        "caption.py infer --model-file 'ALL/train captioner/checkpoints/best_model' --max-new-tokens 6 --infer-image-path 'ALL/own settings embedded/00000.png'"
    )
    made["complete"] = f"caption.py complete --model {tiny}/llama --prompt once --max-new-tokens 8 --temperature 0"
    made["augment"] = (
        f"caption.py augment --data-csv ALL/split/val.csv --model {tiny}/llama --max-samples 4 --attempts 2 --max-new-tokens 12"
    )
    made["synthesize"] = f"caption.py synthesize --data-csv ALL/split/test.csv --model {tiny}/sd15 --steps 2"
    return {name: shlex.split(words) for name, words in made.items()}


def digests(folder, root):
    """{file: hash} of what a command left in `folder`; texts without the folder's name, times and versions."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts):
        if path.suffix in (".html", ".gif") or path.name in (".lock", "loss.png", "MANIFEST.json", "state.json"):
            continue  # with dates, times or the commit in them
        data = path.read_bytes()
        if path.name == "run.json":
            results = json.loads(data)["results"]
            data = json.dumps({k: v for k, v in results.items() if "tokens_per_s" not in k}, sort_keys=True).encode()
        elif path.name == "study.csv":
            data = b"\n".join(line.rpartition(b",")[0] for line in data.splitlines())
        elif path.suffix in (".json", ".jsonl", ".md", ".csv", ".txt"):
            text = re.sub(r"\b[0-9a-f]{40}\b", "COMMIT", data.decode().replace(str(root), "ALL"))
            data = "\n".join(line for line in _apart(text) if not VOLATILE.search(line)).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()[:16]
    return found


def _apart(text):
    """A text's lines; of JSON on one line its fields."""
    return re.sub(r'([,{] ?)(?=")', r"\1\n", text).splitlines()


def made(root):
    """{command: {file: hash}}, of what is printed, too; every command in the folder root/NAME."""
    found = {}
    env = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    for name, words in commands().items():
        folder = root / name
        folder.mkdir(parents=True)
        argv = [w.replace("OUT", str(folder)).replace("ALL", str(root)) for w in words]
        argv += [] if argv[0] == "-m" else ["--output-dir", str(folder)]
        done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, env=env)
        if done.returncode:
            print(f"FAILS: {' '.join(argv)}\n{done.stderr}", file=sys.stderr)
        said = re.sub(r"[0-9.]+ tokens/s|[0-9.]+ s\b", "", done.stdout.replace(str(root), "ALL"))
        said = "\n".join(line for line in said.splitlines() if "tokens_per_s" not in line)
        found[name] = digests(folder, root) | {"stdout": hashlib.sha256(said.encode()).hexdigest()[:16]}
        print(f"{name}: {len(found[name])} files", flush=True)
    return found


def main(what, file):
    root = Path("/tmp/nanodiff-unchanged")  # the same for both: some files name their inputs
    shutil.rmtree(root, ignore_errors=True)
    found = made(root)
    if what == "record":
        Path(file).write_text(json.dumps(found, indent=1))
        return 0
    before = json.loads(Path(file).read_text())
    differ = {
        name: sorted(k for k in {*old, *found.get(name, {})} if old.get(k) != found.get(name, {}).get(k))
        for name, old in before.items()
    }
    differ = {name: files for name, files in differ.items() if files}
    for name, files in differ.items():
        print(f"DIFFERS: {name}: {', '.join(files)}")
    print(f"{len(before) - len(differ)} of {len(before)} commands make the same bytes")
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
