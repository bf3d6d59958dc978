"""A GPU without one: tensors that have a device, shapes and strides but no memory, and a count of what would be started.

PyTorch's own operators are seen by a dispatch mode, our kernels where they would be handed to the driver. A convolution takes
the memory format that cuDNN would choose: channels last where its picture or its weights are.
"""

import collections
import contextlib
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from util import ROOT

import kernels
from kernels import launch, switch
from nanodiff import pipeline, weights
from nanodiff.models import layers
from nanodiff.weights import loading

MANIFESTS = ROOT / "tests" / "golden" / "manifests"
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "split", "split_with_sizes", "as_strided", "unsqueeze",
         "squeeze", "select", "unbind", "detach", "alias", "_reshape_alias", "narrow", "chunk", "device", "empty", "new_empty",
         "empty_like", "empty_strided", "lift_fresh"}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts by name inside a `with` block; `copies`: tensors that came from the host, for which it would wait."""

    def __init__(self):
        super().__init__()
        self.found, self.copies = collections.Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name not in VIEWS:
            self.found[name] += 1
        if name == "convolution" and args[2] is not None:
            # cuDNN's convolution has none: PyTorch adds it in a pass of its own
            self.found["a convolution's bias"] += 1
        if name in ("_to_copy", "copy_", "_local_scalar_dense", "item"):
            devices = {t.device.type for t in (*args, out) if isinstance(t, torch.Tensor)}
            if len(devices) > 1 or name in ("_local_scalar_dense", "item"):
                self.copies.append(name)
        return out

    @property
    def total(self):
        return sum(self.found.values())


@pytest.fixture
def gpu(monkeypatch):
    """Inside a test: fake tensors of device cuda, kernels for sm_90 that are counted by `Launches`, not run."""
    counting = []

    def started(self, *tensors):
        for counter in counting:
            counter.found[self.kernel.__name__.lstrip("_")] += 1

    def layout(x, w, backend):
        last = any(t.is_contiguous(memory_format=torch.channels_last) and t.stride(1) == 1 for t in (x, w))
        return torch.channels_last if last else torch.contiguous_format

    def adjacent(tensors):  # what join() makes of them: fake tensors have no addresses
        return tensors[0].new_empty((len(tensors) * len(tensors[0]), *tensors[0].shape[1:]))

    monkeypatch.setattr(launch.Launch, "__call__", started)
    monkeypatch.setattr(launch, "real", lambda x: True)
    monkeypatch.setattr(switch, "_old_gpu", lambda device: None)
    monkeypatch.setattr(torch._C, "_conv_determine_backend_memory_format", layout)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(layers, "_adjacent", adjacent)
    switch.set_target("sm_90")

    @contextlib.contextmanager
    def on_it(mode="triton"):
        counter = Launches()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), kernels.backend(mode), counter:
            counting.append(counter)
            yield counter
            counting.pop()

    yield on_it
    switch.set_target(None)


def network(name, part):
    """A published network on the fake GPU in bf16, its convolutions channels last as weights.load() gives them."""
    cls = pipeline.BUILDERS[part]
    cfg = cls.Config.from_json(json.loads((MANIFESTS / f"{name}.{part}.json").read_text())["config"])
    net = weights.skeleton(cls, cfg).eval().requires_grad_(False)
    wanted = [(k, v.shape, torch.bfloat16) for k, v in net.state_dict().items()]
    net.load_state_dict(loading._allocate(wanted, "cuda"), strict=True, assign=True)
    for module in net.modules():
        if hasattr(module, "phases"):  # made once, by indexing that fakes do not have on a PyTorch without CUDA
            module.phases = None
    return net.requires_grad_(False)


def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda")
