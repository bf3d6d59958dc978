"""A recorded step: what is called when, with a graph that stands for CUDA's; the real one is in tests/kernels/test_gpu.py."""

import contextlib

import pytest
import torch

from nanodiff import cudagraph


class Graph:
    """Records by running once more; replays by running on the recorded tensors."""

    recorded = None

    def replay(self):
        Graph.recorded()


@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda's names, on a CPU. Yields a list to which a failure can be appended."""
    failures = []

    @contextlib.contextmanager
    def capture(graph):
        if failures:
            raise RuntimeError(failures[0])
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return failures


def step(calls):
    def f(x, t):
        calls.append(t.clone())
        return x * 2 + t

    return f


def test_recorded_at_the_third_call(graphs):
    calls = []
    replayed = cudagraph.Replayed(step(calls))
    for i in range(2):
        torch.testing.assert_close(replayed(torch.full((3,), float(i)), 10 * i), torch.full((3,), 12.0 * i))
    assert len(calls) == 2 and replayed.graph is None

    def again():
        replayed.out.copy_(replayed.x * 2 + replayed.t)

    Graph.recorded = again
    third = replayed(torch.ones(3), 7)
    assert len(calls) == 3 and isinstance(replayed.graph, Graph)
    fourth = replayed(torch.full((3,), 5.0), 1)
    torch.testing.assert_close(third, torch.full((3,), 9.0), msg="a later replay does not write over it")
    torch.testing.assert_close(fourth, torch.full((3,), 11.0))
    assert len(calls) == 3, "replayed, not called"


def test_a_failure_is_said_once_and_steps_go_on(graphs, capsys):
    graphs.append("operation not permitted when stream is capturing")
    replayed = cudagraph.Replayed(step([]))
    for i in range(5):
        torch.testing.assert_close(replayed(torch.ones(2), i), torch.full((2,), 2.0 + i))
    assert capsys.readouterr().err.count("no CUDA graph (operation not permitted") == 1
