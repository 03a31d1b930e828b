"""Every Make target on a real Slurm: jobs run, go on by themselves, and end with the weights of a
run without Slurm.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from hashlib import sha256
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
    for path in REPOSITORY.glob("*"):
        if path.is_file() and path.name != ".git":  # a link, in a git worktree
            shutil.copy(path, folder)
    unused = shutil.ignore_patterns("logs", "snapshots", "__pycache__")
    for name in ("lib", "jobs", "tests"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=unused)
    shutil.copy(REPOSITORY / ".gitignore", folder)
    shutil.copytree(pcam_dir, folder / 'my "data"')
    (folder / ".gitignore").open("a").write("my*\n")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def make(project, environment, target, check=0, arguments=(), **variables):
    """`make TARGET` as a user would; the result gets `.json`, the last line of stdout."""
    variables |= {"PYTHON": sys.executable} | ({"ARGS": " ".join(arguments)} if arguments else {})
    command = ["make", "-s", target, *(f"{name}={value}" for name, value in variables.items())]
    result = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (result.returncode != 0) == (check != 0), result.stderr
    lines = result.stdout.splitlines()
    result.json = json.loads(lines[-1]) if lines else None
    return result


def state(cluster, job) -> str:
    return run(["squeue", "-h", "-j", job, "-o", "%T"], cluster).strip()


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


def under_way(project, job) -> Path:
    """The run folder of a job that has made its first checkpoint."""
    return wait_for(
        lambda: (run := run_of(project, job)) and (run / "last.pt").is_file() and run,
        f"job {job} to be under way",
    )


@contextlib.contextmanager
def paused(project, job):
    """The job's training stands still in the block, and so cannot be over before it is
    disturbed.
    """
    pid = read_json(under_way(project, job) / "meta.json")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ended(project, job, seconds=120) -> str:
    """The exit code of a job that is over, and of no other start of it."""
    path = project / f"jobs/logs/{job}.exit"
    return wait_for(
        lambda: path.is_file() and path.read_text().strip(), f"the end of job {job}", seconds
    )


def logged(project, job, kind="err") -> str:
    return (project / f"jobs/logs/{job}.{kind}").read_text()


def digest_of_resumed(project, job) -> str:
    """weights_sha256 of a run that its job started twice, and that did not begin anew."""
    assert ended(project, job) == "0", logged(project, job)
    run = run_of(project, job)
    meta = read_json(run / "meta.json")
    assert (
        meta["start_step"] > 0
        and meta["earlier_starts"]
        and meta["job"]["SLURM_RESTART_COUNT"] != "0"
    )
    return read_json(run / "summary.json")["weights_sha256"]


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory) -> str:
    """weights_sha256 of LONG without Slurm: no sbatch is found."""
    path = tmp_path_factory.mktemp("bin")
    for name in ("make", "bash", "git"):
        (path / name).symlink_to(shutil.which(name))
    result = make(project, {"PATH": str(path)}, "train", arguments=LONG, SEED=1)
    assert "no Slurm cluster here" in result.stderr
    return result.json["weights_sha256"]


@pytest.fixture(scope="module")
def jobs(project, cluster) -> dict[str, str]:
    """Ids of jobs that were disturbed, each as soon as it had something to lose; they end while the
    tests look at them.
    """

    def submit(target="train", **more):
        return make(project, cluster, target, arguments=LONG, **more).json["job"]

    ids = {"array": submit("seeds", SEEDS="1,2")}
    with paused(project, f"{ids['array']}_0"), paused(project, f"{ids['array']}_1"):
        ids |= {
            f"task {seed}": job_of(run_of(project, f"{ids['array']}_{seed - 1}")) for seed in (1, 2)
        }
        ids["status"] = make(project, cluster, "status").json["jobs"]
        run(["scontrol", "requeue", ids["task 1"]], cluster)
        ids["cancelled"] = make(project, cluster, "cancel", JOB=f"{ids['array']}_1").json
    ids["preempted"] = submit(PARTITION="gpu_course")
    with paused(project, ids["preempted"]):
        run(
            [
                "sbatch",
                "--partition=urgent",
                "--cpus-per-task=8",
                "--output=/dev/null",
                "--wrap=true",
            ],
            cluster,
        )
        wait_for(
            lambda: state(cluster, ids["preempted"]) != "RUNNING", "the urgent job to preempt it"
        )
    ids["limited"] = submit(TIME=12, STAGE_DATA=1)
    with paused(project, ids["limited"]):
        # that is within the warning
        run(["scontrol", "update", f"JobId={ids['limited']}", "TimeLimit=2"], cluster)
        wait_for(lambda: "told to stop: USR1" in logged(project, ids["limited"]), "the warning")
    wait_for(
        lambda: state(cluster, ids["limited"]) == "PENDING", "the job to go back into the queue"
    )
    run(["scontrol", "update", f"JobId={ids['limited']}", "TimeLimit=12"], cluster)
    ids["ranks"] = submit(NUM_RANKS=2)
    return ids


@needs_slurm
def test_a_requeued_task_of_an_array_goes_on_and_status_shows_its_neighbour(
    jobs, project, undisturbed
):
    assert digest_of_resumed(project, jobs["task 1"]) == undisturbed
    row, run = (
        next(row for row in jobs["status"] if row["id"] == jobs["task 2"]),
        run_of(project, jobs["task 2"]),
    )
    assert (
        row["state"] == "RUNNING"
        and row["progress"].endswith("/60")
        and row["left"]
        and row["limit_left"]
    )
    assert row["run"] == str(run.relative_to(project)) and "-s2-" in run.name
    shown = (project / f"jobs/logs/{jobs['task 1']}.shown").read_text().strip()
    assert shown == f"{jobs['array']}_0", "which status shows when Slurm has forgotten the job"


@needs_slurm
def test_a_cancelled_task_saves_and_does_not_go_on(jobs, project, cluster):
    assert jobs["cancelled"] == {"num_cancelled": 1}
    assert ended(project, jobs["task 2"]) == "130" and "goes on later" not in logged(
        project, jobs["task 2"]
    )
    assert "interrupted after step" in logged(project, jobs["task 2"])
    assert wait_for(
        lambda: not state(cluster, jobs["task 2"]), "the cancelled job to leave the queue"
    )


@needs_slurm
def test_a_preempted_job_goes_on_by_itself(jobs, project, undisturbed):
    assert digest_of_resumed(project, jobs["preempted"]) == undisturbed


@needs_slurm
def test_a_job_at_its_time_limit_goes_on_by_itself_and_data_are_copied_for_each_start(
    jobs, project, undisturbed
):
    assert digest_of_resumed(project, jobs["limited"]) == undisturbed
    log = logged(project, jobs["limited"])
    assert "interrupted after step" in log and log.count("data copied to") == 2
    copy = re.search("data copied to (.*)", log)[1]
    assert jobs["limited"] in copy and not Path(copy).exists()
    assert read_run_config(run_of(project, jobs["limited"])).data_dir == 'my "data"', (
        "the run can be resumed without the copy"
    )


@needs_slurm
def test_two_tasks_are_two_ranks_and_end_with_the_weights_of_one(jobs, project, undisturbed):
    assert ended(project, jobs["ranks"]) == "0", logged(project, jobs["ranks"])
    run = run_of(project, jobs["ranks"])
    assert read_json(run / "meta.json")["num_ranks"] == 2
    assert read_json(run / "summary.json")["weights_sha256"] == undisturbed


@needs_slurm
def test_a_job_runs_the_code_that_was_submitted_after_a_failed_one_whose_last_words_status_quotes(
    project, cluster
):
    (project / "lib/new.py").write_text("NAME = 'new'\n")
    script, text = project / "train.py", (project / "train.py").read_text()
    old, older = (project / f"jobs/snapshots/{name}" for name in ("old", "older"))
    for folder in (old, older):
        folder.mkdir(parents=True)
    os.utime(older, (0, 0))
    script.write_text(text.replace("\nimport argparse\n", "\nimport argparse\nimport lib.new\n"))
    try:
        failing = make(project, cluster, "train", arguments=[*SHORT, "--device cuda"]).json["job"]
        after = make(project, cluster, "train", arguments=SHORT, AFTER=failing).json["job"]
    finally:
        script.write_text("raise SystemExit('not what was submitted')\n")
    assert old.is_dir() and not older.exists()
    try:
        assert ended(project, after) == "0", logged(project, after)
        status = make(project, cluster, "status")
    finally:
        script.write_text(text)
        (project / "lib/new.py").unlink()
    meta = read_json(run_of(project, after) / "meta.json")
    head = run(["git", "-C", str(project), "rev-parse", "HEAD"], cluster).strip()
    assert (
        meta["commit"] == head
        and "+import lib.new" in meta["uncommitted_patch"]
        and meta["untracked_files"] == ["lib/new.py"]
    )
    assert (
        meta["submitted"]["commit"] == head
        and meta["submitted"]["uncommitted_patch_sha256"] != sha256(b"").hexdigest()
    )
    row = next(row for row in status.json["jobs"] if row["id"] == failing)
    assert row[
        "state"
    ] == "failed, exit 2" and "--device cuda: this machine offers no CUDA" in " ".join(
        row["stderr"]
    )
    assert "--device cuda: this machine offers no CUDA" in status.stderr


@needs_slurm
def test_bench_audit_and_folds_run(project, cluster):
    quick = [
        (
            "--seconds 0.01 --repeats 1 --batch-sizes 8 --allow-noise --cases raw,default,apart"
            " model=resnet18"
        ),
        *QUICK[2:],
    ]
    wanted = {"DATA": 'my "data"', "OUT": "my bench", "arguments": quick}
    bench = make(project, cluster, "bench", PARTITION="thin_course", **wanted).json
    checks = {"OUT": "an audit", "ARGS": "--checks values,balance"}
    audit = make(project, cluster, "audit", PARTITION="gpu_course", DATA='my "data"', **checks).json
    folds = make(project, cluster, "folds", K=2, arguments=SHORT).json
    assert "--cpus-per-task=16" in bench["request"] and {"--cpus-per-task=4", "--gpus=1"} <= set(
        audit["request"]
    )
    assert folds["tasks"] == ["0", "1"]
    assert ended(project, bench["job"]) == "0", logged(project, bench["job"])
    rows = read_json(project / "my bench/benchmark.json")["rows"]
    assert {row["what"] for row in rows} == {"loader", "infer", "train", "stage"}
    assert {(row["partition"], row["node_type"], row["job_id"]) for row in rows} == {
        ("thin_course", "rome,256g", bench["job"])
    }
    assert json.loads(logged(project, bench["job"], "out").splitlines()[-1])["rows"] == rows
    nowhere = make(project, cluster, "bench", check=2, PARTITION="thick_course", **wanted)
    assert "no partition thick_course, did you mean 'thin_course'" in nowhere.stderr
    # 1: there are suspects
    assert ended(project, audit["job"]) in ("0", "1"), logged(project, audit["job"])
    assert {
        row["check"] for row in json.loads((project / "an audit/findings.json").read_text())
    } >= {"balance"}
    for task in "01":
        run = wait_for(
            lambda task=task: run_of(project, f"{folds['job']}_{task}"), "a fold to begin"
        )
        assert f"fold: {task}\n" in (run / "config.yaml").read_text()
        wait_for(lambda run=run: (run / "summary.json").is_file(), "a fold to end")
    assert ended(project, folds["jobs"][1]) == "0", logged(project, folds["jobs"][1])
    assert (
        json.loads(logged(project, folds["jobs"][1], "out").splitlines()[-1])["folds"]["val_auc"][
            "num"
        ]
        == 2
    )


@needs_slurm
def test_a_search_is_a_chain_of_arrays_that_goes_on_when_a_task_is_killed(project, cluster):
    ranges = "{lr: {choice: [0.01, 0.02]}, momentum: {choice: [0.9]}}"
    space = (
        "design: grid\ntrials: 2\nseed: 1\nseeds: [1]\nrungs: [20, 21]\nchampion_seeds: 3\nranges:"
        f" {ranges}\n"
    )
    (project / "my space.yaml").write_text(space)
    cheap = [
        "model=mlp",
        "mlp_hidden=4",
        "limit_train=64",
        "limit_valid=32",
        *QUICK[1:4],
        "views=1",
    ]
    held = run(
        ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"], cluster
    ).strip()
    named = {"SPACE": "my space.yaml", "SEARCH": "two", "DATA": 'my "data"', "AFTER": held}
    jobs = make(project, cluster, "sweep", arguments=cheap, **named).json["jobs"]
    first, last, mending = jobs[0], jobs[-1], jobs[1::3]
    assert len(jobs) == 9
    run(["scontrol", "release", held], cluster)
    # the first task dies with all its processes before it has a result; what it left goes on in the
    # next job
    killed = wait_for(lambda: run_of(project, f"{first}_0"), "the first trial to begin")
    os.kill(read_json(killed / "meta.json")["pid"], signal.SIGSTOP)
    job = job_of(killed)
    assert kill_job(job) >= 4, "its script, srun, sweep.py and train.py"
    # 1: no trial beats the config as it is
    assert ended(project, last, 900) in ("0", "1"), logged(project, last)
    champion = read_json(project / "sweeps/two/champion.json")
    assert champion["note"] and len(champion["finalists"]) == 3
    assert len(list((project / "runs").glob("*-two-*/summary.json"))) == 1 + 9, (
        "one of two was promoted; three times three seeds"
    )
    assert (
        read_json(project / "sweeps/two/rung-1.json")["trials"]
        and (project / "sweeps/two/sweep.html").is_file()
    )
    assert (
        not (project / f"jobs/logs/{job}.exit").exists()
        and read_json(killed / "meta.json")["earlier_starts"]
    )
    started = [job for job in mending if (project / f"jobs/logs/{job}.err").exists()]
    assert started == mending[:1], "only of the rung in which a task failed"


@needs_slurm
def test_jobs_that_only_report_or_promote_ask_for_one_core_and_no_gpu(project, cluster):
    space = (
        "design: grid\ntrials: 1\nseed: 1\nseeds: [1]\nrungs: [1]\nchampion_seeds: 3\nranges: {lr:"
        " {choice: [0.01]}}\n"
    )
    (project / "my small space.yaml").write_text(space)
    held = run(
        ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"], cluster
    ).strip()
    common = {"PARTITION": "gpu_course", "CPUS": "2", "AFTER": held, "DATA": 'my "data"'}
    named = {"SPACE": "my small space.yaml", "SEARCH": "one"}
    jobs = make(project, cluster, "sweep", arguments=QUICK[1:4], **named, **common).json["jobs"]
    jobs += make(project, cluster, "seeds", arguments=SHORT[:-1], **common).json["jobs"]
    shown = [run(["scontrol", "show", "job", job], cluster) for job in jobs]
    run(["scancel", held, *jobs], cluster)
    computes = [True, True, False] * 2 + [True, False]
    assert [
        "gpu" in text.partition("TresPerJob=")[2].partition("\n")[0] for text in shown
    ] == computes
    assert [int(re.search(r"NumCPUs=(\d+)", text)[1]) for text in shown] == [
        2 if each else 1 for each in computes
    ]


@needs_slurm
def test_a_job_that_cannot_work_is_not_submitted(project, cluster):
    def refused(sentence, target="train", **variables):
        assert sentence in make(project, cluster, target, check=2, **variables).stderr

    queued = run(["squeue", "-h", "-o", "%A"], cluster).split()
    refused("no folder nowhere", arguments=["data_dir=nowhere"])
    refused("unknown key 'lrr', did you mean 'lr'?", arguments=[*SHORT, "lrr=1"])
    refused("3 ranks cannot share out 2 shards", arguments=SHORT, NUM_RANKS=3)
    refused(
        "no partition thin_curse, did you mean 'thin_course'?",
        arguments=SHORT,
        PARTITION="thin_curse",
    )
    refused("unrecognized arguments: --nonsense", arguments=[*SHORT, "--nonsense"])
    refused("AFTER=99999: there is no such job", arguments=SHORT, AFTER="99999")
    settings, text = project / "jobs/env.sh", (project / "jobs/env.sh").read_text()
    for lines in (
        "echo loading\necho no module 2019 >&2\nreturn 2\n",
        "echo no module 2019 >&2\nfalse\ntrue\n",
    ):
        settings.write_text(lines)
        try:
            refused("no module 2019", arguments=SHORT)
        finally:
            settings.write_text(text)
    refused("DATA=DIR", target="audit", DATA="")
    refused("NUM_RANKS: audit.py has one rank", target="audit", DATA="jobs", NUM_RANKS=2)
    assert set(run(["squeue", "-h", "-o", "%A"], cluster).split()) <= set(queued)


@pytest.mark.parametrize(
    "variables, sentence",
    [
        ({"PARTITION": "closed"}, "partition closed is down"),
        ({"TIME": "00:00:00"}, "TIME=00:00:00 is no time at all"),
        (
            {"PARTITION": "gpu_course", "TIME": "45"},
            "TIME=45 is over the limit of partition gpu_course, 30:00",
        ),
        (
            {"PARTITION": "gpu_course", "CPUS": "5"},
            "1 x 5 cores do not fit: a node of gpu_course has 4",
        ),
        ({"NUM_RANKS": "32"}, "32 x 1 cores do not fit"),
    ],
)
@needs_slurm
def test_what_does_not_fit_the_partition_is_refused(variables, sentence, cluster, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
    with pytest.raises(BadInput, match=sentence):
        slurm.fit_request(work.read_variables(variables), 2)


@needs_slurm
def test_a_request_fits_the_partition(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
    request = slurm.fit_request(work.read_variables({"PARTITION": "gpu_course"}), 64)
    assert {"--cpus-per-task=4", "--mem=8000M", "--time=30", "--gpus=1"} <= set(request)
    request = slurm.fit_request(
        work.read_variables({"MEM": "2G", "TIME": "0:12:00", "NUM_RANKS": "2"}), 2
    )
    assert {
        "--partition=thin_course",
        "--cpus-per-task=2",
        "--ntasks=2",
        "--mem=2G",
        "--time=0:12:00",
    } <= set(request)
    assert "--signal=B:USR1@120" in request and not any("gpu" in option for option in request)


@pytest.mark.parametrize(
    "text, minutes",
    [
        ("30", 30),
        ("30:00", 30),
        ("1:30:30", 90.5),
        ("1-00:00:00", 1440),
        ("2-3", 3060),
        ("infinite", float("inf")),
    ],
)
def test_slurm_times_are_read_in_all_their_forms(text, minutes):
    assert slurm.minutes_of(text) == minutes


@pytest.mark.parametrize(
    "name",
    [
        "SEED",
        "SEEDS",
        "K",
        "PARTITION",
        "TIME",
        "MEM",
        "AFTER",
        "NUM_RANKS",
        "STAGE_DATA",
        "CPUS",
        "JOB",
        "SEARCH",
        "PROCESSES",
    ],
)
@pytest.mark.parametrize("value", ["1; touch x", "$(touch x)", "-1", "1\n2", "١"])
def test_a_variable_that_is_more_than_its_form_is_refused(name, value):
    with pytest.raises(BadInput, match=f"^{name} is "):
        work.read_variables({name: value})


@pytest.mark.parametrize(
    "variables",
    [
        {"SEED": "1; touch pwned"},
        {"ARGS": "$(shell touch pwned) `touch pwned` ; touch pwned"},
        {"ARGS": "--no", "DEST": "$(shell touch pwned)", "RUN": "$(shell touch pwned)"},
    ],
)
def test_neither_make_nor_a_shell_carries_out_what_stands_in_a_variable(variables, project):
    environment = {"PATH": os.environ["PATH"]}
    assert "Traceback" not in make(project, environment, "train", check=2, **variables).stderr
    make(project, environment, "demo", check=2, DEMO_DATA="--no", **variables)
    assert not (project / "pwned").exists()


def test_what_cannot_be_read_hides_no_job_and_stops_no_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "REPOSITORY", tmp_path)
    monkeypatch.setattr(slurm, "LOGS", tmp_path / "logs")
    for name, text in (("a", "{"), ("b", '{"job": null}'), ("c", '{"job": {"SLURM_JOB_ID": "7"}}')):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "meta.json").write_text(text)
    (tmp_path / "logs" / "9.err").mkdir(parents=True)
    (tmp_path / "logs" / "7.err").write_text("x" * 10_000 + "\nlast words")
    (tmp_path / "logs" / "7.exit").write_bytes(b"\xff")
    (row,) = slurm.describe_jobs([])
    assert (
        row["progress"].startswith("cannot be read")
        and row["stderr"][-1] == "last words"
        and len(row["stderr"][0]) < 5_000
    )
    job = {"SLURM_JOB_ID": "7"}
    assert work.requeued_arguments(["--runs", str(tmp_path / "runs"), "seed=1"], job)[2:] == [
        "--resume",
        str(tmp_path / "runs/c"),
    ]


@needs_slurm
def test_a_job_takes_the_config_that_was_submitted_and_an_audit_told_to_stop_leaves_no_process(
    project, cluster
):
    config = project / "my.yaml"
    config.write_text((project / "config.yaml").read_text())
    held = run(
        ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"], cluster
    ).strip()
    waiting = make(
        project, cluster, "train", arguments=["--config my.yaml", *SHORT], AFTER=held
    ).json["job"]
    config.write_text("not: what was submitted\n")
    run(["scontrol", "release", held], cluster)
    audit = make(
        project,
        cluster,
        "audit",
        DATA='my "data"',
        OUT="stopped",
        ARGS="--checks labels --train-folds epochs=500",
    ).json["job"]
    fold = wait_for(
        lambda: next(iter(project.glob("stopped/runs/*/meta.json")), None), "the audit to train"
    )
    worker = read_json(fold)["pid"]
    make(project, cluster, "cancel", JOB=audit)
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), "the worker to end")
    assert ended(project, waiting) == "0", logged(project, waiting)


def submitted(folder) -> list[str]:
    """What a fake cluster was asked for, a line a call."""
    return (folder / "log").read_text().splitlines()


def test_the_number_in_the_last_line_of_sbatch_is_the_jobs(project, tmp_path):
    cluster = fake_cluster(tmp_path, FAKE_BANNER="Welcome to cluster 7!\n--> 3 jobs of 9")
    result = make(project, cluster, "seeds", arguments=SHORT, SEEDS="1,2").json
    assert result["jobs"] == ["5010", "5020"]
    assert "--dependency=afterany:5010 " in submitted(tmp_path)[1]


def test_a_chain_is_submitted_whole_or_not_at_all(project, tmp_path):
    before = set((project / "jobs/snapshots").glob("*"))
    cluster = fake_cluster(tmp_path, FAKE_MAX_JOBS="1")
    result = make(project, cluster, "seeds", check=2, arguments=SHORT, SEEDS="1,2")
    assert submitted(tmp_path)[2:] == ["scancel 5010"]
    assert "QOSMaxSubmitJobPerUserLimit" in result.stderr and "5010" in result.stderr
    assert set((project / "jobs/snapshots").glob("*")) == before


def test_sbatchs_own_variables_count_where_make_is_given_none(project, tmp_path):
    own = {"SBATCH_PARTITION": "gpu_course", "SBATCH_TIMELIMIT": "00:20:00", "SBATCH_GPUS": "2"}
    cluster = fake_cluster(tmp_path, **own, SBATCH_MEM_PER_CPU="4G")
    request = make(project, cluster, "seeds", arguments=SHORT, SEEDS="1,2").json["request"]
    assert {"--partition=gpu_course", "--time=00:20:00"} <= set(request)
    assert not any(option.startswith(("--mem", "--gpus")) for option in request)
    training, report = submitted(tmp_path)
    assert training.endswith("SBATCH_GPUS=2")
    assert report.endswith("SBATCH_GPUS=") and "gpus" not in report and "--mem=" in report
    listed = work.read_variables({"SBATCH_PARTITION": "a,b", "SBATCH_TIMELIMIT": "UNLIMITED"})
    assert (listed["PARTITION"], listed["TIME"]) == ("a,b", "UNLIMITED"), "which sbatch takes"
    named = {"PARTITION": "thin_course", "TIME": "5", "MEM": "2G"}
    request = make(project, cluster, "train", arguments=SHORT, **named).json["request"]
    assert {"--partition=thin_course", "--time=5", "--mem=2G"} <= set(request)


def test_a_home_in_a_make_variable_is_the_users():
    home = Path("~").expanduser()
    assert work.read_variables({"DATA": "~/data"})["DATA"] == str(home / "data")


def test_variables_of_the_shell_are_no_make_variables_and_are_named(project, tmp_path):
    shell = {"DATA": "nowhere", "TIME": "$(touch pwned)", "K": "x", "SEED": "y", "ARGS": "--no"}
    result = make(project, fake_cluster(tmp_path, **shell), "folds", arguments=SHORT, OUT="x")
    assert result.json["tasks"] == list("01234") and not (project / "pwned").exists()
    (note,) = [line for line in result.stderr.splitlines() if "ignored" in line]
    assert set(re.findall(r"\b[A-Z]+\b", note)) == {"DATA", "TIME", "K", "SEED"}


def test_code_of_which_git_tells_nothing_is_submitted_with_gits_reason_and_remedy(
    project, tmp_path
):
    cluster = fake_cluster(tmp_path, GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    result = make(project, cluster, "train", arguments=SHORT)
    assert "dubious ownership" in result.stderr
    assert "git config --global --add safe.directory" in result.stderr
    newest = max((project / "jobs/snapshots").glob("*/submission.json"), key=os.path.getmtime)
    assert read_json(newest)["commit"] is None
    code = newest.parent / "code"
    assert (code / "train.py").read_bytes() == (project / "train.py").read_bytes()
    assert not (code / ".git").exists() and not (code / "runs").exists()


def test_check_says_whether_a_training_fits_and_submits_nothing(project, tmp_path):
    cluster = fake_cluster(tmp_path)
    result = make(project, cluster, "check", arguments=SHORT).json
    assert result["fits"] and result["seconds"] > 0 and "--mem=16000M" in result["request"]
    small = make(project, cluster, "check", check=1, arguments=SHORT, MEM="100M").json
    assert not small["fits"] and small["memory_bytes"] > 100 << 20
    for sentence, words in (
        ("unknown key 'lrr'", [*SHORT, "lrr=1"]),
        ("no folder nowhere", ["data_dir=nowhere"]),
    ):
        refused = make(project, cluster, "check", check=2, arguments=words)
        assert sentence in refused.stderr
    assert not (tmp_path / "log").exists()


@needs_slurm
def test_a_job_loses_nothing_where_the_site_exports_no_variables(project, cluster):
    bare = cluster | {"SBATCH_EXPORT": "NONE"}
    jobs = make(project, bare, "seeds", arguments=SHORT, SEEDS="3,4").json["jobs"]
    assert ended(project, jobs[1], 600) == "0", logged(project, jobs[1])
    report = json.loads(logged(project, jobs[1], "out").splitlines()[-1])
    assert report["seeds"]["val_auc"]["num"] == 2


def test_a_full_disk_is_seen(tmp_path):
    slurm.require_disk(tmp_path, 1)
    with pytest.raises(BadInput, match="GB free"):
        slurm.require_disk(tmp_path, 10**18)


def test_without_slurm_seeds_run_one_after_the_other(project, tmp_path):
    environment = {"PATH": str(tmp_path), "ARGS": " ".join(SHORT), "SEEDS": "7,8"}
    command = [sys.executable, "jobs/submit.py", "seeds"]
    result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["num_runs"] == 2 and told["seeds"]["val_auc"]["num"] == 2, result.stderr
    for seed in (7, 8):
        assert len(list((project / "runs").glob(f"*-s{seed}-*/summary.json"))) == 1
