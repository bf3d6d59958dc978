"""Several processes as one run: ranks, agreement, who may write; DDP, FSDP2 and checkpointing applied from outside.

    torchrun --standalone --nproc-per-node 2 train.py diffusion …       (gloo on CPUs, nccl on GPUs)

Rules: rank 0 alone writes; what it decides is told to all before anybody acts on it, and its mistake is raised by all
(`on_main`). A process that fails says so first through the rendezvous store, so that the cause is printed once and the
others, whose connections break, leave in silence. A model knows nothing of all this: it is wrapped here.
"""

import datetime
import functools
import os
import sys
import time
import warnings
from typing import NamedTuple

import torch
import torch.distributed as td
from torch import nn
from tqdm import tqdm

from nanodiff import commandline
from nanodiff.config import UserError
from nanodiff.device import derived

# The repeated parts of the models by class name: what is sharded, or computed again in the backward pass, as a unit.
UNITS = {"ResnetBlock", "TransformerBlock", "JointBlock", "Block", "Layer"}
CAUSE = "nanodiff/first-cause"


class World(NamedTuple):
    rank: int = 0
    size: int = 1
    local: int = 0


def world():
    """This process's place, from torchrun's environment variables."""
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return World(rank, size, local)


def is_main():
    return world().rank == 0


def say(message):
    """A line for people, from rank 0 alone."""
    if is_main():
        print(commandline.flagged(message), file=sys.stderr)


def progress(items, total, what):
    """The items, under a progress bar on rank 0: a bar in a terminal, else a line every half minute."""
    terminal, said = sys.stderr.isatty(), time.monotonic()
    for i, item in enumerate(tqdm(items, total=total, desc=what, disable=not (is_main() and terminal))):
        yield item
        if not terminal and time.monotonic() - said > 30:
            say(f"{what}: {i + 1}/{total}")
            said = time.monotonic()


def start(device, timeout):
    """Join the other processes; alone, where torchrun started this one, make a group of one. timeout: seconds after which a process that does not answer is lost."""
    alone = world().size == 1 and (device.type == "mps" or "TORCHELASTIC_RUN_ID" not in os.environ)
    if alone or td.is_initialized():
        return
    if device.type == "mps":
        raise UserError("`device` mps: several processes compute on CUDA or on the CPU")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(td.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout)))
    td.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=td.PrefixStore("nanodiff", store),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )
    commandline.speaks = functools.partial(_speaks, store)


def finish():
    """Leave the group of processes."""
    commandline.speaks = None
    if td.is_initialized():
        _settle()
        td.destroy_process_group()


def _settle():
    """Give Gloo's threads the time to let go of the last exchange, for which they need Python's lock, before their group goes, or Python itself.

    Else the group waits, holding the lock, for a thread that waits for the lock, without end; or Python's end takes the lock from the
    thread, which aborts the process ("terminate called without an active exception").
    """
    time.sleep(0.1)


def _speaks(store, error):
    """May this process print its failure? Only the first one does; a broken connection is another's failure first."""
    _settle()
    lost = isinstance(error, RuntimeError) and not isinstance(error, UserError)
    try:
        if lost:  # the process that caused this may still be on its way to the store
            for _ in range(20):
                if store.check([CAUSE]):
                    return False
                time.sleep(0.1)
        mine = f"{world().rank} {os.getpid()}"
        return store.compare_set(CAUSE, "", mine).decode() == mine
    except RuntimeError:  # the store is gone, and with it the process that kept it
        return is_main()


def on_main(act, *args, **kwargs):
    """act(…) on rank 0; every rank returns its result, or raises its UserError."""
    box = [None, None]
    if is_main():
        try:
            box[0] = act(*args, **kwargs)
        except UserError as e:
            box[1] = str(e)
    if td.is_initialized():
        td.broadcast_object_list(box)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def gathered(value):
    """[value of rank 0, value of rank 1, …], on every rank."""
    if not td.is_initialized():
        return [value]
    values = [None] * world().size
    td.all_gather_object(values, value)
    return values


def together(act, *args, **kwargs):
    """act(…) on every rank; when one of them raises a UserError, all raise the first rank's."""
    try:
        result, fault = act(*args, **kwargs), None
    except UserError as e:
        result, fault = None, str(e)
    for message in gathered(fault):
        if message is not None:
            raise UserError(message)
    return result


def agree(value, what):
    """Raise UserError unless every rank has the same value."""
    values = gathered(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"rank {rank} was started with another {what} than rank 0; start all processes alike")


def total(values, device):
    """A list of numbers, each summed over all ranks, in float64."""
    if not td.is_initialized():
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    td.all_reduce(tensor)
    return tensor.tolist()


# ---------------------------------------------------------------------------------------------------------
# Models


def units(module):
    return [m for m in module.modules() if type(m).__name__ in UNITS]


def parallelize(module, how, device, dtype=None):
    """What to call in place of `module`: DDP's wrapper, the module sharded in place (FSDP2), or itself when alone.

    dtype: the type in which a sharded model computes; its shards, gradients' sums and optimizer stay fp32.
    """
    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if not td.is_initialized():
            raise UserError("`parallel` fsdp needs torchrun (one process is enough: `nproc_per_node` 1)")
        mesh = init_device_mesh(device.type, (world().size,))
        # inputs stay as they are: autocast casts what it should, and timesteps do not fit bf16
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        derived.keep_none(module)
        for part in (*units(module), module):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        return module
    if world().size == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch >= 2.13 has another name for broadcast_buffers, which older ones do not know
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(
            module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def synchronise(module, yes):
    """Whether the next backward pass through a parallelized module exchanges gradients."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.require_backward_grad_sync = yes
    elif hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(yes)


def recompute(module, random=False):
    """Keep only the inputs of each unit in the forward pass and compute the rest again in the backward pass
    (Chen et al. 2016, arXiv 1604.06174). Names and weights stay. random: units draw random numbers (dropout), which must
    be the same again."""
    from torch.utils.checkpoint import checkpoint

    for unit in units(module):
        unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False, preserve_rng_state=random)


def whole_state(module):
    """{name: tensor} of a module's parameters and buffers, complete, on rank 0 (in host memory when they were shards); other
    ranks get {}. Every rank must ask."""
    state = {}
    for name, tensor in module.state_dict().items():
        full = tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor
        if is_main():
            state[name] = full
    return state


def whole(tensor):
    """A tensor of which this rank may hold a shard, complete. Every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
