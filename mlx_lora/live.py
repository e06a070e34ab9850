"""One base, many adapters: loaded, swapped, blended, switched off and merged while the base's weights stay."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import adapter_files, lora
from mlx_lora.errors import InputError
from mlx_lora.lora import Adapter
from mlx_lora.lora.combination import concatenate

LARGEST_WEIGHT = 1e6  # far above any of use, and far below what overflows float32
WEIGHTS = f"a number between -{LARGEST_WEIGHT:g} and {LARGEST_WEIGHT:g}"


class LiveAdapters:
    """Adapters by name beside a model, and the blend of them that the model uses.

    A blend is a weight for each of its adapters; its update is the weighted sum of theirs, exactly (`concatenate`).
    Whatever changes it puts the base's own layers back first, bit for bit, a merged blend's too. A call that raises
    InputError leaves everything as it was.

    `identity` is that of the loaded base (`model.Base`): `notes` then says which adapters were trained on another one
    of the same shapes. Such an adapter works, as on a fine-tuned base, but it may be a mistake.
    """

    def __init__(self, model: nn.Module, identity: Mapping[str, str] | None = None) -> None:
        if lora.layers(model):
            raise ValueError("an adapter is attached already: detach it first")
        self.notes: dict[str, str] = {}  # by adapter, what a person should know of it
        self._model = model
        self._digest = (identity or {}).get("digest")
        self._adapters: dict[str, Adapter] = {}
        self._blend: dict[str, float] = {}
        self._enabled = True

    @property
    def names(self) -> list[str]:
        """The loaded adapters, in the order of their loading."""
        return list(self._adapters)

    @property
    def active(self) -> dict[str, float]:
        """The blend in use, as weights by name; empty for the bare base and while it is switched off."""
        return dict(self._blend) if self._enabled else {}

    @property
    def merged(self) -> bool:
        """Whether the blend is written into the weights."""
        return any(layer.merged for layer in lora.layers(self._model).values())

    def load(self, name: str, folder: str | Path) -> Adapter:
        """Reads the adapter in `folder`; it is not active yet. Raises InputError naming what is wrong."""
        self._check_new(name)
        adapter = adapter_files.read(folder)
        adapter_files.check(self._model, adapter, folder)
        self.add(name, adapter)
        return adapter

    def add(self, name: str, adapter: Adapter) -> None:
        """Takes an adapter under a name; it is not active yet. Raises InputError where it has no place in the model."""
        self._check_new(name)
        lora.check_fit(self._model, adapter)
        mx.eval(adapter.arrays())
        self._adapters[name] = adapter
        digest = adapter.metadata.get("base_digest")
        if self._digest and digest and digest != self._digest:
            base = adapter.base.path if adapter.base else "another base"
            self.notes[name] = f"{name} was trained on {base}, whose digest differs from the loaded base's"

    def unload(self, name: str) -> None:
        """Forgets an adapter. An active one leaves the blend first; the others keep their weights."""
        self._check_known([name])
        if name in self._blend:
            self._put({other: weight for other, weight in self._blend.items() if other != name}, self._enabled)
        del self._adapters[name]
        self.notes.pop(name, None)

    def use(self, blend: Mapping[str, float] | str | None) -> None:
        """Swaps to exactly this blend and switches it on: weights by name, one name (weight 1), or None for the bare
        base. A weight of 0 is as good as none, and the order says nothing. The blend that is in use already stays as it
        is, merged or not."""
        weights = {blend: 1.0} if isinstance(blend, str) else dict(blend or {})
        self._check_known(weights)
        for name, weight in weights.items():
            if not abs(weight) <= LARGEST_WEIGHT:
                raise InputError(f"{name}: its weight is not {WEIGHTS}")
        wanted = {name: float(weights[name]) for name in self._adapters if weights.get(name)}
        if not self._enabled or wanted != self._blend:
            self._put(wanted, True)

    def enable(self) -> None:
        """Switches the blend on again."""
        lora.enable(self._model)
        self._enabled = True

    def disable(self) -> None:
        """Switches the blend off, a merged one too: the output is the base's, bit for bit."""
        lora.unmerge(self._model)
        lora.disable(self._model)
        self._enabled = False

    def merge(self) -> None:
        """Writes the blend into dense weights, for speed; the base's own layers are kept for `unmerge`."""
        if not self.active:
            raise InputError("no adapter is active: there is nothing to merge")
        lora.merge(self._model)
        mx.eval(self._model.parameters())

    def unmerge(self) -> None:
        """Puts the base's layers back, bit for bit; the blend stays active."""
        lora.unmerge(self._model)

    def _put(self, blend: dict[str, float], enabled: bool) -> None:
        adapter = None
        if blend:
            adapter = concatenate([self._adapters[name] for name in blend], list(blend.values()))
            mx.eval(adapter.arrays())
        lora.detach(self._model)
        if adapter is not None:
            lora.attach_adapter(self._model, adapter)
        self._blend, self._enabled = blend, enabled
        if not enabled:
            lora.disable(self._model)

    def _check_new(self, name: str) -> None:
        if not name:
            raise InputError("an adapter needs a name")
        if name in self._adapters:
            raise InputError(f"an adapter is named {name} already: unload it first, or choose another name")

    def _check_known(self, names: Mapping[str, float] | list[str]) -> None:
        for name in names:
            if name not in self._adapters:
                known = ", ".join(self._adapters) or "none"
                raise InputError(f"no adapter is named {name}; loaded: {known}")


@dataclass(frozen=True)
class Source:
    """An adapter's folder as a command line gives it, with the name and weight to use it under."""

    name: str
    folder: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Source":
        """``[NAME=]FOLDER[:WEIGHT]``, where the name is the folder's if none is given, and the weight 1.

        A folder that is there wins over a name or a weight in what is written. Raises InputError.
        """
        name, path = ("", text) if Path(text).is_dir() or "=" not in text else text.split("=", 1)
        weight = "1"
        if not Path(path).is_dir() and ":" in path:
            path, weight = path.rsplit(":", 1)
        if not path:
            raise InputError(f"{text!r} names no folder of an adapter; write [NAME=]FOLDER[:WEIGHT]")
        folder = Path(path)
        return cls(name or folder.resolve().name, folder, number(weight, text))


def number(text: str, where: str) -> float:
    """A weight, as a person writes it. Raises InputError naming `where`."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= LARGEST_WEIGHT:
        raise InputError(f"{where}: the weight {text!r} is not {WEIGHTS}")
    return weight
