#!/bin/sh
# Predict without a network: verify this stick, install from it once, test it on patches/, then predict.
#
#   sh run.sh INPUT... [--out FILE]     INPUT: image, folder or tar of 96x96 images, .h5, PCam folder with --split
#
# Further options are those of code/inference.py. predictions.csv is written to the folder that you call it from.
# PCAM_PYTHON names a Python, PCAM_HOME the folder to install into (1 GB; default: ~/.cache/pcam-NUMBER).
set -eu
unset PYTHONPATH PYTHONHOME PYTHONSAFEPATH CDPATH
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

refuse() {
    say "error: $*"
    exit 2
}

for name in SHA256SUMS stick.json verify.py; do
    [ -f "$stick/$name" ] || refuse "$stick has no $name: it was not written to its end"
done
[ -e "$1" ] || case $1 in -*) ;; *) refuse "there is no $1" ;; esac
before=''
for word; do # nothing may be added to the stick
    case $before$word in --out=?*)
        folder=$(cd "$(dirname "${word#--out=}")" 2>/dev/null && pwd -P) || folder=''
        case $folder/ in "$stick"/*) refuse "--out ${word#--out=} lies on the stick" ;; esac
        ;;
    esac
    before=''
    [ "$word" != --out ] || before=--out=
done

# the stick's files, and a Python that fits its wheels
# (as it is not verified yet, only digits of it are taken)
wanted=$(sed -n 's/^ *"python": "\(.*\)",*$/\1/p' "$stick/stick.json")
case $wanted in '' | *[!0-9.]*) refuse "$stick/stick.json names no Python" ;; esac
python=${PCAM_PYTHON-}
if [ -z "$python" ]; then
    for python in "python$wanted" python3; do
        "$python" -I -c '' 2>/dev/null && break
    done
fi
"$python" -I -c '' 2>/dev/null || refuse "no Python $wanted here; PCAM_PYTHON=/path/to/python names one"
verify "$python" --python

# installed beside and renamed when whole: a run that was cut off, or another at the same time, leaves nothing half
number=$(cksum <"$stick/SHA256SUMS")
home=${PCAM_HOME:-${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}}
[ -n "$home" ] || refuse 'there is no HOME; PCAM_HOME=/folder names where to install'
[ -n "${PCAM_HOME:-}" ] || home=$home/pcam-${number%% *}
home=${home%"${home##*[!/]}"} # without slashes at its end
scratch=$home.$$
find "$home".[0-9]* -maxdepth 0 -mmin +1440 -exec rm -rf {} + 2>/dev/null || true # of an installation that was killed
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir -p "$scratch" || exit 2
if cmp -s "$stick/SHA256SUMS" "$home/installed" && ! "$home/venv/bin/python" -c '' 2>/dev/null; then
    rm -rf "$home" # its Python is gone
fi
if ! cmp -s "$stick/SHA256SUMS" "$home/installed"; then
    rmdir "$home" 2>/dev/null || [ ! -e "$home" ] || refuse "$home holds something else; PCAM_HOME names another folder"
    say "installing into $home"
    "$python" -I -m venv --without-pip "$scratch/venv" # pip comes from the stick: not every Python brings one
    for pip in "$stick"/wheels/pip-*.whl; do :; done
    PIP_CONFIG_FILE=/dev/null "$scratch/venv/bin/python" "$pip/pip" --isolated install --quiet \
        --no-index --find-links "$stick/wheels" --no-cache-dir --disable-pip-version-check \
        -r "$stick/wheels/requirements.txt" >&2 || refuse "the wheels could not be installed into $home"
    cp "$stick/SHA256SUMS" "$scratch/installed"
    "$python" -I -c 'import os, sys; os.rename(*sys.argv[1:])' "$scratch" "$home" 2>/dev/null || [ -f "$home/installed" ]
    mkdir -p "$scratch"
fi
python=$home/venv/bin/python
predict() { "$python" "$stick/code/inference.py" --ckpt "$stick/model" "$@"; }

# the self-test: the sample patches get here what they got there
predict "$stick/patches" --out "$scratch/patches.csv" >/dev/null 2>"$scratch/log" || {
    code=$?
    cat "$scratch/log" >&2
    exit "$code"
}
verify "$python" --predictions "$scratch/patches.csv"
say "the self-test passed"

# nothing is written to the stick
out=$PWD
case $(pwd -P)/ in "$stick"/*) out=$home ;; esac
predict --out "$out/predictions.csv" "$@"
