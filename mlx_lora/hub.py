"""What goes to the Hugging Face hub: a model card made from the run, and the upload."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mlx_lora import __version__, config_file, metrics, model
from mlx_lora.config import Config, Model
from mlx_lora.errors import InputError
from mlx_lora.lora import Adapter

CARD = "README.md"
# How to use each form, with {repo} and {base} filled in.
USE = {
    "mlx": (
        "hf download {repo} --local-dir adapter\nmlx_lm.generate --model {base} --adapter-path adapter --prompt Hello"
    ),
    "peft": (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {repo!r})"
    ),
    "gguf": "hf download {repo} --local-dir adapter\nllama-cli -m base.gguf --lora adapter/{file} -p Hello",
    "merged": "mlx_lm.generate --model {repo} --prompt Hello",
    "merged-gguf": "hf download {repo} --local-dir model\nllama-cli -m model/{file} -p Hello",
    "ollama": "hf download {repo} --local-dir model\ncd model\nollama create my-model -f Modelfile",
}
ADAPTERS = ("mlx", "peft", "gguf")
LIBRARIES = {"mlx": "mlx", "peft": "peft", "merged": "mlx"}  # the others: gguf


def fetch_config(options: Model) -> Path:
    """The folder of a hub id's config.json, which alone is downloaded, once. Raises InputError where it is not had."""
    try:
        return Path(huggingface_hub.hf_hub_download(options.path, "config.json", revision=options.revision)).parent
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model: {options.path} is neither a local path nor available on the hub: {reason}") from None


def card(repo: str, form: str, folder: Path, adapter: Adapter, run: Path | None) -> str:
    """The model card (Markdown with a YAML head) of the export in `folder`, and of the run it came from.

    Paths of this machine are left out: local files and folders are named by their last part.
    """
    path = adapter.base.path if adapter.base else "an unnamed base"
    local = adapter.base is None or model.is_local(path)
    name = _public_name(path)
    head = huggingface_hub.ModelCardData(
        library_name=LIBRARIES.get(form, "gguf"),
        pipeline_tag="text-generation",
        tags=["lora", "mlx-lora"],
        base_model=None if local else path,
    )
    apart = form in ADAPTERS or (folder / "adapter.gguf").exists()
    ranks = sorted({pair.rank for pair in adapter.pairs.values()})
    scales = sorted({pair.scale for pair in adapter.pairs.values()})
    kinds = sorted({path.rsplit(".", 1)[-1] for path in adapter.pairs})
    parts = [
        f"---\n{head.to_yaml()}\n---\n",
        f"# {repo.rsplit('/', 1)[-1]}\n",
        f"A LoRA fine-tune of {_link(name, local)}, made with mlx_lora {__version__}"
        f"{'' if apart else ', merged into its weights'}.\n",
        "## Use\n",
        f"```{'python' if form == 'peft' else 'bash'}\n{_use(repo, form, name, folder)}\n```\n",
        "## Adapter\n",
        _table(
            {
                "rank": _listed(ranks),
                "scale (alpha / rank)": _listed(scales),
                "adapted": f"{len(adapter.pairs)} modules: {', '.join(kinds)}",
                "parameters": f"{sum(array.size for array in adapter.arrays().values()):,}",
            }
        ),
    ]
    if run is not None:
        config = config_file.load(run)
        parts += ["## Training\n", _table(_facts(run) | _training(config))]
        parts += _losses(run.parent / metrics.FILE, adapter)
        parts += [_table(config.notes)] if config.notes else []
    return "\n".join(parts)


def public(adapter: Adapter) -> Adapter:
    """The adapter without paths of this machine: of a local base its last part, of the metadata what tells none."""
    base = adapter.base and Model(path=_public_name(adapter.base.path), revision=adapter.base.revision)
    private = ("base_name", "combined_from")
    return replace(adapter, base=base, metadata={k: v for k, v in adapter.metadata.items() if k not in private})


def _public_name(path: str) -> str:
    return (Path(path).resolve().name or "base") if model.is_local(path) else path


def check_name(repo: str) -> None:
    """Raises InputError for what is no name of a repository."""
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise InputError(f"--repo: {error}") from None
    if "/" not in repo:
        raise InputError(f"--repo: {repo} is not OWNER/NAME")


def push(repo: str, folder: Path, private: bool) -> str:
    """Uploads a folder as a model repository, made where there is none; returns its address."""
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise InputError("it is there already and public; make it private first, or choose another name")
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload from mlx_lora")
    except Exception as error:  # the HTTP library beneath, which differs between versions, raises its own
        reason = " ".join(str(error).split())
        raise InputError(f"{repo}: cannot be uploaded: {reason}; log in with `hf auth login`, then try again") from None
    return str(commit.repo_url)


def _use(repo: str, form: str, base: str, folder: Path) -> str:
    file = next((path.name for path in sorted(folder.glob("*.gguf"))), "")
    return USE[form].format(repo=repo, base=base, file=file)


def _facts(run: Path) -> dict[str, str]:
    """What the head of a run's config.yaml tells of versions and rows."""
    lines = [line[2:].partition(": ") for line in run.read_text(encoding="utf-8").splitlines() if line[:2] == "# "]
    return {name: fact for name, _, fact in lines if name in ("versions", "train rows", "valid rows")}


def _training(config: Config) -> dict[str, str]:
    data, options = config.data, config.train
    names = ", ".join(Path(source.path).name for source in data.sources)
    accumulation = options.gradient_accumulation_steps
    quantized = f", quantized to {config.model.quantize.bits} bits" if config.model.quantize else ""
    return {
        "base in training": ("as stored" if config.model.dtype == "auto" else config.model.dtype) + quantized,
        "data": f"{names}, rows of at most {data.max_seq_length} tokens, loss on {data.loss_on}",
        "rows in an update": f"{options.batch_size * accumulation}",
        "optimizer": f"{options.optimizer.name}, {options.schedule.name} from {options.learning_rate:g}",
        "seed": str(options.seed),
    }


def _losses(path: Path, adapter: Adapter) -> list[str]:
    """The run's first loss and that of the adapter's own step: on the validation rows, or else in training."""
    own = adapter.metadata
    kind, name, loss = "eval", "Validation", own.get("valid_loss", "None")
    if loss == "None":
        kind, name, loss = "train", "Training", own.get("loss", "None")
    losses = [event for _, event in metrics.events(path) if event["event"] == kind and event.get("loss") is not None]
    if not losses or loss == "None":
        return []
    rows = {
        f"step {losses[0]['step']}": f"{losses[0]['loss']:.4f}",
        f"this adapter, step {own['step']}": f"{float(loss):.4f}",
    }
    return [f"{name} loss (nats per supervised token):\n", _table(rows)]


def _table(rows: dict[str, str]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)]) + "\n"


def _listed(values: list[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _link(name: str, local: bool) -> str:
    return f"`{name}`" if local else f"[{name}](https://huggingface.co/{name})"
