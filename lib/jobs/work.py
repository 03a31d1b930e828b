"""What the Make targets run: their variables, and a script with arguments for each of its tasks."""

import argparse
import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path

from lib.command import REPOSITORY, BadInput, expand_home, one_line
from lib.files import read_cache

COUNT, COUNT_WORDS = r"[1-9]\d*", "a number from 1 on, such as 2"
NUMBERS = r"\d+(,\d+)*"
# Make variables: what they may look like, what they are when not given, and the form in words
VARIABLES = {
    "SEED": (r"\d+", "1", "a number, such as 1"),
    "SEEDS": (NUMBERS, "1,2,3", "numbers with commas between them, such as 1,2,3"),
    "K": (r"[2-9]|[1-9]\d+", "5", "a number from 2 on, such as 5"),
    "NUM_RANKS": (COUNT, "1", COUNT_WORDS),
    "PARTITION": (
        r"\w[\w.-]*(,\w[\w.-]*)*",
        "",
        "the name of a partition, or several with commas between them",
    ),
    "TIME": (
        r"(\d+-)?\d+(:\d+){0,2}|(?i:infinite|unlimited)",
        "",
        "a time, such as 30 (minutes), 0:30:00 or 1-12:00:00",
    ),
    "CPUS": (COUNT, "", COUNT_WORDS),
    "MEM": (r"[1-9]\d*[MG]", "", "a size in M or G, such as 8G"),
    "AFTER": (NUMBERS, "", "numbers of jobs with commas between them, such as 123,124"),
    "JOB": (r"\d+(_\d+)?", "", "the number of a job, such as 123 or 123_4"),
    "STAGE_DATA": (r"[01]", "0", "1 to copy the data to the node first, or 0"),
    "SEARCH": (
        r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}",
        "",
        "a name of at most 40 letters, digits, _ and -, such as lr-1",
    ),
    "PROCESSES": (COUNT, "1", COUNT_WORDS),
}
FREE_VARIABLES = ("ARGS", "DATA", "OUT", "SPACE")
# sbatch's own variables, which count where the Make variable is not given
SBATCH_VARIABLES = {"PARTITION": "SBATCH_PARTITION", "TIME": "SBATCH_TIMELIMIT"}


def read_variables(environment) -> dict[str, str]:
    """The Make variables in an environment. Raises BadInput for one that could mean anything but
    what it is for.
    """
    values = {name: expand_home(environment.get(name, "")) for name in FREE_VARIABLES}
    for name, (form, default, words) in VARIABLES.items():
        source = name if environment.get(name) else SBATCH_VARIABLES.get(name, name)
        value = environment.get(source) or default
        if value and not re.fullmatch(form, value, re.ASCII):
            raise BadInput(f"{source} is {value!r}, it must be {words}")
        values[name] = value
    return values


def split_arguments(text: str) -> list[str]:
    """ARGS as a list: quotes hold together what has spaces, and no shell sees any of it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(f"ARGS {text!r}: {one_line(error).lower()}") from None


def parse_arguments(script: str, arguments: list[str]) -> argparse.Namespace:
    """A script's arguments as it parses them itself. Raises BadInput for what it does not know."""
    return runpy.run_path(str(REPOSITORY / script))["parse"](arguments)


@dataclass(frozen=True)
class Work:
    """What a Make target runs: a script with arguments, once, or once for each of `tasks` with a
    further key=value.
    """

    script: str
    arguments: list[str]
    varied: str = ""  # the key that differs between tasks
    tasks: tuple[str, ...] = ()
    only_reads: bool = False  # what other jobs have computed: it needs one core and no GPU
    mends: bool = False  # what tasks of the job before left undone: it starts only if one failed

    def arguments_of_tasks(self) -> list[list[str]]:
        if not self.tasks:
            return [self.arguments]
        return [[*self.arguments, f"{self.varied}={task}"] for task in self.tasks]


def build_work(target: str, variables: dict[str, str]) -> Work:
    """The work of `make TARGET`."""
    arguments, data, out = split_arguments(variables["ARGS"]), variables["DATA"], variables["OUT"]
    out_options = ["--out", out] if out else []
    if target == "audit":
        if not data or not Path(data).is_dir():
            raise BadInput(f"make audit needs DATA=DIR, the PCam folder to audit, {data!r} is none")
        return Work("audit.py", ["data", data, *out_options, *arguments])
    if target == "bench":
        options = ["--data", data] if data else []
        return Work("benchmark.py", ["all", *options, *out_options, *arguments])
    if data:
        arguments.append(f"data_dir={data}")
    if target == "seeds":
        seeds = dict.fromkeys(variables["SEEDS"].split(","))
        return Work("train.py", arguments, "seed", tuple(seeds))
    if "--resume" not in arguments:
        arguments.insert(0, f"seed={variables['SEED']}")
    if target == "folds":
        arguments.append(f"num_folds={variables['K']}")
        folds = range(int(variables["K"]))
        return Work("train.py", arguments, "fold", tuple(map(str, folds)))
    return Work("train.py", arguments)


def sweep_stages(name: str, num_rows: list[int], arguments: list[str]) -> list[Work]:
    """A planned search as jobs, one after the other: three for each rung.

    An array carries out the rows, a job those that a killed task left, and a job promotes or, at
    last, names the champion.
    """
    stages = []
    last_rung = len(num_rows) - 1
    for rung, num in enumerate(num_rows):
        which = [name, "--rung", str(rung)]
        ending = ["promote", *which] if rung < last_rung else ["champion", name]
        rows = tuple(map(str, range(num)))
        stages += [
            Work("sweep.py", ["run", *which, *arguments], "--row", rows),
            Work("sweep.py", ["run", *which, "--all", *arguments], mends=True),
            Work("sweep.py", [*ending, *arguments], only_reads=True),
        ]
    return stages


def job_of(meta: Path) -> dict:
    """The Slurm job that a run's meta.json names; empty for one that names none, or cannot be
    read.
    """
    return read_cache(meta).get("job") or {}


def requeued_arguments(arguments: list[str], environment) -> list[str]:
    """train.py's arguments when a job starts again: its run resumed, if it got as far as to make
    one.

    The run remembers its job, in meta.json, so that there is no second file that has to agree with
    it.
    """
    args = parse_arguments("train.py", arguments)
    names = ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME")
    own_job = [environment.get(name) for name in names]
    for meta in sorted(Path(args.runs).glob("*/meta.json"), reverse=True):
        job = job_of(meta)
        if [job.get(name) for name in names] == own_job:
            # the run has its own config
            in_config = {*args.overrides, "--config", args.config, f"--config={args.config}"}
            flags = [word for word in arguments if word not in in_config]
            return [*flags, "--resume", str(meta.parent)]
    return arguments
