"""What a module derives from its weights and keeps beside them, in an attribute `phases` (models/upsample.py): who changes, moves or
records weights must say so here."""


def _keepers(module):
    return [m for m in module.modules() if hasattr(m, "phases")]


def weights_changed(module):
    """Let what was derived from the weights be derived again, at the next call."""
    for m in _keepers(module):
        if m.phases:
            m.phases = ()


def keep_none(module):
    """Derive nothing any more: the weights come and go, and what was derived would stay."""
    for m in _keepers(module):
        m.phases = None


def held(module):
    """What is derived now, to be held by one who reads it later (a CUDA graph)."""
    return [m.phases for m in _keepers(module)]
