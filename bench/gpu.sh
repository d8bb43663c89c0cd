#!/usr/bin/env bash
# Everything that needs a GPU, in one command: figures first, then the tests. `bench/gpu.sh --help` says more.
# PYTHON is the interpreter that has torch; left out, the first of python3, python and .venv/bin/python that has it.
set -u
here=$(cd "$(dirname "$0")" && pwd)
for python in "${PYTHON:-python3}" python "$here/../.venv/bin/python"; do
    if command -v "$python" > /dev/null && "$python" -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("torch"))'; then
        exec "$python" "$here/gpu.py" "$@"
    fi
    [ -z "${PYTHON:-}" ] || break
done
echo "bench/gpu.sh: no Python with torch was found; name one: PYTHON=/path/to/python bench/gpu.sh" >&2
exit 2
