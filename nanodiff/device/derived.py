"""What is derived from a module's weights and kept: beside them, in an attribute `phases` (models/upsample.py); what it says of a prompt (pipeline/conditions.py); a
recording of its kernels. Who changes, moves or records weights must say so here; a pipeline notices by itself, before it draws, what was written behind
PyTorch's back (`parameter.data`, as many averages of weights are copied): see noticed()."""

import torch

# weights that noticed() looks at beside those that something is derived from, and numbers of each
SAMPLED, EACH = 16, 8


def _keepers(module):
    return [m for m in module.modules() if hasattr(m, "phases")]


def weights_changed(module):
    """Let what was derived from the weights be derived again, at the next call."""
    module.changes = getattr(module, "changes", 0) + 1
    for m in _keepers(module):
        if m.phases:
            m.phases = ()


def stamp(tensor):
    """A number that is another one after every write that PyTorch sees; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


def _glance(t):
    """Some of its numbers [up to EACH], from the first to the last in memory."""
    dense = t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
    n = min(EACH, t.numel())
    return t.as_strided((n,), (max((t.numel() - 1) // max(n - 1, 1), 1),)) if dense else t.reshape(-1)[:n]


def noticed(module):
    """weights_changed(), where some numbers of the weights are others than at the last call: what writes to all of them, as averages are copied, is seen,
    what writes to a few numbers may not be."""
    own, kept = (
        [t.detach() for t in found if type(t) in (torch.Tensor, torch.nn.Parameter) and t.numel() and not t.is_meta]
        for found in (module.parameters(), (t for m in _keepers(module) for t in m.parameters()))
    )
    picked = [_glance(t) for t in (*own[:: max(1, len(own) // SAMPLED)], *kept)]
    seen = torch.cat([p.float() for p in picked]).cpu().numpy().tobytes() if picked else b""
    if seen != getattr(module, "seen", seen):
        weights_changed(module)
    module.seen = seen


def version(module):
    """A value that is another one when a module may say another thing of the same input: its weights were written or changed (weights_changed), or a hook
    beside them, such as a LoRA, came, went or has another `scale`. Where the weights lie is no part of it."""
    tensors = [*module.parameters(), *module.buffers()]
    hooks = [h for m in module.modules() for h in m._forward_hooks.values()]
    owners = [getattr(getattr(h, "func", h), "__self__", h) for h in hooks]
    written = tuple((stamp(t), t.dtype) for t in tensors)
    return getattr(module, "changes", 0), written, tuple((o, getattr(o, "scale", None)) for o in owners)


def has_lora(layer):
    """Does a LoRA run beside this layer's weights: attached (lora.Beside, or silent), or in training (lora.adapt)?"""
    return hasattr(layer, "lora_scale") or any(hasattr(hook, "silent") for hook in layer._forward_hooks.values())


def keep_none(module):
    """Derive nothing any more: the weights come and go, and what was derived would stay."""
    for m in _keepers(module):
        m.phases = None


def held(module):
    """What is derived now, to be held by one who reads it later (a CUDA graph)."""
    return [m.phases for m in _keepers(module)]
