# Site settings: every job sources this file first, and so does the check before a job is submitted. It is the only file to
# change for another cluster. A line that fails stops the job, and its message is what `make status` shows.

case "${SLURM_CLUSTER_NAME:-$(hostname -f 2>/dev/null)}" in
  *snellius*)
    # make .venv with the same modules loaded: an environment of another Python does not start
    module purge
    module load 2025 Python/3.13.1-GCCcore-14.2.0 || return 2
    ;;
esac

# Where `STAGE_DATA=1` copies the data to: a disk of the node itself. Shared scratch is slow for random reads.
NODE_SCRATCH=${TMPDIR:-/tmp}

# Threads are set by `threads` in config.yaml; what OMP_NUM_THREADS says elsewhere must not count here.
unset OMP_NUM_THREADS
