"""Every Make target on a real Slurm: jobs run, go on by themselves, and end with the weights of a
run without Slurm. What is asked of sbatch is tested with a fake one.
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

# long enough to be caught after its first epoch
LONG = ["epochs=12", *QUICK[1:], "shards=2", "data_dir='my \"data\"'"]
SHORT = ["epochs=1", *LONG[1:]]
DATA = 'my "data"'


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with running_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


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
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *author, "commit", "-qm", "a"], cwd=folder, check=True)
    return folder


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
def paused(project, job):
    """The job's training stands still in the block, after its first checkpoint, and so cannot be
    over before it is disturbed.
    """

    def is_under_way():
        run = run_of(project, job)
        return run and (run / "last.pt").is_file()

    wait_for(is_under_way, f"job {job} to be under way")
    pid = read_json(run_of(project, job) / "meta.json")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ended(project, job, seconds=120) -> str:
    """The exit code of a job that is over, and of no other start of it."""
    path = project / f"jobs/logs/{job}.exit"
    is_over = lambda: path.is_file() and path.read_text().strip()  # noqa: E731
    return wait_for(is_over, f"the end of job {job}", seconds)


def logged(project, job, kind="err") -> str:
    return (project / f"jobs/logs/{job}.{kind}").read_text()


def hold(cluster) -> str:
    """A job that waits until it is released."""
    command = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"]
    return run(command, cluster).strip()


@needs_slurm
def test_disturbed_jobs_go_on_and_end_with_the_weights_of_a_run_without_slurm(
    project, cluster, tmp_path
):
    def submit(target="train", **more):
        return make(project, cluster, target, arguments=LONG, **more).json["job"]

    def state(job):
        return run(["squeue", "-h", "-j", job, "-o", "%T"], cluster).strip()

    # a requeued task of an array, whose neighbour is cancelled
    array = submit("seeds", SEEDS="1,2")
    with paused(project, f"{array}_0"), paused(project, f"{array}_1"):
        tasks = [job_of(run_of(project, f"{array}_{number}")) for number in (0, 1)]
        rows = {row["id"]: row for row in make(project, cluster, "status").json["jobs"]}
        run(["scontrol", "requeue", tasks[0]], cluster)
        cancelled = make(project, cluster, "cancel", JOB=f"{array}_1").json
    preempted = submit(PARTITION="gpu_course")
    with paused(project, preempted):
        urgent = ["--partition=urgent", "--cpus-per-task=8", "--output=/dev/null", "--wrap=true"]
        run(["sbatch", *urgent], cluster)
        wait_for(lambda: state(preempted) != "RUNNING", "the urgent job to preempt it")
    limited = submit(TIME=12, STAGE_DATA=1)
    with paused(project, limited):
        # that is within the warning
        run(["scontrol", "update", f"JobId={limited}", "TimeLimit=2"], cluster)
        wait_for(lambda: "told to stop: USR1" in logged(project, limited), "the warning")
    wait_for(lambda: state(limited) == "PENDING", "the job to go back into the queue")
    run(["scontrol", "update", f"JobId={limited}", "TimeLimit=12"], cluster)
    ranks = submit(NUM_RANKS=2)

    for name in ("make", "bash", "git"):  # no sbatch is found
        (tmp_path / name).symlink_to(shutil.which(name))
    undisturbed = make(project, {"PATH": str(tmp_path)}, "train", arguments=LONG, SEED=1)
    assert "no Slurm cluster here" in undisturbed.stderr
    for job in (tasks[0], preempted, limited, ranks):
        assert ended(project, job) == "0", logged(project, job)
        folder = run_of(project, job)
        summary, meta = read_json(folder / "summary.json"), read_json(folder / "meta.json")
        assert summary["weights_sha256"] == undisturbed.json["weights_sha256"]
        if job == ranks:
            assert meta["num_ranks"] == 2
        else:
            assert meta["start_step"] > 0 and meta["earlier_starts"], "it did not begin anew"

    row, folder = rows[tasks[1]], run_of(project, tasks[1])
    assert row["state"] == "RUNNING" and row["progress"].endswith("/60") and row["left"]
    assert row["run"] == str(folder.relative_to(project)) and "-s2-" in folder.name
    assert cancelled == {"num_cancelled": 1} and ended(project, tasks[1]) == "130"
    assert "interrupted after step" in logged(project, tasks[1])
    assert "goes on later" not in logged(project, tasks[1])
    log = logged(project, limited)
    assert "interrupted after step" in log and log.count("data copied to") == 2
    copy = re.search("data copied to (.*)", log)[1]
    assert limited in copy and not Path(copy).exists()
    assert read_run_config(run_of(project, limited)).data_dir == DATA, "not the copy"


@needs_slurm
def test_a_job_runs_the_code_and_config_that_were_submitted_after_a_failed_one_that_status_quotes(
    project, cluster
):
    (project / "lib/new.py").write_text("NAME = 'new'\n")
    config, program = project / "my.yaml", project / "train.py"
    texts = {path: path.read_text() for path in (project / "config.yaml", program)}
    config.write_text(texts[project / "config.yaml"])
    old, older = (project / f"jobs/snapshots/{name}" for name in ("old", "older"))
    for folder in (old, older):
        folder.mkdir(parents=True)
    os.utime(older, (0, 0))
    imports = "\nimport argparse\n"
    program.write_text(texts[program].replace(imports, f"{imports}import lib.new\n"))
    try:
        failing = make(project, cluster, "train", arguments=[*SHORT, "--device cuda"]).json["job"]
        words = ["--config my.yaml", *SHORT]
        after = make(project, cluster, "train", arguments=words, AFTER=failing).json["job"]
        for path in (program, config):
            path.write_text("raise: not what was submitted\n")
        assert ended(project, after) == "0", logged(project, after)
        status = make(project, cluster, "status")
    finally:
        program.write_text(texts[program])
        (project / "lib/new.py").unlink()
    assert old.is_dir() and not older.exists()
    meta = read_json(run_of(project, after) / "meta.json")
    head = run(["git", "-C", str(project), "rev-parse", "HEAD"], cluster).strip()
    assert meta["commit"] == meta["submitted"]["commit"] == head
    assert "+import lib.new" in meta["uncommitted_patch"]
    assert meta["untracked_files"] == ["lib/new.py"]
    row = next(row for row in status.json["jobs"] if row["id"] == failing)
    assert row["state"] == "failed, exit 2"
    assert "--device cuda: this machine offers no CUDA" in status.stderr


@needs_slurm
def test_bench_audit_and_folds_run_and_lose_nothing_where_the_site_exports_no_variables(
    project, cluster
):
    cluster = cluster | {"SBATCH_EXPORT": "NONE"}
    quick = ["--seconds 0.01 --repeats 1 --batch-sizes 8 --allow-noise --cases raw,default,apart"]
    quick += ["model=resnet18", *QUICK[2:]]
    wanted = {"DATA": DATA, "OUT": "my bench", "PARTITION": "thin_course"}
    bench = make(project, cluster, "bench", arguments=quick, **wanted).json["job"]
    stopped = {"OUT": "my audit", "DATA": DATA, "PARTITION": "gpu_course"}
    words = ["--checks labels --train-folds epochs=500"]
    audit = make(project, cluster, "audit", arguments=words, **stopped).json["job"]
    folds = make(project, cluster, "folds", K=2, arguments=SHORT).json
    training = wait_for(lambda: [*project.glob("my audit/runs/*/meta.json")], "the audit to train")
    worker = read_json(training[0])["pid"]
    make(project, cluster, "cancel", JOB=audit)
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), "the worker of the audit to end")
    assert ended(project, bench) == "0", logged(project, bench)
    rows = read_json(project / "my bench/benchmark.json")["rows"]
    where = {(row["partition"], row["node_type"], row["job_id"]) for row in rows}
    assert where == {("thin_course", "rome,256g", bench)}
    assert ended(project, folds["jobs"][1], 300) == "0", logged(project, folds["jobs"][1])
    for task in folds["tasks"]:
        assert read_run_config(run_of(project, f"{folds['job']}_{task}")).fold == int(task)
    report = json.loads(logged(project, folds["jobs"][1], "out").splitlines()[-1])
    assert report["folds"]["val_auc"]["num"] == 2


@needs_slurm
def test_a_search_is_a_chain_of_arrays_that_goes_on_when_a_task_is_killed(project, cluster):
    (project / "my space.yaml").write_text(
        "design: grid\ntrials: 2\nseed: 1\nseeds: [1]\nrungs: [20, 21]\nchampion_seeds: 3\n"
        "ranges: {lr: {choice: [0.01, 0.02]}, momentum: {choice: [0.9]}}\n"
    )
    cheap = ["model=mlp", "mlp_hidden=4", "limit_train=64", "limit_valid=32", *QUICK[1:4]]
    held = hold(cluster)
    named = {"SPACE": "my space.yaml", "SEARCH": "two", "DATA": DATA, "AFTER": held}
    jobs = make(project, cluster, "sweep", arguments=[*cheap, "views=1"], **named).json["jobs"]
    first, last, mending = jobs[0], jobs[-1], jobs[1::3]
    assert len(jobs) == 9
    run(["scontrol", "release", held], cluster)
    # the first task dies with all its processes before it has a result; what it left goes on in the
    # next job
    killed = wait_for(lambda: run_of(project, f"{first}_0"), "the first trial to begin")
    os.kill(read_json(killed / "meta.json")["pid"], signal.SIGSTOP)
    assert kill_job(job_of(killed)) >= 4, "its script, srun, sweep.py and train.py"
    # 1: no trial beats the config as it is
    assert ended(project, last, 900) in ("0", "1"), logged(project, last)
    champion = read_json(project / "sweeps/two/champion.json")
    assert champion["note"] and len(champion["finalists"]) == 3
    assert read_json(killed / "meta.json")["earlier_starts"]
    started = [job for job in mending if (project / f"jobs/logs/{job}.err").exists()]
    assert started == mending[:1], "only of the rung in which a task failed"


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


REFUSED = {
    "no folder nowhere": {"ARGS": "data_dir=nowhere"},
    "unknown key 'lrr', did you mean 'lr'?": {"ARGS": "lrr=1"},
    "3 ranks cannot share out 2 shards": {"NUM_RANKS": 3},
    "no partition thin_curse, did you mean 'thin_course'?": {"PARTITION": "thin_curse"},
    "AFTER=99999: there is no such job": {"AFTER": "99999"},
}


@pytest.mark.slow
@pytest.mark.parametrize("sentence", REFUSED)
def test_a_job_that_cannot_work_is_not_submitted(project, fake, sentence):
    variables = {"ARGS": " ".join(SHORT)} | REFUSED[sentence]
    assert sentence in make(project, fake(), "train", check=2, **variables).stderr
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


# by the sentence, or by some of the options: variables
REQUESTS = {
    "partition closed is down": {"PARTITION": "closed"},
    "TIME=00:00:00 is no time at all": {"TIME": "00:00:00"},
    "TIME=45 is over the limit of partition gpu_course, 30:00": {
        "PARTITION": "gpu_course",
        "TIME": "45",
    },
    "1 x 5 cores do not fit: a node of gpu_course has 4": {"PARTITION": "gpu_course", "CPUS": "5"},
    "32 x 1 cores do not fit": {"NUM_RANKS": "32"},
    "--cpus-per-task=4 --mem=8000M --time=30 --gpus=1": {"PARTITION": "gpu_course"},
    "--partition=thin_course --cpus-per-task=8 --ntasks=2 --mem=2G --time=0:12:00"
    " --signal=B:USR1@120": {"MEM": "2G", "TIME": "0:12:00", "NUM_RANKS": "2"},
}


@pytest.mark.parametrize("wanted", REQUESTS)
def test_a_request_fits_the_partition_or_is_refused(wanted, fake, monkeypatch):
    monkeypatch.setenv("PATH", fake()["PATH"])
    try:
        answer = slurm.fit_request(work.read_variables(REQUESTS[wanted]), 64)
    except BadInput as error:
        assert wanted in str(error)
    else:
        assert set(wanted.split()) <= set(answer)
        assert any("gpu" in option for option in answer) == ("gpu" in wanted)


def test_slurm_times_are_read_in_all_their_forms():
    minutes = {"30": 30, "30:00": 30, "1:30:30": 90.5, "1-00:00:00": 1440, "2-3": 3060}
    assert {text: slurm.minutes_of(text) for text in minutes} == minutes
    assert slurm.minutes_of("infinite") == float("inf")


@pytest.mark.parametrize("name", work.VARIABLES)
def test_a_variable_that_is_more_than_its_form_is_refused(name):
    for value in ("1; touch x", "$(touch x)", "-1", "1\n2", "١"):
        with pytest.raises(BadInput, match=f"^{name} is .* must be [^^$]*$"):
            work.read_variables({name: value})


def test_neither_make_nor_a_shell_carries_out_what_stands_in_a_variable(project):
    attack = "$(shell touch pwned) `touch pwned` ; touch pwned"
    for variables in (
        {"SEED": "1; touch pwned"},
        {"ARGS": attack},
        {"ARGS": "--no", "RUN": attack},
    ):
        for target in ("train", "demo"):
            environment = {"PATH": os.environ["PATH"]}
            make(project, environment, target, check=2, DEMO_DATA="--no", **variables)
    assert not (project / "pwned").exists()


def test_what_cannot_be_read_hides_no_job_and_stops_no_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "REPOSITORY", tmp_path)
    monkeypatch.setattr(slurm, "LOGS", tmp_path / "logs")
    for name, text in (("a", "{"), ("b", '{"job": null}'), ("c", '{"job": {"SLURM_JOB_ID": "7"}}')):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "meta.json").write_text(text)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "7.err").write_text("x" * 10_000 + "\nlast words")
    (row,) = slurm.describe_jobs([])
    assert row["state"] == "killed" and row["progress"].startswith("cannot be read")
    assert row["stderr"][-1] == "last words" and len(row["stderr"][0]) < 5_000
    words = ["--runs", str(tmp_path / "runs"), "seed=1", "--config", "x.yaml", "--trace"]
    resumed = ["--runs", str(tmp_path / "runs"), "--trace", "--resume", str(tmp_path / "runs/c")]
    assert work.requeued_arguments(words, {"SLURM_JOB_ID": "7"}) == resumed


def test_the_number_in_the_last_line_of_sbatch_is_the_jobs(project, fake):
    environment = fake(FAKE_BANNER="Welcome to cluster 7!\n--> 3 jobs of 9")
    result = make(project, environment, "seeds", arguments=SHORT, SEEDS="1,2").json
    assert result["jobs"] == ["5010", "5020"]
    assert "--dependency=afterany:5010 " in fake.calls()[1]


def test_a_chain_is_submitted_whole_or_not_at_all(project, fake):
    before = set((project / "jobs/snapshots").glob("*"))
    environment = fake(FAKE_MAX_JOBS="1")
    result = make(project, environment, "seeds", check=2, arguments=SHORT, SEEDS="1,2")
    assert fake.calls()[2:] == ["scancel 5010"]
    assert "QOSMaxSubmitJobPerUserLimit" in result.stderr and "5010" in result.stderr
    assert set((project / "jobs/snapshots").glob("*")) == before


def test_sbatchs_own_variables_count_where_make_is_given_none(project, fake):
    """A job that only reports asks for one core and no GPU."""
    own = {"SBATCH_PARTITION": "gpu_course", "SBATCH_TIMELIMIT": "00:20:00", "SBATCH_GPUS": "2"}
    environment = fake(**own, SBATCH_MEM_PER_CPU="4G")
    options = {"SEEDS": "1,2", "CPUS": "2"}
    request = make(project, environment, "seeds", arguments=SHORT, **options).json["request"]
    assert {"--partition=gpu_course", "--time=00:20:00", "--cpus-per-task=2"} <= set(request)
    assert not any(option.startswith(("--mem", "--gpus")) for option in request)
    training, report = fake.calls()
    assert training.endswith("SBATCH_GPUS=2")
    assert report.endswith("SBATCH_GPUS=") and "gpus" not in report
    assert "--cpus-per-task=1 " in report and "--mem=" in report
    listed = work.read_variables({"SBATCH_PARTITION": "a,b", "SBATCH_TIMELIMIT": "UNLIMITED"})
    assert (listed["PARTITION"], listed["TIME"]) == ("a,b", "UNLIMITED"), "which sbatch takes"
    named = work.read_variables(own | {"PARTITION": "thin_course", "DATA": "~/data"})
    assert named["PARTITION"] == "thin_course"
    assert named["DATA"] == str(Path("~/data").expanduser())


@pytest.mark.slow
def test_variables_of_the_shell_are_no_make_variables_and_are_named(project, fake):
    shell = {"DATA": "nowhere", "TIME": "$(touch pwned)", "K": "x", "SEED": "y", "ARGS": "--no"}
    result = make(project, fake(**shell), "folds", arguments=SHORT, OUT="x")
    assert result.json["tasks"] == list("01234") and not (project / "pwned").exists()
    (note,) = [line for line in result.stderr.splitlines() if "ignored" in line]
    assert set(re.findall(r"\b[A-Z]+\b", note)) == {"DATA", "TIME", "K", "SEED"}


def test_a_mistyped_variable_is_refused_with_the_nearest_one(project, fake):
    result = make(project, fake(), "train", check=2, arguments=SHORT, PARTITON="thin_course")
    assert "PARTITON" in result.stderr and "PARTITION" in result.stderr and fake.calls() == []


def test_code_of_which_git_tells_nothing_is_submitted_with_gits_reason_and_remedy(project, fake):
    environment = fake(GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    result = make(project, environment, "train", arguments=SHORT)
    assert "dubious ownership" in result.stderr
    assert "git config --global --add safe.directory" in result.stderr
    newest = max((project / "jobs/snapshots").glob("*/submission.json"), key=os.path.getmtime)
    assert read_json(newest)["commit"] is None
    code = newest.parent / "code"
    assert (code / "train.py").read_bytes() == (project / "train.py").read_bytes()
    assert not (code / ".git").exists() and not (code / "runs").exists()


@pytest.mark.slow
def test_check_says_whether_a_training_fits_and_submits_nothing(project, fake):
    result = make(project, fake(), "check", arguments=SHORT).json
    assert result["fits"] and result["seconds"] > 0 and "--mem=16000M" in result["request"]
    small = make(project, fake(), "check", check=1, arguments=SHORT, MEM="100M").json
    assert not small["fits"] and small["memory_bytes"] > 100 << 20
    assert fake.calls() == []


def test_a_full_disk_is_seen():
    slurm.require_disk(1)
    with pytest.raises(BadInput, match="GB free"):
        slurm.require_disk(10**18)


@pytest.mark.slow
def test_without_slurm_seeds_run_one_after_the_other_once_they_can_work(project, tmp_path):
    for name in ("make", "bash", "git"):
        (tmp_path / name).symlink_to(shutil.which(name))
    environment = {"PATH": str(tmp_path)}
    refused = make(project, environment, "seeds", check=2, arguments=["data_dir=nowhere"])
    assert refused.stderr.count("no folder nowhere") == 1
    result = make(project, environment, "seeds", arguments=SHORT, SEEDS="7,8").json
    assert result["num_runs"] == 2 and result["seeds"]["val_auc"]["num"] == 2
