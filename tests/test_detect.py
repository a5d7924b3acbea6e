"""detect.py on tiny random Grounding DINO, SAM 2, SAM 3 and Florence-2: shapes, batches, resuming and processes, end to end."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import detect
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

import annotate
import data
from data import InputError

ROOT = Path(annotate.__file__).parent
WORDS = "dog cat man red ball grass brown a the table beach ##s w".split()


def bert_tokenizer():
    """Grounding DINO knows BERT's special tokens by their numbers."""
    special, words = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}, iter(WORDS)
    return transformers.BertTokenizer(vocab={special.get(i) or next(words, f"[unused{i}]"): i for i in range(1040)})


def word_tokenizer(**more):
    vocab = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                                unk_token="<unk>", **more)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the four models, as from_pretrained reads them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)

    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
                                                out_indices=[2, 3, 4]),
        text_config=transformers.BertConfig(vocab_size=1040, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                            intermediate_size=16),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=12, max_text_len=24)
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder / "dino")
    transformers.GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(folder / "dino")
    bert_tokenizer().save_pretrained(folder / "dino")

    hiera = transformers.Sam2HieraDetConfig(
        hidden_size=8, image_size=[64, 64], blocks_per_stage=[1, 2, 1, 1], embed_dim_per_stage=[8, 16, 24, 32],
        num_attention_heads_per_stage=[1, 1, 2, 2], window_size_per_stage=[4, 4, 4, 4], global_attention_blocks=[2])
    config = transformers.Sam2Config(
        vision_config=transformers.Sam2VisionConfig(backbone_config=hiera, backbone_channel_list=[32, 24, 16, 8], fpn_hidden_size=16,
                                                    backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]]),
        prompt_encoder_config=transformers.Sam2PromptEncoderConfig(hidden_size=16, image_size=64),
        mask_decoder_config=transformers.Sam2MaskDecoderConfig(hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16))
    transformers.Sam2Model(config).save_pretrained(folder / "sam2")

    small = dict(hidden_size=16, num_attention_heads=2)
    vit = transformers.Sam3ViTConfig(**small, intermediate_size=16, num_hidden_layers=2, image_size=56, patch_size=14, window_size=2,
                                     global_attn_indexes=[1], pretrain_image_size=28)
    config = transformers.Sam3Config(
        vision_config=transformers.Sam3VisionConfig(backbone_config=vit, fpn_hidden_size=16,
                                                    backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]]),
        text_config=transformers.CLIPTextConfig(**small, vocab_size=40, intermediate_size=16, projection_dim=16, num_hidden_layers=1,
                                                max_position_embeddings=32, eos_token_id=2),
        **{f"{name}_config": dict(**small, **({} if name == "mask_decoder" else dict(intermediate_size=16, num_layers=1)))
           for name in ("geometry_encoder", "detr_encoder", "mask_decoder")},
        detr_decoder_config=dict(**small, intermediate_size=16, num_layers=1, num_queries=6))
    transformers.Sam3Model(config).save_pretrained(folder / "sam3")
    word_tokenizer().save_pretrained(folder / "sam3")

    tokenizer = word_tokenizer(extra_special_tokens={"image_token": "<image>"})
    config = transformers.Florence2Config(
        vision_config=transformers.Florence2VisionConfig(depths=(1, 1, 1, 1), embed_dim=(8, 8, 16, 16), num_heads=(1, 1, 2, 2),
                                                         num_groups=(1, 1, 2, 2), window_size=2, projection_dim=16),
        text_config=transformers.BartConfig(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
                                            decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2),
        image_token_id=tokenizer.image_token_id)
    florence = transformers.Florence2ForConditionalGeneration(config)
    with torch.no_grad():                                       # so that random weights say more than one word
        florence.model.language_model.get_input_embeddings().weight.mul_(20)
    florence.save_pretrained(folder / "florence")
    transformers.CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5).save_pretrained(
        folder / "florence")
    tokenizer.save_pretrained(folder / "florence")
    return folder


@pytest.fixture
def photos(tmp_path):
    """Seven images of several sizes, and records about them."""
    rng, records = np.random.default_rng(0), []
    for i in range(7):
        size = [(64, 48), (40, 60), (90, 33)][i % 3]
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
        turns = ("human", "?"), ("gpt", ["A brown dog on the grass.", "A man, a red ball and a cat", "It is."][i % 3])
        records.append({"id": i, "image": f"{i}.png", "conversations": [{"from": who, "value": text} for who, text in turns]})
    records.insert(3, {"id": "text", "conversations": records[0]["conversations"]})
    (tmp_path / "in.json").write_text(json.dumps(records))
    return tmp_path


def convert(out, *flags):
    annotate.main(annotate.runtime.parse(annotate.Args, "", ["--from", "images", "--out", str(out), *map(str, flags)]))
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_noun_phrases_and_files_of_tags(tmp_path):
    assert detect.noun_phrases("A brown dog is running on the wet grass, chasing two red balls near a building.") == [
        "brown dog", "wet grass", "red balls", "building"]
    assert detect.noun_phrases("People riding a swing; a dining table") == ["people", "swing", "dining table"]
    (tmp_path / "tags.txt").write_text("a.jpg\tdog | grass |  red ball | dog\n\nsub/b.jpg\tman, hat\n")
    assert detect.read_tags(tmp_path / "tags.txt") == {"a.jpg": ["dog", "grass", "red ball"], "sub/b.jpg": ["man", "hat"]}
    (tmp_path / "tags.txt").write_text("a.jpg dog\n")
    with pytest.raises(InputError, match="line 1: expected an image's name, a tab"):
        detect.read_tags(tmp_path / "tags.txt")


def test_suppression_keeps_what_a_plain_loop_keeps():
    torch.manual_seed(0)
    corner = torch.rand(40, 2) * 10
    boxes, scores = torch.cat([corner, corner + torch.rand(40, 2) * 8], 1), torch.rand(40).mul(20).round()         # ties as well

    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        common = max(w, 0) * max(h, 0)
        return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)
    kept = []
    for i in sorted(range(40), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j]) <= 0.4 for j in kept):
            kept.append(i)
    assert detect.suppress(boxes, scores, 0.4) == kept and 5 < len(kept) < 35
    assert detect.suppress(boxes[:0], scores[:0], 0.4) == []


def test_labels_go_back_to_their_tags():
    tags = ["brown dog", "red ball", "dog"]
    assert [detect.same_tag(label, tags) for label in ("brown", "ball", "dog", "brown dog red", "the .", "")] == [
        "brown dog", "red ball", "dog", "brown dog", None, None]


@pytest.mark.parametrize("flags, source, mask", [
    (["--detector", "dino"], "caption+dino", False), (["--detector", "dino", "--segmenter", "sam2"], "caption+dino+sam2", True),
    (["--segmenter", "sam3"], "caption+sam3", True)])
def test_records_get_regions(photos, models, flags, source, mask):
    flags = [models / f if not f.startswith("--") else f for f in flags]
    flags += ["--data", photos / "in.json", "--image-dir", photos / "images", "--text-threshold", 0]
    records = convert(photos / "out.jsonl", *flags, "--threshold", 0.001, "--batch-size", 3)
    assert [r["id"] for r in records] == [0, 1, 2, "text", 3, 4, 5, 6] and "regions" not in records[3]
    assert [r["conversations"] for r in records] == [r["conversations"] for r in json.loads((photos / "in.json").read_text())]
    for record in (r for r in records if r["id"] != "text"):
        tags = detect.noun_phrases(record["conversations"][1]["value"])
        regions, size = record["regions"], Image.open(photos / "images" / record["image"]).size
        assert bool(regions) == bool(tags) and {r["phrase"] for r in regions} <= set(tags)
        assert all(("rle" in r) == mask and r["source"] == source and 0.001 < r["score"] <= 1 for r in regions)
        assert [r["score"] for r in regions] == sorted((r["score"] for r in regions), reverse=True)
        data.region_coverage(regions, size, "crop", (4, 4))     # well formed, and of this image
    highest = max(r["score"] for record in records for r in record.get("regions", []))
    assert not any(r.get("regions") for r in convert(photos / "none.jsonl", *flags, "--threshold", min(highest + 0.001, 1)))


def test_a_batch_gives_what_single_images_give(photos, models):
    images = [data.open_image(photos / "images" / f"{i}.png", "") for i in range(3)]                   # the first is 64 x 48
    tags = [["brown dog", "grass"], ["man"], ["cat", "red ball", "dog"]]
    dino = detect.GroundingDino(str(models / "dino"), torch.device("cpu"), 0.001, 0.0)
    sam2, sam3 = detect.Sam2(str(models / "sam2"), torch.device("cpu")), detect.Sam3(str(models / "sam3"), torch.device("cpu"), 0.001)
    assert [list(dino.prompts(["brown dog"] * 9))[i] for i in (0, -1)] == [["brown dog"] * 7, ["brown dog"] * 2]      # 24 tokens: 7 x 3 + 2
    boxes = [[[1, 2, 30, 40]], [], [[5, 5, 50, 20], [0, 0, 9, 9], [60, 3, 80, 30]]]
    asked = []
    sam2.model.register_forward_pre_hook(lambda module, _, given: asked.append(given["input_boxes"][0]), with_kwargs=True)
    with torch.inference_mode():
        together, masks, found = dino(images, tags), sam2(images, boxes), sam3(images, tags)
        for i, image in enumerate(images):
            assert masks[i].shape == (len(boxes[i]), *image.size[::-1])
            (alone,) = sam2([image], [boxes[i]])
            assert (alone == masks[i]).float().mean() > 0.99 if boxes[i] else len(alone) == 0
            (alone,) = sam3([image], [tags[i]])
            assert {row[0] for row in alone} == set(tags[i]) and len(alone) == len(found[i])
            for a, b in zip(sorted(alone, key=lambda r: r[:2]), sorted(found[i], key=lambda r: r[:2])):
                assert a[0] == b[0] and a[1] == pytest.approx(b[1], abs=1e-4) and np.allclose(a[2], b[2], atol=0.05)
                assert (a[3] == b[3]).float().mean() > 0.99
        assert asked[0][0].tolist() == pytest.approx([1, 2 * 64 / 48, 30, 40 * 64 / 48])        # in the square of 64 that it sees
        (alone,) = dino(images[:1], tags[:1])                   # the others' padding is masked, up to what the random model makes of it
        assert len(alone) == len(together[0]) and {row[0] for row in together[2]} <= set(tags[2])


def test_florence_captions_a_folder_and_tags_come_from_it(photos, models, monkeypatch):
    annotator = detect.Annotator(str(models / "florence"), str(models / "dino"), "", torch.device("cpu"), torch.float32, 0.001, 0.0, 0.7)
    images = [data.open_image(photos / "images" / f"{i}.png", "") for i in range(3)]
    with torch.inference_mode():
        captions = annotator.florence(images)
        assert len(captions) == 3 and captions[0] == annotator.florence(images[:1])[0] and not any("<" in text for text in captions)
    monkeypatch.setattr(detect.Florence, "__call__", lambda self, images: ["a red ball on a table"] * len(images))
    flags = ["--tagger", models / "florence", "--detector", models / "dino", "--threshold", 0.001, "--text-threshold", 0]
    (photos / "images" / "3.png").write_bytes(b"broken")
    records = convert(photos / "out.jsonl", "--image-dir", photos / "images", *flags)
    assert [r["id"] for r in records] == [f"{i}.png" for i in (0, 1, 2, 4, 5, 6)] and "3.png" in (photos / "out.jsonl.problems").read_text()
    for record in records:
        assert record["conversations"][1]["value"] == "a red ball on a table"
        assert {r["phrase"] for r in record["regions"]} <= {"red ball", "table"} and record["regions"]
        assert record["regions"][0]["source"] == "florence+dino"


def test_tags_of_a_file_and_bfloat16(photos, models):
    (photos / "tags.txt").write_text("0.png\tdog | cat\n2.png\tman\n")
    records = convert(photos / "out.jsonl", "--image-dir", photos / "images", "--tagger", photos / "tags.txt", "--dtype", "bfloat16",
                      "--detector", models / "dino", "--segmenter", models / "sam2", "--threshold", 0.001, "--text-threshold", 0)
    assert [r["id"] for r in records] == ["0.png", "2.png"]     # the others have no tag, so no region and no caption: problems
    problems = (photos / "out.jsonl.problems").read_text()
    assert problems.count("no caption and no region") == 5 and f"image 1.png: no line for 1.png in {photos / 'tags.txt'}" in problems
    assert {r["phrase"] for r in records[0]["regions"]} <= {"dog", "cat"} and "rle" in records[0]["regions"][0]


@pytest.mark.parametrize("flags, message", [
    ([], "needs --detector"), (["--segmenter", "sam2"], "needs --detector"),
    (["--segmenter", "sam3", "--detector", "dino"], "needs --detector"),
    (["--detector", "sam2"], "a sam2; expected grounding-dino"), (["--detector", "nothing"], "not a model folder"),
    (["--detector", "dino", "--tagger", "sam2"], "expected florence2")])
def test_models_of_the_wrong_kind_are_refused(photos, models, flags, message):
    flags = [models / f if not f.startswith("--") else f for f in flags]
    with pytest.raises(InputError, match=message):
        convert(photos / "out.jsonl", "--data", photos / "in.json", "--image-dir", photos / "images", *flags)


@pytest.mark.parametrize("flag, missing", [("--detector", "model.safetensors"), ("--segmenter", "model.safetensors"),
                                           ("--detector", "tokenizer.json"), ("--tagger", "model.safetensors")])
def test_half_a_model_is_refused(photos, models, flag, missing):
    names = {"--detector": models / "dino", "--segmenter": models / "sam2", "--tagger": models / "florence"}
    shutil.copytree(names[flag], photos / "half")
    weights = (photos / "half" / missing).read_bytes()
    (photos / "half" / missing).write_bytes(weights[:len(weights) // 2])
    flags = [f for name, folder in (names | {flag: photos / "half"}).items() for f in (name, folder)]
    with pytest.raises(InputError, match=f"{flag} .*half: cannot be loaded; is the folder complete"):
        convert(photos / "out.jsonl", "--image-dir", photos / "images", *flags)


class Fake:
    """In the place of the models: fails on images named 2 and on batches with one, and tells how many it saw at once."""

    error, tags_of = RuntimeError("no such\nshape"), None

    def __init__(self, *arguments):
        pass

    def __call__(self, images, captions, names):
        if "2.png" in names:
            raise self.error
        return [(text, [{"phrase": text.split()[0], "bbox": [0, 0, 5, 5], "score": 1 / len(names)}]) for text in captions]


def test_an_image_that_the_models_fail_on_and_an_answer_that_is_no_text_are_listed(photos, monkeypatch):
    monkeypatch.setattr(detect, "Annotator", Fake)
    records = json.loads((photos / "in.json").read_text())
    regions = [{"phrase": "", "bbox": [0, 0, 5, 5]}, {"phrase": "x", "bbox": [0, 0, 500, 5]}, {"phrase": "x", "bbox": [0, 0, 5, 5]}]
    records += [records[0] | {"id": i, "image": image, "regions": own} for i, image, own in (
        (7, "6.png", regions), (8, "none.png", regions[2:]))]
    records[5]["conversations"][1]["value"] = None              # of image 4
    (photos / "in.json").write_text(json.dumps(records))
    flags = ["--data", photos / "in.json", "--image-dir", photos / "images", "--batch-size", 4]
    made = convert(photos / "out.jsonl", *flags)
    assert [r["id"] for r in made] == [0, 1, "text", 3, 5, 6, 7] and made[-1]["regions"] == regions[2:]
    assert [r["regions"][0].get("score") for r in made if "regions" in r] == [1, 1, 1 / 3, 1 / 3, 1 / 3, None]         # alone; together
    problems = (photos / "out.jsonl.problems").read_text().splitlines()
    assert [words in own for words, own in zip(("record 2: the models fail on it (RuntimeError: no such shape)", "record 5: turn 1 is not",
                                                '"phrase" is missing', "outside its 64 x 48", "none.png"), problems)] == [True] * 5
    assert len(problems) == 5


@pytest.mark.parametrize("error, ends, message", [
    (torch.OutOfMemoryError("CUDA"), InputError, "--batch-size 4: out of GPU memory at .*record 0; lower it"),
    (torch.AcceleratorError("device-side assert"), torch.AcceleratorError, "device-side")])
def test_what_is_not_an_image_s_fault_ends_the_run(photos, monkeypatch, error, ends, message):
    monkeypatch.setattr(detect, "Annotator", Fake)
    monkeypatch.setattr(Fake, "error", error)
    with pytest.raises(ends, match=message):
        convert(photos / "out.jsonl", "--data", photos / "in.json", "--image-dir", photos / "images", "--batch-size", 4)


KILL =
"""
import os, signal, sys
import annotate, detect, runtime
real, left = detect.Annotator.__call__, [int(sys.argv.pop(1))]
def dying(*arguments):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
detect.Annotator.__call__ = dying
runtime.run(annotate.main, annotate.Args, "", annotate.InputError)
"""


def test_killed_resumed_and_shared_by_two_processes_is_the_same(photos, models, run):
    """One process, killed before its second and, resumed, before its third batch, then finished by two; and an image is missing."""
    flags = ["--from", "images", "--data", photos / "in.json", "--image-dir", photos / "images", "--segmenter", models / "sam3",
             "--threshold", "0.001", "--batch-size", "2", "--out"]
    (photos / "images" / "4.png").unlink()
    done = run("annotate.py", *flags, photos / "whole.jsonl")
    assert done.returncode == 0 and "7 records of 8 images; 1 problems" in done.stdout, done.stderr
    part = photos / "out.jsonl.rank-0"
    for batches, expected in ((1, 2), (1, 4)):
        command = [sys.executable, "-c", KILL, str(batches), *map(str, flags), str(photos / "out.jsonl")]
        killed = subprocess.run(command, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True)
        assert killed.returncode == -9 and part.read_bytes().count(b"\n") == 1 + expected
    part.write_bytes(part.read_bytes()[:-30])                   # and half a batch is lost
    done = run("annotate.py", *flags, photos / "out.jsonl", processes=2)
    assert done.returncode == 0, done.stderr
    assert (photos / "out.jsonl").read_bytes() == (photos / "whole.jsonl").read_bytes()
