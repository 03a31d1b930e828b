"""The rules of the house: floors, budget, packages, and what may not stand in a public
repository.
"""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from lib.config import Config

FLOORS = [
    set(rooms.split())
    for rooms in (
        "command config seeding device logger metrics calibration progress",
        (
            "pcam batches augment synthetic models optimizers centrenet rundir inputs features"
            " copies reference"
        ),
        (
            "training runlog predict deploy checkpoint search launch ingest repack verify download"
            " trace slurm handover bench cases verdict"
        ),
        "audits reports",
    )
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}
FILE_BYTES = 5_000_000
# Pillow comes with torchvision
PACKAGES = {"torch", "torchvision", "h5py", "numpy", "yaml", "matplotlib", "PIL"}
SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py"))
LIB = sorted(path for path in (REPOSITORY / "lib").rglob("*.py"))
# built from parts, so that this file does not hold what it looks for
MACHINE_PATHS = [f"/{name}/" for name in ("work", "root", "mnt")]
REGISTRIES = [
    ".".join(parts)
    for parts in (("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"), ("npmjs", "org"))
]


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative import"
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "lib"
                else {node.module}
            )
    return names


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rooms_of(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("lib.")}


def tracked_files() -> list[Path]:
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git repository: nothing says which files are tracked")
    paths = [REPOSITORY / name for name in result.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


@pytest.mark.parametrize("path", LIB, ids=module_name)
def test_a_room_stands_on_a_floor_and_imports_from_its_own_or_below(path):
    own = path.relative_to(REPOSITORY / "lib").with_suffix("").parts[0]
    if own == "__init__":
        assert not rooms_of(path)
        return
    assert own in FLOOR_OF, f"lib/{own} is on no floor of DESIGN.md"
    above = {room for room in rooms_of(path) if FLOOR_OF[room] > FLOOR_OF[own]}
    assert not above, f"{own} (floor {FLOOR_OF[own]}) imports {above}"


def test_no_room_imports_itself_in_a_circle():
    known = {
        module_name(path): {name for name in imports(path) if name.startswith("lib")}
        for path in LIB
    }
    # `from lib.reports import pages` names a package: look into it
    graph = {
        name: {target for target in targets if target in known and target != name}
        for name, targets in known.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for target in graph[name]:
                visit(target)
            done.add(path.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize("path", [*LIB, *(REPOSITORY / name for name in SCRIPTS)], ids=module_name)
def test_nothing_imports_a_script_and_nothing_but_the_run_time_packages(path):
    top = {name.split(".")[0] for name in imports(path)}
    assert not top & {Path(name).stem for name in SCRIPTS}
    assert top - set(sys.stdlib_module_names) - {"lib"} <= PACKAGES


def test_every_package_that_is_imported_is_pinned():
    pinned = re.findall(r"(?m)^([a-z0-9]+)==[\d.]+$", (REPOSITORY / "requirements.txt").read_text())
    assert set(pinned) >= (PACKAGES - {"PIL", "yaml"}) | {"pyyaml", "pytest"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_torch(script):
    code = f"""if True:
        import runpy, sys
        sys.argv = [{script!r}, "--help"]
        try:
            runpy.run_path({str(REPOSITORY / script)!r}, run_name="__main__")
        except SystemExit as stop:
            heavy = sorted({{"torch", "numpy", "h5py", "matplotlib"}} & set(sys.modules))
            print(stop.code or 0, *heavy, file=sys.stderr)"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={"PYTHONPATH": "."},
    )
    assert result.stderr.split() == ["0"] and "usage:" in result.stdout and script in result.stdout


def test_no_tracked_file_is_large():
    large = [path.name for path in tracked_files() if path.stat().st_size > FILE_BYTES]
    assert not large


def test_no_tracked_file_names_a_path_of_this_machine_or_a_package_registry():
    forbidden = re.compile(
        "|".join(
            [rf"(?<![\w.\-}}]){path}" for path in MACHINE_PATHS]
            + [re.escape(host) for host in REGISTRIES]
        )
    )
    found = {}
    for path in tracked_files():
        if match := forbidden.search(path.read_text(errors="replace")):
            found[str(path.relative_to(REPOSITORY))] = match.group()
    assert not found


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Config)])
def test_every_config_key_is_used_and_has_no_value_in_the_code(key):
    text = "\n".join(path.read_text() for path in [*LIB, *(REPOSITORY / name for name in SCRIPTS)])
    assert re.search(rf"\bcfg\.{key}\b", text), f"nothing reads {key}"
    field = Config.__dataclass_fields__[key]
    assert field.default is dataclasses.MISSING is field.default_factory
    assert re.search(rf"(?m)^{key}: .*#|^{key}: ", (REPOSITORY / "config.yaml").read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readme_mentions_every_script(script):
    readme = REPOSITORY / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    assert script in readme.read_text()
