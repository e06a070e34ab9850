"""Configs of other tools → ours."""

from collections.abc import Callable
from typing import Any

from mlx_lora.config_forms import axolotl, hugging_face, mlx_lm
from mlx_lora.config_forms.translation import Translation
from mlx_lora.errors import InputError

FORMS: dict[str, Callable[[Translation], None]] = {
    "mlx-lm": mlx_lm.translate,
    "axolotl": axolotl.translate,
    "hugging-face": hugging_face.translate,
}
SIGNS = {"mlx-lm": mlx_lm.SIGNS, "axolotl": axolotl.SIGNS, "hugging-face": hugging_face.SIGNS}


def translate(path: str, raw: dict[str, Any], where: dict[tuple[str, ...], str], form: str | None) -> Translation:
    """What a file holds in our words; `form` is one of FORMS, or None to tell by its keys.

    Raises InputError naming file, line and key.
    """
    options, places = hugging_face.flat(path, raw, where)
    form = form or _form(path, raw, set(options))
    if form == "hugging-face":
        translation = Translation(path, options, places)
    else:
        translation = Translation(path, raw, {keys[0]: place for keys, place in where.items() if len(keys) == 1})
    translation.form = form
    FORMS[form](translation)
    return translation


def _form(path: str, raw: dict[str, Any], names: set[str]) -> str:
    """Whose keys a file holds most of."""
    if isinstance(raw.get("data"), dict) and {"train", "max_seq_length"} & raw["data"].keys():
        raise InputError(f"{path}: is a config of ours already: mlx-lora train --config {path} --dry-run")
    counts = {form: len(signs & names) for form, signs in SIGNS.items()}
    best = max(counts, key=lambda form: counts[form])
    if list(counts.values()).count(counts[best]) > 1:
        raise InputError(f"{path}: its keys do not tell whose config it is; say so with --from ({', '.join(FORMS)})")
    return best
