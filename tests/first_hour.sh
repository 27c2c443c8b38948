#!/usr/bin/env bash
# The first hour of a user, from an empty environment, with times: tests/first_hour.sh CHECKPOINT CONFIG > results/first_hour.txt
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
checkpoint=$(realpath "$1") config=$(realpath "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cp "$checkpoint" model.safetensors
cp "$config" model.yml
cp -r "$checkout/calib_cache/demo_classes" folder
begun=$(date +%s)

step() {
    local begin=$SECONDS
    printf '\n$ %s\n' "${*//$checkout/CHECKOUT}"
    bash -c "$*" 2>&1 | grep -v "^\[notice\]\|^WARNING: Location" | sed "s#$work/##g; s#$checkout#CHECKOUT#g" | cut -c1-400 || true
    printf '(%d s)\n' $((SECONDS - begin))
}

echo "$(nproc) CPU cores, no GPU, $(python3 --version); commit $(git -C "$checkout" rev-parse --short HEAD)"
step "python3 -m venv env && env/bin/pip install --quiet '$checkout[rtx]' 'torch==2.13.*'"
export PATH="$work/env/bin:$PATH"
step "modiff-trt --quiet demo --out demo"
step "modiff-trt quantize --config model.yml --ckpt model.safetensors --timesteps 20 --engine rtx:sm89 --dry-run --out mine"
step "modiff-trt quantize --config model.yml --ckpt model.safetensors --timesteps 20 --engine rtx:sm89 --out mine"
step "ls -sh1 mine"
step "modiff-trt sample --model mine --num-samples 8 --grid mine.png --out mine-images"
step "modiff-trt sample --config model.yml --ckpt model.safetensors --timesteps 20 --num-samples 8 --out fp32-images"
step "modiff-trt evaluate --samples mine-images --same-noise fp32-images --out mine.json"
step "modiff-trt package --onnx mine --out sampler"
step "python3 -m venv small && small/bin/pip install --quiet -r sampler/requirements.txt && du -sh small | cut -f1"
step "small/bin/python sampler/modiff-sampler -n 4 --seed 0 -o deployed && ls deployed | head -3"
step "modiff-trt quantize --model folder --context folder/classes.npz --guidance 2 --timesteps 20 --engine rtx:sm89 --out classes"
step "modiff-trt sample --backend onnx --onnx classes/network.onnx --context folder/classes.npz --guidance 2 --num-samples 10 --out classes-images"
printf '\n%d minutes in all\n' $((($(date +%s) - begun + 30) / 60))
