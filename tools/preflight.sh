#!/bin/sh
# What building shmbroker needs from the machine. Says in one sentence what is missing and how to get it.
# Runs before there is a Python environment, hence in sh. With the argument "build" it leaves out what only make needs:
# pip has an environment when it asks.
set -u
PYTHON="${PYTHON:-python3}"

missing() {
    echo "shmbroker: $1" >&2
    exit 1
}

[ "$(uname -s)" = Linux ] || missing "this is $(uname -s); shmbroker needs Linux (robust mutexes, pidfds, /dev/shm)."

command -v "$PYTHON" >/dev/null 2>&1 ||
    missing "$PYTHON was not found; install it (Debian: apt-get install python3 python3-venv python3-dev) or name one: make PYTHON=python3.12 ..."

# A shim that chooses between versions may be there without a version to choose.
reason="$("$PYTHON" -c '' 2>&1)" ||
    missing "$PYTHON does not run ($(echo $reason)); install Python 3.11 or newer and name it: make PYTHON=/usr/bin/python3 ..."

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    missing "$("$PYTHON" --version 2>&1) is too old; Python 3.11 or newer is needed: install one and name it: make PYTHON=python3.12 ..."

[ "${1-}" = build ] || "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
    missing "$PYTHON has no venv module (or no ensurepip); install it (Debian: apt-get install python3-venv)."

# The compiler that setuptools will call: $CC, else the one Python was built with, else cc.
CC="${CC:-$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("CC") or "cc")')}"
command -v "${CC%% *}" >/dev/null 2>&1 ||
    missing "the C compiler ${CC%% *} was not found; install one (Debian: apt-get install gcc) or name yours in CC."

# $CC may carry flags, so it is not quoted.
echo '#include <stdlib.h>' | $CC -x c -fsyntax-only - 2>/dev/null ||
    missing "${CC%% *} finds no C library headers; install them (Debian: apt-get install libc6-dev)."

include="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
echo '#include <Python.h>' | $CC -I"$include" -x c -fsyntax-only - 2>/dev/null ||
    missing "Python.h was not found in $include; install Python's headers (Debian: apt-get install python3-dev)."
