"""Between pixels and latents: sizes, the VAE, and its overflow in half precision."""

import sys

import torch

from nanodiff.commandline import flagged
from nanodiff.config import UserError
from nanodiff.device import memory


def say(message):
    print(flagged(message), file=sys.stderr)


class LatentSpace:
    """What a pipeline does with pictures and their latents. Needs: net, vae (None: latents are pixels), denoiser_name."""

    @property
    def downscale(self):
        """Pixels per latent along one side."""
        return self.vae.cfg.downscale if self.vae else 1

    @property
    def multiple(self):
        """Heights and widths are multiples of this many pixels."""
        return self.downscale

    @property
    def size(self):
        """(height, width) in pixels that the model was made for."""
        size = self.net.cfg.sample_size or 64
        h, w = (size, size) if isinstance(size, int) else size
        return h * self.downscale, w * self.downscale

    @property
    def channels(self):
        """Of the latents."""
        return self.vae.cfg.latent_channels if self.vae else self.net.cfg.out_channels

    @property
    def inpaints(self):
        """Is it an inpainting model, whose UNet is given the mask and the masked picture's latents beside x?"""
        return self.vae is not None and self.net.cfg.in_channels == 2 * self.channels + 1

    def check_latents(self):
        net, name, channels = self.net.cfg, self.denoiser_name, self.channels
        if (net.in_channels, net.out_channels) != (channels, channels) and not (
            self.inpaints and net.out_channels == channels
        ):
            got = f"{net.in_channels} channels in and {net.out_channels} out"
            raise UserError(f"{name} has {got}, the VAE's latents have {channels}: they are not of one model")

    def check_size(self, height, width, named="`height` and `width`"):
        """Raise UserError for pictures that are too large for the model, or not of its only size. named: what set the size, in the error."""
        only = getattr(self.vae.cfg, "fixed_size", None) if self.vae else None
        if only and (height, width) != (only, only):
            raise UserError(f"{named}: this model's VAE makes {only}x{only} pictures only")
        positions = getattr(self.net.cfg, "pos_embed_max_size", None)  # of an MMDiT
        if positions and max(height, width) > positions * self.multiple:
            raise UserError(f"{named} can be at most {positions * self.multiple}: the model has no positions for more")

    def encode_pixels(self, pixels, noise):
        """[B, 3, H, W] in [-1, 1] -> latents: a posterior sample, as image-to-image starts from."""
        if self.vae is None:
            return pixels
        shape = (len(pixels), self.vae.cfg.latent_channels, *(s // self.downscale for s in pixels.shape[-2:]))
        drawn = noise(shape)
        return self._finite(lambda dtype: self.vae.encode(pixels.to(self.device, dtype), drawn.to(dtype)))

    def decode(self, latents, tiled=False):
        """latents -> pixels. A half-precision VAE that overflows is run again in fp32, with a line."""
        if self.vae is None:
            if tiled:
                raise UserError("`tiled`: this model works in pixels and has no VAE")
            return latents
        run = self.vae.decode_tiled if tiled else self.vae.decode
        return self._finite(lambda dtype: run(latents.to(dtype)))

    def vae_dtype(self):
        """The type in which the VAE is tried first."""
        return memory.dtype_of(self.vae)

    def _finite(self, run):
        """run(dtype of the VAE), again in fp32 when a half-precision result is not finite."""
        dtype = self.vae_dtype()
        with memory.at_work(self.vae, dtype):
            out = run(dtype)
        if not torch.isfinite(out).all() and dtype != torch.float32:
            say(f"note: the VAE overflowed in {dtype}; running it again in fp32")
            with memory.at_work(self.vae, torch.float32):
                out = run(torch.float32)
        if not torch.isfinite(out).all():
            raise UserError("the VAE's result is not finite (NaN or infinity): check its weights")
        return out
