"""Inception-v3, the network behind FID, KID and the Inception Score: pictures [B, 3, 299, 299] -> 2048 numbers each.

Szegedy et al. 2015, arXiv 1512.00567. Two networks share the names of their tensors:
- `fid`: the one of the first FID program (Heusel et al. 2017), TensorFlow's 2015-12-05 weights carried over: average pools do not count
  their padding, the last block takes the maximum instead of the average, 1008 classes.
- `torchvision`: 1000 classes, pools that count their padding.
Files: `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid; torch-fidelity's is the same) and `inception_v3_google-0cc3c7bd.pth`.

    299²  3   three convolutions, a pool      ->  73²   64   (tap 64)
     73²  64  two convolutions, a pool        ->  35²  192   (tap 192)
     35²      three A, one B                  ->  17²  768
     17²      four C: 1×7 and 7×1 in turn     ->  17²  768   (tap 768)
     17²      one D, two E                    ->   8² 2048, averaged over places (tap 2048), then the classes

24 million weights. Why this one: figures of papers are comparable only when all use the same network, resize and file; as
a judge of pictures it is neither new nor good (Stein et al. 2023, arXiv 2306.04675).

`fold()` is for inference: each batch norm goes into its convolution. Same numbers but for rounding.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.device.onednn import unusable

VARIANTS = {"fid": 1008, "torchvision": 1000}
EPS = 1e-3
TAPS = {64: "after the first pool", 192: "after the second pool", 768: "before Mixed_7a", 2048: "the last"}


class BasicConv2d(nn.Module):
    """Convolution without bias, batch norm, ReLU: [B, C_in, H, W] -> [B, C_out, H', W']."""

    def __init__(self, i, o, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=EPS)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _chain(x, *layers):
    for layer in layers:
        x = layer(x)
    return x


class Block(nn.Module):
    """Branches side by side over the same input, concatenated over channels.

    branches: tuples of layer names; ("pool", name) pools first; a name may be a pair, whose two outputs are both kept.
    """

    def __init__(self, branches, count_padding):
        super().__init__()
        self.branches, self.count_padding = branches, count_padding

    def pool(self, x):
        """3×3 average, same size: [B, C, H, W] -> [B, C, H, W]."""
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=self.count_padding)

    def forward(self, x):
        """[B, C, H, W] -> [B, ΣC of the branches, H, W], or half the size with a "down"."""
        return torch.cat([part for branch in self.branches for part in self.run(x, branch)], 1)

    def run(self, x, branch):
        """What one branch makes of x: a list of one tensor, or of two where it ends in a pair."""
        for name in branch:
            if isinstance(name, tuple):
                return [getattr(self, n)(x) for n in name]
            x = self.pool(x) if name == "pool" else _down(x) if name == "down" else getattr(self, name)(x)
        return [x]


def _down(x):
    """3×3 maximum with stride 2: [B, C, H, W] -> [B, C, (H-1)/2, (W-1)/2]."""
    return F.max_pool2d(x, 3, 2)


class InceptionA(Block):  # 35×35
    """1×1, 5×5, two 3×3 (as wide a view for less work), pool."""

    def __init__(self, c, pooled, count_padding):
        super().__init__(
            [
                ("branch1x1",),
                ("branch5x5_1", "branch5x5_2"),
                ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                ("pool", "branch_pool"),
            ],
            count_padding,
        )
        self.branch1x1 = BasicConv2d(c, 64, 1)
        self.branch5x5_1 = BasicConv2d(c, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(c, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(c, pooled, 1)


class InceptionB(Block):  # 35×35 -> 17×17
    """Half the size: two ways of strided convolutions, and a pool."""

    def __init__(self, c):
        super().__init__([("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), ("down",)], True)
        self.branch3x3 = BasicConv2d(c, 384, 3, 2)
        self.branch3x3dbl_1 = BasicConv2d(c, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, 2)


class InceptionC(Block):  # 17×17
    """7×7 taken apart into 1×7 and 7×1 (§3.2): 14 products a channel in place of 49."""

    def __init__(self, c7, count_padding):
        super().__init__(
            [
                ("branch1x1",),
                ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
                tuple(f"branch7x7dbl_{i}" for i in range(1, 6)),
                ("pool", "branch_pool"),
            ],
            count_padding,
        )
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = BasicConv2d(768, 192, 1)
        self.branch7x7_1 = BasicConv2d(768, c7, 1)
        self.branch7x7_2 = BasicConv2d(c7, c7, **row)
        self.branch7x7_3 = BasicConv2d(c7, 192, **column)
        self.branch7x7dbl_1 = BasicConv2d(768, c7, 1)
        self.branch7x7dbl_2 = BasicConv2d(c7, c7, **column)
        self.branch7x7dbl_3 = BasicConv2d(c7, c7, **row)
        self.branch7x7dbl_4 = BasicConv2d(c7, c7, **column)
        self.branch7x7dbl_5 = BasicConv2d(c7, 192, **row)
        self.branch_pool = BasicConv2d(768, 192, 1)


class InceptionD(Block):  # 17×17 -> 8×8
    """Half the size again."""

    def __init__(self):
        super().__init__(
            [("branch3x3_1", "branch3x3_2"), tuple(f"branch7x7x3_{i}" for i in range(1, 5)), ("down",)], True
        )
        self.branch3x3_1 = BasicConv2d(768, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, 2)
        self.branch7x7x3_1 = BasicConv2d(768, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, 2)


class InceptionE(Block):  # 8×8
    """The widest: 1×3 and 3×1 beside each other, both kept. maximum: the FID network's last block, whose pool is no average."""

    def __init__(self, c, count_padding, maximum=False):
        super().__init__(
            [
                ("branch1x1",),
                ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
                ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
                ("pool", "branch_pool"),
            ],
            count_padding,
        )
        self.maximum = maximum
        self.branch1x1 = BasicConv2d(c, 320, 1)
        self.branch3x3_1 = BasicConv2d(c, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = BasicConv2d(c, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(c, 192, 1)

    def pool(self, x):
        return F.max_pool2d(x, 3, 1, 1) if self.maximum else super().pool(x)


class InceptionV3(nn.Module):
    """See the module docstring. Pixels in about [-1, 1]."""

    class_name = "InceptionV3"

    def __init__(self, variant="fid"):
        super().__init__()
        self.variant, padded = variant, variant == "torchvision"
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32, padded)
        self.Mixed_5c = InceptionA(256, 64, padded)
        self.Mixed_5d = InceptionA(288, 64, padded)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(128, padded)
        self.Mixed_6c = InceptionC(160, padded)
        self.Mixed_6d = InceptionC(160, padded)
        self.Mixed_6e = InceptionC(192, padded)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, padded)
        self.Mixed_7c = InceptionE(2048, padded, maximum=variant == "fid")
        self.fc = nn.Linear(2048, VARIANTS[variant])

    def forward(self, pixels, tap=2048):
        """pixels [B, 3, 299, 299] -> features [B, tap], averaged over places; tap is 64, 192, 768 or 2048."""
        x = _down(_chain(pixels, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3))
        if tap == 64:
            return x.mean((2, 3))
        x = _down(_chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3))
        if tap == 192:
            return x.mean((2, 3))
        x = _chain(x, self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a)
        x = _chain(x, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)
        if tap == 768:
            return x.mean((2, 3))
        return _chain(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c).mean((2, 3))

    def logits(self, features):
        """features [B, 2048] -> class logits; the FID network's without the bias, as the Inception Score takes them."""
        return F.linear(features, self.fc.weight, None if self.variant == "fid" else self.fc.bias)


# ---------------------------------------------------------------------------------------------------------
# For inference


class Folded(nn.Module):
    """A convolution with the batch norm behind it inside, and the ReLU; on a CPU one oneDNN operator with its weight packed."""

    def __init__(self, part):
        super().__init__()
        scale = part.bn.weight.double() / (part.bn.running_var.double() + part.bn.eps).sqrt()
        conv = part.conv
        self.register_buffer("weight", (conv.weight.double() * scale[:, None, None, None]).float())
        self.register_buffer("bias", (part.bn.bias.double() - part.bn.running_mean.double() * scale).float())
        self.where = (conv.padding, conv.stride, conv.dilation, 1)
        self.packed, self.shape = None, None

    def forward(self, x):
        padding, stride, dilation, groups = self.where
        if x.device.type != "cpu" or unusable(x.dtype):
            return F.relu(F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups), inplace=True)
        if self.shape != x.shape:  # the layout depends on it
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.where, tuple(x.shape))
            self.shape = x.shape
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *self.where, "relu", [], "")


def fold(model):
    """The same network for inference: see the module docstring. Channels-last inputs are the fastest."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BasicConv2d):
                setattr(module, name, Folded(child))
    return model
