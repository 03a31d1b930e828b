"""The processes of a run, called ranks: what they exchange, and the signals that stop them."""

import contextlib
import datetime
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lib.command import STOP_SIGNALS, BadInput, one_line, say
from lib.machine import read_count

# steps from one exchange of stop flags to the next: in an exchange all ranks wait for the slowest
ASK_EVERY = 8
# how long a rank waits for another one, which may be reading data
PATIENCE = datetime.timedelta(minutes=30)
NOTE_S = 15  # a rank that waits longer for the others to start says so
# (rank, number of ranks) in the environment, as torchrun sets them, and srun
RANK_VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))


@dataclass
class StopFlag:
    """True once Ctrl-C, SIGTERM (preemption, scancel) or SIGUSR1 (before the time limit) has come.
    A second Ctrl-C interrupts at once.
    """

    signal: int | None = None

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number, _frame):
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self):
        return self.signal is not None


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. They have equal weights and share out the shards of each batch. The
    first one writes the files.

    With `via_host` tensors on a GPU are exchanged through host memory: some ranks share a GPU,
    which NCCL refuses.
    """

    rank: int = 0
    num: int = 1
    via_host: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's part of `values` (B,) of a batch: those of its shards, in order."""
        return values.chunk(self.num)[self.rank]

    def shard_range(self, num_shards: int) -> range:
        """The numbers of the shards that this rank computes."""
        num_own = num_shards // self.num
        return range(self.rank * num_own, (self.rank + 1) * num_own)

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The `values` of every rank, in rank order. All have the same shape."""
        if self.num == 1:
            return [values]
        sent = values.cpu() if self.via_host else values.contiguous()
        gathered = [torch.empty_like(sent) for _ in range(self.num)]
        dist.all_gather(gathered, sent)
        return [part.to(values.device) for part in gathered]

    def any(self, flag: bool, step: int) -> bool:
        """Whether the flag of any rank is set. All ranks give the same answer: they exchange their
        flags every ASK_EVERY steps, and at other steps the answer is False.
        """
        if self.num == 1:
            return bool(flag)
        if step % ASK_EVERY:
            return False
        flags = self.gather(torch.tensor(int(bool(flag))))  # on the CPU: no GPU is waited for
        return any(flags)

    def wait(self) -> None:
        """Wait until every rank has called this."""
        self.gather(torch.zeros(1))

    def tree_sum(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The sum of the parts of all ranks, added as a binary tree ((a+b)+(c+d)). Their number is
        a power of two. The order does not depend on which rank has a part.
        """
        return _tree(self.gather(_tree(parts)))


ALONE = Ranks()


def _tree(parts: list[torch.Tensor]) -> torch.Tensor:
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def require_equal_shares(num_shards: int, num_ranks: int) -> None:
    """Raise BadInput where the ranks cannot share out the shards equally."""
    if num_shards % num_ranks or num_ranks & (num_ranks - 1):
        raise BadInput(
            f"{num_ranks} ranks cannot share out {num_shards} shards: both must be powers of two,"
            " shards not fewer"
        )


def _first_node() -> str:
    """The name of the machine that has rank 0, where srun started the ranks."""
    if os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def _read_environment() -> tuple[int, int, str]:
    """(rank, number of ranks, hint) of this process, from torchrun or else srun. The hint names
    the variables that say so: a shell inside a job, or a notebook, may have them left over.

    For srun it sets the variables that tell torch.distributed where the ranks meet.
    """
    for rank_name, num_name in RANK_VARIABLES:
        rank, num = read_count(rank_name, -1), read_count(num_name, 0)
        if rank >= 0 and num:
            break
    else:
        return 0, 1, ""
    remedy = f"if that is left over, `env -u {rank_name} -u {num_name} python ...` trains alone"
    hint = f"{rank_name}={rank} and {num_name}={num} make this one of several ranks; {remedy}"
    if num > 1 and rank_name == "SLURM_PROCID":
        os.environ.setdefault("MASTER_ADDR", _first_node())
        os.environ.setdefault("MASTER_PORT", str(20000 + read_count("SLURM_JOB_ID", 0) % 20000))
    return rank, num, hint


def _share_a_gpu(num_ranks: int, device: torch.device) -> bool:
    """Whether some of the ranks have the same GPU."""
    own = f"{platform.node()} {torch.cuda.get_device_properties(device).uuid}"
    gpus = [""] * num_ranks
    dist.all_gather_object(gpus, own)  # over the CPU
    return len(set(gpus)) < num_ranks


def meet(rank: int, num: int, device: torch.device) -> Ranks:
    """Connect this process to the other ranks, and make a first exchange with them."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Python's handlers do not run while torch waits for the others: a signal ends the process
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    try:
        dist.init_process_group(backend, rank=rank, world_size=num, timeout=PATIENCE)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    ranks = Ranks(rank, num, via_host=device.type == "cuda" and _share_a_gpu(num, device))
    ranks.gather(torch.zeros(1, device=device))
    return ranks


@contextlib.contextmanager
def join_ranks(device: torch.device, num_shards: int) -> Iterator[Ranks]:
    """Yield the Ranks of this process, one of several under torchrun or srun with more than one
    task.

    Raises BadInput where they cannot share out the shards equally, or do not reach each other.
    """
    rank, num, hint = _read_environment()
    if num == 1:
        yield ALONE
        return
    try:
        require_equal_shares(num_shards, num)
    except BadInput as error:
        raise BadInput(f"{error}: {hint}") from None
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    note = threading.Timer(NOTE_S, say, [f"waiting at {place} for the other ranks: {hint}"])
    note.start()
    try:
        ranks = meet(rank, num, device)
    except (dist.DistError, ValueError) as error:
        reason = "the ranks do not reach each other, or have slices of one GPU"
        raise BadInput(f"{reason} ({one_line(error)}): {hint}") from None
    finally:
        note.cancel()
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
