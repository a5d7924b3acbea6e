#!/usr/bin/env bash
# The comparison on photographs, through reproduce.py: DINOv2-S and SmolLM2-135M on Flickr8k with
# phrase boxes.
#
#   bash docs/photographs.sh DATA cpu               # three seeds of 2.5 hours on two cores, 16 GB
#   bash docs/photographs.sh DATA cpu --seeds 1     # the first of them; the others go on from there
#   bash docs/photographs.sh DATA gpu               # three seeds, two epochs; not run yet
#   python docs/intervals.py runs/photographs       # intervals over seeds and images
#
# DATA holds dinov2-small/ and smollm2-135m/ (Hugging Face folders), images/ (Flickr8k's) and
# flickr8k.jsonl.gz (see docs/flickr8k.py). Flags after the second are those of reproduce.py. Images
# have 64 patches. Beside each score stands what the same model says of a grey image.
set -euo pipefail
data=$(realpath "$1") how=$2
shift 2
cd "$(dirname "$0")/.."
records=$data/records common="--image-dir $data/images --dtype bfloat16"
python docs/flickr8k.py "$data/flickr8k.jsonl.gz" --out "$records"
for name in val val_sft; do head -200 "$records/$name.jsonl" > "$records/${name}200.jsonl"; done

case $how in
cpu)
  jobs=2 limit=1000
  pretrain="--batch-size 16 --micro-batch 8 --steps 500 --save-every 100"
  sft="--batch-size 16 --micro-batch 8 --lr 3e-4 --projector-lr 3e-4 --steps 250 \
       --val-every 250 --save-every 50" ;;
gpu)  # two epochs of the 30,000 captions, one of the 6,000 conversations; all six cells at once
  jobs=6 limit=400
  pretrain="--batch-size 64 --steps 938 --save-every 200 --cache-features $data/cache"
  sft="--batch-size 32 --lr 3e-4 --projector-lr 3e-4 --steps 188 --save-every 100 \
       --cache-features $data/cache" ;;
*) echo "error: $how: say cpu or gpu" >&2; exit 2 ;;
esac

models="--vision $data/dinov2-small --llm $data/smollm2-135m --image-size 112 --geometry stretch"
tests="$records/test_caption.jsonl $records/test_refer.jsonl $records/test_vqa.jsonl"
python reproduce.py --out runs/photographs --variants caption-only patch-aligned --seeds 3 \
  --jobs "$jobs" \
  --pretrain-flags "--data $records/train.jsonl --val-data $records/val200.jsonl $models $common \
                    $pretrain" \
  --probe-flags "--data $records/test.jsonl --image-dir $data/images" \
  --caption-eval-flags "--data $records/test_caption.jsonl $common --limit $limit" \
  --sft-flags "--data $records/train_sft.jsonl --val-data $records/val_sft200.jsonl $common \
               --geometry stretch $sft" \
  --eval-flags "--data $tests $common --blind --limit $limit" "$@"
