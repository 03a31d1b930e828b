"""Train a tumour-patch classifier: one run, from config to run folder.

python train.py [--config F] [--runs DIR] [--device D] [--trace] [key=value ...]
python train.py --resume RUN [--until-epoch N]
"""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
    EXIT_INTERRUPTED,
    BadInput,
    Parser,
    one_line,
    positive,
    print_result,
    say,
    script,
)


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="train.py", description="Train one run, from config to run folder, or go on with one."
    )
    parser.add_argument(
        "--config",
        default="",
        metavar="F",
        help="YAML file whose keys are put over those of config.yaml",
    )
    parser.add_argument(
        "--runs", default="runs", metavar="DIR", help="where the run folder is made (default: runs)"
    )
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with a run from its last checkpoint")
    parser.add_argument(
        "--until-epoch",
        type=positive,
        default=0,
        metavar="N",
        help="pause after N epochs, for --resume",
    )
    parser.add_argument(
        "--trace", action="store_true", help="write SHA-256 digests of each step to RUN/trace.csv"
    )
    parser.add_argument(
        "--trace-every",
        type=positive,
        default=0,
        metavar="N",
        help="the same for every Nth step only",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="put over the config, e.g. seed=2 lr=1e-3"
    )
    return parser.parse_intermixed_args(argv)


@script
def main(argv=None) -> int:
    args = parse(argv)
    # the clock starts before the import of torch, which takes most of the time to the first step
    args.started_at = time.monotonic()

    from lib.config import DEFAULT_PATH, load_config
    from lib.files import read_json
    from lib.rundir import find_run, is_finished, resume_config

    if args.resume is None:
        return start(load_config(args.config or DEFAULT_PATH, args.overrides), args)
    run = find_run(args.resume, args.runs)
    if args.config:
        raise BadInput(f"--config does not go with --resume: {run} has its own config.yaml")
    if is_finished(run):
        status = read_json(run / "summary.json").get("status")
        overrides = f", and {' '.join(args.overrides)} has no effect" if args.overrides else ""
        say(f"{run} is {status}, there is nothing to resume{overrides}")
        print_result({"run": str(run), "status": status})
        return EXIT_DONE if status == "finished" else EXIT_FINDING
    return start(resume_config(run, args.overrides), args, run)


def start(cfg, args, run: Path | None = None) -> int:
    """Choose the device, join the other ranks under torchrun or srun, and train. Returns the exit
    code. `run` is the folder of a resumed run, None for a new one.
    """
    import torch

    from lib.device import choose_device
    from lib.machine import resolve_threads
    from lib.ranks import join_ranks

    device = choose_device(args.device)
    threads = resolve_threads(cfg).threads
    with join_ranks(cfg.shards) as ranks:
        # all ranks use the smallest number that one of them was given: with unequal numbers of
        # threads their bits would differ
        threads = int(min(ranks.gather(torch.tensor(threads))))
        cfg = dataclasses.replace(cfg, threads=threads)
        exit_code = train(cfg, args, run, device, ranks)
        ranks.wait()  # torchrun ends every rank as soon as one ends with another code than 0
        return exit_code


def train(cfg, args, run: Path | None, device, ranks) -> int:
    """Train to the end of the config's epochs, in a new run folder or, given one, from its newest
    checkpoint.
    """
    from lib import batches, rundir, training
    from lib.checkpoint import save_checkpoint
    from lib.device import note_slow_precision
    from lib.fingerprint import fingerprint
    from lib.groups import groups_digest
    from lib.machine import keep_freed_memory, note_busy_cores, others_busy_s
    from lib.metrics import constant_alarm, constant_baselines
    from lib.predict import evaluate
    from lib.progress import Progress
    from lib.ranks import StopFlag
    from lib.runlog import Diverged, RunLog
    from lib.seeding import set_determinism
    from lib.trace import Trace

    # how busy other processes keep the cores is measured while the data are opened
    watched_from, busy_s = time.monotonic(), others_busy_s()

    # open the data; whatever can be refused is refused before a folder is made
    set_determinism(cfg.deterministic, cfg.threads)
    keep_freed_memory()
    train_part, valid_part = batches.open_train_valid(cfg)
    (train_split, train_rows), (valid_split, valid_rows) = train_part, valid_part
    batch_size = batches.fit_batch_size(cfg, len(train_rows))
    steps_per_epoch = len(train_rows) // batch_size
    data = fingerprint(cfg.data_dir, ["train"] if cfg.num_folds else ["train", "valid"])
    groups = groups_digest(valid_split, cfg.data_dir)
    if run:
        rundir.require_same_run(run, cfg, data, groups)

    # build the state before the first step, or restore that of the last checkpoint
    state = training.build_state(cfg, device, ranks)
    if run and (run / "last.pt").exists():
        training.restore_state(state, run / "last.pt")
    progress = state.progress

    # put the patches where they can be gathered fast
    train_source = valid_source = batches.PatchSource(
        train_split.images, cfg.data_residence, device
    )
    if not cfg.num_folds:
        valid_source = batches.PatchSource(valid_split.images, cfg.data_residence, device)
    loss_weights = training.class_weights(train_rows.labels, cfg, device)

    # advice for a new run: a resumed one can change neither threads nor precision. Several ranks
    # would count each other as other processes
    if device.type == "cpu" and ranks.num == 1 and not run:
        note_busy_cores(cfg.threads, watched_from, busy_s)
        note_slow_precision(cfg.precision, device)

    # write down what runs where
    baselines = constant_baselines(valid_rows.labels)
    if ranks.is_first:
        run = run or rundir.create_run(args.runs, cfg)
        lock = rundir.hold_run(run, cfg)  # noqa: F841 (held until this function ends)
        facts = {
            "data": data,
            "groups": groups,
            "identity": cfg.identity_digest(data, groups),
            "rows": {"train": train_rows.describe(), "valid": valid_rows.describe()},
            "constant_baselines": baselines,
            "batch_size": batch_size,
            "steps_per_epoch": steps_per_epoch,
            "num_ranks": ranks.num,
        }
        note_start(run, cfg, state, device, facts)
    log_run = run if ranks.is_first else None
    log = RunLog(log_run, progress, args.started_at, batch_size, ranks)
    trace = Trace(run, state, args.trace_every or int(args.trace), ranks)

    def save(name: str) -> None:
        # first the rows of the steps before it, so that a resumed run lacks none
        log.flush()
        trace.flush()
        if not training.is_finite(state.model):
            log.raise_diverged("a weight is no longer a finite number")
        if ranks.is_first:
            is_last = name == "last.pt"  # the other one, best.pt, is for prediction alone
            checkpoint = state.checkpoint(cfg, data, with_optimizer=is_last)
            save_checkpoint(run / name, checkpoint)
            if is_last:
                trace.keep(run / name)

    diverged = None
    until_epoch = args.until_epoch or cfg.epochs
    with StopFlag() as stop, log:
        try:
            while progress["epoch"] < until_epoch and not training.is_over(progress, cfg):
                # train an epoch, or the rest of it
                epoch = progress["epoch"]
                epoch_keys = batches.epoch_order(train_rows, len(train_split), epoch, cfg, device)
                batch_keys = epoch_keys[: steps_per_epoch * batch_size].split(batch_size)
                own_keys = [ranks.part(keys) for keys in batch_keys[progress["step"] :]]
                log.start_epoch()
                with Progress(len(own_keys) * batch_size, f"epoch {epoch + 1}/{cfg.epochs}") as bar:
                    for batch in batches.load_batches(train_source, train_split.labels, own_keys):
                        step, lr_scale = progress["num_steps"], progress["lr_scale"]
                        lr = training.learning_rate(cfg, step, steps_per_epoch, lr_scale)
                        result = training.training_step(state, batch, cfg, lr, loss_weights, ranks)
                        log.add_step(result, batch, lr)
                        trace.add(batch, result)
                        bar.add(batch_size, log.note)

                        # stop if a signal has asked for it, all ranks after the same step
                        if ranks.any(stop):
                            save("last.pt")
                            if ranks.is_first:
                                rundir.write_stop(run, "interrupted", step + 1)
                            return EXIT_INTERRUPTED
                        every = cfg.checkpoint_every_steps
                        if every and (step + 1) % every == 0:
                            save("last.pt")

                # evaluate the averaged weights
                log.flush()
                eval_started_at = time.perf_counter()
                scores = evaluate(state.averaged, valid_source, valid_rows, cfg)
                eval_s = time.perf_counter() - eval_started_at
                if not math.isfinite(scores["loss"]):
                    loss = scores["loss"]
                    log.raise_diverged(f"the validation loss of epoch {epoch + 1} is {loss}")
                is_best = training.note_epoch(progress, scores, cfg)
                log.add_epoch(scores, baselines, is_best, steps_per_epoch, eval_s)
                alarm = constant_alarm(scores)
                if alarm and ranks.is_first:
                    say(alarm)

                # save
                progress.update(epoch=epoch + 1, step=0)
                if is_best:
                    save("best.pt")
                save("last.pt")
        except Diverged as error:
            diverged = error

    if ranks.is_first and (diverged or training.is_over(progress, cfg)):
        parts = (train_part, valid_part, valid_source)
        finish_run(run, cfg, state, baselines, parts, log, diverged)
    elif ranks.is_first:
        rundir.write_stop(run, "paused", progress["num_steps"])
    return EXIT_FINDING if diverged else EXIT_DONE


def note_start(run: Path, cfg, state, device, facts: dict) -> None:
    """Write meta.json, what runs where and on what data, and print what is about to be trained."""
    from lib import rundir
    from lib.checkpoint import SCHEMA
    from lib.machine import describe_machine
    from lib.models import num_parameters

    num_weights = num_parameters(state.model)
    meta = {
        **rundir.environment(),
        "machine": describe_machine(device),
        **facts,
        "model": {"name": cfg.model, "num_parameters": num_weights},
        "start_step": state.progress["num_steps"],
    }
    meta["versions"]["schema"] = SCHEMA  # a step gives other bits under another schema
    rundir.say_what_changed(run, meta)
    rundir.write_meta(run, meta)
    num_train, num_valid = facts["rows"]["train"]["num"], facts["rows"]["valid"]["num"]
    say(f"run {run}: {cfg.model} of {num_weights:,} parameters on {device}")
    say(f"{num_train:,} patches to train on, {num_valid:,} to validate on")


def finish_run(run: Path, cfg, state, baselines: dict, parts: tuple, log, diverged) -> None:
    """Calibrate the best epoch's model, and score it over the views of the config. Then write the
    page and, last, summary.json: it says that the run is over.

    `parts` holds (split, rows) of training, the same of validation, and validation's patches.
    `diverged` is None or the error that ended the run. After an error nothing is calibrated, and
    summary.json gives the step and the rows.
    """
    from lib import rundir
    from lib.calibration import complete_checkpoint
    from lib.checkpoint import weights_sha256

    progress = state.progress
    if diverged:
        status = "diverged"
        details = {"diverged_step": diverged.step, "diverged_rows": diverged.rows}
        good = "last.pt" if (run / "last.pt").is_file() else "none yet"
        say(f"error: {diverged}; the last good checkpoint of {run} is {good}")
    else:
        status = "finished"
        progress["best_scores"], details = complete_checkpoint(run, *parts, cfg)
    digest = weights_sha256(state.model.state_dict())
    summary = rundir.build_summary(status, digest, progress, baselines, **details, **log.times())
    write_page(run, summary)
    rundir.write_summary(run, summary)
    print_result({"run": str(run), **summary})


def write_page(run: Path, summary: dict) -> None:
    """Write RUN/report.html. Where that fails it prints a warning: the run itself is complete."""
    try:
        from lib.runpage import write_run_page  # matplotlib takes a second to import

        write_run_page(run, run / "report.html", summary)
    except Exception as error:
        say(f"warning: no page of {run} could be written ({one_line(error)})")


if __name__ == "__main__":
    sys.exit(main())
