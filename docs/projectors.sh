#!/usr/bin/env bash
# Every projector on photographs, caption-only and patch-aligned, 64 patches each: DINOv2-S and
# SmolLM2-135M on Flickr8k.
#
#   bash docs/projectors.sh DATA [STEPS]      # STEPS of 16 captions; again, to go on
#
# 300 steps take 95 minutes on two CPU cores. DATA as in docs/photographs.sh. linear and mlp2x_gelu
# get 8 x 8 patches of 112 pixels, the pooling ones 16 x 16 of 224, pooled to 8 x 8. Two runs at a
# time, one thread each. Writes runs/projectors/: a checkpoint, log and captions each, table.txt and
# probe.png.
set -euo pipefail
data=$(realpath "$1") steps=${2:-300}
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
out=runs/projectors records=$data/records common="--image-dir $data/images --dtype bfloat16"
[ -e "$records/test.jsonl" ] ||
  python docs/flickr8k.py "$data/flickr8k.jsonl.gz" --out "$records"

train() {
  local name=$1 weight=$2 steps=$3 folder=$out/$4 size=112
  case $name in pixel_shuffle | c_abstractor) size=224 ;; esac
  mkdir -p "$folder"
  [ -e "$folder/ckpt.pt" ] || python pretrain.py --vision "$data/dinov2-small" \
    --llm "$data/smollm2-135m" --data "$records/train.jsonl" --projector "$name" \
    --image-size $size --geometry stretch $common --patch-weight "$weight" --steps "$steps" \
    --batch-size 16 --micro-batch 8 --cache-features $out/features --out "$folder" \
    > "$folder/log.txt" 2>&1
  [ -e "$folder/eval.json" ] || python eval.py "$folder/ckpt.pt" \
    --data "$records/test_caption.jsonl" --limit 100 $common > "$folder/eval.txt" 2>&1
}
export -f train
export data out records common

for name in linear mlp2x_gelu pixel_shuffle c_abstractor; do
  for weight in 0 1; do echo "$name $weight $steps $name-$weight"; done
done | { cat; echo mlp2x_gelu 0 0 untrained; } |
  xargs -P 2 -L 1 bash -c 'train "$0" "$1" "$2" "$3"'
python probe.py $out/{linear,mlp2x_gelu,pixel_shuffle,c_abstractor}-{0,1}/ckpt.pt \
  --data "$records/test.jsonl" --image-dir "$data/images" --images 60 --pursuit-patches 512 \
  --show 3 | tee $out/table.txt
