"""What the Make targets run: their variables, and a script with arguments for each of its tasks."""

import argparse
import os
import re
import runpy
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from lib.command import REPOSITORY, BadInput, expand_home, one_line
from lib.files import read_cache
from lib.rundir import resume_config

COUNT = r"[1-9]\d*"
NUMBERS = r"\d+(,\d+)*"
# Make variables: what they may look like, what they are when not given, and an example
VARIABLES = {
    "SEED": (r"\d+", "1", "1"),
    "SEEDS": (NUMBERS, "1,2,3", "1,2,3"),
    "K": (r"[2-9]|[1-9]\d+", "5", "5"),
    "NUM_RANKS": (COUNT, "1", "2"),
    "PARTITION": (r"\w[\w.-]*(,\w[\w.-]*)*", "", "thin"),
    "TIME": (r"(\d+-)?\d+(:\d+){0,2}|(?i:infinite|unlimited)", "", "30 (minutes) or 1-12:00:00"),
    "CPUS": (COUNT, "", "4"),
    "MEM": (r"[1-9]\d*[MG]", "", "8G"),
    "AFTER": (NUMBERS, "", "123,124 (numbers of jobs)"),
    "JOB": (r"\d+(_\d+)?", "", "123 or 123_4"),
    "STAGE_DATA": (r"[01]", "0", "1"),
    "SEARCH": (r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", "", "lr-1"),
    "PROCESSES": (COUNT, "1", "2"),
}
RESOLVED = {"threads=0", "precision=auto"}  # a run's config has what they stood for
FREE_VARIABLES = ("ARGS", "DATA", "OUT", "SPACE")
# sbatch's own variables, which count where the Make variable is not given
SBATCH_VARIABLES = {"PARTITION": "SBATCH_PARTITION", "TIME": "SBATCH_TIMELIMIT"}


def read_variables(environment) -> dict[str, str]:
    """The Make variables in an environment. Raises BadInput for one that could mean anything but
    what it is for.
    """
    values = {name: expand_home(environment.get(name, "")) for name in FREE_VARIABLES}
    for name, (form, default, example) in VARIABLES.items():
        source = name if environment.get(name) else SBATCH_VARIABLES.get(name, name)
        value = environment.get(source) or default
        if value and not re.fullmatch(form, value, re.ASCII):
            raise BadInput(f"{source} is {value!r}, it must be such as {example}")
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
    further key=value, as an array of jobs or one after the other.
    """

    script: str
    arguments: list[str]
    varied: str = ""  # the key that differs between tasks
    tasks: tuple[str, ...] = ()
    is_array: bool = False
    mends: bool = False  # what tasks of the array left undone: it starts only if one failed
    only_reads: bool = False  # what other jobs have computed: it needs one core and no GPU

    def commands(self) -> list[list[str]]:
        """The script with the arguments of each task, or with those of the only one."""
        command = [str(REPOSITORY / self.script), *self.arguments]
        if not self.tasks:
            return [command]
        return [[*command, f"{self.varied}={task}"] for task in self.tasks]


def build_chain(target: str, variables: dict[str, str], submission: dict) -> list[Work]:
    """The works of `make TARGET`. Behind the array of `seeds` or `folds`, the tasks that failed go
    on one after the other, and then all are averaged.
    """
    arguments = [expand_home(word) for word in split_arguments(variables["ARGS"])]
    data = variables["DATA"]
    out = option("--out", variables["OUT"])
    if target == "audit":
        if not os.path.isdir(data):
            raise BadInput(f"make audit needs DATA=DIR, the PCam folder to audit, {data!r} is none")
        return [Work("audit.py", ["data", data, *out, *arguments])]
    if target == "bench":
        return [Work("benchmark.py", ["all", *option("--data", data), *out, *arguments])]
    if data:
        arguments.append(f"data_dir={data}")
    if target != "seeds" and "--resume" not in arguments:
        arguments.insert(0, f"seed={variables['SEED']}")
    work = Work("train.py", arguments)
    if target == "train":
        return [work]
    if target == "seeds":
        seeds = dict.fromkeys(variables["SEEDS"].split(","))
        work = replace(work, varied="seed", tasks=tuple(seeds))
    else:
        arguments.append(f"num_folds={variables['K']}")
        work = replace(work, varied="fold", tasks=tuple(map(str, range(int(variables["K"])))))
    chain = [replace(work, is_array=True), replace(work, mends=True)]
    if len(work.tasks) > 1:
        which = f"submission={submission['id']}"
        chain.append(Work("report.py", [target, "--where", which], only_reads=True))
    return chain


def option(name: str, value: str) -> list[str]:
    """An option of a script, if it has a value."""
    return [name, value] if value else []


def sweep_chain(name: str, num_rows: list[int], processes: str) -> list[Work]:
    """A planned search as jobs, one after the other, two for each rung: an array carries out the
    rows, and a job those that a killed task left. That job promotes or, at last, names the
    champion.
    """
    chain = []
    for rung, num in enumerate(num_rows):
        which = [name, "--rung", str(rung)]
        is_last = rung == len(num_rows) - 1
        ending = ["champion", name] if is_last else ["promote", *which, "--finish"]
        rows = tuple(map(str, range(num)))
        chain.append(Work("sweep.py", ["run", *which], "--row", rows, is_array=True))
        chain.append(Work("sweep.py", [*ending, "--processes", processes]))
    return chain


def resumed_arguments(arguments: list[str], submission: str) -> list[str]:
    """train.py's arguments when a task of a submission starts again: its run resumed, if it got as
    far as to make one.

    The run remembers both, so that there is no second file that has to agree with it.
    """
    args = parse_arguments("train.py", arguments)
    for path in sorted(Path(args.runs).glob("*/meta.json"), reverse=True):
        if (read_cache(path).get("submitted") or {}).get("id") != submission:
            continue
        try:
            resume_config(path.parent, [word for word in args.overrides if word not in RESOLVED])
        except BadInput:  # the run of another task
            continue
        # the run has its own config
        config = {"--config", args.config, f"--config={args.config}"}
        words = [word for word in arguments if word not in config | RESOLVED]
        return [*words, "--resume", str(path.parent)]
    return arguments
