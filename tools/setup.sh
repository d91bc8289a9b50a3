#!/bin/sh
# Make a virtual environment with hola-jax installed in it (editable, extra `dev`, versions of constraints.txt).
#
#     sh tools/setup.sh DIR VERSION...      e.g.  sh tools/setup.sh .venv 3.13 3.12 3.11
#
# SETUP_PACKAGES="NAME ..." installs these packages instead, at the versions of constraints.txt, and no hola-jax.
# Takes the first VERSION for which some Python on this machine really makes an environment; PYTHON=... names one instead.
# A second call is instant. Exit status 3: none of the versions is here.
set -eu
cd "$(dirname "$0")/.."
venv=$1
shift
stamp=$venv/.hola-setup
packages=${SETUP_PACKAGES:---editable .[dev]}
wanted=$( (pwd && echo "$packages" && cat pyproject.toml constraints.txt) | cksum) # the path too: an environment does not survive a move

say() { printf 'setup: %s\n' "$*" >&2; }

# "3.13 /usr/local": version and home of an interpreter; nothing if it does not run (a pyenv shim without its version).
identity() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.base_prefix)' 2>/dev/null || :; }

# Every interpreter that may be of version $1, one a line: PATH first, then pyenv's own folders, which PATH may not show.
candidates() (
    pyenv=$(pyenv root 2>/dev/null || echo "${PYENV_ROOT:-${HOME:-}/.pyenv}")
    IFS=:
    for name in "python$1" python3 python; do
        for folder in $PATH; do
            [ ! -x "$folder/$name" ] || printf '%s\n' "$folder/$name"
        done
    done
    for python in "$pyenv/versions/$1".*/bin/"python$1"; do
        [ ! -x "$python" ] || printf '%s\n' "$python"
    done
)

new_environment() {
    say "$venv from $1 ($(identity "$1"))"
    "$1" -m venv --clear "$venv" >&2 && "$venv/bin/python" -m pip --version >/dev/null && return
    say "$1 cannot make a virtual environment (on Debian and Ubuntu its python3-venv package does)"
    rm -rf "$venv"
    return 1
}

# The first interpreter of the wanted versions that makes an environment.
search() {
    for version in "$@"; do
        tried=' '
        while read -r python; do
            found=$(identity "$python")
            case $tried in *" ${found#* } "*) continue ;; esac # a link to one that failed a moment ago
            if [ "${found% *}" = "$version" ]; then
                new_environment "$python" </dev/null && return
                tried="$tried${found#* } "
            fi
        done <<EOF
$(candidates "$version")
EOF
    done
    return 1
}

if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
    say "$venv exists and is no virtual environment; move it away"
    exit 1
fi
current=$(identity "$venv/bin/python")

if [ -n "${PYTHON:-}" ]; then
    chosen=$(identity "$PYTHON")
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        say "PYTHON=$PYTHON is ${chosen:+Python }${chosen:-no interpreter that runs}, and hola-jax needs Python 3.11 or newer"
        exit 1
    fi
    if [ "$chosen" != "$current" ]; then
        new_environment "$PYTHON" || exit 1
    fi
else
    usable=no
    for version in "$@"; do [ "${current% *}" != "$version" ] || usable=yes; done
    if [ "$usable" = no ] && ! search "$@"; then
        here=$(python3 --version 2>/dev/null || python --version 2>/dev/null || echo 'none')
        say "no Python of $* that can make a virtual environment was found (first on PATH: $here)." \
            "Install one, or name one: make setup PYTHON=/path/to/python"
        exit 3
    fi
fi

[ "$(cat "$stamp" 2>/dev/null || :)" != "$wanted" ] || exit 0
rm -f "$stamp"
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
say "installing into $venv (minutes the first time)"
set -f # several words, none of them a pattern
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $packages >&2
printf '%s\n' "$wanted" >"$stamp"
say "$venv is ready"
