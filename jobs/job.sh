#!/bin/bash
# The job of every Make target; lib/jobs/slurm.py submits it with what to ask for. It holds no parameters of its own:
#   sbatch OPTIONS jobs/job.sh CODE PYTHON DATA VARIED SCRIPT ARGUMENT...
# CODE is a copy of the program as it was submitted, with submission.json beside it. DATA is a folder to copy to the node or '',
# VARIED the key that an array's tasks differ in or ''. The working folder is the project: data and runs are where they are without Slurm.
code=$1 python=$2 data=$3 varied=$4
shift 4
log=jobs/logs/$SLURM_JOB_ID
num_starts=$((${SLURM_RESTART_COUNT:-0} + 1)) most_starts=100 # a job that never gets anywhere must end some day
num_signals=0 step='' timer='' copy=''
rm -f "$log.exit"

# finish CODE: tidy up, and leave the exit code where `make status` finds it; a job without one was killed.
finish() {
  [ -z "$timer" ] || kill $(ps -o pid= --ppid "$timer") "$timer" 2> /dev/null # and its sleep
  [ -z "$copy" ] || rm -rf -- "$copy"
  [ "$1" = again ] && exit
  echo "$1" > "$log.exit"
  exit "$1"
}

# go_on: back into the queue, to be started again under the same id.
go_on() {
  [ "$num_starts" -lt "$most_starts" ] || return
  echo "job $SLURM_JOB_ID goes on later (this was start $num_starts)" >&2
  scontrol requeue "$SLURM_JOB_ID"
}

# USR1 is the warning ahead of the time limit, TERM is preemption or scancel. train.py saves at its next step and leaves. One
# that is too busy to hear it is requeued all the same before the limit, and goes on from its last checkpoint.
on_signal() {
  echo "told to stop: $1" >&2
  num_signals=$((num_signals + 1))
  [ -z "$step" ] || kill -USR1 "$step" 2> /dev/null
  if [ "$1" = USR1 ] && [ -z "$timer" ]; then
    ends_at=$(date +%s --date="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)")
    left=$((ends_at - $(date +%s) - 5))
    (sleep $((left > 0 ? left : 0)) && go_on) &
    timer=$!
  fi
}
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

# a line of it that fails stops the job, and no setting of its shell stays
trap 'finish 2' ERR
. "$code/jobs/env.sh"
trap - ERR
set +eu

if [ -n "$data" ]; then
  copy=$NODE_SCRATCH/pcam-$SLURM_JOB_ID
  # the CSVs need not be there
  shopt -s nullglob
  if mkdir -p -- "$copy" && cp -p -- "$data"/*.h5 "$data"/*.csv "$copy"; then
    echo "data copied to $copy" >&2
  else
    echo "the data could not be copied to $copy: they are read from $data" >&2
    rm -rf -- "$copy"
    copy=''
  fi
fi

# In the background, because bash heeds a signal only while it waits. --export=ALL: where a site or SBATCH_EXPORT says NONE,
# a step would lose what env.sh has set.
srun --export=ALL --ntasks="$SLURM_NTASKS" --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=0 \
  "$python" "$code/jobs/submit.py" go "$data" "$copy" "$varied" "$@" < /dev/null &
step=$!
[ "$num_signals" -eq 0 ] || kill -USR1 "$step" # it came while the data were copied
heard=-1
while [ "$heard" -ne "$num_signals" ]; do # a signal ends the wait, not the step
  heard=$num_signals
  wait "$step"
  ended_with=$?
done

# 130: told to stop, and saved; 138, 143: told before it was able to. A job that Slurm still counts as running has been neither
# cancelled nor requeued, so it asks for its next start itself.
case $ended_with in
  130 | 138 | 143)
    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ] || ! go_on || finish again
    ;;
esac
finish "$ended_with"
