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
    Parser,
    one_line,
    positive,
    print_result,
    say,
    script,
)


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="train.py",
        usage="python train.py data_dir=data/mine seed=2 lr=1e-2 [options]",
        description="Train one run, with `key=value` put over the config, or go on with one.",
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--config",
        default="",
        metavar="F",
        help="YAML file whose keys are put over those of config.yaml",
    )
    which.add_argument("--resume", metavar="RUN", help="go on with a run from its last checkpoint")
    add("--runs", default="runs", metavar="DIR", help="of the run folder (default: runs)")
    parser.add_device()
    add(
        "--until-epoch",
        type=positive,
        default=0,
        metavar="N",
        help="pause after N epochs, for --resume",
    )
    add("--trace", action="store_true", help="write digests of each step to RUN/trace.csv")
    add("--trace-every", type=positive, default=0, metavar="N", help="only of every Nth step")
    return parser.parse_with_overrides(argv)


@script
def main(argv=None) -> int:
    args = parse(argv)

    from lib.config import DEFAULT_PATH, load_config
    from lib.files import read_json
    from lib.rundir import find_run, is_finished, resume_config

    run = find_run(args.resume, args.runs) if args.resume is not None else None
    if run and is_finished(run):
        status = read_json(run / "summary.json").get("status")
        say(f"{run} is {status}, there is nothing to resume")
        print_result({"run": str(run), "status": status})
        return EXIT_DONE if status == "finished" else EXIT_FINDING
    if run:
        cfg = resume_config(run, args.overrides)
    else:
        cfg = load_config(args.config or DEFAULT_PATH, args.overrides)

    # choose the device, and join the other ranks under torchrun or srun
    import torch

    from lib.device import choose_device, resolve_precision
    from lib.machine import resolve_threads
    from lib.ranks import join_ranks

    device = choose_device(args.device)
    cfg = resolve_precision(resolve_threads(cfg), device)
    with join_ranks(cfg.shards) as ranks:
        # all ranks use the least that one of them was given: with unequal threads or precision
        # their bits would differ
        given = torch.tensor([cfg.threads, cfg.precision == "bf16"])
        threads, is_bf16 = torch.stack(ranks.gather(given)).amin(0).tolist()
        cfg = dataclasses.replace(cfg, threads=threads, precision="bf16" if is_bf16 else "fp32")
        exit_code = train(cfg, args, run, device, ranks)
        ranks.wait()  # torchrun ends every rank as soon as one ends with another code than 0
        return exit_code


def train(cfg, args, run: Path | None, device, ranks) -> int:
    """Train to the end of the config's epochs, in a new run folder or, given one, from its newest
    checkpoint.
    """
    from lib import batches, rundir, training
    from lib.checkpoint import SCHEMA, save_checkpoint
    from lib.fingerprint import fingerprint
    from lib.groups import groups_digest
    from lib.machine import (
        describe_machine,
        keep_freed_memory,
        note_busy_cores,
        others_busy_s,
    )
    from lib.metrics import compute_metrics, constant_alarm, constant_baselines
    from lib.models import num_parameters
    from lib.predict import predict_rows
    from lib.progress import Progress
    from lib.ranks import StopFlag
    from lib.runlog import Diverged, RunLog
    from lib.seeding import set_determinism
    from lib.trace import Trace

    # how busy other processes keep the cores is measured while the data are opened
    started_at, busy_s = time.monotonic(), others_busy_s()

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

    # advice for a new run: a resumed one cannot change its threads. Several ranks would count each
    # other as other processes
    if device.type == "cpu" and ranks.num == 1 and not run:
        note_busy_cores(cfg.threads, started_at, busy_s)

    # write down what runs where
    baselines = constant_baselines(valid_rows.labels)
    if ranks.is_first:
        run = run or rundir.create_run(args.runs, cfg)
        lock = rundir.hold_run(run, cfg)  # noqa: F841 (held until this function ends)
        meta = {
            **rundir.environment(),
            "machine": describe_machine(device),
            "data": data,
            "groups": groups,
            "identity": cfg.identity_digest(data, groups),
            "rows": {"train": train_rows.describe(), "valid": valid_rows.describe()},
            "batch_size": batch_size,
            "steps_per_epoch": steps_per_epoch,
            "num_ranks": ranks.num,
            "model": {"num_parameters": num_parameters(state.model)},
            "start_step": progress["num_steps"],
        }
        meta["versions"]["schema"] = SCHEMA  # a step gives other bits under another schema
        rundir.say_what_changed(run, meta)
        rundir.write_meta(run, meta)
        num_weights = meta["model"]["num_parameters"]
        say(f"run {run}: {cfg.model} of {num_weights:,} parameters on {device}")
        say(f"{len(train_rows):,} patches to train on, {len(valid_rows):,} to validate on")
    log = RunLog(run if ranks.is_first else None, progress, started_at, batch_size, ranks)
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
    num_epochs = args.until_epoch or cfg.epochs
    num_left = (num_epochs * steps_per_epoch - progress["num_steps"]) * batch_size
    with StopFlag() as stop, log, Progress(num_left, "training") as bar:
        try:
            while progress["epoch"] < num_epochs and not training.is_over(progress, cfg):
                # train an epoch, or the rest of it
                epoch = progress["epoch"]
                epoch_keys = batches.epoch_order(train_rows, len(train_split), epoch, cfg, device)
                batch_keys = epoch_keys[: steps_per_epoch * batch_size].split(batch_size)
                own_keys = [ranks.part(keys) for keys in batch_keys[progress["step"] :]]
                log.start_epoch()
                bar.label = f"epoch {epoch + 1}/{cfg.epochs}"
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
                logits = predict_rows(state.averaged, valid_source, valid_rows.index, cfg, views=1)
                scores = compute_metrics(valid_rows.labels, logits)
                eval_s = time.perf_counter() - eval_started_at
                if not math.isfinite(scores["loss"]):
                    what = f"the validation loss of epoch {epoch + 1} is {scores['loss']}"
                    log.raise_diverged(what)
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


def finish_run(run: Path, cfg, state, baselines: dict, parts: tuple, log, diverged) -> None:
    """Calibrate the best epoch's model, and score it over the views of the config. Then write the
    page and, last, summary.json: it says that the run is over.

    `parts` holds (split, rows) of training, the same of validation, and validation's patches.
    `diverged` is None or the error that ended the run. After an error nothing is calibrated, and
    summary.json gives the step and the rows.
    """
    from lib.calibration import complete_checkpoint
    from lib.checkpoint import weights_sha256
    from lib.files import write_json

    progress = state.progress
    if diverged:
        status = "diverged"
        details = {"diverged_step": diverged.step, "diverged_rows": diverged.rows}
        say(f"error: {diverged}; the last good checkpoint is {run}/last.pt, if it is there")
    else:
        status = "finished"
        progress["best_scores"], details = complete_checkpoint(run, *parts, cfg)
    summary = {
        "status": status,
        "weights_sha256": weights_sha256(state.model.state_dict()),
        "num_steps": progress["num_steps"],
        "num_epochs": progress["epoch"],
        "best_epoch": progress["best_epoch"],
        # of best.pt, over the views of the config
        **{f"val_{name}": value for name, value in progress["best_scores"].items()},
        **baselines,
        **details,
        "wall_s": log.wall_s(),
    }
    try:
        from lib.runpage import write_run_page  # matplotlib takes a second to import

        write_run_page(run, run / "report.html", summary)
    except Exception as error:  # the run itself is complete
        say(f"warning: no page of {run} could be written ({one_line(error)})")
    write_json(run / "summary.json", summary)
    say(f"{status}: see {run}/report.html; next: python inference.py --ckpt {run} INPUT")
    print_result({"run": str(run), **summary})


if __name__ == "__main__":
    sys.exit(main())
