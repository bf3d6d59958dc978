"""A denoising step, or a training step's forward and backward pass, as one CUDA graph: hundreds of kernels started by one call.

At batch 1 the host cannot start kernels as fast as a large GPU finishes them. A graph records them once, with the memory
they use, and replays them; so everything that changes from step to step, or from prompt to prompt, must arrive in the
same tensors. One recording then serves every run of the same shapes.

Explained in the book (docs/book): chapter 16.
"""

import sys

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from nanodiff.device import derived

WARM_UP = 2  # calls before recording: kernels are compiled and libraries choose their algorithms in these
MOST = 8  # recordings that are kept, the latest


class Replayed:
    """f(x, t, *conditions), recorded at its third call with the same shapes and types and replayed from then on.

    x: a tensor. t: a tensor, or a number, of which f gets a tensor [1] on x's device. conditions: tensors in tuples and lists, equal
    from step to step; they are copied into the recording when others are given (other objects: they are not changed in place). f must not wait for the GPU and must
    depend on nothing else that changes. If it cannot be recorded, that is said once and f is called as it is. The recordings share
    their memory: they never run at the same time, and what one gives is copied out of it.
    """

    def __init__(self, f):
        self.f, self.kinds, self.pool = f, {}, None

    @property
    def recordings(self):
        return [kind for kind in self.kinds.values() if isinstance(kind, _Recording)]

    def memory(self):
        """Bytes of device memory that the recordings keep for themselves."""
        pools = {tuple(r.graph.pool()) for r in self.recordings}
        segments = torch.cuda.memory_snapshot() if pools else ()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) in pools)

    def __call__(self, x, t, *conditions):
        t = t if isinstance(t, torch.Tensor) else torch.full((1,), float(t), device=x.device)
        leaves, shape = tree_flatten(conditions)
        key = (str(shape), *((leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in (x, t, *leaves)))
        kind = self.kinds.get(key, 0)
        if kind == WARM_UP:
            kind = self._record(x, t, leaves, shape)
        elif isinstance(kind, int) and kind < WARM_UP:
            kind += 1
        self.kinds[key] = kind
        if isinstance(kind, _Recording):
            return kind.replay(x, t, leaves)
        return self.f(x, t, *conditions)

    def _record(self, x, t, leaves, shape):
        if len(self.recordings) >= MOST:
            del self.kinds[next(key for key, kind in self.kinds.items() if isinstance(kind, _Recording))]
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            return _Recording(self.f, x, t, leaves, shape, self.pool)
        except RuntimeError as e:
            print(
                f"note: no CUDA graph ({str(e).splitlines()[0]}); steps are started kernel by kernel", file=sys.stderr
            )
            return WARM_UP + 1


class _Recording:
    """One graph, the tensors that it reads, and the one that it writes."""

    def __init__(self, f, x, t, leaves, shape, pool):
        self.x, self.t = x.clone(), t.clone()
        self.leaves, self.given = [leaf.clone() for leaf in leaves], leaves
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(x.device), torch.cuda.graph(self.graph, pool, torch.cuda.Stream(x.device)):
            self.out = f(self.x, self.t, *tree_unflatten(self.leaves, shape))
        # what was derived from weights and is read by the graph must not be freed before it
        self.derived = derived.held(f) if isinstance(f, torch.nn.Module) else []

    def replay(self, x, t, leaves):
        self.x.copy_(x)
        self.t.copy_(t)
        if any(new is not old for new, old in zip(leaves, self.given, strict=True)):
            torch._foreach_copy_(self.leaves, leaves)
            self.given = leaves
        self.graph.replay()
        return self.out.clone()  # the next replay writes over it


class Learning:
    """A module in training whose forward and backward passes are a CUDA graph each (torch's make_graphed_callables). For networks so small that
    the host takes longer to start their kernels than a GPU to run them.

    A call is recorded when one like it (shapes, types, which arguments want gradients) comes for the second time, with gradients and in
    training mode; all other calls run as they are. The arguments are tensors, in tuples and lists or not. A recording reads and writes
    the same places each time: one forward pass, its backward pass, and the gradients taken out, before the next forward pass.
    """

    def __init__(self, module):
        self.module, self.kinds, self.places, self.pool = module, {}, None, None

    def __call__(self, *args):
        if not (torch.is_grad_enabled() and self.module.training):
            return self.module(*args)
        places = [p.data_ptr() for p in self.module.parameters()]
        if places != self.places:  # what was recorded reads where weights were
            self.kinds, self.places, self.pool = {}, places, None
        leaves = tree_flatten(args)[0]
        kind = tuple((a.shape, a.dtype, a.requires_grad) if isinstance(a, torch.Tensor) else a for a in leaves)
        if kind not in self.kinds:
            if len(self.kinds) < MOST:
                self.kinds[kind] = None
        elif self.kinds[kind] is None:
            self.kinds[kind] = self._record(args) or self.module
        return (self.kinds.get(kind) or self.module)(*args)

    def _record(self, args):
        """What computes these arguments' kind by graphs, or None, which is said."""
        leaves, shape = tree_flatten(args)
        own, kind = self.module.__dict__.get("forward"), leaves[0].device.type
        try:
            samples = [a.detach().clone().requires_grad_(a.requires_grad) for a in leaves]
            low, on = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            self.pool = self.pool or torch.cuda.graph_pool_handle()  # its recordings never run at the same time
            # the stream: one that a failed recording leaves behind would stay the current one
            with torch.cuda.stream(torch.cuda.current_stream()), torch.autocast(kind, low, on, cache_enabled=False):
                made = torch.cuda.make_graphed_callables(
                    self.module, tuple(tree_unflatten(samples, shape)), allow_unused_input=True, pool=self.pool
                )
            return made.forward
        except Exception as e:
            said = (str(e).splitlines() or [type(e).__name__])[0]
            print(f"note: no CUDA graph ({said}); kernels are started one by one", file=sys.stderr)
        finally:
            self.module.__dict__.pop("forward", None)  # what was put over the class's
            if own:
                self.module.forward = own
