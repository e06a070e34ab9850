"""python -m mlx_lora.combine --adapter RUN --adapter RUN --out FOLDER: several adapters → one."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mlx_lora import adapter_files, files
from mlx_lora.adapter_files import mlx_form, peft_form
from mlx_lora.errors import InputError, exit_code
from mlx_lora.live import Source
from mlx_lora.lora import Adapter, combination

METHODS = {
    "concatenate": "the weighted sum of the updates, exactly; ranks add up",
    "svd": "the update of --rank that is nearest to that sum",
    "linear": "the weighted sums of the factors: rough, and all ranks must be the same",
    "ties": "as linear, of the share --density with the largest entries, where their signs agree",
    "dare": "as linear, of a random share --density of the entries",
}
# Options that have a meaning with some methods only.
GOES_WITH = {"rank": ["svd"], "density": ["ties", "dare"], "seed": ["dare"]}


def _main() -> None:
    options = _parser().parse_args()
    for name, methods in GOES_WITH.items():
        if getattr(options, name) is not None and options.method not in methods:
            raise InputError(f"--{name} goes with --method {' or '.join(methods)}, not {options.method}")
    if options.seed is not None and not 0 <= options.seed < 2**64:
        raise InputError(f"--seed {options.seed} is not between 0 and 2^64 - 1")
    out = Path(options.out)
    sources = [Source.parse(text) for text in options.adapter]
    adapters: dict[str, Adapter] = {}
    for source in sources:
        if source.name in adapters:
            raise InputError(f"two adapters are named {source.name}: give one of them a name, NAME=FOLDER")
        adapters[source.name] = _read(source.folder)
    combination.check_bases(adapters)
    weights = [source.weight for source in sources]
    combined = _combined(list(adapters.values()), weights, options)
    combination.check_range(combined)
    if combination.norm(combined) < 1e-38:  # float32 has no smaller numbers
        raise InputError(
            "the combined update is zero: the weights or --density are too small, or the updates are zero or cancel"
        )
    _save(out, combined, sources, options)
    rank, _ = combined.uniform or (0, 0)
    size = sum(array.nbytes for array in combined.arrays().values())
    print(f"{out}: {len(combined.pairs)} modules of rank {rank}, {size / 1e6:.1f} MB")
    exact = combination.concatenate(list(adapters.values()), weights)
    whole = combination.norm(exact)
    terms = sum(abs(each.weight) * combination.norm(adapters[each.name]) for each in sources)
    if whole <= 1e-6 * terms:  # what is left is rounding
        print("the adapters' updates cancel: nothing is left of their weighted sum")
    else:
        missing = combination.norm(combination.concatenate([combined, exact], [1, -1]))
        print(f"its update is off the adapters' weighted sum by {100 * missing / whole:.3g} % (Frobenius norm)")


def _read(folder: Path) -> Adapter:
    """The adapter in `folder`, if it means the same on any base of its shapes."""
    adapter = adapter_files.read(folder)
    try:
        peft_form.check_tying(folder, adapter, tied=True)
    except InputError as error:
        hint = f"python -m mlx_lora.export {folder} --to mlx"
        raise InputError(f"{error}. If its base's weights are not tied, combine what `{hint}` writes") from None
    return adapter


def _combined(adapters: list[Adapter], weights: list[float], options: argparse.Namespace) -> Adapter:
    """The combination by the method of the options, of one rank and alpha."""
    density = 0.5 if options.density is None else options.density
    methods: dict[str, Callable[[], Adapter]] = {
        "concatenate": lambda: combination.concatenate(adapters, weights),
        "svd": lambda: combination.svd(adapters, weights, options.rank),
        "linear": lambda: combination.linear(adapters, weights),
        "ties": lambda: combination.ties(adapters, weights, density),
        "dare": lambda: combination.dare(adapters, weights, density, options.seed or 0),
    }
    return methods[options.method]().folded()


def _save(out: Path, adapter: Adapter, sources: list[Source], options: argparse.Namespace) -> None:
    """Writes the adapter in mlx-lm's form; its metadata say what it was made from."""
    parents = [{"name": each.name, "folder": str(each.folder), "weight": each.weight} for each in sources]
    settings = {name: getattr(options, name) for name in ("method", *GOES_WITH) if getattr(options, name) is not None}
    metadata = {"format": "mlx", "combined_from": json.dumps(parents), "combined_by": json.dumps(settings)}
    adapter = replace(adapter, metadata=adapter.metadata | metadata)
    with files.output_folder(out) as folder:
        mlx_form.save(folder, adapter.arrays(), mlx_form.settings(adapter), adapter.metadata)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora combine",
        description="Make one adapter of several that were trained on the same base.",
        epilog="methods: " + "; ".join(f"{name}: {meaning}" for name, meaning in METHODS.items()),
    )
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="[NAME=]FOLDER[:WEIGHT]",
        help="a run's folder, a checkpoint, or an adapter of mlx-lm or PEFT, and its weight (default 1)",
    )
    parser.add_argument("--method", choices=list(METHODS), default="concatenate", help="see below")
    parser.add_argument("--rank", type=int, help="of the result, with svd (default: the largest of the adapters')")
    parser.add_argument("--density", type=float, help="share of the entries that is kept, with ties and dare (0.5)")
    parser.add_argument("--seed", type=int, help="of the choice of entries, with dare (default 0)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder to write to")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(_main))
