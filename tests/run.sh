#!/usr/bin/env bash
# What `make test` and CI run, in the environment that `make env` made.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 WANDB_MODE=disabled
step() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }

step 'environment'
uv pip check

step 'exported library is in sync, notebooks are clean'
nbdev-export
nbdev-clean
git add -N vla_nb nbs
git diff --exit-code -- vla_nb nbs || { echo 'run nbdev-export and nbdev-clean, and commit'; exit 1; }

step 'notebooks (nbdev-test)'
log=$(mktemp)
nbdev-test --n-workers 2 --timing 2>&1 | tee "$log"
notebooks=$(grep -c ' secs$' "$log")
test "$notebooks" = "$(git ls-files 'nbs/*.ipynb' | wc -l)" || { echo "ran $notebooks notebooks of $(git ls-files 'nbs/*.ipynb' | wc -l)"; exit 1; }    # nbdev-test exits 0 when a pattern matches nothing

step 'docs'
if command -v npm >/dev/null; then npm ci --prefix docs --ignore-scripts --silent; fi
python docs/build.py

step 'tests'
python -m pytest -q -n 2 --dist worksteal -p no:cacheprovider 2>&1 | tee "$log"
tests=$(grep -oE '[0-9]+ passed' "$log" | tail -1 | cut -d' ' -f1)

step 'done'
echo "notebooks: $notebooks passed, 0 failed"
echo "$((notebooks + tests)) passed, 0 failed"
