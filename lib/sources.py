"""The sources of non-determinism in this program, each with its control and the statement in the code
that controls it.
"""

# source | control | file: statement that controls it
SOURCES = """
python's generator | seeded from the config | lib/seeding.py: random.seed(seed)
numpy's generator | seeded from the config | lib/seeding.py: np.random.seed(seed
torch's generators | seeded from the config, on every device | lib/seeding.py: torch.manual_seed(seed)
initial weights | drawn on the CPU, after seeding | lib/training.py: seed_everything(cfg.seed)
dropout | seeded by (seed, epoch, step, shard) | lib/training.py: torch.manual_seed(position_seed(*position, shard))
order of samples | a function of (seed, epoch) | lib/batches.py: position_permutation(len(keys), cfg.seed, epoch, ORDER
order of classes | a function of (seed, epoch) | lib/batches.py: cfg.seed, epoch, CLASS_ORDER, label, repeat
rows under a limit | a function of the row numbers | lib/batches.py: position_permutation(len(index), LIMIT)
folds | drawn by row numbers, not by python's hash | lib/batches.py: position_bits(torch.from_numpy(first_row), FOLD)
augmentation | a function of (seed, epoch, sample) | lib/augment.py: mixed_bits(places
steps as a CUDA graph | the captured kernels, which no generator feeds | lib/training.py: StepGraph(why_not_captured(cfg, ranks))
prefetch thread | one thread, batches in their order | lib/batches.py: ThreadPoolExecutor(1, "prefetch")
copies to the device | steps that read one wait for it | lib/batches.py: current.wait_event(
number of threads | fixed by the config | lib/seeding.py: torch.set_num_threads(threads)
algorithms with atomics | refused or replaced | lib/seeding.py: torch.set_deterministic_debug_mode(
cuDNN's choice | deterministic algorithms only | lib/seeding.py: cudnn.deterministic = deterministic
cuDNN's autotuner | off | lib/seeding.py: cudnn.benchmark = not deterministic
cuBLAS workspaces | of fixed size, before CUDA starts | lib/seeding.py: setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sum over shards and ranks | one fixed binary tree | lib/ranks.py: return _tree(self.gather(_tree(parts)))
statistics of shards | each from the same running ones | lib/training.py: buffer.copy_(value)
resumption | weights, moments and position restored | lib/training.py: state.optimizer.load_state_dict(checkpoint[
a damaged checkpoint | noticed by its checksums | lib/checkpoint.py: zipfile.ZipFile(path).testzip()
other data | refused by fingerprint on resumption | lib/rundir.py: if before.get("data") != data
machine and driver | recorded, compared by twin | lib/machine.py: "driver": nvidia_smi("driver_version")
packages | recorded, compared by twin | lib/rundir.py: importlib.metadata.version(package)
code | commit and patch recorded, compared by twin | lib/rundir.py: "uncommitted_patch": git("diff", "HEAD")
environment | variables recorded, compared by twin | lib/rundir.py: "variables": {
"""


def locate_sources(read) -> list[dict]:
    """A row for each source: source, control, file, statement, and `where`, the file:line of each
    place that has the statement. `where` is empty if the code has lost it.

    `read` gives the text of a file by its name in the repository.
    """
    rows = []
    for entry in SOURCES.strip().splitlines():
        source, control, place = entry.split(" | ")
        name, statement = place.split(": ", 1)
        lines = read(name).splitlines()
        where = [
            f"{name}:{number}"
            for number, line in enumerate(lines, 1)
            if statement in line.split("  #")[0]
        ]
        rows.append(
            {
                "source": source,
                "control": control,
                "file": name,
                "statement": statement,
                "where": where,
            }
        )
    return rows
