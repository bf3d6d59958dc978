"""Weight-only quantization of linear layers, for models that are larger than the card.

int8: w ≈ absmax/127 · code, one absmax a row (output), symmetric.
nf4: w ≈ absmax · NF4[code], one absmax for every 64 weights, two codes a byte; the sixteen levels are the quantiles of
N(0, 1), so that each is used equally often by normally distributed weights (Dettmers et al. 2023, "QLoRA", arXiv
2305.14314 §3 and appendix E). 4.5 bits a weight.
int4: w ≈ absmax/7 · (code - 8), one absmax for every 64 weights, for language models on a CPU.
Weights are turned back into the computing type layer by layer; activations are not quantized, but in the layers of a denoiser that a CPU multiplies in 8 bits (int8.py). A
text of one or a few rows is bound by the bytes of the weights, so there PyTorch's CPU kernels read the codes themselves (one row in bf16: half or a quarter of the time).
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError, short
from nanodiff.device import derived, int8, memory, onednn

BLOCK = 64
ROWS = 4096  # of a weight that are turned into codes at a time: a vocabulary's layer is large in fp32
MOST_ROWS = 8  # of x up to which a kernel that reads int8 codes is the quicker one
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
KINDS = ("int8", "nf4")
INSIDE = {"TransformerBlock", "JointBlock", "Block"}  # the repeated blocks of UNet, MMDiT and T5


def to_int8(weight):
    """[out, in] -> (codes int8 [out, in], absmax fp32 [out, 1])"""
    weight = weight.float()
    absmax = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    return (weight * (127 / absmax)).round().to(torch.int8), absmax


def from_int8(codes, absmax, dtype):
    return codes.to(dtype) * (absmax / 127).to(dtype)


def to_nf4(weight):
    """[out, in] -> (codes uint8 [out, in/2], absmax fp32 [out, in/64]); in is a multiple of 64."""
    out, width = weight.shape
    blocks = weight.float().view(out, width // BLOCK, BLOCK)
    absmax = blocks.abs().amax(dim=-1).clamp(min=1e-30)
    levels = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(blocks / absmax[..., None], (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    codes = codes.view(out, width)
    return codes[:, ::2] << 4 | codes[:, 1::2], absmax


def from_nf4(codes, absmax, dtype):
    levels = torch.tensor(NF4, device=codes.device, dtype=dtype)
    out, half = codes.shape
    # Both levels of a byte by one lookup in a table of 256 pairs.
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=-1)
    values = pairs[codes.int()].view(out, -1, BLOCK)
    return (values * absmax[..., None].to(dtype)).view(out, 2 * half)


def reads_codes(x):
    """Does PyTorch's CPU kernel multiply rows x by int8 codes, sooner than they would be turned back? It is made for bf16, and reads past the end of
    other widths than multiples of 16."""
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and rows <= MOST_ROWS and width % 16 == 0


def to_int4(weight):
    """[out, in] -> (codes in the layout of PyTorch's CPU kernel, scale bf16 [out, in/64]); in is a multiple of 64."""
    blocks = weight.float().view(len(weight), -1, BLOCK)
    scale = blocks.abs().amax(dim=-1).clamp(min=1e-30) / 7
    codes = (blocks / scale[..., None]).round().clamp(-8, 7).to(torch.int32).view(len(weight), -1) + 8
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scale.bfloat16()


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is kept as codes. `weight` gives it back in fp32."""

    def __init__(self, linear, kind):
        super().__init__()
        self.kind = kind
        self.out_features, self.in_features = linear.weight.shape
        self.stands_for = linear.weight.numel()
        parts = map(to_int8 if kind == "int8" else to_nf4, linear.weight.data.split(ROWS))
        codes, absmax = map(torch.cat, zip(*parts, strict=True))
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.bias = linear.bias

    def dequantized(self, dtype):
        return (from_int8 if self.kind == "int8" else from_nf4)(self.codes, self.absmax, dtype)

    @property
    def weight(self):
        return self.dequantized(torch.float32)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.kind == "int8" and reads_codes(x):
            rows = x.reshape(-1, self.in_features).contiguous()
            y = torch.ops.aten._weight_int8pack_mm(rows, self.codes, (self.absmax[:, 0] / 127).to(x.dtype))
            y = y.view(*x.shape[:-1], self.out_features)
            return y if bias is None else y + bias
        return F.linear(x, self.dequantized(x.dtype), bias)


class Int4Linear(nn.Module):
    """A linear layer without bias whose weight is kept as int4 codes in the layout of PyTorch's CPU kernel, which reads them for any number of rows."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.stands_for = linear.weight.numel()
        codes, scales = zip(*map(to_int4, linear.weight.data.split(ROWS)), strict=True)
        scales = torch.cat(scales).T.contiguous()  # [in/64, out], and a zero beside each
        self.register_buffer("codes", torch.cat(codes))
        self.register_buffer("scales", torch.stack([scales, torch.zeros_like(scales)], dim=-1))

    def forward(self, x):
        rows = x.reshape(-1, self.in_features).bfloat16().contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, BLOCK, self.scales)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


def language(model, kind):
    """Keep every linear layer of a CausalLM in `kind` ("int8", "int4"), in place, and beside its embedding a copy of the last layer's weight; returns the
    relative error (RMS) that this makes in the weights. Raises UserError for int4 elsewhere than on a CPU, and for widths that it cannot hold."""
    layers = [
        (p, name, c) for p in model.model.layers.modules() for name, c in p.named_children() if isinstance(c, nn.Linear)
    ]
    last = nn.Linear(*model.output.shape[::-1], bias=False, device="meta")
    last.weight = nn.Parameter(model.output.detach(), requires_grad=False)
    layers.append((model, "head", last))
    if kind == "int4":
        if model.output.device.type != "cpu":
            raise UserError("`quantize` int4 is for a CPU; on a GPU take int8")
        if odd := [c for _, _, c in layers if c.in_features % BLOCK or c.out_features % 16 or c.bias is not None]:
            raise UserError(
                f"`quantize` int4: a layer of {odd[0].in_features} x {odd[0].out_features} cannot be held; take int8"
            )
    wrong = whole = 0.0
    for parent, name, layer in layers:
        weight = layer.weight.data
        made = Int4Linear(layer) if kind == "int4" else QuantizedLinear(layer, kind)
        if kind == "int4":  # by its first 64 columns
            kept = made(torch.eye(layer.in_features, dtype=torch.bfloat16)[:BLOCK]).T.float()
        else:
            kept = from_int8(made.codes[:, :BLOCK], made.absmax, torch.float32)
        wrong += (kept - weight[:, :BLOCK].float()).pow(2).sum().item()
        whole += weight[:, :BLOCK].float().pow(2).sum().item()
        setattr(parent, name, made)
        memory.let_go([weight])
    return (wrong / whole) ** 0.5


def apply(model, kind, device="cpu", home=None):
    """Quantize every linear layer inside the repeated blocks of `model`, in place: computed on `device`, kept at `home`
    (default: there too). In int8, on a CPU with instructions for it, what the model names as behind a norm (after_norm(), convolutions too) is
    multiplied in 8 bits.

    Raises UserError for another kind than KINDS, when nothing is large enough (a width that is no multiple of 64 stays as it is in nf4), and for a model
    beside whose weights a LoRA runs, which would be lost.
    """
    if kind not in KINDS:
        raise UserError(f"`quantize` {short(kind)}: is none of {', '.join(KINDS)}")
    if any(derived.has_lora(m) for m in model.modules()):
        raise UserError(
            f"`quantize` {kind}: a LoRA runs beside the weights of this {model.class_name}; quantize it first, and attach the LoRA then"
        )
    onednn.undo(model)
    for layer, size in after_norm(model) if in_8_bits(kind, device) else ():
        weight = layer.weight.data
        shares = int8.balance(weight, size)
        pieces = weight.split(max(1, int8.PIECE // weight[0].numel()))
        parts = [to_int8((w * shares.view(-1, *[1] * (weight.dim() - 2))).flatten(1)) for w in pieces]
        codes, absmax = map(torch.cat, zip(*parts, strict=True))
        int8.pack(layer, codes.view(weight.shape), absmax[:, 0], shares)
        memory.let_go([weight])
    layers = _layers(model, kind)
    if not layers:
        raise UserError(f"`quantize` {kind}: {model.class_name} has no linear layer that it can hold")
    for parent, name, child in layers:
        weight = child.weight.data
        setattr(parent, name, QuantizedLinear(child.to(device), kind).to(home or device))
        memory.let_go([weight])
    return model


def _layers(model, kind):
    """[(parent, name, linear layer)] of what apply() quantizes."""
    blocks = [m for m in model.modules() if type(m).__name__ in INSIDE]
    found = [(p, name, c) for b in blocks for p in b.modules() for name, c in p.named_children()]
    return [
        f
        for f in found
        if isinstance(f[2], nn.Linear)
        and not hasattr(f[2], "codes")
        and (kind == "int8" or f[2].in_features % BLOCK == 0)
    ]


def in_8_bits(kind, device):
    """Whether apply() lets layers multiply in 8 bits, convolutions too."""
    return kind == "int8" and torch.device(device).type == "cpu" and int8.usable()


@torch.no_grad()
def after_norm(model):
    """[(layer, size of its input's channels [C])] of the layers that a model, or else its modules, name as behind a norm, and that can be multiplied
    in 8 bits."""
    owners = [model] if hasattr(model, "after_norm") else [m for m in model.modules() if hasattr(m, "after_norm")]
    named = [pair for m in owners for pair in m.after_norm()]
    return [(layer, size) for layer, size in named if int8.fits(layer)]


def sizes(model, kind, device):
    """{id of a weight: bytes it takes} of what apply() would quantize."""
    convolutions = [layer for layer, _ in after_norm(model)] if in_8_bits(kind, device) else []
    per = {"int8": lambda w: w.numel() + 4 * w.shape[0], "nf4": lambda w: w.numel() / 2 + 4 * w.numel() / BLOCK}[kind]
    return {id(c.weight): per(c.weight) for c in (*convolutions, *(c for _, _, c in _layers(model, kind)))}


def rest(model, dtype, device):
    """Bring everything that is not quantized to its device and computing type."""
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        exact = key.endswith((".codes", ".absmax"))
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        tensor.data = tensor.data.to(device, tensor.dtype if exact else dtype, memory_format=layout)
