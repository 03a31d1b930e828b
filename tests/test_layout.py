"""The rule of docs/architecture.md, the packages, and what may not stand in a public repository."""

import ast
import dataclasses
import graphlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, REPOSITORY
from packaging.requirements import Requirement

from lib.config import Config

FILE_BYTES = 5_000_000
# Pillow comes with torchvision
PACKAGES = {"torch", "torchvision", "h5py", "numpy", "yaml", "matplotlib", "PIL"}
SCRIPTS = sorted(REPOSITORY.glob("*.py"))
LIB = sorted((REPOSITORY / "lib").rglob("*.py"))
ALL_SCRIPTS = [*SCRIPTS, *sorted((REPOSITORY / "jobs").glob("*.py"))]
# in parts, so that this file does not hold what it looks for
FORBIDDEN = re.compile(
    r"(?<![\w.\-}])/(?:work|root|mnt)/|pypi\.org|pythonhosted\.org|anaconda\.org|npmjs\.org"
)


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in LIB}


def local_imports(path: Path) -> set[str]:
    """The modules of lib/ that a file imports, by their full names."""
    modules = set()
    for name in imports(path):
        while name and name not in MODULES:  # a name in a module, or in a package
            name = name.rpartition(".")[0]
        modules.add(name)
    return modules - {"", "lib", module_name(path)}


GRAPH = {name: local_imports(path) for name, path in MODULES.items()}


def chapter_of(module: str) -> str:
    """The folder of lib/ that a module stands in; empty for the core."""
    folder = MODULES[module].parent.relative_to(REPOSITORY / "lib").parts
    return folder[0] if folder else ""


def name_of_script(path: Path) -> str:
    """The chapter that belongs to a script: its own name, or that of its folder."""
    return path.stem if path.parent == REPOSITORY else path.parent.name


def reached(names: set[str]) -> set[str]:
    """Modules, and all that they import."""
    done, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name not in done:
            done.add(name)
            todo += GRAPH[name]
    return done


def test_the_core_imports_the_core_and_a_chapter_its_own_folder_besides():
    owners = {path: chapter_of(name) for name, path in MODULES.items()}
    owners |= {path: name_of_script(path) for path in ALL_SCRIPTS}
    for path, owner in owners.items():
        chapters = {chapter_of(name) for name in local_imports(path)}
        assert chapters <= {"", owner}, path


def test_the_core_is_what_two_or_more_scripts_share_and_a_chapter_what_one_needs():
    users = {name: set() for name in MODULES}
    for path in ALL_SCRIPTS:
        for name in reached(local_imports(path)):
            users[name].add(name_of_script(path))
    for name, used_by in users.items():
        chapter = chapter_of(name)
        is_right = used_by == {chapter} if chapter else len(used_by) > 1
        assert is_right or MODULES[name].name == "__init__.py", f"{name}: {used_by}"


def test_nothing_imports_itself_in_a_circle():
    list(graphlib.TopologicalSorter(GRAPH).static_order())


def test_nothing_imports_a_script_and_nothing_but_the_run_time_packages():
    allowed = PACKAGES | {"lib"} | set(sys.stdlib_module_names)
    for path in [*LIB, *SCRIPTS]:
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path


def read_requirements(name: str) -> dict:
    lines = (REPOSITORY / name).read_text().splitlines()
    wanted = [Requirement(line) for line in lines if not line.startswith("#")]
    return {requirement.name: requirement.specifier for requirement in wanted}


def test_every_package_that_is_imported_has_a_range_and_its_pin_is_in_it():
    ranges, pins = read_requirements("requirements.txt"), read_requirements("requirements-lock.txt")
    assert set(ranges) == (PACKAGES - {"PIL", "yaml"}) | {"pillow", "pyyaml", "pytest"}
    for name, versions in ranges.items():
        (pin,) = pins[name]
        assert pin.operator == "==" and versions.contains(pin.version), name


def test_setup_installs_the_locked_set_and_torchs_cpu_build_on_request(tmp_path):
    for name in ("Makefile", "requirements.txt", "requirements-lock.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    command = ["make", "--dry-run", "-C", tmp_path, "setup", "TORCH=cpu"]
    recipe = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "-c requirements-lock.txt" in recipe and "--torch-backend cpu" in recipe


@pytest.mark.parametrize("path", SCRIPTS, ids=module_name)
def test_help_answers_without_torch(path):
    command = [sys.executable, "-X", "importtime", path, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0 and result.stdout.startswith("usage: ")
    assert not re.search(r"\| +(torch|h5py|matplotlib)$", result.stderr, re.MULTILINE)


def test_no_tracked_file_is_large_or_names_a_path_of_this_machine_or_a_package_registry():
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git repository: nothing says which files are tracked")
    for name in result.stdout.split("\0"):
        path = REPOSITORY / name
        if path.is_file() and not path.is_symlink() and path != Path(__file__):
            assert path.stat().st_size <= FILE_BYTES, path
            assert not FORBIDDEN.search(path.read_text(errors="replace")), path


def test_every_config_key_is_used():
    text = "\n".join(path.read_text() for path in [*LIB, *SCRIPTS])
    for field in dataclasses.fields(Config):
        assert re.search(rf"\bcfg\.{field.name}\b", text), f"nothing reads {field.name}"


WITHOUT_CHAPTERS = """
import sys
from pathlib import Path
import inference, train
data, *keys = sys.argv[1:]
assert train.main([f"data_dir={data}", *keys, "--until-epoch", "1"]) == 0
run = sorted(Path("runs").iterdir())[0]
assert train.main(["--resume", str(run)]) == 0
assert inference.main(["--ckpt", str(run), data, "--split", "valid"]) == 0
"""


@pytest.mark.slow
def test_without_any_chapter_training_resumption_and_prediction_work(pcam_dir, tmp_path):
    chapters = [path for path in (REPOSITORY / "lib").iterdir() if (path / "__init__.py").exists()]
    assert len(chapters) > 5
    names = [path.name for path in chapters]
    shutil.copytree(REPOSITORY / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns(*names))
    for name in ("train.py", "inference.py", "config.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    command = [sys.executable, "-c", WITHOUT_CHAPTERS, str(pcam_dir), *QUICK]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["num"] == 64
