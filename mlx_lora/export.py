"""python -m mlx_lora.export RUN --to FORM: an adapter in the form that another tool reads."""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from mlx_lora import adapter_files, files, gguf_model, hub, lora, merged_folder, merging, model, ollama
from mlx_lora.adapter_files import gguf_form, mlx_form, peft_form
from mlx_lora.config import Model
from mlx_lora.errors import InputError, exit_code
from mlx_lora.gguf_layout import Dtype
from mlx_lora.lora import Adapter
from mlx_lora.model import Base

FORMS = {
    "gguf": "LoRA file for llama.cpp",
    "peft": "adapter for PEFT, transformers and vLLM",
    "mlx": "adapter for mlx-lm, of one rank and alpha",
    "merged": "whole model folder for mlx-lm and, where it is dense, transformers",
    "merged-gguf": "whole model file for llama.cpp",
    "ollama": "whole model file and a Modelfile",
    "hub": "any of these, pushed to the Hugging Face hub",
}
# Options that have a meaning with some forms only.
GOES_WITH = {
    "dtype": ["gguf", "merged-gguf", "ollama", "merged"],
    "quantize": ["merged"],
    "max_loss": ["merged"],
    "force": ["merged"],
    "with_adapter": ["ollama"],
    "form": ["hub"],
    "repo": ["hub"],
    "private": ["hub"],
    "dry_run": ["hub"],
}


def _main() -> None:
    options = _parser().parse_args()
    form = _checked_form(options)
    source = Path(options.run)
    adapter = adapter_files.read(source)
    base = _base(options, source, adapter)
    adapter = replace(adapter, base=base)
    if options.to != "hub":
        out = Path(options.out) if options.out else _beside(source, form)
        with files.output_folder(out) as folder:
            _write(form, folder, adapter, base, options)
        for path in sorted(out.iterdir()):
            print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        with files.output_folder(folder) as unfinished:
            _write(form, unfinished, hub.public(adapter), base, options)
        _push(form, folder, adapter, options)


def _write(form: str, folder: Path, adapter: Adapter, base: Model | None, options: argparse.Namespace) -> None:
    """Fills `folder` with the files of a form, and prints what there is to say about them."""
    dtype: Dtype = options.dtype or "f16"
    lines = []
    if form == "mlx":
        if options.model or peft_form.leaves_head_out(Path(options.run), adapter):
            _config(adapter, base, options)  # only the base tells whether it fits, and means the same
        folded = adapter.folded()
        mlx_form.save(folder, folded.arrays(), mlx_form.settings(folded), adapter.metadata)
    elif form == "peft":
        lines = peft_form.write(folder, adapter, _config(adapter, base, options))
    elif form == "gguf":
        lines = gguf_form.write(folder / f"adapter-{dtype}.gguf", adapter, _config(adapter, base, options), dtype)
    elif form == "merged":
        _write_merged(folder, adapter, base, options)
    else:
        lines = _write_gguf(form, folder, adapter, base, dtype, options)
    for line in lines:
        print(line)


def _write_merged(folder: Path, adapter: Adapter, base: Model | None, options: argparse.Namespace) -> None:
    """Says what is left of the adapter before it writes, or refuses to."""
    loaded = _loaded(_known(base), adapter, options)
    dtype = merging.DTYPES[options.dtype] if options.dtype else None
    max_loss = merging.MAX_LOSS if options.max_loss is None else options.max_loss
    report = merging.measure(loaded, adapter, options.quantize or "keep", dtype, max_loss=max_loss)
    for line in report.lines():
        print(line, flush=True)
    merged_folder.write(folder, report, options.force)
    files.write_json(folder / "merge_report.json", report.as_json())
    if any(report.merge.forms.values()):
        print("quantized as MLX does it: for mlx-lm, not for transformers, which needs --quantize none")


def _write_gguf(
    form: str, folder: Path, adapter: Adapter, base: Model | None, dtype: Dtype, options: argparse.Namespace
) -> list[str]:
    """A whole model file, for `ollama` with a Modelfile; base and adapter apart if asked for."""
    chosen = _known(base)
    source = model.gguf_file(chosen)
    # Of a GGUF file the file's own weights are taken, however training cast them.
    stored = chosen.model_copy(update={"dtype": "auto", "quantize": None})
    loaded = _loaded(stored if source else chosen, adapter, options)
    if options.with_adapter:
        name, apart = "base.gguf", "adapter.gguf"
        lines = gguf_form.write(folder / apart, adapter, _config(adapter, base, options), dtype)
        lines += [f"{name} is the base's file as it is"] if source else []
    else:
        name, apart, lines = f"model-{dtype}.gguf", None, []
        lora.attach_adapter(loaded.model, adapter)
    lines += gguf_model.write(folder / name, loaded, source, dtype)
    if source and loaded.other_template:
        lines.append(f"{name} keeps the chat template of its base, not the one of training (model.chat_template)")
    if form == "ollama":
        text, notes = ollama.modelfile(name, apart, loaded.tokenizer)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        lines += notes
    return lines


def _push(form: str, folder: Path, adapter: Adapter, options: argparse.Namespace) -> None:
    run = adapter_files.run_config(Path(options.run))
    card = hub.card(options.repo, form, folder, adapter, run if run.is_file() else None)
    (folder / hub.CARD).write_text(card, encoding="utf-8")
    if not options.dry_run:
        print(hub.push(options.repo, folder, options.private))
        return
    print(f"would push to {options.repo} ({'private' if options.private else 'public'}):")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name}  {path.stat().st_size / 1e6:,.1f} MB")
    print(f"{hub.CARD}:\n\n{card}")


def _loaded(base: Model, adapter: Adapter, options: argparse.Namespace) -> Base:
    """The base as it is stored, for an adapter that fits it."""
    loaded = merging.load_base(base)
    adapter_files.check(loaded.model, adapter, options.run)
    if adapter.metadata.get("base_digest", loaded.identity["digest"]) != loaded.identity["digest"]:
        print(f"note: the adapter was trained on another base than {base.path}, or this one has changed since")
    return loaded


def _config(adapter: Adapter, base: Model | None, options: argparse.Namespace) -> dict[str, Any]:
    """The base's config.json, after checking that the adapter fits the model that it describes; reads no weights."""
    structure = model.load(_known(base), weights=False)
    adapter_files.check(structure.model, adapter, options.run)
    return structure.config | {"tie_word_embeddings": "lm_head" not in dict(structure.model.named_modules())}


def _beside(source: Path, form: str) -> Path:
    """RUN-FORM, or RUN-STEP-FORM for a checkpoint."""
    source = source.absolute()
    in_run = source.parent.name == adapter_files.CHECKPOINTS
    run = source.parent.parent if in_run else source
    return run.with_name("-".join([run.name, *([source.name] if in_run else []), form]))


def _base(options: argparse.Namespace, source: Path, adapter: Adapter) -> Model | None:
    """The adapter's base; mlx-lm's form can do without."""
    if options.model:
        return Model(path=options.model, revision=options.revision)
    return adapter.base if options.to == "mlx" else adapter_files.base_of(source)


def _known(base: Model | None) -> Model:
    if base is None:
        raise InputError("the adapter does not name its base, which is needed here; give it with --model")
    return base


def _checked_form(options: argparse.Namespace) -> str:
    """The form to write. Raises InputError for options that have no meaning with it."""
    form: str = options.form or "mlx" if options.to == "hub" else options.to
    for name, forms in GOES_WITH.items():
        if getattr(options, name) not in (None, False) and not {form, options.to} & set(forms):
            raise InputError(f"--{name.replace('_', '-')} goes with --to {' or '.join(forms)}, not {form}")
    if form == "merged" and options.dtype == "q8_0":
        raise InputError("--dtype q8_0 goes with GGUF files; with merged it is f16, bf16 or f32")
    if options.to == "hub" and not options.repo:
        raise InputError("--to hub needs --repo OWNER/NAME")
    if options.to == "hub":
        hub.check_name(options.repo)
    if options.to == "hub" and options.out:
        raise InputError("--out has no meaning with --to hub")
    if options.max_loss is not None and not 0 <= options.max_loss <= 1:
        raise InputError(f"--max-loss: {options.max_loss:g} is not a share from 0 to 1")
    if options.revision and not options.model:
        raise InputError("--revision goes with --model; without it the adapter's run says both")
    return form


def _quantize(text: str) -> str | int:
    if text not in ("keep", "none", *map(str, merging.BITS)):
        raise argparse.ArgumentTypeError(f"{text} is not keep, none, {', '.join(map(str, merging.BITS))}")
    return int(text) if text.isdigit() else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora export",
        description="Write an adapter in the form that another tool reads.",
        epilog="forms: " + "; ".join(f"{form}: {meaning}" for form, meaning in FORMS.items()),
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint, or an adapter of mlx-lm or PEFT")
    parser.add_argument("--to", required=True, choices=list(FORMS), help="the form to write; see below")
    parser.add_argument("--out", metavar="FOLDER", help="a new folder to write to (default: RUN-FORM)")
    parser.add_argument("--model", help="hub id, folder or .gguf file; default: the one the adapter was trained on")
    parser.add_argument("--revision", help="of a hub id given with --model")
    parser.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        help="of a GGUF file (default f16), or of a merged folder (default: the base's own)",
    )
    parser.add_argument(
        "--quantize",
        type=_quantize,
        metavar="keep|none|BITS",
        help="of a merged folder: as the base is (default), dense, or to 2, 3, 4, 5, 6 or 8 bits",
    )
    parser.add_argument(
        "--max-loss", type=float, metavar="SHARE", help="refuse a merge that loses more of the adapter (default 0.1)"
    )
    parser.add_argument("--force", action="store_true", help="merge however much is lost")
    parser.add_argument(
        "--with-adapter", action="store_true", help="base and adapter apart, for Ollama before 0.34.1 (with ollama)"
    )
    parser.add_argument("--repo", metavar="OWNER/NAME", help="where hub pushes to")
    parser.add_argument("--form", choices=list(FORMS)[:-1], help="what hub pushes (default mlx)")
    parser.add_argument("--private", action="store_true", help="make the hub's repository private")
    parser.add_argument("--dry-run", action="store_true", help="show what hub would push")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(_main))
