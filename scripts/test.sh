#!/usr/bin/env bash
# Checks and tests in .venv, which it makes: what .ci/run runs. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
# a file of tests at a time in each process; some take 3 GB
.venv/bin/python -m pytest --cov=mlx_lora -n auto --maxprocesses 4 --dist loadfile "$@"
