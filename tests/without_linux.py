"""Runs a script without what only Linux has, as macOS does: without_linux.py SCRIPT ARGUMENT..."""

import builtins
import ctypes
import io
import os
import runpy
import sys
from pathlib import Path

CALLS = ("posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity", "fdatasync")
FOLDERS = ("/proc", "/sys/fs/cgroup")
open_file = io.open
find_symbol = ctypes.CDLL.__getattr__


def open_outside_proc(file, *arguments, **options):
    if str(file).startswith(FOLDERS):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return open_file(file, *arguments, **options)


def find_but_mallopt(library, name):
    if name == "mallopt":
        raise AttributeError(name)
    return find_symbol(library, name)


for name in CALLS:
    if hasattr(os, name):
        delattr(os, name)
io.open = builtins.open = open_outside_proc
ctypes.CDLL.__getattr__ = find_but_mallopt
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(__file__).parent.parent)
runpy.run_path(sys.argv[0], run_name="__main__")
