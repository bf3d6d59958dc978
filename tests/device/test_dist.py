"""One process's share of running as several (what two processes do: tests/scripts/test_train_parallel.py)."""

import pytest
import torch
from torch import nn
from util import run

from nanodiff import commandline, config
from nanodiff.config import UserError
from nanodiff.device import dist
from nanodiff.models.layers import ResnetBlock


def test_alone_everything_is_said_and_done(capsys):
    assert dist.world() == (0, 1, 0) and dist.is_main()
    assert dist.on_main(lambda a: a + 1, 2) == 3 and dist.gathered("x") == ["x"] and dist.total([1, 2], "cpu") == [1, 2]
    dist.agree(1, "configuration")
    dist.say("hello")
    assert capsys.readouterr().err == "hello\n"
    for call in (dist.on_main, dist.together):
        with pytest.raises(UserError, match="mine"):
            call(lambda: (_ for _ in ()).throw(UserError("mine")))


def test_others_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist.say("hello")
    assert capsys.readouterr().err == "" and dist.world() == (1, 2, 0)


def test_recomputation_changes_no_gradient_and_no_name():
    torch.manual_seed(0)
    plain, again = ResnetBlock(8, 8, 4, 1e-5), ResnetBlock(8, 8, 4, 1e-5)
    again.load_state_dict(plain.state_dict())
    net = nn.Sequential(again)
    dist.recompute(net)
    assert set(net.state_dict()) == {f"0.{k}" for k in plain.state_dict()}
    x = torch.randn(2, 8, 6, 6)
    calls = []
    again.conv1.register_forward_hook(lambda *a: calls.append(1))
    for m in (plain, again):
        m(x).pow(2).sum().backward()
    assert len(calls) == 2, "the forward pass ran again"
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


class Store(dict):
    """What torch.distributed's store does, of which dist needs two calls."""

    def check(self, keys):
        return all(k in self for k in keys)

    def compare_set(self, key, expected, value):
        return self.setdefault(key, value).encode()


def test_the_first_to_fail_speaks(monkeypatch):
    store = Store()
    assert dist._speaks(store, UserError("x"))
    assert dist._speaks(store, UserError("x")), "the same process may go on speaking"
    monkeypatch.setattr(dist.os, "getpid", lambda: 1)
    assert not dist._speaks(store, UserError("y")) and not dist._speaks(
        store, RuntimeError("Connection closed by peer")
    )

    class Gone(Store):
        def check(self, keys):
            raise RuntimeError("gone")

    assert dist._speaks(Gone(), RuntimeError("x")) is True, "without a store rank 0 speaks"


def test_what_ends_a_script():
    """Exit codes and lines, also of failures that only several processes know."""
    verdict = commandline._verdict
    assert verdict(UserError("a\nb"), "")[0] == 2 and verdict(KeyboardInterrupt(), "") == (130, "interrupted")
    assert verdict(config.Stopped(), "") == (143, "terminated") and verdict(ValueError("x"), "") == (None, None)
    assert "try less" in verdict(torch.OutOfMemoryError("CUDA out of memory"), "try less")[1]
    lost = RuntimeError("gloo: Connection closed by peer")
    assert verdict(lost, "") == (None, None)
    commandline.speaks = lambda e: True
    try:
        assert verdict(lost, "")[0] == 1 and verdict(RuntimeError("shapes do not match"), "") == (None, None)
    finally:
        commandline.speaks = None


@pytest.mark.parametrize(
    "said",
    [
        "gloo: Connection closed by peer",
        "Application timeout caused pair closure",
        "NCCL error in: x",
        "Timed out after 20 s",
    ],
)
def test_a_lost_process_is_known_by_its_words(monkeypatch, said):
    """What PyTorch says of a broken connection, in each of its wordings (the second has been met once, on a busy machine)."""
    monkeypatch.setattr(commandline, "speaks", lambda error: True)
    code, line = commandline._verdict(RuntimeError(said), "")
    assert code == 1 and line.startswith("error: another process was lost, or did not answer in time")


LEAVE = """
import sys, torch; sys.path.insert(0, ".")
from torch import nn
from nanodiff.device import dist
sys.setswitchinterval(1000)  # nobody gets Python's lock unless it is given away
torch.set_num_threads(1)
for i in range(30):
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/{i}", rank=0, world_size=1)
    net = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    net(torch.ones(2, 4)).sum().backward()
    dist.finish()
    del net  # and with it the group
print("left")
"""


def test_leaving_does_not_wait_for_itself(tmp_path):
    """Gloo's threads need Python's lock to let go of the last exchange: a group that goes at once waits for ever, within some 20 rounds."""
    assert run("-c", LEAVE, tmp_path, timeout=100).stdout == "left\n"
