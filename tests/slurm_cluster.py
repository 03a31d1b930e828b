"""A real Slurm on this machine: munged, slurmctld and two slurmd in a folder of their own, as long
as a block lasts.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
path = f"{os.environ['PATH']}:/usr/sbin"
missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
# REQUIRE_SLURM is what CI sets: there a missing program is a failure
without_slurm = pytest.mark.skipif(
    bool(missing) and not os.environ.get("REQUIRE_SLURM"),
    reason=f"needs slurm-wlm and munge ({', '.join(missing)} not found)",
)


def needs_slurm(test):
    """Mark a test that runs on a real Slurm."""
    return pytest.mark.slurm(without_slurm(test))


# cred_expire is how long a requeued job waits before it starts again; config_overrides lets the
# nodes have more cores than the machine; `urgent` preempts what runs on the GPU node, whose GPU is
# the null device
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
NodeName=thin NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=12000 Feature=rome,256g
NodeName=gpu NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=8000 Gres=gpu:1
PartitionName=thin_course Nodes=thin Default=YES MaxTime=60
PartitionName=gpu_course Nodes=gpu MaxTime=30 MaxCPUsPerNode=4
PartitionName=urgent Nodes=gpu MaxTime=5 PriorityTier=10
PartitionName=closed Nodes=thin State=DOWN
"""


# a cluster of shell scripts: what real ones do and this machine's does not
FAKE_COMMANDS = {
    "sinfo": """
        echo 'thin_course*|up|1:00:00|16|64000|(null)'
        echo 'gpu_course|up|30:00|18|8000|gpu'
    """,
    "squeue": "",
    "scancel": 'echo "scancel $*" >> "$FAKE_LOG"',
    "sbatch": """
        echo "sbatch $*" >> "$FAKE_LOG"
        num=$(grep -c ^sbatch "$FAKE_LOG")
        [ "$num" -le "${FAKE_MAX_JOBS:-9}" ] || { echo QOSMaxSubmitJobPerUserLimit >&2; exit 1; }
        echo "$FAKE_BANNER"
        echo "$((5000 + 10 * num))"
    """,
}


def fake_cluster(folder: Path, **variables) -> dict:
    """An environment in which Slurm's commands are FAKE_COMMANDS. What was asked of sbatch and
    scancel stands in FOLDER/log, a line a call.
    """
    for name, script in FAKE_COMMANDS.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
    named = {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_LOG": str(folder / "log")}
    return clean_environment() | {"FAKE_BANNER": ""} | named | variables


def clean_environment() -> dict:
    """The environment without what a job or `make test` around the tests has put there."""
    outer = ("SLURM_", "SBATCH_", "MAKE", "MFLAGS")
    return {key: value for key, value in os.environ.items() if not key.startswith(outer)}


def free_ports(num: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


@contextlib.contextmanager
def running_cluster(folder: Path):
    """Yield the environment in which Slurm's commands talk to a cluster in `folder`; whatever
    happens, all of it is ended.
    """
    folder.chmod(0o755)  # munged trusts no socket that others could replace
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    config = CONFIG.format(folder=folder, host=host, user=getpass.getuser(), ports=free_ports(3))
    (folder / "slurm.conf").write_text(config)
    (folder / "gres.conf").write_text("NodeName=gpu Name=gpu Count=1 File=/dev/null\n")
    environment = clean_environment()
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    environment["PATH"] += ":/usr/sbin"
    munge = [f"--socket={folder}/munge.socket"]
    for name in ("key", "pid", "log", "seed"):
        munge.append(f"--{name}-file={folder}/munge.{name}")
    commands = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "thin"],
        ["slurmd", "-D", "-N", "gpu"],
    ]
    daemons = []
    with open(folder / "daemons.log", "wb") as log:
        try:
            for command in commands:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
                if command[0] == "munged":
                    wait_for(lambda: (folder / "munge.socket").exists(), "munged to answer")
            wait_for(
                lambda: run(["sinfo", "-h", "-o", "%T"], environment).split() == ["idle"],
                "all nodes to be idle",
                60,
            )
            yield environment
        finally:
            for command in (["scancel", "--user", getpass.getuser()], ["scontrol", "shutdown"]):
                subprocess.run(command, env=environment, capture_output=True, timeout=30)
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()


def kill_job(number: str) -> int:
    """SIGKILL to every process of a running job, its script first, as if the node had died; how
    many there were.
    """
    killed = 0
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            if f"SLURM_JOB_ID={number}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
                killed += 1
    return killed


def run(command, environment) -> str:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60
    ).stdout


def wait_for(condition, what: str, seconds: float = 120):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")
