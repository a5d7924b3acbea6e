#!/usr/bin/env bash
# From photographs with COCO's annotations to a model that transformers answers with: the README's
# commands, one after the other, each with its minutes.
#
#   DATA=coco bash docs/own_data.sh                   # the toy world's backbones: shows the way
#   DATA=coco MODELS=models bash docs/own_data.sh     # DINOv2-S and SmolLM2-135M
#
# DATA holds instances.json, captions.json, images/ and, if there is one, panoptic.json with its
# folder. MODELS holds dinov2-small/ and smollm2-135m/ (Hugging Face folders). STEPS: of pretraining,
# 16 captions each; half as many of fine-tuning. Writes OUT, runs/own unless it is given.
set -euo pipefail
data=$(realpath "${DATA:?names a folder of photographs in COCO\'s format}") steps=${STEPS:-120}
models=${MODELS:+$(realpath "$MODELS")}
cd "$(dirname "$0")/.."
out=${OUT:-runs/own} images="--image-dir $data/images" panoptic="" backbones=""
[ -e "$data/panoptic.json" ] && panoptic="--panoptic $data/panoptic.json"
[ "$models" ] && backbones="--vision $models/dinov2-small --llm $models/smollm2-135m \
                            --image-size 112"
[ -e "$out" ] && { echo "error: $out exists; delete it, or name another with OUT" >&2; exit 2; }

run() {  # a command, printed, and its minutes
  echo && echo "\$ $*" && SECONDS=0
  "$@"
  echo "# $((SECONDS / 60)) min $((SECONDS % 60)) s"
}

run python annotate.py --from coco --instances "$data/instances.json" $panoptic \
  --captions "$data/captions.json" --captions-per-image 0 $images --out $out/all.jsonl \
  --conversations $out/data --geometry stretch
run python annotate.py --inspect 4 --out $out/data/train.jsonl $images --geometry stretch
run torchrun pretrain.py $backbones --data $out/data/train.jsonl --val-data $out/data/val.jsonl \
  $images --geometry stretch --batch-size 16 --steps "$steps" --out $out/pretrain
run python probe.py $out/pretrain/ckpt.pt --data $out/data/test.jsonl $images \
  --page $out/pretrain/page.html
run torchrun sft.py $out/pretrain/ckpt.pt --data $out/data/train_sft.jsonl \
  --val-data $out/data/val_sft.jsonl $images --geometry stretch --batch-size 16 --lr 3e-4 \
  --projector-lr 3e-4 --steps $((steps / 2)) --out $out/sft
run python eval.py $out/sft/ckpt.pt $images \
  --data $out/data/test_caption.jsonl $out/data/test_refer.jsonl $out/data/test_vqa.jsonl
run python -m hf export $out/sft/ckpt.pt $out/exported
run python docs/answers.py $out/exported $out/sft/predictions.jsonl $images \
  --data $out/data/test_caption.jsonl $out/data/test_refer.jsonl $out/data/test_vqa.jsonl
