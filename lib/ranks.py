"""The processes of a run, called ranks: what they exchange, and the signals that stop them."""

import contextlib
import datetime
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lib.command import STOP_SIGNALS, BadInput, one_line, say
from lib.machine import read_count

# how long a rank waits for another one, which may be reading data
PATIENCE = datetime.timedelta(minutes=30)


def set_handlers(handlers: dict) -> dict:
    """Set the handler of each signal, and return those from before."""
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


class StopFlag:
    """True once Ctrl-C, SIGTERM (preemption, scancel) or SIGUSR1 (before the time limit) has come.
    A second Ctrl-C interrupts at once.
    """

    signal = None

    def __enter__(self):
        self.previous = set_handlers(dict.fromkeys(STOP_SIGNALS, self.receive))
        return self

    def __exit__(self, *_):
        set_handlers(self.previous)

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

    They exchange tensors through host memory. NCCL refuses ranks that share a GPU, or have slices
    of one.
    """

    rank: int = 0
    num: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's part of `values` (B,) of a batch: those of its shards, in order."""
        return values.chunk(self.num)[self.rank]

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The `values` of every rank, in rank order. All have the same shape."""
        if self.num == 1:
            return [values]
        sent = values.cpu().contiguous()
        gathered = [torch.empty_like(sent) for _ in range(self.num)]
        dist.all_gather(gathered, sent)
        return [part.to(values.device) for part in gathered]

    def any(self, flag: bool) -> bool:
        """Whether the flag of any rank is set. All ranks give the same answer."""
        return any(self.gather(torch.tensor(bool(flag))))

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
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return _tree(parts[:half]) + _tree(parts[half:])


def require_equal_shares(num_shards: int, num_ranks: int, hint: str = "") -> None:
    """Raise BadInput, ending with `hint`, where ranks cannot share out the shards equally."""
    if num_shards % num_ranks or num_ranks & (num_ranks - 1):
        raise BadInput(
            f"{num_ranks} ranks cannot share out {num_shards} shards: both must be powers of two,"
            f" shards not fewer{hint}"
        )


def _first_node() -> str:
    """The name of the machine that has rank 0, where srun started the ranks."""
    if os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


@contextlib.contextmanager
def join_ranks(num_shards: int) -> Iterator[Ranks]:
    """Yield the Ranks of this process, one of several under torchrun or srun with more than one
    task.

    Raises BadInput where they cannot share out the shards equally, or do not reach each other. It
    names the variables that make this a rank: a shell inside a job may have them left over.
    """
    rank_name, num_name = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
    if "WORLD_SIZE" in os.environ:  # torchrun's
        rank_name, num_name = "RANK", "WORLD_SIZE"
    rank, num = read_count(rank_name, 0), read_count(num_name, 1)
    if num == 1:
        yield ALONE
        return
    hint = (
        f": {rank_name}={rank} and {num_name}={num} make this one of several ranks; if that is left"
        f" over, `env -u {rank_name} -u {num_name} python ...` trains alone"
    )
    require_equal_shares(num_shards, num, hint)
    if rank_name == "SLURM_PROCID":
        os.environ.setdefault("MASTER_ADDR", _first_node())
        os.environ.setdefault("MASTER_PORT", str(20000 + read_count("SLURM_JOB_ID", 0) % 20000))
    say(f"rank {rank} waits for the others{hint}")
    # Python's handlers do not run while torch waits for the others: a signal ends the process
    handlers = set_handlers(dict.fromkeys(STOP_SIGNALS, signal.SIG_DFL))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=num, timeout=PATIENCE)
    except (dist.DistError, ValueError) as error:
        raise BadInput(f"the ranks do not reach each other ({one_line(error)}){hint}") from None
    finally:
        set_handlers(handlers)
    try:
        yield Ranks(rank, num)
    finally:
        dist.destroy_process_group()
