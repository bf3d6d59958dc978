"""Recorded steps: what is called when, with a graph that stands for CUDA's; the real one is in tests/kernels/test_gpu.py."""

import contextlib

import pytest
import torch

from nanodiff.device import cudagraph


class Graph:
    """Records a function and what it wrote; replays by running it once more on the recorded tensors."""

    now = None  # the one that is being recorded

    def __init__(self):
        self.again = lambda: None

    def replay(self):
        self.again()

    def pool(self):
        return (0, id(self))


@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda's names, on a CPU. Yields a list to which a failure can be appended."""
    failures = []

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        if failures:
            raise RuntimeError(failures[0])
        Graph.now = graph
        yield
        Graph.now = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    return failures


def step(calls):
    """x · 2 + t + Σ conditions; `calls` grows by one at each call, and a recorded one writes into the same tensor again."""

    def f(x, t, *conditions):
        def result():
            return x * 2 + t + sum(a + b for a, b in conditions)

        calls.append(float(t))
        out = result()
        if Graph.now is not None:
            Graph.now.again = lambda: out.copy_(result())
        return out

    return f


def full(value):
    return torch.full((3,), float(value))


def test_recorded_at_the_third_call():
    calls = []
    replayed = cudagraph.Replayed(step(calls))
    for i in range(2):
        torch.testing.assert_close(replayed(full(i), 10 * i), full(12 * i))
    assert calls == [0, 10] and replayed.recordings == []


def test_replayed_from_then_on(graphs):
    calls = []
    replayed = cudagraph.Replayed(step(calls))
    for i in range(3):
        third = replayed(full(i), 7)
    assert len(calls) == 3 and len(replayed.recordings) == 1
    torch.testing.assert_close(replayed(full(5), 1), full(11))
    torch.testing.assert_close(replayed(full(6), torch.tensor([2.0])), full(14))
    torch.testing.assert_close(third, full(11), msg="a later replay does not write over it")
    assert len(calls) == 3, "replayed, not called"


def test_one_recording_serves_every_prompt(graphs):
    """Conditions are copied in when others are given, and only then."""
    calls = []
    replayed = cudagraph.Replayed(step(calls))
    first, second = ((full(1), full(2)),), ((full(10), full(20)),)
    for _ in range(4):
        torch.testing.assert_close(replayed(full(0), 0, *first), full(3))
    torch.testing.assert_close(replayed(full(0), 0, *second), full(30))
    torch.testing.assert_close(replayed(full(0), 0, *second), full(30))
    first[0][0].fill_(5)
    torch.testing.assert_close(replayed(full(0), 0, *first), full(7))
    assert len(calls) == 3 and len(replayed.recordings) == 1


def test_other_shapes_and_types_are_recorded_apart(graphs):
    calls = []
    replayed = cudagraph.Replayed(step(calls))
    for x in (torch.ones(3), torch.ones(4), torch.ones(3, dtype=torch.float64)):
        for _ in range(4):
            torch.testing.assert_close(replayed(x, 1), x * 3)
    assert len(replayed.recordings) == 3 and len(calls) == 9


def test_the_latest_recordings_are_kept(graphs, monkeypatch):
    monkeypatch.setattr(cudagraph, "MOST", 2)
    replayed = cudagraph.Replayed(step([]))
    for n in (3, 4, 5):
        for _ in range(3):
            replayed(torch.ones(n), 1)
    assert [len(r.x) for r in replayed.recordings] == [4, 5]
    torch.testing.assert_close(replayed(torch.ones(3), 1), full(3), msg="one that is gone is recorded anew, in time")


def test_what_a_graph_reads_outlives_its_model(graphs):
    """Weights derived from weights (upsample.Upsample.phases) are held by the recording."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.phases = (1, 2)

        def forward(self, x, t):
            return x + t

    net = Net()
    replayed = cudagraph.Replayed(net)
    for _ in range(3):
        replayed(full(1), 1)
    held, net.phases = net.phases, ()
    assert replayed.recordings[0].derived == [held]


def test_a_failure_is_said_once_and_steps_go_on(graphs, capsys):
    graphs.append("operation not permitted when stream is capturing")
    replayed = cudagraph.Replayed(step([]))
    for i in range(5):
        torch.testing.assert_close(replayed(torch.ones(2), i), torch.full((2,), 2.0 + i))
    assert capsys.readouterr().err.count("no CUDA graph (operation not permitted") == 1


def test_memory_is_that_of_the_recordings_own(graphs, monkeypatch):
    replayed = cudagraph.Replayed(step([]))
    assert replayed.memory() == 0
    for _ in range(3):
        replayed(full(0), 0)
    mine = replayed.recordings[0].graph.pool()
    segments = [{"total_size": 5, "segment_pool_id": mine}, {"total_size": 7, "segment_pool_id": (0, 0)}]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert replayed.memory() == 5


@pytest.fixture
def recorder(monkeypatch):
    """torch's make_graphed_callables on a CPU: what it returns computes on the arguments' copies, as a graph does. Yields [what was recorded,
    "replayed" for each replay]; an error in place of that when one was appended to `recorder.failures`."""

    class Made(list):
        pass

    made = Made()
    made.failures = []

    def graphed(module, samples, allow_unused_input, pool):
        if made.failures:
            raise RuntimeError(made.failures[0])
        made.append((samples, torch.is_autocast_cache_enabled(), torch.is_autocast_enabled("cpu"), pool))
        forward = module.forward

        def replay(*args):
            made.append("replayed")
            return forward(*args)

        module.forward = replay
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


def recordings(recorder):
    return [made for made in recorder if made != "replayed"]


def test_a_module_that_learns_is_recorded_at_the_second_call(recorder):
    net = torch.nn.Linear(3, 2)
    learning = cudagraph.Learning(net)
    x = torch.randn(4, 3, requires_grad=True)
    assert torch.equal(learning(x), net(x)) and not recorder
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(learning(x), net(x))
    (samples, cached, low, _), replayed = recorder
    assert replayed == "replayed" and not cached and low
    assert samples[0] is not x and samples[0].requires_grad and samples[0].shape == x.shape
    learning(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert recorder.count("replayed") == 2 and net.weight.grad is not None
    assert "forward" not in net.__dict__  # the module itself is called as it was


def test_arguments_in_tuples(recorder):
    class Net(torch.nn.Linear):
        def forward(self, x, added):
            return super().forward(x + added[0]) + added[1][0]

    net, given = Net(3, 2), (torch.randn(4, 3), (torch.randn(4, 3), [torch.randn(4, 2)]))
    learning = cudagraph.Learning(net)
    for _ in range(3):
        assert torch.equal(learning(*given), net(*given))
    assert recorder.count("replayed") == 2


def test_kinds_are_recorded_apart_in_one_pool_and_not_without_end(recorder):
    net = torch.nn.Linear(3, 2)
    learning = cudagraph.Learning(net)
    for n in (*range(1, 12), *range(1, 12)):
        learning(torch.randn(n, 3))
    made = recordings(recorder)
    assert [m[0][0].shape[0] for m in made] == list(range(1, cudagraph.MOST + 1)) and len({m[3] for m in made}) == 1


@pytest.mark.parametrize("other", ["no gradients", "evaluation"])
def test_a_look_in_between_runs_as_it_is(recorder, other):
    net = torch.nn.Linear(3, 2)
    learning = cudagraph.Learning(net)
    for _ in range(2):
        learning(torch.randn(4, 3))
    net.train(other != "evaluation")
    x = torch.randn(4, 3)
    with torch.set_grad_enabled(other != "no gradients"):
        assert torch.equal(learning(x), net(x))
    assert recorder.count("replayed") == 1


def test_weights_elsewhere_are_recorded_again(recorder):
    """Such as those that layers.join() puts side by side when a sheet is drawn: a graph would read where they were."""
    net = torch.nn.Linear(3, 2)
    learning = cudagraph.Learning(net)
    for _ in range(3):
        learning(torch.randn(4, 3))
    net.weight.data = net.weight.data.clone()
    for _ in range(3):
        learning(torch.randn(4, 3))
    assert len(recordings(recorder)) == 2


def test_what_cannot_be_recorded_learns_all_the_same(recorder, capsys):
    recorder.failures.append("operation not permitted when stream is capturing\nand more")
    net = torch.nn.Linear(3, 2)
    learning = cudagraph.Learning(net)
    for _ in range(4):
        learning(torch.randn(4, 3)).sum().backward()
    said = capsys.readouterr().err
    assert (
        said.count("note: no CUDA graph (operation not permitted when stream is capturing); ") == 1
        and net.weight.grad is not None
    )
