"""What the long proofs share: when and of which commit a figure is, and a table of figures."""

import datetime

from lib.logger import atomic_write
from lib.rundir import git_state


def made_now() -> dict[str, str]:
    """Date and commit of a figure measured now."""
    code = git_state()
    commit = (code["commit"] or "none")[:10] + (" with changes" if code["uncommitted_patch"] else "")
    return {"date": str(datetime.date.today()), "commit": commit}


def write_markdown(path, header, rows) -> None:
    """Write a table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    with atomic_write(path, "w") as file:
        file.write("\n".join(lines) + "\n")
