"""TensorBoard and Weights & Biases, beside metrics.jsonl."""

from pathlib import Path

from nanodiff.commandline import as_dict
from nanodiff.config import UserError
from nanodiff.device import dist
from nanodiff.training.options import Training


class Watch:
    """TensorBoard or Weights & Biases, beside metrics.jsonl. Raises UserError when the extra is not installed."""

    def __init__(self, kind, cfg: Training):
        self.kind, self.writer = kind, None
        folder = cfg.logging_dir or Path(cfg.output_dir) / "logs"
        missing = f"--report-to {kind}: {kind} is not installed; pip install {kind} (extra `{kind}`)"
        if kind == "tensorboard":
            try:
                import tensorboard  # noqa: F401
            except ImportError:
                raise UserError(missing) from None
            from torch.utils.tensorboard import SummaryWriter

            try:
                self.writer = SummaryWriter(str(folder)) if dist.is_main() else None
            except OSError as e:
                raise UserError(f"{folder}: TensorBoard's log cannot be written: {e.strerror}") from None
        elif kind == "wandb":
            try:
                import wandb
            except ImportError:
                raise UserError(missing) from None
            if dist.is_main():
                self.writer = wandb.init(project="nanodiff", dir=str(cfg.output_dir), config=as_dict(cfg))

    def numbers(self, step, values):
        if self.writer is None:
            return
        if self.kind == "wandb":
            self.writer.log(values, step=step)
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step, name, image):
        """image: a PIL image."""
        if self.writer is None:
            return
        if self.kind == "wandb":
            import wandb

            self.writer.log({name: wandb.Image(image)}, step=step)
            return
        import numpy as np

        self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self):
        if self.writer is not None:
            self.writer.close() if self.kind == "tensorboard" else self.writer.finish()
