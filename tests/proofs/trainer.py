"""A training a step at a time, for the proofs and the tests that need a GPU."""

import contextlib
import functools
import itertools
import statistics
import time
from collections import deque

import torch

from lib import batches, pcam, predict, runlog, seeding, training
from lib.config import load_config
from lib.device import resolve_precision

# steps before a measurement; steps that the host may be ahead of the device in one
WARM_STEPS, AHEAD = 3, 8
# calls of CUDA that put work on a GPU
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
# without a GPU the proof shows that it runs, in small
ON_CPU, ON_GPU = {"threads": 1, "p4m_width": 2}, {"threads": 8}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(step, seconds: float, device: torch.device) -> float:
    """Calls of `step` a second. Without a bound a host that only launches graphs would be minutes
    ahead of the device.
    """
    for _ in range(WARM_STEPS):
        step()
    wait_for(device)
    events, num, started = deque(), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        step()
        num += 1
        if device.type == "cuda":
            events.append(torch.cuda.Event())
            events[-1].record()
        if len(events) > AHEAD:
            events.popleft().synchronize()
    wait_for(device)
    return num / (time.perf_counter() - started)


def median_rates(measures: list, num_rounds: int) -> list[float]:
    """The median of what each function gives, called in turn, so that what drifts hits all."""
    rounds = [[measure() for measure in measures] for _ in range(num_rounds)]
    return list(map(statistics.median, zip(*rounds, strict=True)))


class Trainer:
    """The program's training a step at a time, over the patches of a PCam folder, from where
    `residence` says.
    """

    def __init__(self, device: torch.device, data, residence="device", captured=True, **changes):
        values = {"data_dir": data, **(ON_GPU if device.type == "cuda" else ON_CPU), **changes}
        overrides = [f"{key}={value}" for key, value in values.items()]
        self.cfg, self.device = resolve_precision(load_config(overrides=overrides), device), device
        self.split = pcam.open_split(data, "train")
        self.rows = batches.select_rows(self.split, self.cfg)
        seeding.set_determinism(self.cfg.deterministic, self.cfg.threads)
        started = time.perf_counter()
        self.source = batches.PatchSource(self.split.images, residence, device)
        wait_for(device)
        self.read_s = time.perf_counter() - started
        self.state = training.build_state(self.cfg, device)
        if not captured:
            self.state.graph = None

    def order(self, epoch: int, device=None) -> torch.Tensor:
        """The sample keys of an epoch, int64 (N,)."""
        device = device or self.device
        return batches.epoch_order(self.rows, len(self.split), epoch, self.cfg, device)

    def batches(self, size: int):
        """Batches of `size` patches without end, many epochs' at once: where loading starts anew, a
        GPU waits.
        """
        size, epoch = min(size, len(self.rows)), 0
        while True:
            todo = []
            while len(todo) < 400:
                todo += self.order(epoch)[: len(self.rows) // size * size].split(size)
                epoch += 1
            yield from batches.load_batches(self.source, self.split.labels, todo)

    def step(self, batch):
        return training.training_step(self.state, batch, self.cfg, self.cfg.lr)

    def images_per_s(self, seconds: float) -> float:
        """The rate of training with batches of the config's size."""
        seeding.set_determinism(self.cfg.deterministic, self.cfg.threads)
        size = min(self.cfg.batch_size, len(self.rows))
        with contextlib.closing(self.batches(size)) as loader:
            return rate(lambda: self.step(next(loader)), seconds, self.device) * size

    def predicting_images_per_s(self, seconds: float) -> float:
        """The rate of prediction of one view, of a batch that is on the device."""
        size = min(self.cfg.batch_size, len(self.rows))
        images = torch.from_numpy(self.split.images.read(range(size))).to(self.device)
        precision = self.cfg.precision
        model = predict.ready_to_predict(self.state.model, precision)
        step = functools.partial(predict.predict_batch, model, images, precision, 1)
        return rate(step, seconds, self.device) * size

    def logged_steps(self, run_folder, num: int, size: int):
        """Train as train.py does, with a row of steps.csv for each step; yields the number of steps
        done.
        """
        log = runlog.RunLog(run_folder, self.state.progress, time.monotonic(), size)
        with log, contextlib.closing(self.batches(size)) as loader:
            log.start_epoch()
            for done, batch in enumerate(itertools.islice(loader, num), 1):
                log.add_step(self.step(batch), batch, self.cfg.lr)
                yield done
            log.flush()


def profile_steps(trainer: Trainer, num: int, activities):
    """A profile of `num` steps of training, their batches included."""
    with contextlib.closing(trainer.batches(trainer.cfg.batch_size)) as loader:
        for _ in range(WARM_STEPS):
            trainer.step(next(loader))
        wait_for(trainer.device)
        with torch.profiler.profile(activities=activities) as profiled:
            for _ in range(num):
                trainer.step(next(loader))
            wait_for(trainer.device)
    return profiled
