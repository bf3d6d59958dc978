"""What is derived from a module's weights and kept: beside them, in an attribute `phases` (models/upsample.py); what it says of a prompt (pipeline/conditions.py); a
recording of its kernels. Who changes, moves or records weights must say so here."""


def _keepers(module):
    return [m for m in module.modules() if hasattr(m, "phases")]


def weights_changed(module):
    """Let what was derived from the weights be derived again, at the next call."""
    module.changes = getattr(module, "changes", 0) + 1
    for m in _keepers(module):
        if m.phases:
            m.phases = ()


def version(module):
    """A value that is another one when a module may say another thing of the same input: its weights were written or changed (weights_changed), or a hook
    beside them, such as a LoRA, came, went or has another `scale`. Where the weights lie is no part of it."""
    tensors = [*module.parameters(), *module.buffers()]
    hooks = [h for m in module.modules() for h in m._forward_hooks.values()]
    owners = [getattr(getattr(h, "func", h), "__self__", h) for h in hooks]
    written = tuple(0 if t.is_inference() else t._version for t in tensors)
    return getattr(module, "changes", 0), written, tuple((o, getattr(o, "scale", None)) for o in owners)


def keep_none(module):
    """Derive nothing any more: the weights come and go, and what was derived would stay."""
    for m in _keepers(module):
        m.phases = None


def held(module):
    """What is derived now, to be held by one who reads it later (a CUDA graph)."""
    return [m.phases for m in _keepers(module)]
