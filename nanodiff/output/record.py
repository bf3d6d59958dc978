"""run.json: what was run, with what, how long, which files came out and which numbers."""

import contextlib
import platform
import sys
import time

import torch

from nanodiff import config, system
from nanodiff.commandline import as_dict, hide, masked
from nanodiff.config import UserError
from nanodiff.device import dist, onednn
from nanodiff.files import claim, out_dir, write_json


class Record:
    """run.json: what was run, with what, how long, which files came out and which numbers."""

    def __init__(self, cfg, device):
        if dist.world().size > 1 and not torch.distributed.is_initialized():  # all would write the same files
            raise UserError("running this on several processes is not supported yet; start it without torchrun")
        if not str(cfg.output_dir).strip():
            raise UserError("--output-dir is empty")
        hide(cfg)
        self.out = out_dir(cfg.output_dir)
        dist.on_main(self._claim)
        self.started = time.perf_counter()
        self.data = {
            "config": as_dict(cfg),
            "argv": masked(sys.argv),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{device.type} x {torch.get_num_threads()}",
            "cpu": onednn.processor(),
            "git_commit": config.commit(),
            "seconds": {},
            "files": [],
            "results": {},
        }

    def _claim(self):
        claim(self.out)  # until the script ends

    @contextlib.contextmanager
    def timed(self, stage):
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.data["seconds"]
            seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 3)

    def file(self, path, **facts):
        self.data["files"].append({"path": str(path), **facts})

    def result(self, name, value):
        """Print a number on stdout and keep it."""
        self.data["results"][name] = value
        if dist.is_main():
            print(f"{name}: {value:g}" if isinstance(value, float) else f"{name}: {value}")

    def write(self):
        self.data["seconds"]["total"] = round(time.perf_counter() - self.started, 3)
        self.data["peak_memory_mb"] = system.peak_memory() >> 20
        if torch.cuda.is_available():
            self.data["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() >> 20
        if dist.is_main():
            write_json(self.out / "run.json", self.data)
