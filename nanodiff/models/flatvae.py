"""A VAE whose latent is one vector: pixels [B, 3, R, R] in [-1, 1]  ⇄  `latent_dim` numbers.

Strided convolutions with residual blocks down to R/16, one linear layer to mean and log-variance of q(z|x) (Kingma &
Welling 2014, arXiv 1312.6114 §3), and back: a linear layer, then residual blocks and sub-pixel convolutions
(PixelShuffle; Shi et al. 2016, arXiv 1609.05158 eq. 4). It needs one picture size. What it lacks in detail it has in
brevity: 128 numbers are a whole picture.

To the rest of the project it is a VAE like AutoencoderKL: its vector is handed out as a map [B, latent_dim/16, 4, 4],
which any UNet takes; the places in the map mean nothing.
"""

from dataclasses import dataclass

from torch import nn

from nanodiff.config import UserError, from_json
from nanodiff.models.layers import GroupNorm, ResnetBlock

SIDE = 4  # of the map in which the vector is handed out
LOGVAR = (-10.0, 2.0)  # what log-variances are clamped to
EPS = 1e-6


@dataclass
class Config:
    """Fields of config.json."""

    sample_size: int = 128  # pixels along one side
    latent_dim: int = 128
    block_out_channels: tuple[int, ...] = (64, 128, 256, 512)
    norm_num_groups: int = 32
    scaling_factor: float = 1.0
    shift_factor: float | None = None
    force_upcast: bool | None = False

    @classmethod
    def from_json(cls, raw, where="vae/config.json"):
        """Raises UserError, naming `where` and the field, for sizes that do not divide each other."""
        cfg = from_json(cls, raw, {}, where)
        if cfg.latent_dim % SIDE**2 or not cfg.latent_dim:
            raise UserError(f"{where}: latent_dim = {cfg.latent_dim} must be a multiple of {SIDE**2}")
        if cfg.sample_size % 2 ** len(cfg.block_out_channels):
            raise UserError(
                f"{where}: sample_size = {cfg.sample_size} must be a multiple of {2 ** len(cfg.block_out_channels)}"
            )
        return cfg

    @property
    def latent_channels(self):
        """Channels of the map in which the vector is handed out."""
        return self.latent_dim // SIDE**2

    @property
    def downscale(self):
        """Pixels per place of the map."""
        return self.sample_size // SIDE

    @property
    def fixed_size(self):
        """The only height and width."""
        return self.sample_size


class FlatVAE(nn.Module):
    """See the module docstring. forward(), encode(), decode() as AutoencoderKL has them."""

    Config = Config
    class_name = "FlatVAE"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        widths, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.side = cfg.sample_size >> len(widths)  # of the last feature map
        down, c = [nn.Conv2d(3, widths[0], 3, padding=1)], widths[0]
        for w in widths:
            down += [nn.Conv2d(c, w, 4, stride=2, padding=1), ResnetBlock(w, w, groups, EPS)]
            c = w
        self.encoder = nn.Sequential(*down, GroupNorm(groups, c, EPS, silu=True), nn.Flatten())
        self.moments = nn.Linear(c * self.side**2, 2 * cfg.latent_dim)
        self.expand = nn.Linear(cfg.latent_dim, c * self.side**2)
        up = []
        for w in (*reversed(widths[:-1]), widths[0]):
            up += [ResnetBlock(c, c, groups, EPS), nn.Conv2d(c, 4 * w, 3, padding=1), nn.PixelShuffle(2)]
            c = w
        self.decoder = nn.Sequential(*up, GroupNorm(groups, c, EPS, silu=True), nn.Conv2d(c, 3, 3, padding=1))
        nn.init.constant_(self.moments.bias[cfg.latent_dim :], -3.0)  # begin with little noise in the latents

    def encode_moments(self, pixels):
        """pixels in [-1, 1] -> (mean, logvar) of q(z|x), each [B, latent_dim/16, 4, 4]."""
        if pixels.shape[-2:] != (self.cfg.sample_size,) * 2:
            raise UserError(
                f"this VAE takes {self.cfg.sample_size}x{self.cfg.sample_size} pixels, not {pixels.shape[-1]}x{pixels.shape[-2]}"
            )
        mean, logvar = self.moments(self.encoder(pixels)).chunk(2, dim=1)
        shape = (len(pixels), self.cfg.latent_channels, SIDE, SIDE)
        return mean.view(shape), logvar.clamp(*LOGVAR).view(shape)

    def decode_raw(self, z):
        """The map [B, latent_dim/16, 4, 4], not scaled -> pixels [B, 3, R, R]."""
        h = self.expand(z.flatten(1))
        return self.decoder(h.view(len(z), -1, self.side, self.side))

    def forward(self, pixels, noise):
        """(reconstruction, mean, logvar) with a sample of the posterior, noise ~ N(0, I)."""
        mean, logvar = self.encode_moments(pixels)
        return self.decode_raw(mean + (0.5 * logvar).exp() * noise), mean, logvar

    def encode(self, pixels, noise=None):
        """pixels -> latents: a sample of the posterior when `noise` ~ N(0, I) is given, else its mean."""
        mean, logvar = self.encode_moments(pixels)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - (self.cfg.shift_factor or 0.0)) * self.cfg.scaling_factor

    def decode(self, latents):
        """latents -> pixels, about [-1, 1] (not clamped)."""
        return self.decode_raw(latents / self.cfg.scaling_factor + (self.cfg.shift_factor or 0.0))

    def decode_tiled(self, latents, tile=64):
        """decode(): every pixel depends on the whole vector, so there is nothing to tile."""
        return self.decode(latents)
