"""A denoising step as one CUDA graph: hundreds of kernels started by one call.

At batch 1 the host cannot start kernels as fast as a large GPU finishes them. A graph records them once, with the memory
they use, and replays them; so everything that changes from step to step must arrive in the same tensors, and a recording
serves one run with one text (its keys and values are part of it).
"""

import sys

import torch

WARM_UP = 2  # calls before recording: kernels are compiled and libraries choose their algorithms in these


class Replayed:
    """f(x, t) recorded at its third call and replayed from then on (a shorter run is not recorded). x: a tensor of one
    shape; t: a number.

    f is called with t as a tensor [1] on x's device, must not wait for the GPU, and must depend on nothing else that
    changes. If it cannot be recorded, that is said once and f is called as it is.
    """

    def __init__(self, f):
        self.f, self.calls, self.graph = f, 0, None

    def __call__(self, x, t):
        self.calls += 1
        if self.graph is None and self.calls > WARM_UP:
            self._record(x, t)
        if not self.graph:
            return self.f(x, torch.full((1,), float(t), device=x.device))
        self.x.copy_(x)
        self.t.fill_(float(t))
        self.graph.replay()
        return self.out.clone()  # the next replay writes over it

    def _record(self, x, t):
        self.x, self.t = x.clone(), torch.full((1,), float(t), device=x.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(x.device), torch.cuda.graph(graph):
                self.out = self.f(self.x, self.t)
        except RuntimeError as e:
            print(
                f"note: no CUDA graph ({str(e).splitlines()[0]}); steps are started kernel by kernel", file=sys.stderr
            )
            graph = False
        self.graph = graph
