"""python -m mlx_lora.report RUN [RUN ...]: runs as one HTML page."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from mlx_lora import page
from mlx_lora.errors import exit_code


def _main() -> None:
    options = _parser().parse_args()
    folders = [Path(run) for run in options.runs]
    path = Path(options.out) if options.out else (folders[0] if len(folders) == 1 else Path()) / page.FILE
    runs = [page.read(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(folder)) for run, folder in zip(runs, folders, strict=True)]
    page.write(path, runs)
    print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora report",
        description="Write a run, or several one over the other, as one HTML page that opens offline.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, also while it trains")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the run's folder, of several here")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(_main))
