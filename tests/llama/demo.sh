#!/usr/bin/env bash
# From the demo's run to text that llama.cpp prints, beside the same text from run.py. Its output is in docs/ollama.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
prompt="Anna and Tom sat by the pond. The duck"
[ -f runs/demo/model.pt ] || make demo
[ -d tests/llama/node_modules ] || npm ci --prefix tests/llama --omit=optional --ignore-scripts

"$python" -m mamba2_min.export --model runs/demo --out runs/demo-gguf
echo && echo "run.py:"
printf "%s" "$prompt"; "$python" run.py --model runs/demo --prompt "$prompt" --temperature 0 --max-tokens 60 2>/dev/null
echo && echo "llama.cpp:"
node tests/llama/write.mjs runs/demo-gguf/model.gguf "$prompt" 60
