"""The rule of docs/architecture.md, the packages, and what may not stand in a public repository."""

import ast
import dataclasses
import json
import os
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
SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py"))
LIB = sorted(path for path in (REPOSITORY / "lib").rglob("*.py"))
ALL_SCRIPTS = [
    *(REPOSITORY / name for name in SCRIPTS),
    *sorted((REPOSITORY / "jobs").glob("*.py")),
]
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
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
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


MODULES = {module_name(path): path for path in LIB}


def local_imports(path: Path) -> set[str]:
    """The modules of lib/ that a file imports, by their full names."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        while parts and ".".join(parts) not in MODULES:  # a name in a module, or in a package
            parts.pop()
        found.add(".".join(parts))
    return found - {"", "lib"}


def chapter_of(module: str) -> str:
    """The folder of lib/ that a module stands in; empty for the core."""
    if module == "lib":
        return ""
    return (
        module.split(".")[1]
        if module.count(".") > 1 or (REPOSITORY / module.replace(".", "/")).is_dir()
        else ""
    )


def name_of_script(path: Path) -> str:
    """The chapter that belongs to a script: its own name, or that of its folder."""
    return path.stem if path.parent == REPOSITORY else path.parent.name


@pytest.mark.parametrize("path", [*LIB, *ALL_SCRIPTS], ids=module_name)
def test_the_core_imports_the_core_and_a_chapter_its_own_folder_besides(path):
    module = module_name(path)
    own = chapter_of(module) if path in LIB else name_of_script(path)
    others = {name for name in local_imports(path) if chapter_of(name) not in ("", own)}
    assert not others


def test_the_core_is_what_two_or_more_scripts_share_and_a_chapter_what_one_needs():
    graph = {name: local_imports(path) for name, path in MODULES.items()}

    def reached(start: Path) -> set[str]:
        found, todo = set(), list(local_imports(start))
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += graph[name]
        return found

    users = {name: set() for name in MODULES}
    for script in ALL_SCRIPTS:
        for name in reached(script):
            users[name].add(name_of_script(script))
    wrong = {}
    for name, used_by in users.items():
        if MODULES[name].name == "__init__.py":
            continue
        chapter = chapter_of(name)
        if (chapter and used_by != {chapter}) or (not chapter and len(used_by) < 2):
            wrong[name] = used_by
    assert not wrong


def test_no_room_imports_itself_in_a_circle():
    known = {
        module_name(path): {name for name in imports(path) if name.startswith("lib")}
        for path in LIB
    }
    # `from lib.report import pages` names a package: look into it
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


@pytest.mark.parametrize("arguments, asks", [(["TORCH=cpu"], True), ([], False)])
def test_setup_installs_the_locked_set_and_torchs_cpu_build_on_request(tmp_path, arguments, asks):
    for name in ("Makefile", "requirements.txt", "requirements-lock.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    command = ["make", "--dry-run", "-C", tmp_path, "setup", *arguments]
    # `make test` hands its interpreter and its flags on to the tests
    ours = {"PYTHON", "TORCH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    recipe = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    assert "-c requirements-lock.txt" in recipe and ("--torch-backend cpu" in recipe) == asks


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_torch(script):
    code = f"""if True:
        import runpy, sys
        sys.argv = [{script!r}, "--help"]
        try:
            runpy.run_path({str(REPOSITORY / script)!r}, run_name="__main__")
        except SystemExit as stop:
            heavy = sorted({{"torch", "h5py", "matplotlib"}} & set(sys.modules))
            print(stop.code or 0, *heavy, file=sys.stderr)"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={"PYTHONPATH": "."},
    )
    assert result.stderr.split() == ["0"] and "usage:" in result.stdout and script in result.stdout


@pytest.mark.slow
def test_every_proof_answers_help():
    for path in sorted((REPOSITORY / "tests" / "proofs").glob("*.py")):
        if "parse_args" not in path.read_text():
            continue
        command = [sys.executable, str(path), "--help"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert result.returncode == 0 and "usage:" in result.stdout, f"{path}: {result.stderr}"


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


@pytest.mark.slow
def test_without_any_chapter_training_resumption_and_prediction_work(pcam_dir, tmp_path):
    chapters = [path for path in (REPOSITORY / "lib").iterdir() if (path / "__init__.py").exists()]
    assert len(chapters) > 5
    for path in [
        *LIB,
        *(REPOSITORY / name for name in ("train.py", "inference.py", "config.yaml")),
    ]:
        if not any(path.is_relative_to(chapter) for chapter in chapters):
            copy = tmp_path / "code" / path.relative_to(REPOSITORY)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)

    def run(script, *arguments) -> dict:
        command = [sys.executable, str(tmp_path / "code" / script), *map(str, arguments)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    paused = run("train.py", f"data_dir={pcam_dir}", *QUICK, "--until-epoch", 1)
    resumed = run("train.py", "--resume", paused["run"])
    assert resumed["status"] == "finished"
    assert run("inference.py", "--ckpt", resumed["run"], pcam_dir, "--split", "valid")["num"] == 64
