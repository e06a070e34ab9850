#!/usr/bin/env bash
# Checks and tests in .venv, which it makes: what .ci/run runs. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
# A file of tests at a time in each process; some take 3 GB. One thread each: on shared cores, threads that wait for one
# another spin, and take twice the time.
export OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1
.venv/bin/python -m pytest --cov=mlx_lora -n auto --maxprocesses 4 --dist loadfile "$@"
