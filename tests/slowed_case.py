"""A repeat of a benchmark in which something is slow, in place of `benchmark.py case`: loader,
model, or the disk for real.

python tests/slowed_case.py loader|model SECONDS | disk GROUP < task     GROUP: a control group with
a limit on reading
"""

import json
import os
import sys
import time
from pathlib import Path

import conftest  # noqa: F401 (it makes lib importable)

from lib.batches import PatchSource
from lib.benchmark import cases
from lib.centrenet import CentreNet
from lib.command import print_result


def slow_down(owner, name: str, seconds: float) -> None:
    """Let a method take so much longer."""
    method = getattr(owner, name)

    def slowed(*given, **named):
        time.sleep(seconds)
        return method(*given, **named)

    setattr(owner, name, slowed)


if __name__ == "__main__":
    what, value = sys.argv[1:]
    if what == "disk":
        (Path(value) / "cgroup.procs").write_text(str(os.getpid()))
    else:
        slow_down(
            *{"loader": (PatchSource, "gather"), "model": (CentreNet, "forward")}[what],
            float(value),
        )
    print_result(cases.time_case(json.load(sys.stdin)))
