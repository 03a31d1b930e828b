"""What the Make targets run: their variables, and a script with arguments for each of its tasks."""

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from lib.command import BadInput, expand_home, one_line
from lib.files import read_cache

# Make variables: what they may look like, and what they are when not given
VARIABLES = {
    "SEED": (r"\d+", "1"),
    "SEEDS": (r"\d+(,\d+)*", "1,2,3"),
    "K": (r"[2-9]|[1-9]\d+", "5"),
    "NUM_RANKS": (r"[1-9]\d*", "1"),
    "PARTITION": (r"\w[\w.-]*(,\w[\w.-]*)*", ""),
    "TIME": (r"(\d+-)?\d+(:\d+){0,2}|(?i:infinite|unlimited)", ""),
    "CPUS": (r"[1-9]\d*", ""),
    "MEM": (r"[1-9]\d*[MG]", ""),
    "AFTER": (r"\d+(,\d+)*", ""),
    "JOB": (r"\d+(_\d+)?", ""),
    "STAGE_DATA": (r"[01]", "0"),
    "SEARCH": (r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", ""),
    "PROCESSES": (r"[1-9]\d*", "1"),
}
FREE_VARIABLES = ("ARGS", "DATA", "OUT", "SPACE")
# sbatch's own variables, which count where the Make variable is not given
SBATCH_VARIABLES = {"PARTITION": "SBATCH_PARTITION", "TIME": "SBATCH_TIMELIMIT"}
EXAMPLES = {
    "TIME": "30 (minutes), 0:30:00 or 1-12:00:00",
    "MEM": "8G",
    "SEEDS": "1,2,3",
    "AFTER": "123",
    "JOB": "123 or 123_4",
}


def read_variables(environment) -> dict[str, str]:
    """The Make variables in an environment. Raises BadInput for one that could mean anything but
    what it is for.
    """
    values = {name: expand_home(environment.get(name, "")) for name in FREE_VARIABLES}
    for name, (form, default) in VARIABLES.items():
        source = name
        if not environment.get(name) and name in SBATCH_VARIABLES:
            source = SBATCH_VARIABLES[name]
        values[name] = environment.get(source) or default
        if values[name] and not re.fullmatch(form, values[name], re.ASCII):
            example = f", such as {EXAMPLES[name]}" if name in EXAMPLES else ""
            sentence = f"{source} is {values[name]!r}, it must be of the form {form}{example}"
            raise BadInput(sentence)
    return values


def split_arguments(text: str) -> list[str]:
    """ARGS as a list: quotes hold together what has spaces, and no shell sees any of it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(f"ARGS {text!r}: {one_line(error).lower()}") from None


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
    if target == "audit":
        if not data or not Path(data).is_dir():
            raise BadInput(f"make audit needs DATA=DIR, the PCam folder to audit, {data!r} is none")
        options = ["--out", out] if out else []
        return Work("audit.py", ["data", data, *options, *arguments])
    if target == "bench":
        options = ["--data", data] if data else []
        options += ["--out", out] if out else []
        return Work("benchmark.py", ["all", *options, *arguments])
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
        stages.append(Work("sweep.py", ["run", *which, *arguments], "--row", rows))
        stages.append(Work("sweep.py", ["run", *which, "--all", *arguments], mends=True))
        stages.append(Work("sweep.py", [*ending, *arguments], only_reads=True))
    return stages


def training_options(arguments) -> tuple[argparse.Namespace, list[str]]:
    """What says, among train.py's arguments, which run it is and where, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option, default in (("--config", ""), ("--runs", "runs"), ("--resume", None)):
        parser.add_argument(option, default=default)
    return parser.parse_known_args(arguments)


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
    options, rest = training_options(arguments)
    names = ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME")
    own_job = [environment.get(name) for name in names]
    for meta in sorted(Path(options.runs).glob("*/meta.json"), reverse=True):
        job = job_of(meta)
        if [job.get(name) for name in names] == own_job:
            flags = [word for word in rest if word.startswith("-") or "=" not in word]
            return ["--runs", options.runs, "--resume", str(meta.parent), *flags]
    return arguments
