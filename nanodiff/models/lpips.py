"""VGG16's features, and two perceptual distances on them.

`LPIPS`: unit-normalised features after five stages, squared differences weighed by learned 1×1 layers, mean over
places, sum over stages (Zhang et al. 2018, arXiv 1801.03924 eq. 1). `features_mse`: the mean squared difference of the
features after the third stage (Johnson et al. 2016, arXiv 1603.08155 §3.2).
Weights are never downloaded: torchvision's `vgg16-397923af.pth` converted to safetensors (names `features.N.weight`), and
LPIPS v0.1's linear layers (`lin0.model.1.weight`, …).
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError
from nanodiff.weights import as_weights, is_pickle, load_pickle, load_weights

WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
TAPS = (3, 8, 15, 22, 29)  # after these ReLUs
CHANNELS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, for inputs in [-1, 1]


class VGG16(nn.Module):
    """pixels [B, 3, H, W] in [-1, 1] -> feature maps after relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""

    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for width in WIDTHS:
            if width == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
                c = width
        self.features = nn.Sequential(*layers)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    def forward(self, pixels, taps=TAPS):
        """A list of maps [B, Cᵢ, H/2ⁱ, W/2ⁱ], one for each of `taps`; what lies behind the last is not computed."""
        x, found = (pixels - self.shift) / self.scale, []
        for i, layer in enumerate(self.features[: max(taps) + 1]):
            x = layer(x)
            if i in taps:
                found.append(x)
        return found

    def features_mse(self, a, b):
        """[B]: mean squared difference after relu3_3."""
        fa, fb = (self(x, TAPS[2:3])[0].float() for x in (a, b))
        return (fa - fb).pow(2).flatten(1).mean(1)


class LPIPS(nn.Module):
    """(a, b) [B, 3, H, W] in [-1, 1] -> distance [B]."""

    def __init__(self):
        super().__init__()
        self.vgg = VGG16()
        self.lins = nn.ModuleList([nn.Conv2d(c, 1, 1, bias=False) for c in CHANNELS])

    def distance(self, fa, fb):
        """[B] from two lists of feature maps."""
        total = 0.0
        for a, b, lin in zip(fa, fb, self.lins, strict=True):
            # length one at every place: what is seen there counts, not how strongly the network answers to it
            a, b = (f.float() / (f.float().pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
            total = total + F.conv2d((a - b).pow(2), lin.weight.float()).mean((1, 2, 3))
        return total

    def forward(self, a, b):
        return self.distance(self.vgg(a), self.vgg(b))


def load_vgg(path, allow_pickle=False):
    """VGG16 from a file with torchvision's names, frozen. Raises UserError when it is another network's."""
    pickled = allow_pickle and is_pickle(path)
    tensors = as_weights(load_pickle(path), path) if pickled else load_weights(path)
    return fill(VGG16(), {k: v for k, v in tensors.items() if k.startswith("features.")}, path)


def load_lpips(vgg, lins):
    """LPIPS from VGG16's file and that of the linear layers, frozen."""
    model = LPIPS()
    model.vgg = load_vgg(vgg)
    tensors = load_weights(lins)
    fill(model.lins, {f"{i}.weight": tensors.get(f"lin{i}.model.1.weight") for i in range(5)}, lins)
    return model.eval().requires_grad_(False)


def fill(module, tensors, path):
    """A module with these tensors, frozen, in eval mode. Raises UserError when one is missing or misshapen."""
    wanted = module.state_dict()
    wrong = [k for k in wanted if tensors.get(k) is None or tensors[k].shape != wanted[k].shape]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors are missing or of another shape, such as {wrong[0]}")
    module.load_state_dict({k: tensors[k].float() for k in wanted})
    return module.eval().requires_grad_(False)
