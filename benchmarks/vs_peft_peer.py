"""The side of torch, transformers and PEFT in vs_peft.py, which starts it: a process that never loads MLX.

    python vs_peft_peer.py FOLDER

FOLDER holds the model (model/), settings.json, and as safetensors the adapter's start in PEFT's names and the updates:
"0.tokens", "0.supervised", ... (rows, width), padded with -1 and false. {} on stdout says that all is ready; then each
line on stdin, the number of an update and of threads, is answered by one of JSON: the update's seconds and its loss, a
mean over the supervised tokens.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file


def prepare(folder: Path, settings: dict[str, Any]) -> Any:
    """The model with the adapter in it, in memory as a whole."""
    network = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    network.config.use_cache = False
    wanted = peft.LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=0.0,
        target_modules=settings["paths"],
        task_type="CAUSAL_LM",
    )
    network = peft.get_peft_model(network, wanted)
    adapter = load_file(folder / "adapter.safetensors")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(adapter.pop(name.replace(".default.weight", "")))
            parameter.sum()  # read from its file
    assert not adapter, f"no place for {sorted(adapter)}"
    return network.train()


def as_batch(tokens: torch.Tensor, supervised: torch.Tensor) -> dict[str, torch.Tensor]:
    """What transformers' models take, their loss included."""
    real = tokens >= 0
    return {
        "input_ids": torch.where(real, tokens, 0).long(),
        "attention_mask": real.long(),
        "labels": torch.where(supervised, tokens, -100).long(),
    }


def _main() -> None:
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    network = prepare(folder, settings)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        settings["learning_rate"],
        tuple(settings["betas"]),
        settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    updates = load_file(folder / "updates.safetensors")
    print("{}", flush=True)
    for line in sys.stdin:
        number, threads = map(int, line.split())
        torch.set_num_threads(threads)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = network(**as_batch(updates[f"{number}.tokens"], updates[f"{number}.supervised"])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        optimizer.step()
        value = loss.item()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": value}), flush=True)


if __name__ == "__main__":
    _main()
