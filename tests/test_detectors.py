"""--from images on tiny random Grounding DINO, SAM 2, SAM 3 and Florence-2.

Shapes, batches, what fails, resuming and several processes, end to end.
"""

import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from test_annotate import convert, forked, photo, same_files, told, turns

import data
import labels
from annotations import detectors, images
from runtime import InputError

WORDS = "dog cat man red ball grass brown a the table beach ##s w".split()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def any_word(monkeypatch):
    """Random models: each word of a box's phrase counts, whatever its score."""
    monkeypatch.setattr(detectors, "TEXT_THRESHOLD", 0.0)


def bert_tokenizer():
    """Grounding DINO knows BERT's special tokens by their numbers."""
    special = {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1012: ".",
        1029: "?",
    }
    words = iter(WORDS)
    vocab = {special.get(i) or next(words, f"[unused{i}]"): i for i in range(1040)}
    return transformers.BertTokenizer(vocab=vocab)


def word_tokenizer(**more):
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocab = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special, **more)


def save_dino(folder):
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            out_indices=[2, 3, 4],
        ),
        text_config=transformers.BertConfig(
            vocab_size=1040,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=12,
        max_text_len=24,
    )
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    size = {"shortest_edge": 96, "longest_edge": 160}
    transformers.GroundingDinoImageProcessorPil(size=size).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)


def save_sam2(folder):
    hiera = transformers.Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[64, 64],
        blocks_per_stage=[1, 2, 1, 1],
        embed_dim_per_stage=[8, 16, 24, 32],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 4, 4],
        global_attention_blocks=[2],
    )
    config = transformers.Sam2Config(
        vision_config=transformers.Sam2VisionConfig(
            backbone_config=hiera,
            backbone_channel_list=[32, 24, 16, 8],
            fpn_hidden_size=16,
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        ),
        prompt_encoder_config=transformers.Sam2PromptEncoderConfig(hidden_size=16, image_size=64),
        mask_decoder_config=transformers.Sam2MaskDecoderConfig(
            hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )
    transformers.Sam2Model(config).save_pretrained(folder)


def save_sam3(folder):
    small = dict(hidden_size=16, num_attention_heads=2)
    layer = small | dict(intermediate_size=16, num_layers=1)
    vit = transformers.Sam3ViTConfig(
        **small,
        intermediate_size=16,
        num_hidden_layers=2,
        image_size=56,
        patch_size=14,
        window_size=2,
        global_attn_indexes=[1],
        pretrain_image_size=28,
    )
    config = transformers.Sam3Config(
        vision_config=transformers.Sam3VisionConfig(
            backbone_config=vit,
            fpn_hidden_size=16,
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        ),
        text_config=transformers.CLIPTextConfig(
            **small,
            vocab_size=40,
            intermediate_size=16,
            projection_dim=16,
            num_hidden_layers=1,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=2,
        ),
        geometry_encoder_config=dict(layer),
        detr_encoder_config=dict(layer),
        mask_decoder_config=dict(small),
        detr_decoder_config=layer | dict(num_queries=6),
    )
    transformers.Sam3Model(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def save_florence(folder):
    tokenizer = word_tokenizer(extra_special_tokens={"image_token": "<image>"})
    config = transformers.Florence2Config(
        vision_config=transformers.Florence2VisionConfig(
            depths=(1, 1, 1, 1),
            embed_dim=(8, 8, 16, 16),
            num_heads=(1, 1, 2, 2),
            num_groups=(1, 1, 2, 2),
            window_size=2,
            projection_dim=16,
        ),
        text_config=transformers.BartConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        ),
        image_token_id=tokenizer.image_token_id,
    )
    florence = transformers.Florence2ForConditionalGeneration(config)
    with torch.no_grad():  # so that random weights say words
        words = florence.model.language_model.get_input_embeddings().weight.mul_(20)
        words[: tokenizer.vocab_size - len(WORDS)] = 0
    florence.save_pretrained(folder)
    transformers.CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the four models, as from_pretrained reads them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, save in (
        ("dino", save_dino),
        ("sam2", save_sam2),
        ("sam3", save_sam3),
        ("florence", save_florence),
    ):
        save(folder / name)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Seven images of several sizes, and records about them and one without an image."""
    said = ["A brown dog on the grass.", "A man, a red ball and a cat", "It is."]
    for i in range(7):
        photo(tmp_path / "images" / f"{i}.png", [(64, 48), (40, 60), (90, 33)][i % 3], i)
    records = [
        {"id": i, "image": f"{i}.png", "conversations": turns("?", said[i % 3])} for i in range(7)
    ]
    records.insert(3, {"id": "text", "conversations": turns("?", said[0])})
    (tmp_path / "in.json").write_text(json.dumps(records))
    return tmp_path


def folder_of(photos):
    return ["--from", "images", "--image-dir", photos / "images"]


def records_in(photos):
    return [*folder_of(photos), "--data", photos / "in.json"]


def placed(models, flags):
    """Names of models -> their folders."""
    return [flag if flag.startswith("--") else models / flag for flag in flags]


def opened(models, *names):
    """Models at a threshold of 0.001."""
    return [kind(str(models / name), CPU, 0.001) for kind, name in names]


# ---- phrases, tags, boxes ------------------------------------------------------------------------


def test_noun_phrases_and_files_of_tags(tmp_path):
    assert detectors.noun_phrases(
        "A brown dog is running on the wet grass, chasing two red balls near a building."
    ) == ["brown dog", "wet grass", "red balls", "building"]
    assert detectors.noun_phrases("People riding a swing; a dining table") == [
        "people",
        "swing",
        "dining table",
    ]
    file = tmp_path / "tags.txt"
    file.write_text("a.jpg\tdog | grass |  red ball | dog\n\nsub/b.jpg\tman, hat\n")
    assert detectors.read_tags(file) == {
        "a.jpg": ["dog", "grass", "red ball"],
        "sub/b.jpg": ["man", "hat"],
    }
    file.write_text("a.jpg dog\n")
    with pytest.raises(InputError, match="line 1: expected an image's name, a tab"):
        detectors.read_tags(file)


def test_suppression_keeps_what_a_plain_loop_keeps():
    torch.manual_seed(0)
    corner = torch.rand(40, 2) * 10
    boxes = torch.cat([corner, corner + torch.rand(40, 2) * 8], 1)
    scores = torch.rand(40).mul(20).round()  # ties as well

    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        common = max(w, 0) * max(h, 0)
        areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        return common / (areas - common)

    kept = []
    for i in sorted(range(40), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j]) <= 0.4 for j in kept):
            kept.append(i)
    assert detectors.suppress(boxes, scores, 0.4) == kept and 5 < len(kept) < 35
    assert detectors.suppress(boxes[:0], scores[:0], 0.4) == []


def test_labels_go_back_to_their_tags():
    tags = ["brown dog", "red ball", "dog"]
    given = ("brown", "ball", "dog", "brown dog red", "the .", "")
    assert [detectors.same_tag(label, tags) for label in given] == [
        "brown dog",
        "red ball",
        "dog",
        "brown dog",
        None,
        None,
    ]


def test_tags_go_into_as_many_texts_as_they_need(models):
    (dino,) = opened(models, (detectors.GroundingDino, "dino"))
    lengths = [len(text) for text in dino.prompts(["brown dog"] * 9)]
    assert lengths == [7, 2]  # 24 tokens: 7 x 3 + 2
    assert dino.prompts(["dog " * 30, "cat"]) == [["dog " * 30], ["cat"]] and not dino.prompts([])


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, source, mask",
    [
        (["--detector", "dino"], "caption+dino", False),
        (["--detector", "dino", "--segmenter", "sam2"], "caption+dino+sam2", True),
        (["--segmenter", "sam3"], "caption+sam3", True),
    ],
)
def test_records_get_regions(photos, models, flags, source, mask):
    flags = [*records_in(photos), *placed(models, flags)]
    records, problems = convert(
        photos / "out.jsonl", *flags, "--threshold", 0.001, "--batch-size", 3
    )
    assert [r["id"] for r in records] == [0, 1, 2, "text", 3, 4, 5, 6] and not problems
    given = json.loads((photos / "in.json").read_text())
    assert [r["conversations"] for r in records] == [r["conversations"] for r in given]
    assert "regions" not in records.pop(3)
    for record in records:
        tags, regions = detectors.noun_phrases(told(record)), record["regions"]
        assert bool(regions) == bool(tags) and {r["phrase"] for r in regions} <= set(tags)
        assert all(("rle" in r) == mask and r["source"] == source for r in regions)
        scores = [r["score"] for r in regions]
        assert scores == sorted(scores, reverse=True) and all(0.001 < s <= 1 for s in scores)
        size = Image.open(photos / "images" / record["image"]).size
        labels.region_coverage(regions, size, "crop", (4, 4))  # well formed, and of this image
    highest = max(r["score"] for record in records for r in record["regions"])
    none, _ = convert(photos / "none.jsonl", *flags, "--threshold", min(highest + 0.001, 1))
    assert not any(r.get("regions") for r in none)


def test_a_batch_gives_what_single_images_give(photos, models):
    several = [data.open_image(photos / "images" / f"{i}.png", "") for i in range(3)]
    tags = [["brown dog", "grass"], ["man"], ["cat", "red ball", "dog"]]
    boxes = [[[1, 2, 30, 40]], [], [[5, 5, 50, 20], [0, 0, 9, 9], [60, 3, 80, 30]]]
    dino, sam2, sam3 = opened(
        models,
        (detectors.GroundingDino, "dino"),
        (detectors.Sam2, "sam2"),
        (detectors.Sam3, "sam3"),
    )
    asked = []
    sam2.model.register_forward_pre_hook(
        lambda module, _, given: asked.append(given["input_boxes"][0]), with_kwargs=True
    )
    with torch.inference_mode():
        together, masks = dino(several, tags), sam2(several, boxes)
        found = sam3(several, tags)
        for i, image in enumerate(several):
            assert masks[i].shape == (len(boxes[i]), *image.size[::-1])
            (alone,) = sam2([image], [boxes[i]])
            assert (alone == masks[i]).float().mean() > 0.99 if boxes[i] else len(alone) == 0
            (alone,) = sam3([image], [tags[i]])
            assert {row[0] for row in alone} == set(tags[i]) and len(alone) == len(found[i])
            for a, b in zip(*(sorted(rows, key=lambda r: r[:2]) for rows in (alone, found[i]))):
                assert a[0] == b[0] and a[1] == pytest.approx(b[1], abs=1e-4)
                assert np.allclose(a[2], b[2], atol=0.05)
                assert (a[3] == b[3]).float().mean() > 0.99
        (alone,) = dino(several[:1], tags[:1])
    # the first image is 64 x 48; the model sees a square of 64
    assert asked[0][0].tolist() == pytest.approx([1, 2 * 64 / 48, 30, 40 * 64 / 48])
    # the others' padding is masked, up to what the random model makes of it
    assert len(alone) == len(together[0]) and {row[0] for row in together[2]} <= set(tags[2])


def test_florence_captions_a_folder_and_tags_come_from_it(photos, models, monkeypatch):
    (florence,) = opened(models, (detectors.Florence, "florence"))
    several = [data.open_image(photos / "images" / f"{i}.png", "") for i in range(3)]
    with torch.inference_mode():
        captions = florence(several)
        assert len(captions) == 3 and captions[0] == florence(several[:1])[0]
        assert any(captions) and not any("<" in text for text in captions)
    said = "a red ball on a table"
    monkeypatch.setattr(detectors.Florence, "__call__", lambda self, several: [said] * len(several))
    (photos / "images" / "3.png").write_bytes(b"broken")
    flags = placed(models, ["--tagger", "florence", "--detector", "dino"])
    records, problems = convert(
        photos / "out.jsonl", *folder_of(photos), *flags, "--threshold", 0.001
    )
    assert [r["id"] for r in records] == [f"{i}.png" for i in (0, 1, 2, 4, 5, 6)]
    assert len(problems) == 1 and "3.png" in problems[0]
    for record in records:
        assert told(record) == said and record["regions"]
        assert {r["phrase"] for r in record["regions"]} <= {"red ball", "table"}
        assert record["regions"][0]["source"] == "florence+dino"


def test_tags_of_a_file_and_bfloat16(photos, models):
    file = photos / "tags.txt"
    file.write_text("0.png\tdog | cat\n2.png\tman\n")
    flags = placed(models, ["--detector", "dino", "--segmenter", "sam2"])
    records, problems = convert(
        photos / "out.jsonl",
        *folder_of(photos),
        *flags,
        "--tagger",
        file,
        "--dtype",
        "bfloat16",
        "--threshold",
        0.001,
    )
    assert [r["id"] for r in records] == ["0.png", "2.png"]  # the others have no tag, so no
    text = "\n".join(problems)  # region and no caption
    assert text.count("no caption and no region") == 5
    assert f"image 1.png: no line for 1.png in {file}" in text
    regions = records[0]["regions"]
    assert {r["phrase"] for r in regions} <= {"dog", "cat"} and "rle" in regions[0]


# ---- what fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "needs --detector"),
        (["--segmenter", "sam2"], "needs --detector"),
        (["--segmenter", "sam3", "--detector", "dino"], "needs --detector"),
        (["--detector", "sam2"], "--detector .*: a sam2; expected grounding-dino"),
        (
            ["--detector", "nothing"],
            "--detector .*nothing: cannot be loaded; is it a complete model",
        ),
        (["--detector", "dino", "--tagger", "sam2"], "--tagger .* expected florence2"),
        (["--detector", "dino", "--tagger", "no.txt"], "neither caption nor a file.* cannot be"),
    ],
)
def test_models_of_the_wrong_kind_are_refused(photos, models, flags, message):
    with pytest.raises(InputError, match=message):
        convert(photos / "out.jsonl", *records_in(photos), *placed(models, flags))


@pytest.mark.parametrize(
    "flag, missing",
    [
        ("--detector", "model.safetensors"),
        ("--segmenter", "model.safetensors"),
        ("--detector", "tokenizer.json"),
        ("--tagger", "model.safetensors"),
    ],
)
def test_half_a_model_is_refused(photos, models, flag, missing):
    names = {"--detector": "dino", "--segmenter": "sam2", "--tagger": "florence"}
    shutil.copytree(models / names[flag], photos / "half")
    weights = (photos / "half" / missing).read_bytes()
    (photos / "half" / missing).write_bytes(weights[: len(weights) // 2])
    folders = {name: models / folder for name, folder in names.items()} | {flag: photos / "half"}
    with pytest.raises(InputError, match=f"{flag} .*half: cannot be loaded; is it a complete"):
        convert(
            photos / "out.jsonl",
            *folder_of(photos),
            *(part for pair in folders.items() for part in pair),
        )


class Fake:
    """In the place of the models: fails on images named 2 and on batches with one of them.

    The score tells how many it saw at once.
    """

    error, tags_of = RuntimeError("no such\nshape"), None

    def __init__(self, *arguments):
        pass

    def __call__(self, several, captions, names):
        if "2.png" in names:
            raise self.error
        return [
            (text, [{"phrase": text.split()[0], "bbox": [0, 0, 5, 5], "score": 1 / len(names)}])
            for text in captions
        ]


def test_an_image_that_models_fail_on_and_an_answer_that_is_no_text_are_listed(photos, monkeypatch):
    monkeypatch.setattr(images, "Annotator", Fake)
    records = json.loads((photos / "in.json").read_text())
    regions = [
        {"phrase": "", "bbox": [0, 0, 5, 5]},
        {"phrase": "x", "bbox": [64, 0, 500, 5]},
        {"phrase": "x", "bbox": [0, 0, 5, 5]},
    ]
    records += [
        records[0] | {"id": 7, "image": "6.png", "regions": regions},
        records[0] | {"id": 8, "image": "none.png", "regions": regions[2:]},
    ]
    records[5]["conversations"][1]["value"] = None  # of image 4
    (photos / "in.json").write_text(json.dumps(records))
    made, problems = convert(photos / "out.jsonl", *records_in(photos), "--batch-size", 4)
    assert [r["id"] for r in made] == [0, 1, "text", 3, 5, 6, 7]
    assert made[-1]["regions"] == regions[2:]
    scores = [r["regions"][0].get("score") for r in made if "regions" in r]
    assert scores == [1, 1, 1 / 3, 1 / 3, 1 / 3, None]  # alone; together; as it was
    for own, words in zip(
        problems,
        (
            "record 2: the models fail on it (RuntimeError: no such shape)",
            "record 5: turn 1 is not",
            '"phrase" is missing',
            "outside its 64 x 48",
            "none.png",
        ),
    ):
        assert words in own, own
    assert len(problems) == 5


@pytest.mark.parametrize(
    "error, ends, message",
    [
        (
            torch.OutOfMemoryError("CUDA"),
            InputError,
            "--batch-size 4: out of GPU memory at .*record 0; lower it",
        ),
        (torch.AcceleratorError("device-side assert"), torch.AcceleratorError, "device-side"),
    ],
)
def test_what_is_not_an_image_s_fault_ends_the_run(photos, monkeypatch, error, ends, message):
    monkeypatch.setattr(images, "Annotator", Fake)
    monkeypatch.setattr(Fake, "error", error)
    with pytest.raises(ends, match=message):
        convert(photos / "out.jsonl", *records_in(photos), "--batch-size", 4)


def test_killed_resumed_and_shared_by_two_processes_is_the_same(photos, models):
    """One process, killed before its second and, resumed, before its third batch, then finished by
    two; and an image is missing."""
    flags = [
        *records_in(photos),
        "--segmenter",
        models / "sam3",
        "--threshold",
        0.001,
        "--batch-size",
        2,
    ]
    (photos / "images" / "4.png").unlink()
    records, problems = convert(photos / "whole.jsonl", *flags)
    assert len(records) == 7 and len(problems) == 1
    out, part = photos / "out.jsonl", photos / "out.jsonl.rank-0"
    for expected in (2, 4):
        assert forked(out, flags, dying=(detectors.Sam3, "__call__", 1)) == [-9]
        assert part.read_bytes().count(b"\n") == 1 + expected
    part.write_bytes(part.read_bytes()[:-30])  # and half a batch is lost
    assert forked(out, flags, ranks=2) == [0, 0]
    assert same_files(out, photos / "whole.jsonl") and not part.exists()
