"""The export command: what each form leaves, what is refused, and the quickstart's adapter in llama.cpp."""

import json
import re
import resource
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from gguf_files import as_float32
from llama_cpp import LlamaCpp

from mlx_lora import adapter_files, config, config_file, data, files, finetune, generation, hub, lora, model
from mlx_lora.adapter_files import mlx_form, peft_form
from mlx_lora.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    """A short run that changed the tiny model well enough."""
    folder = tmp_path_factory.mktemp("export")
    rows = [{"prompt": f"Number {n}", "completion": f"{n} it is"} for n in range(12)]
    (folder / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model": str(tiny_model),
        "data": {"train": str(folder / "my rows.jsonl"), "valid": 0.2},
        "lora": {"rank": 4, "alpha": 8},
        "train": {"max_steps": 20, "learning_rate": 0.02},
        "notes": {"purpose": "numbers | tests"},
        "output_dir": str(folder / "run"),
    }
    finetune(options)
    return folder / "run"


def logits(base: Path, adapter: Path | None) -> np.ndarray:
    loaded = model.load(config.Model(path=str(base)))
    if adapter:
        adapter_files.load(loaded.model, adapter)
    return np.array(loaded.model(mx.array([[1, 90, 198, 83, 35, 253, 56]])))


EXPECTED = {
    "gguf": ["adapter-f16.gguf"],
    "peft": ["adapter_config.json", "adapter_model.safetensors"],
    "mlx": ["adapter_config.json", "adapters.safetensors"],
    "merged-gguf": ["model-f16.gguf"],
    "ollama": ["Modelfile", "model-f16.gguf"],
}


@pytest.mark.parametrize("form", [*EXPECTED, "merged"])
def test_each_form_goes_beside_the_run_and_never_over_anything(run, run_command, form):
    ended = run_command("export", run, "--to", form)
    assert ended.returncode == 0, ended.stderr
    out = run.with_name(f"run-{form}")
    names = sorted(path.name for path in out.iterdir())
    assert names == EXPECTED.get(form, names)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(names) or form in EXPECTED
    assert all(str(out / name) in ended.stdout for name in names)
    again = run_command("export", run, "--to", form)
    assert (again.returncode, again.stdout) == (2, "")
    assert "is there already" in again.stderr
    assert sorted(path.name for path in out.iterdir()) == names
    assert not [path for path in run.parent.iterdir() if path.name.startswith(".tmp-")]


def test_what_is_exported_reads_back_as_the_same_model(run, run_command, tmp_path, tiny_model):
    expected = logits(tiny_model, run)
    for form in ("mlx", "peft"):
        assert run_command("export", run, "--to", form, "--out", tmp_path / form).returncode == 0
        np.testing.assert_array_equal(logits(tiny_model, tmp_path / form), expected)
    assert run_command("export", run, "--to", "merged", "--out", tmp_path / "merged").returncode == 0
    assert np.abs(logits(tmp_path / "merged", None) - expected).max() < 1e-4 < np.abs(expected).max()


def test_mixed_ranks_and_alphas_are_folded_for_mlx_lm(run_command, tmp_path, tiny_model, run):
    """The source is a PEFT adapter in which every module has a rank and an alpha of its own."""
    import mlx_lm

    adapter = adapter_files.read(run)
    mixed = {
        path: pair.with_rank(pair.rank + number, pair.alpha * (1 + number % 3)) if number % 2 else pair
        for number, (path, pair) in enumerate(adapter.pairs.items())
    }
    (tmp_path / "peft").mkdir()
    base_config = json.loads((tiny_model / "config.json").read_text())
    mixed_adapter = replace(adapter, pairs=mixed, base=config.Model(path=str(tiny_model)))
    peft_form.write(tmp_path / "peft", mixed_adapter, base_config)
    ended = run_command("export", tmp_path / "peft", "--to", "mlx", "--out", tmp_path / "mlx")
    assert ended.returncode == 0, ended.stderr
    theirs, _ = mlx_lm.load(str(tiny_model), adapter_path=str(tmp_path / "mlx"))
    tokens = mx.array([[1, 90, 198, 83, 35, 253, 56]])
    assert np.abs(np.array(theirs(tokens)) - logits(tiny_model, run)).max() < 1e-4


def test_a_gguf_adapter_and_its_merged_model_agree_in_llama_cpp(run, run_command, tmp_path, tiny_model):
    for form, dtype in (("gguf", "f32"), ("merged-gguf", "f32"), ("ollama", "f32")):
        more = ["--with-adapter"] if form == "ollama" else []
        ended = run_command("export", run, "--to", form, "--dtype", dtype, "--out", tmp_path / form, *more)
        assert ended.returncode == 0, ended.stderr
    tokens = [1, 90, 198, 83, 35, 253, 56]
    expected = logits(tiny_model, run)[0]
    apart = LlamaCpp(tmp_path / "ollama" / "base.gguf", [(tmp_path / "gguf" / "adapter-f32.gguf", 1.0)])
    merged = LlamaCpp(tmp_path / "merged-gguf" / "model-f32.gguf")
    base = LlamaCpp(tmp_path / "ollama" / "base.gguf")
    assert np.abs(apart.logits(tokens) - expected).max() < 1e-4
    assert np.abs(merged.logits(tokens) - expected).max() < 1e-4
    assert np.abs(base.logits(tokens) - expected).max() > 0.01
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "ollama" / "Modelfile").read_text()


def test_the_model_card_tells_the_run_and_nothing_of_this_machine(run, run_command):
    ended = run_command("export", run, "--to", "hub", "--repo", "me/numbers", "--form", "peft", "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert "would push to me/numbers (public)" in ended.stdout
    assert "adapter_model.safetensors" in ended.stdout
    card = ended.stdout.split("README.md:\n\n")[1]
    head = yaml.safe_load(card.split("---")[1])
    assert (head["library_name"], "lora" in head["tags"]) == ("peft", True)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {event["step"]: event["loss"] for event in events if event["event"] == "eval"}
    best = min(losses, key=losses.get)
    assert f"| step 0 | {losses[0]:.4f} |" in card
    assert f"| this adapter, step {best} | {losses[best]:.4f} |" in card
    for fact in ("| rank | 4 |", "| scale (alpha / rank) | 2 |", "my rows.jsonl", "numbers \\| tests", "me/numbers"):
        assert fact in card
    assert str(run.parent) not in card
    assert re.search(r"\| train rows \| \d+, sha256 [0-9a-f]{64} \|", card)


def test_what_is_pushed_names_no_folder_of_this_machine(run, tiny_model, tmp_path):
    adapter = adapter_files.read(run)
    adapter = hub.public(replace(adapter, base=adapter_files.base_of(run)))
    mlx_form.save(tmp_path, adapter.arrays(), mlx_form.settings(adapter), adapter.metadata)
    (tmp_path / "peft").mkdir()
    peft_form.write(tmp_path / "peft", adapter, json.loads((tiny_model / "config.json").read_text()))
    pushed = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b'"model": "model"' in pushed
    assert str(run.parent).encode() not in pushed
    assert str(tiny_model.parent).encode() not in pushed


@pytest.mark.parametrize("path", ["/gone/secret/llama", "./here", "runs/deep/llama", "x.gguf", "~/llama"])
def test_a_base_that_is_not_there_now_is_no_hub_id(run, tmp_path, path):
    adapter = replace(adapter_files.read(run), base=config.Model(path=path))
    card = hub.card("me/it", "mlx", tmp_path, adapter, None)
    assert "huggingface.co" not in card
    assert "secret" not in card


@pytest.mark.parametrize("form", ["mlx", "peft", "gguf", "merged-gguf", "merged"])
def test_a_full_disk_is_one_message_and_leaves_nothing(run, run_command, tmp_path, form):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    ended = run_command("export", run, "--to", form, "--out", tmp_path / "out", preexec_fn=small_files)
    assert ended.returncode == 2
    assert f"error: {tmp_path / 'out'}" in ended.stderr
    assert "cannot be written" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_stays(tmp_path):
    def export() -> None:
        with files.output_folder(tmp_path / "out") as folder:
            (folder / "mine").write_text("mine")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("theirs")

    with pytest.raises(InputError, match="cannot be written"):
        export()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_foreign_config_two_folders_up_is_not_the_runs(run, tmp_path):
    folder = tmp_path / "adapters" / "mine"
    folder.mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("model: elsewhere\n")
    for name in ("adapters.safetensors", "adapter_config.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    assert adapter_files.base_of(folder) == adapter_files.base_of(run)


def test_a_peft_embedding_without_its_tied_head_has_no_form_here(run_command, tiny_model, tmp_path):
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    options = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the tied weights
        peft.get_peft_model(base, options).save_pretrained(tmp_path / "peft")
    for form in ("mlx", "gguf"):
        ended = run_command("export", tmp_path / "peft", "--to", form, "--out", tmp_path / form)
        assert (ended.returncode, "ensure_weight_tying is not set" in ended.stderr) == (2, True)


def test_an_upload_that_fails_says_so(run, run_command, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    ended = run_command("export", run, "--to", "hub", "--repo", "me/numbers")
    assert ended.returncode == 2
    assert "me/numbers: cannot be uploaded" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--to", "peft", "--dtype", "f16"],
            "--dtype goes with --to gguf or merged-gguf or ollama or merged, not peft",
        ),
        (["--to", "merged", "--dtype", "q8_0"], "--dtype q8_0 goes with GGUF files"),
        (["--to", "gguf", "--quantize", "4"], "--quantize goes with --to merged, not gguf"),
        (["--to", "gguf", "--repo", "me/it"], "--repo goes with --to hub"),
        (["--to", "hub"], "--to hub needs --repo"),
        (["--to", "hub", "--repo", "no name!"], "--repo"),
        (["--to", "hub", "--repo", "name"], "name is not OWNER/NAME"),
        (["--to", "hub", "--repo", "me/it", "--out", "x"], "--out has no meaning"),
        (["--to", "gguf", "--revision", "main"], "--revision goes with --model"),
        (["--to", "merged", "--quantize", "7"], "7 is not keep, none, 2, 3, 4, 5, 6, 8"),
        (["--to", "merged", "--max-loss", "-1"], "--max-loss"),
        (["--to", "gguf", "--model", "/nowhere"], "/nowhere"),
        (["--to", "nonsense"], "invalid choice"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(run, run_command, arguments, words, tmp_path):
    where = [] if "hub" in arguments else ["--out", tmp_path / "out"]
    ended = run_command("export", run, *arguments, *where)
    assert ended.returncode == 2
    assert not (tmp_path / "out").exists()
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_is_no_adapter_is_refused(run_command, tmp_path):
    ended = run_command("export", tmp_path, "--to", "peft")
    assert (ended.returncode, "holds no adapter" in ended.stderr) == (2, True)


@pytest.mark.slow
def test_llama_cpp_answers_the_quickstarts_held_out_prompts_as_we_do(quickstart, run_command, tmp_path, smollm2_gguf):
    """The F32 form of the very GGUF file that was trained on, with the exported adapter, greedily."""
    trained = ROOT / "runs" / "quickstart"
    ended = run_command("export", trained, "--to", "gguf", "--dtype", "f32", "--out", tmp_path / "gguf")
    assert ended.returncode == 0, ended.stderr
    options = config_file.load(trained / "config.yaml")
    base = model.load(config.Model(path=str(smollm2_gguf)))
    rows = options.data.model_copy(update={"train": str(ROOT / options.data.train)})
    held_out = data.held_out(rows, base.tokenizer)
    asked = [
        data.last_answer(row.content, rows)[0] for row in islice(data.used_rows(held_out, rows.valid_paths, rows), 32)
    ]
    prompts = [generation.chat_prompt(base.tokenizer, messages) for messages in asked]
    assert len(prompts) == 32
    adapter_files.load(base.model, trained)
    ours = generation.answers(base.model, base.tokenizer, prompts, 64)
    theirs = LlamaCpp(as_float32(smollm2_gguf, tmp_path / "base.gguf"), [(tmp_path / "gguf" / "adapter-f32.gguf", 1.0)])
    stops = set(base.tokenizer.eos_token_ids)
    for prompt, own in zip(prompts, ours, strict=True):
        answer = theirs.answer(prompt, stops, 64)
        # Of every token that llama.cpp chose, how far it is below the one that we would choose there.
        logits = np.array(base.model(mx.array([prompt + answer]))[0, len(prompt) - 1 :])
        gaps = logits[:-1].max(axis=-1) - logits[np.arange(len(answer)), answer]
        assert gaps.max() < 1e-3
        assert int(logits[-1].argmax()) in stops
        assert base.tokenizer.decode(answer) == own or gaps.max() > 0  # a tie, up to rounding, may fall either way
    lora.disable(base.model)
    assert generation.answers(base.model, base.tokenizer, prompts[:4], 64) != ours[:4]
