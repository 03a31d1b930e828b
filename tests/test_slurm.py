"""Make targets on a real Slurm: jobs run, go on by themselves, and end with the weights of a run
without Slurm. What is asked of sbatch is tested with a fake one.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, REPOSITORY
from slurm_cluster import fake_cluster, kill_job, needs_slurm, run, running_cluster, wait_for

from lib.command import BadInput
from lib.files import read_json
from lib.jobs import slurm, work
from lib.rundir import read_run_config

DATA = 'my "data"'
# long enough to be caught after its first epoch
LONG = ["epochs=4", *QUICK[1:], "shards=2", "data_dir='my \"data\"'"]
SHORT = ["epochs=1", *LONG[1:]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with running_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        # as some sites have it: a job gets no variable of the shell, and must lose nothing by that
        yield environment | {"SBATCH_EXPORT": "NONE"}


@pytest.fixture(scope="module")
def project(tmp_path_factory, pcam_dir) -> Path:
    """A copy of the repository, committed, in a folder with an awkward name, with data in another
    one.
    """
    folder = tmp_path_factory.mktemp("slurm") / 'a "team\'s" copy, 100%j'
    folder.mkdir()
    for path in REPOSITORY.iterdir():
        if path.is_file() and path.name != ".git":  # a link, in a git worktree
            shutil.copy(path, folder)
    unused = shutil.ignore_patterns("logs", "snapshots", "__pycache__")
    for name in ("lib", "jobs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=unused)
    shutil.copytree(pcam_dir, folder / DATA)
    (folder / ".gitignore").open("a").write("my*\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def no_slurm(tmp_path_factory) -> dict:
    """An environment in which no sbatch is found."""
    folder = tmp_path_factory.mktemp("path")
    for name in ("make", "bash", "git"):
        (folder / name).symlink_to(shutil.which(name))
    return {"PATH": str(folder)}


def make(project, environment, target, check=0, arguments=(), **variables):
    """`make TARGET` as a user would; the result gets `.json`, the last line of stdout."""
    variables["PYTHON"] = sys.executable
    if arguments:
        variables["ARGS"] = " ".join(arguments)
    command = ["make", "-s", target, *(f"{name}={value}" for name, value in variables.items())]
    options = {"cwd": project, "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run(command, env=environment, **options)
    assert (result.returncode != 0) == (check != 0), result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stdout.splitlines()
    result.json = json.loads(lines[-1]) if lines else None
    return result


def run_of(project, job) -> Path | None:
    """The run folder of a job, or of a task of an array, `ID_TASK`."""
    for meta in (project / "runs").glob("*/meta.json"):
        made_by = read_json(meta)["job"]
        task = f"{made_by.get('SLURM_ARRAY_JOB_ID')}_{made_by.get('SLURM_ARRAY_TASK_ID')}"
        if job in (task, made_by.get("SLURM_JOB_ID")):
            return meta.parent
    return None


def job_of(run: Path) -> str:
    return read_json(run / "meta.json")["job"]["SLURM_JOB_ID"]


@contextlib.contextmanager
def paused(project, job, file="last.pt"):
    """The job's training stands still in the block, after its first checkpoint, and so cannot be
    over before it is disturbed. Yields its run.
    """

    def is_under_way():
        run = run_of(project, job)
        return run and (run / file).is_file() and run

    folder = wait_for(is_under_way, f"job {job} to be under way")
    pid = read_json(folder / "meta.json")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield folder
    finally:
        with contextlib.suppress(ProcessLookupError):  # it was killed
            os.kill(pid, signal.SIGCONT)


def wait_until_done(project, job, codes=("0",)) -> str:
    """Wait for the end of a job, and of no other start of it; its log."""
    path = project / f"jobs/logs/{job}.exit"
    is_over = lambda: path.is_file() and path.read_text().strip()  # noqa: E731
    code = wait_for(is_over, f"the end of job {job}", 300)
    log = path.with_suffix(".err").read_text()
    assert code in codes, log
    return log


@needs_slurm
def test_disturbed_jobs_go_on_and_end_with_the_weights_of_runs_without_slurm(
    project, cluster, no_slurm
):
    def submit(target, **more):
        return make(project, cluster, target, arguments=LONG, **more).json["jobs"]

    def state(job):
        return run(["squeue", "-h", "-j", job, "-o", "%T"], cluster).strip()

    array, _, report = submit("seeds", SEEDS="1,2")
    with paused(project, f"{array}_0") as killed, paused(project, f"{array}_1") as requeued:
        rows = make(project, cluster, "status").json["jobs"]
        assert kill_job(job_of(killed)) >= 3, "its script, srun and train.py"
        run(["scontrol", "requeue", job_of(requeued)], cluster)
    (limited,) = submit("train", TIME=12, STAGE_DATA=1, NUM_RANKS=2)
    with paused(project, limited):
        # that is within the warning
        run(["scontrol", "update", f"JobId={limited}", "TimeLimit=2"], cluster)
        log = project / f"jobs/logs/{limited}.err"
        wait_for(lambda: "told to stop: USR1" in log.read_text(), "the warning")
    wait_for(lambda: state(limited) == "PENDING", "the job to go back into the queue")
    run(["scontrol", "update", f"JobId={limited}", "TimeLimit=12"], cluster)

    # meanwhile the same without Slurm
    alone = make(project, no_slurm, "seeds", arguments=LONG, SEEDS="1,2")
    assert "no Slurm cluster here" in alone.stderr and alone.json["num_runs"] == 2
    digests = {}
    for path in (project / "runs").glob("*/summary.json"):
        if not read_json(path.parent / "meta.json")["job"]:
            digests[read_run_config(path.parent).seed] = read_json(path)["weights_sha256"]
    wait_until_done(project, report)
    averaged = json.loads((project / f"jobs/logs/{report}.out").read_text().splitlines()[-1])
    assert averaged["seeds"]["val_auc"]["num"] == 2, "what a killed task left was carried out"
    log = wait_until_done(project, limited)
    for folder in (killed, requeued, run_of(project, limited)):
        summary, meta = read_json(folder / "summary.json"), read_json(folder / "meta.json")
        assert summary["weights_sha256"] == digests[read_run_config(folder).seed]
        assert meta["earlier_starts"], "it did not begin anew"
    assert meta["num_ranks"] == 2 and read_run_config(folder).data_dir == DATA, "not the copy"
    states = {row["run"]: row["state"] for row in rows}
    assert states[str(requeued.relative_to(project))] == "RUNNING"
    copy = re.search("data copied to (.*)", log)[1]
    assert log.count(f"data copied to {copy}") == 2 and not Path(copy).exists()


@needs_slurm
def test_a_job_runs_the_code_and_config_that_were_submitted_and_status_quotes_a_failed_one(
    project, cluster
):
    config, program = project / "my.yaml", project / "train.py"
    text = program.read_text()
    shutil.copy(project / "config.yaml", config)
    old = project / "jobs/snapshots/old"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    imports = "\nimport argparse\n"
    program.write_text(text.replace(imports, f"{imports}import lib.new\n"))
    (project / "lib/new.py").write_text("NAME = 'new'\n")
    try:
        failing = make(project, cluster, "train", arguments=[*SHORT, "--device cuda"]).json["job"]
        words = ["--config my.yaml", *LONG]
        after = make(project, cluster, "train", arguments=words, AFTER=failing).json["job"]
        for path in (program, config):
            path.write_text("raise: not what was submitted\n")
        with paused(project, after) as folder:
            make(project, cluster, "cancel", JOB=after)
        wait_until_done(project, after, ("130",))
        status = make(project, cluster, "status")
    finally:
        program.write_text(text)
        (project / "lib/new.py").unlink()
    assert not old.exists()
    meta = read_json(folder / "meta.json")
    head = run(["git", "-C", str(project), "rev-parse", "HEAD"], cluster).strip()
    assert meta["commit"] == meta["submitted"]["commit"] == head
    assert "+import lib.new" in meta["uncommitted_patch"]
    assert meta["untracked_files"] == ["lib/new.py"]
    states = {row["id"]: row["state"] for row in status.json["jobs"]}
    assert states[failing] == "failed, exit 2" and states[after] in ("stopped", "COMPLETING")
    assert "there are 0 CUDA devices" in status.stderr


@needs_slurm
def test_a_benchmark_knows_its_job_and_folds_are_averaged(project, cluster):
    quick = ["--seconds 0.01 --repeats 1 --allow-noise --cases memory_copy", *QUICK[2:]]
    wanted = {"DATA": DATA, "OUT": "my bench", "PARTITION": "thin_course"}
    bench = make(project, cluster, "bench", arguments=quick, **wanted).json["job"]
    _, mending, report = make(project, cluster, "folds", K=2, arguments=SHORT).json["jobs"]
    wait_until_done(project, bench)
    (row,) = read_json(project / "my bench/benchmark.json")["rows"]
    where = (row["partition"], row["node_type"], row["job_id"])
    assert where == ("thin_course", "rome,256g", bench)
    wait_until_done(project, report)
    averaged = json.loads((project / f"jobs/logs/{report}.out").read_text().splitlines()[-1])
    assert averaged["folds"]["val_auc"]["num"] == 2
    assert not (project / f"jobs/logs/{mending}.err").exists(), "no task failed"


@needs_slurm
def test_a_search_is_a_chain_of_arrays_that_goes_on_when_a_task_is_killed(project, cluster):
    (project / "my space.yaml").write_text(
        "design: grid\ntrials: 2\nseed: 1\nseeds: [1]\nrungs: [20]\nchampion_seeds: 1\n"
        "finalists: 1\nranges: {lr: {choice: [0.01, 0.02]}}\n"
    )
    cheap = ["model=mlp", "mlp_hidden=4", "limit_train=64", "limit_valid=32", *QUICK[1:4]]
    named = {"SPACE": "my space.yaml", "SEARCH": "two", "DATA": DATA}
    jobs = make(project, cluster, "sweep", arguments=[*cheap, "views=1"], **named).json["jobs"]
    assert len(jobs) == 4
    # the first task dies with all its processes before it has a result; what it left goes on in the
    # next job
    with paused(project, f"{jobs[0]}_0", "config.yaml") as killed:
        assert kill_job(job_of(killed)) >= 4, "its script, srun, sweep.py and train.py"
    # 1: no trial beats the config as it is
    wait_until_done(project, jobs[-1], ("0", "1"))
    champion = read_json(project / "sweeps/two/champion.json")
    assert champion["note"] and len(champion["finalists"]) == 2
    assert read_json(killed / "meta.json")["earlier_starts"]


@pytest.fixture
def fake(tmp_path):
    """`fake(VARIABLE=...)` gives the environment of a fake cluster, and `fake.calls()` what was
    asked of its sbatch and scancel, a line a call.
    """

    def fake(**variables):
        return fake_cluster(tmp_path, **variables)

    log = tmp_path / "log"
    fake.calls = lambda: log.read_text().splitlines() if log.exists() else []
    return fake


@pytest.mark.slow
def test_a_submission_bears_a_banner_sbatchs_own_and_foreign_variables_and_no_git(project, fake):
    """A banner above sbatch's number, its own variables, those of a shell that Make would know, and
    a checkout of a colleague, of which git tells nothing.
    """
    banner = "Welcome to cluster 7!\n--> 3 jobs of 9"
    shell = {"DATA": "nowhere", "TIME": "$(touch pwned)", "K": "x", "SEED": "y", "ARGS": "--no"}
    own = {"SBATCH_PARTITION": "gpu_course", "SBATCH_TIMELIMIT": "00:20:00"}
    own |= {"SBATCH_MEM_PER_CPU": "4G", "GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}
    environment = fake(FAKE_BANNER=banner, **shell, **own)
    result = make(project, environment, "seeds", arguments=SHORT, SEEDS="1,2", CPUS="2")
    assert result.json["jobs"] == ["5010", "5020", "5030"], "the number in the last line counts"
    array, mending, report = fake.calls()
    wanted = ["--partition=gpu_course", "--time=00:20:00", "--cpus-per-task=2", "--gpus=1"]
    assert all(f" {option} " in array for option in [*wanted, "--array=0-1"])
    assert "--mem=" not in array and "--dependency=afternotok:5010 " in mending
    assert "--dependency=afterany:5010:5020 " in report and "--gpus" not in report
    (note,) = [line for line in result.stderr.splitlines() if "ignored" in line]
    assert set(re.findall(r"\b[A-Z]+\b", note)) == {"DATA", "TIME", "K", "SEED"}
    assert not (project / "pwned").exists()
    assert "dubious ownership" in result.stderr
    assert "git config --global --add safe.directory" in result.stderr
    newest = max((project / "jobs/snapshots").glob("*/submission.json"), key=os.path.getmtime)
    assert read_json(newest)["commit"] is None
    code = newest.parent / "code"
    assert (code / "train.py").read_bytes() == (project / "train.py").read_bytes()
    assert not (code / ".git").exists() and not (code / "runs").exists()


@pytest.mark.slow
def test_a_chain_is_submitted_whole_or_not_at_all(project, fake):
    before = set((project / "jobs/snapshots").glob("*"))
    environment = fake(FAKE_MAX_JOBS="1")
    result = make(project, environment, "seeds", check=2, arguments=SHORT, SEEDS="1,2")
    assert fake.calls()[2:] == ["scancel 5010"]
    assert "QOSMaxSubmitJobPerUserLimit" in result.stderr and "5010" in result.stderr
    assert set((project / "jobs/snapshots").glob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "sentence, variables",
    [
        ("no folder nowhere", {"ARGS": "data_dir=nowhere"}),
        ("3 ranks cannot share out 2 shards", {"NUM_RANKS": 3}),
        ("PARTITION", {"PARTITON": "thin_course"}),
        ("DATA=DIR", {"target": "audit"}),
    ],
)
def test_a_job_that_cannot_work_is_not_submitted(sentence, variables, project, fake):
    options = {"target": "train", "ARGS": " ".join(SHORT)} | variables
    assert sentence in make(project, fake(), check=2, **options).stderr
    assert fake.calls() == []


def test_settings_of_a_site_that_fail_are_refused_with_their_message(project, fake):
    settings = project / "jobs/env.sh"
    text = settings.read_text()
    settings.write_text("echo no module 2019 >&2\nfalse\ntrue\n")
    try:
        result = make(project, fake(), "train", check=2, arguments=SHORT)
    finally:
        settings.write_text(text)
    assert "no module 2019" in result.stderr and fake.calls() == []


@pytest.mark.slow
def test_check_says_whether_a_training_fits_and_submits_nothing(project, fake):
    result = make(project, fake(), "check", check=1, arguments=SHORT, MEM="100M").json
    assert not result["fits"] and result["memory_bytes"] > 100 << 20
    assert result["seconds"] > 0 and "--time=60" in result["request"]
    assert fake.calls() == []


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"PARTITION": "thin_curse"}, "no partition thin_curse"),
        ({"TIME": "00:00:00"}, "TIME=00:00:00 is not"),
        ({"PARTITION": "gpu_course", "TIME": "45"}, "30:00, the limit of the partition"),
        ({"PARTITION": "gpu_course"}, "--cpus-per-task=18 --mem=8000M --time=30 --gpus=1"),
        (
            {"MEM": "2G", "TIME": "0:12:00", "NUM_RANKS": "2"},
            "--partition=thin_course --cpus-per-task=8 --mem=2G --time=0:12:00 --signal=B:USR1@120",
        ),
    ],
)
def test_a_request_fits_the_partition_or_is_refused(variables, expected, fake, monkeypatch):
    monkeypatch.setenv("PATH", fake()["PATH"])
    try:
        answer = slurm.fit_request(work.read_variables(variables), 64, saves=True)
    except BadInput as error:
        assert expected in str(error)
    else:
        assert set(expected.split()) <= set(answer)
        assert any("gpus" in option for option in answer) == ("gpus" in expected)


def test_slurm_times_are_read_in_all_their_forms():
    minutes = {"30": 30, "30:00": 30, "1:30:30": 90.5, "1-00:00:00": 1440, "2-3": 3060}
    assert {text: slurm.minutes_of(text) for text in minutes} == minutes
    assert slurm.minutes_of("infinite") == float("inf")


def test_a_variable_that_is_more_than_its_form_is_refused_and_makes_own_comes_first():
    for name in work.VARIABLES:
        for value in ("1; touch x", "$(touch x)", "-1", "1\n2", "١"):
            with pytest.raises(BadInput, match=f"^{name} is "):
                work.read_variables({name: value})
    own = {"SBATCH_PARTITION": "a,b", "SBATCH_TIMELIMIT": "UNLIMITED"}
    values = work.read_variables(own | {"PARTITION": "thin"})
    assert (values["PARTITION"], values["TIME"]) == ("thin", "UNLIMITED")


def test_neither_make_nor_a_shell_carries_out_what_stands_in_a_variable(project, no_slurm):
    attack = "$(shell touch pwned) `touch pwned` ; touch pwned"
    for target, variables in (
        ("train", {"SEED": "1; touch pwned"}),
        ("demo", {"ARGS": attack, "RUN": attack}),
    ):
        make(project, no_slurm, target, check=2, DEMO_DATA="--no", **variables)
    assert not (project / "pwned").exists()
