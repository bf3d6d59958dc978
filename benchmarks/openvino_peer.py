"""The OpenVINO side of bench.py, run by a Python that has openvino, after bench.py's CONVERT has written FOLDER/openvino once, as a user does.

    PYTHON benchmarks/openvino_peer.py STARTED PROGRAM FOLDER KIND

PROGRAM: net (a guided UNet call), vae (a decode), image (process start to the pixels of a picture, compilation counted, by a DDIM loop of
a few lines), error (a call in bf16 against one in fp32). KIND: as bench.py has them; only its type, its side and its counts matter here. Prints RESULT and a JSON object.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov

PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def compiled(folder, name, dtype, *shapes):
    """A function of numpy arrays of these shapes."""
    core = ov.Core()
    model = core.read_model(folder / "openvino" / f"{name}.xml")
    model.reshape({place: list(shape) for place, shape in zip(model.inputs, shapes, strict=True)})
    request = core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": PRECISION[dtype], "PERFORMANCE_HINT": "LATENCY"}
    ).create_infer_request()
    return lambda *args: request.infer(list(args), share_inputs=True)[0]


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def timed(call, n):
    call()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def net(folder, kind):
    dtype, side, runs = kind.split("-")[:3]
    shapes = (2, 4, int(side), int(side)), (2, 77, 768)
    start = time.perf_counter()
    unet = compiled(folder, "unet", dtype, shapes[0], (), shapes[1])
    (x, text), t = drawn(*shapes), np.array(500, np.int64)
    first = time.perf_counter() - start
    return {"seconds": timed(lambda: unet(x, t, text), int(runs)), "first": first}


def vae(folder, kind):
    decode, (z,) = compiled(folder, "vae", kind.split("-")[0], (1, 4, 64, 64)), drawn((1, 4, 64, 64))
    return {"seconds": timed(lambda: decode(z), 1)}


def error(folder, _kind):
    shapes = (2, 4, 64, 64), (2, 77, 768)
    (x, text), t, out = drawn(*shapes), np.array(500, np.int64), []
    for dtype in ("float32", "bfloat16"):
        out.append(np.float64(compiled(folder, "unet", dtype, shapes[0], (), shapes[1])(x, t, text)))
    return {"seconds": float(np.sqrt(np.square(out[0] - out[1]).mean() / np.square(out[0]).mean()))}


def image(folder, kind):
    """Guided DDIM on the scaled-linear schedule; the words stand for a prompt's tokens, which cost nothing on either side."""
    dtype, side, steps = kind.split("-")[:3]
    h, steps = int(side) // 8, int(steps)
    started = time.time()
    ids = np.full((2, 77), 49407, np.int64)
    ids[:, 0], ids[1, 1:7] = 49406, (320, 2368, 4681, 525, 320, 2117)
    text = compiled(folder, "text", dtype, (2, 77))(ids)
    unet = compiled(folder, "unet", dtype, (2, 4, h, h), (), text.shape)
    bars = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    (x,) = drawn((1, 4, h, h))
    times = np.arange(steps)[::-1] * (1000 // steps) + 1
    for i, t in enumerate(times):
        empty, told = unet(np.concatenate([x, x]), np.array(t, np.int64), text)
        eps = (empty + 5.0 * (told - empty))[None]
        bar, after = bars[t], bars[times[i + 1]] if i + 1 < steps else bars[0]
        x = (after**0.5 * (x - (1 - bar) ** 0.5 * eps) / bar**0.5 + (1 - after) ** 0.5 * eps).astype(np.float32)
    pixels = compiled(folder, "vae", dtype, x.shape)((x / 0.18215).astype(np.float32))
    assert pixels.shape == (1, 3, int(side), int(side))
    return {"seconds": time.time() - started}


if __name__ == "__main__":
    began, program, path, how = float(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    facts = {"net": net, "vae": vae, "error": error, "image": image}[program](path, how)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    print("RESULT" + json.dumps(facts | {"total_s": time.time() - began, "peak_mb": peak, "version": ov.__version__}))
