"""python -m mlx_lora.convert_config FILE: a config of mlx-lm, axolotl, Unsloth, TRL or PEFT → ours."""

import argparse
import sys
from pathlib import Path

from mlx_lora import config_file, config_forms, files
from mlx_lora.config_forms.translation import Translation
from mlx_lora.errors import exit_code


def _main() -> None:
    options = _parser().parse_args()
    raw, where = config_file.read(options.file)
    translation = config_forms.translate(options.file, raw, where, options.source)
    text = _text(translation)
    if options.out is None:
        print(text, end="")
        return
    files.write_new(Path(options.out), text)
    print(f"{options.out}: {len(translation.lost)} options have no counterpart (see its head). Look at it, then:")
    print(f"mlx-lora train --config {options.out} --dry-run")


def _text(translation: Translation) -> str:
    """The new file. Raises InputError for values that mean nothing here, by their place in the old one."""
    values = {key: value for key, (value, _) in translation.options.items()}
    config_file.parse(config_file.nested(values), where=translation.places, source=translation.path)
    return config_file.commented(translation.finish(), translation.options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora convert-config",
        description="Turn another tool's config into ours: what means something else is translated, what has no "
        "counterpart is listed.",
        epilog="hugging-face: PEFT's adapter_config.json, and the arguments of TRL and Unsloth in YAML or JSON",
    )
    parser.add_argument("file", metavar="FILE", help="YAML or JSON of mlx-lm, axolotl, Unsloth, TRL or PEFT")
    parser.add_argument("--from", dest="source", choices=list(config_forms.FORMS), help="default: told by its keys")
    parser.add_argument("--out", metavar="FILE", help="a new file to write to (default: print it)")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(_main))
