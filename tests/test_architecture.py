"""The structure of the package: which module may import which, and what none may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlx_lora"
# A module imports only from those before it; commands may import any of these, and never one another.
ORDER = [
    "errors",
    "blas",
    "files",
    "config",
    "config_file",
    "config_forms.translation",
    "config_forms.mlx_lm",
    "config_forms.hugging_face",
    "config_forms.axolotl",
    "config_forms",
    "time_limit",
    "chat",
    "data.sources",
    "data.formats",
    "data.oddities",
    "data.examples",
    "data.dataset",
    "data.cache",
    "data",
    "data.checks",
    "data.summary",
    "data.page",
    "batches",
    "gguf_layout",
    "gguf_base.reader",
    "gguf_base.weights",
    "gguf_base.settings",
    "gguf_base.tokenizer",
    "gguf_base",
    "gguf_vocab",
    "model",
    "recomputation",
    "lora.layers",
    "lora.targets",
    "lora.value",
    "lora.combination",
    "lora.adapter",
    "lora",
    "merging",
    "merged_folder",
    "gguf_model",
    "exponential",
    "head",
    "loss",
    "optim",
    "substitution",
    "attention",
    "rms_norm",
    "swiglu",
    "gradient_checkpointing",
    "memory",
    "prefix",
    "step",
    "scoring",
    "adapter_files.reading",
    "adapter_files.mlx_form",
    "adapter_files.peft_form",
    "adapter_files.gguf_form",
    "adapter_files",
    "live",
    "ollama",
    "checkpoint",
    "display",
    "trackers",
    "metrics",
    "charts",
    "page",
    "hub",
    "generation",
    "server.protocol",
    "server.worker",
    "server.app",
    "server",
    "planning",
    "footprint",
    "supervisor",
    "loop",
]
COMMANDS = [
    "__main__",
    "doctor",
    "init",
    "convert_config",
    "data.__main__",
    "plan",
    "train",
    "generate",
    "evaluate",
    "combine",
    "export",
    "serve",
    "report",
]
OWNERS = {  # third-party packages that only these modules may import
    "mlx_lm": {"attention", "swiglu", "model", "generation", "lora.layers", "server.worker"},
    "huggingface_hub": {"model", "hub"},
    "gguf": {
        "gguf_base.reader",
        "gguf_base.weights",
        "gguf_base.settings",
        "gguf_base.tokenizer",
        "adapter_files.gguf_form",
        "gguf_model",
        "gguf_vocab",
    },
    "tokenizers": {"gguf_base.tokenizer", "gguf_vocab"},
    "pydantic": {"config", "config_file", "server.protocol"},
    "starlette": {"server.app"},
    "h11": {"server.app"},
    "uvicorn": {"server.app"},
    "yaml": {"config_file"},
    "packaging": {"doctor"},
    "shtab": {"__main__"},
    "tensorboard": {"trackers"},
    "wandb": {"trackers"},
    "pyarrow": {"data.sources"},
    "zstandard": {"data.sources"},
    "datasets": {"data.sources"},
}
FORBIDDEN = {"pickle", "marshal", "shelve", "torch", "transformers", "requests"}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Every module that a module imports, anywhere in it; ours without the package's name in front."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}".removeprefix("mlx_lora.")
                found.add(full if full in MODULES else str(node.module))
    return {module.removeprefix("mlx_lora.") for module in found}


def test_every_module_has_its_place():
    assert sorted([*ORDER, *COMMANDS, "__init__"]) == sorted(MODULES)


@pytest.mark.parametrize("name", [*ORDER, *COMMANDS])
def test_imports_point_one_way(name):
    allowed = set(ORDER[: ORDER.index(name)] if name in ORDER else ORDER) | {"mlx_lora"}
    ours = {module for module in imports(name) if module in MODULES or module.startswith("mlx_lora")}
    assert ours <= allowed


@pytest.mark.parametrize("name", list(MODULES))
def test_each_dependency_has_its_owners(name):
    for module in imports(name):
        package = module.split(".")[0]
        assert package not in FORBIDDEN
        assert name in OWNERS.get(package, {name})


@pytest.mark.parametrize("name", list(MODULES))
def test_nothing_runs_code_from_outside(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "__import__", "yaml.load", "yaml.unsafe_load", "os.system"}
            assert not any(
                keyword.arg in {"shell", "trust_remote_code"} and getattr(keyword.value, "value", True)
                for keyword in node.keywords
            )


@pytest.mark.parametrize("name", list(MODULES))
def test_yaml_is_read_with_safe_loaders_alone(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml" and node.attr.endswith("Loader"):
            assert node.attr == "SafeLoader"


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, mlx_lora; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mlx_lora" in loaded
    assert not {"mlx", "mlx_lm", "numpy", "pydantic", "transformers", "rich", "yaml"} & set(loaded)


def test_openblas_is_loaded_before_mlx():
    code = "import sys, mlx_lora.blas; print(mlx_lora.blas.loaded, 'mlx.core' in sys.modules); import mlx.core"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    if sys.platform.startswith("linux"):
        assert printed.split() == ["True", "False"]
