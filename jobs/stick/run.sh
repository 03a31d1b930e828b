#!/bin/sh
# Predict without a network: verify this stick, install from it once, test it on patches/, then predict.
#
#   ./run.sh INPUT... [--out FILE]     INPUT: image, folder or tar of 96x96 images, .h5, PCam folder with --split
#
# Further options are those of code/inference.py. predictions.csv is written to the folder that you call it from.
# PCAM_PYTHON names a Python, PCAM_HOME the folder to install into (1 GB; default: ~/.cache/pcam-NUMBER).
set -eu
unset PYTHONPATH PYTHONHOME CDPATH
export PYTHONDONTWRITEBYTECODE=1 # or the stick would get files that nobody sent
stick=$(cd "$(dirname "$0")" && pwd -P)
case ${1-} in
'' | -h | --help)
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$stick/run.sh"
    [ $# -gt 0 ] && exit 0
    exit 2
    ;;
esac

say() { printf '%s\n' "$*" >&2; }
verify() { # its JSON is shown only where it ends the run
    result=$("$1" -I "$stick/verify.py" "$2" ${3+"$3"}) || { code=$?; printf '%s\n' "$result"; exit "$code"; }
}

[ -f "$stick/SHA256SUMS" ] || { say "error: $stick has no SHA256SUMS: it was not written to its end"; exit 2; }

# the stick's files, and a Python that fits its wheels
wanted=$(sed -n 's/^ *"python": "\(.*\)",*$/\1/p' "$stick/stick.json")
python=${PCAM_PYTHON-}
if [ -z "$python" ]; then
    for python in "python$wanted" python3; do
        "$python" -c '' 2>/dev/null && break
    done
fi
"$python" -c '' 2>/dev/null || { say "error: no Python $wanted here; PCAM_PYTHON=/path/to/python names one"; exit 2; }
verify "$python" --python

# installed beside and renamed when whole: a run that was cut off, or another at the same time, leaves nothing half
number=$(cksum <"$stick/SHA256SUMS")
home=${PCAM_HOME-${XDG_CACHE_HOME:-$HOME/.cache}/pcam-${number%% *}}
scratch=$home.$$
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir -p "$scratch" || exit 2
if [ ! -f "$home/installed" ] || ! cmp -s "$stick/SHA256SUMS" "$home/installed"; then
    rmdir "$home" 2>/dev/null || [ ! -e "$home" ] || { say "error: $home holds something else; PCAM_HOME names another folder"; exit 2; }
    say "installing into $home"
    "$python" -m venv --without-pip "$scratch/venv" # pip comes from the stick: not every Python brings one
    for pip in "$stick"/wheels/pip-*.whl; do :; done
    PIP_CONFIG_FILE=/dev/null "$scratch/venv/bin/python" "$pip/pip" --isolated install --quiet \
        --no-index --find-links "$stick/wheels" --no-cache-dir --disable-pip-version-check \
        -r "$stick/wheels/requirements.txt" >&2 || { say "error: the wheels could not be installed into $home"; exit 2; }
    cp "$stick/SHA256SUMS" "$scratch/installed"
    "$python" -c 'import os, sys; os.rename(*sys.argv[1:])' "$scratch" "$home" 2>/dev/null || [ -f "$home/installed" ]
    mkdir -p "$scratch"
fi
python=$home/venv/bin/python
predict() { "$python" "$stick/code/inference.py" --ckpt "$stick/model" "$@"; }

# the self-test: the sample patches get here what they got there
predict "$stick/patches" --out "$scratch/patches.csv" >/dev/null
verify "$python" --predictions "$scratch/patches.csv"
say "the self-test passed"

# nothing is written to the stick
out=$PWD
case $(pwd -P)/ in "$stick"/*) out=$home ;; esac
predict --out "$out/predictions.csv" "$@"
