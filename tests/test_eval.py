"""eval.py against coco-caption's own code and worked examples; a run with known answers; and real
checkpoints from a user's shell."""

import functools
import json
import random
import re

import numpy as np
import pytest
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

import eval as evaluation
import pretrain
from data import tokenize_prompt
from model import PatchAlignedModel, save_checkpoint
from runtime import InputError

# ---- captions ------------------------------------------------------------------------------------


def test_words():
    text = "A man-made \"dog's\" T-shirt isn't 3.5 m (wide): it can't; he’ll see 1,000 & more..."
    assert (
        evaluation.words(text)
        == "a man-made dog 's t-shirt is n't 3.5 m wide it ca n't he 'll see 1,000 more".split()
    )
    assert evaluation.words(" ?! ") == []


def corpus(seed, references, longest=14):
    """Random captions of up to `longest` words, and up to `references` references of each. Words
    are few, so longer n-grams match too; some captions are empty."""
    rng = random.Random(seed)
    vocabulary = "a the red dog cat sits on grass near water .".split()

    def sentence(least, most=14):
        return " ".join(
            rng.choice(vocabulary[:-1]) for _ in range(rng.randint(least, most))
        ).capitalize() + rng.choice([".", "!", ""])

    several = [[sentence(1) for _ in range(rng.randint(1, references))] for _ in range(30)]
    return [
        rng.choice([sentence(0, longest), several[i][0], "", "red"]) for i in range(30)
    ], several


@pytest.mark.parametrize(
    "seed, references, longest", [(0, 1, 14), (1, 5, 14), (2, 5, 14), (3, 2, 60)]
)
def test_caption_scores_are_those_of_coco_caption_on_the_same_words(seed, references, longest):
    candidates, several = corpus(seed, references, longest)
    res = {i: [" ".join(evaluation.words(c))] for i, c in enumerate(candidates)}
    gts = {i: [" ".join(evaluation.words(r)) for r in refs] for i, refs in enumerate(several)}
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    (rouge, rouges), (cider, ciders) = (
        scorer.compute_score(gts, res) for scorer in (Rouge(), Cider())
    )
    expected = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)} | {
        "ROUGE-L": rouge,
        "CIDEr": cider,
    }
    assert min(expected.values()) > 0.05
    assert evaluation.caption_scores(candidates, several) == pytest.approx(expected, abs=1e-8)
    statistics = evaluation.caption_statistics(candidates, several)
    np.testing.assert_allclose(statistics[:, :2], np.stack([ciders, rouges], 1), atol=1e-9)


def test_caption_scores_of_nothing_and_of_everything():
    several = [["A red dog on the grass."], ["The cat sits near the water!"]]
    perfect = evaluation.caption_scores(
        ["a red dog on the grass", "the cat sits near the water"], several
    )
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1.0) | {"CIDEr": 10.0}, abs=1e-6)
    assert list(perfect) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    nothing = evaluation.caption_scores(["", "?"], several)
    assert nothing == pytest.approx(dict.fromkeys(nothing, 0.0), abs=1e-12)
    for bad in (([], []), (["a"], [["a"], ["b"]]), (["a"], [[]])):
        with pytest.raises(InputError, match="one or more references"):
            evaluation.caption_scores(*bad)


# ---- questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "matching, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)]
)
def test_vqa_accuracy_of_ten_answers(matching, accuracy):
    """(3 of 10: without one of the three, 2 / 3 three times, else 1: (3 * 2 / 3 + 7) / 10 =
    0.9.)"""
    assert evaluation.vqa_accuracy(
        "Red", ["red"] * matching + ["blue"] * (10 - matching)
    ) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "prediction, answer, same",
    [
        ("Yes.", "yes", 1),
        ("yes\n", "yes", 1),
        ("the two dogs", "2 dogs", 1),
        ("none", "0", 1),
        ("An apple", "apple", 1),
        ("dont know", "don't know", 1),
        ("couldnt've", "couldn't've", 1),
        ("couldn'tve", "couldn't've", 1),
        ("cant", "can't", 1),
        ("yes/no", "yes no", 1),
        ("yes/ no", "yes no", 1),
        ("red-ish- blue", "redish blue", 1),
        ("half-way", "half way", 1),
        ("half- way", "half way", 1),
        ("blue-green , red", "bluegreen red", 0),
        ("(left)", "left", 1),
        ("2,000", "2000", 1),
        ("2,000 red-ish", "2000 redish", 1),
        ("3.5", "35", 0),
        ("3.5", "3.5", 1),
        ("5.", "5", 1),
        ("let's go", "lets go", 0),
        ("somebody'd", "somebodyd", 1),
        ("red", "blue", 0),
        ("", "red", 0),
        ("dog", "dogs", 0),
    ],
)
def test_vqa_accuracy_of_one_answer_after_the_official_normalisation(prediction, answer, same):
    assert (
        evaluation.vqa_accuracy(prediction, answer)
        == evaluation.vqa_accuracy(prediction, [answer])
        == same
    )


def test_the_official_script_normalises_only_where_answers_differ():
    assert evaluation.vqa_accuracy("Yes.", ["yes"] * 10) == 1
    assert evaluation.vqa_accuracy("Yes.", ["yes"] * 10, official=True) == 0
    assert evaluation.vqa_accuracy(" yes\t", ["yes"] * 10, official=True) == 1
    assert evaluation.vqa_accuracy("Yes.", ["yes"] * 9 + ["no"], official=True) == 1
    with pytest.raises(InputError, match="none"):
        evaluation.vqa_accuracy("yes", [])


# ---- boxes and letters ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, box",
    [
        ("[0.33, 0.54, 0.76, 0.97]", [0.33, 0.54, 0.76, 0.97]),
        ("It is at (0, .5, 1, 1.0).", [0, 0.5, 1, 1]),
        ("0.1 0.2 0.3 0.4", [0.1, 0.2, 0.3, 0.4]),
        ("The 2 dogs: [0.1, 0.2, 0.3, 0.4]", [0.1, 0.2, 0.3, 0.4]),
        ("0.1, 0.2, 0.3, 0.4.", [0.1, 0.2, 0.3, 0.4]),
        ("[0.1, 0.2, 0.3]", None),
        ("[12, 40, 60, 90]", None),
        ("[-0.1, 0.2, 0.3, 0.4]", None),
        ("a red dog", None),
        ("", None),
    ],
)
def test_parse_box(text, box):
    assert evaluation.parse_box(text) == box


def test_iou():
    assert evaluation.iou([0, 0, 2, 2], [1, 0, 3, 2]) == pytest.approx(1 / 3)
    assert evaluation.iou([0, 0, 4, 2], [1, 1, 2, 2]) == pytest.approx(1 / 8)
    for empty in ([5, 5, 6, 6], [1, 0, 1, 2], [2, 2, 0, 0], [0, 1, 2, 0.5]):
        assert evaluation.iou(empty, [0, 0, 2, 2]) == 0


def test_boxes_of_both_frames():
    wide = 200, 100  # pad: a square from y = -50 to 150; crop: from x = 50 to 150
    assert evaluation.box_in_pixels([0.1, 0.2, 0.5, 1], wide, "image", "pad") == pytest.approx(
        [20, 20, 100, 100]
    )
    assert evaluation.box_in_pixels([0.1, 0.2, 0.5, 1], wide, "square", "pad") == pytest.approx(
        [20, -10, 100, 150]
    )
    assert evaluation.box_in_pixels([0.1, 0.2, 0.5, 1], wide, "square", "crop") == pytest.approx(
        [60, 20, 100, 100]
    )
    assert evaluation.box_in_pixels([0.1, 0.2, 0.5, 1], wide, "square", "stretch") == pytest.approx(
        [20, 20, 100, 100]
    )


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B) the red one", "B"),
        ("b: red", "B"),
        ("The answer is B", "B"),
        ("The correct answer is: (c).", "C"),
        ("option A", "A"),
        ("It must be (D), I think", "D"),
        ("b, since it is red", "B"),
        ("A", "A"),
        ("A dog", None),
        ("I do not know the answers.", None),
        ("I think so", None),
        ("The answer is a dog", None),
        ("red", None),
        ("", None),
    ],
)
def test_parse_choice(text, letter):
    assert evaluation.parse_choice(text) == letter


# ---- bootstrap -----------------------------------------------------------------------------------


def test_bootstrap_draws_images_with_all_their_records():
    """200 records right or wrong by image: the deviation is that of 20 images, sqrt(p (1 - p) /
    20), not that of 200 records."""
    right = np.repeat(np.arange(20) < 8, 10).astype(float)
    statistics, images = np.stack([right, np.ones(200)], 1), [f"image{i // 10}" for i in range(200)]
    score = evaluation.mean(0)
    draws = score(evaluation.bootstrap(statistics, images, 4000, seed=0))
    assert draws.mean() == pytest.approx(0.4, abs=0.01) and draws.std() == pytest.approx(
        (0.4 * 0.6 / 20) ** 0.5, rel=0.05
    )
    alone = score(evaluation.bootstrap(statistics, list(range(200)), 4000, seed=0))
    assert alone.std() == pytest.approx((0.4 * 0.6 / 200) ** 0.5, rel=0.05)
    ends = evaluation.interval(draws)
    assert [ends["low"], ends["high"]] == pytest.approx(
        np.percentile(draws, [2.5, 97.5]), abs=1e-9
    ) and ends["low"] < 0.25
    again = evaluation.bootstrap(statistics, images, 4000, seed=0)
    assert np.array_equal(score(again), draws) and not np.array_equal(
        score(evaluation.bootstrap(statistics, images, 4000, seed=1)), draws
    )
    order = np.random.default_rng(0).permutation(200)
    assert np.array_equal(
        evaluation.bootstrap(statistics[order], [images[i] for i in order], 4000, seed=0), again
    )


def test_bleu_of_a_draw_is_that_of_the_drawn_captions():
    candidates, several = corpus(5, 3)
    sums = evaluation.bootstrap(
        evaluation.caption_statistics(candidates, several), range(30), 3, seed=7
    )
    rng = np.random.default_rng(7)
    for row in sums:
        drawn = rng.integers(30, size=30)
        expected = evaluation.caption_scores(
            [candidates[i] for i in drawn], [several[i] for i in drawn]
        )
        for n in (1, 2, 3, 4):
            assert evaluation.bleu(n)(row) == pytest.approx(expected[f"BLEU-{n}"], abs=1e-12)


# ---- a run with known answers --------------------------------------------------------------------

VQA10 = ["red"] * 2 + ["blue"] * 8
# task, kind, answer, prediction, the record's score, whether it can be read; image i is 200 x 100
MIXED = [
    (
        "refer",
        None,
        [100, 20, 200.5, 100],
        "[0.5, 0.2, 1.0, 1.0]",
        1.0,
        True,
    ),  # ends where the image ends
    (
        "refer",
        None,
        [20, 70, 100, 100],
        "[0.1, 0.6, 0.5, 0.75]",
        5 / 40,
        True,
    ),  # 60 .. 75 high; of the square: 70 .. 100
    ("refer", None, [20, 20, 100, 100], "[0.5, 0.5, 0.4, 0.4]", 1 / 32, True),  # inverted
    ("refer", None, [20, 20, 100, 100], "somewhere", 0.0, False),
    ("vqa", "color", VQA10, "red", 0.6, True),
    ("vqa", "color", "red", "red", 1.0, True),
    ("vqa", "number", "2", "Two", 1.0, True),
    ("vqa", "number", "2", "", 0.0, False),
    ("choice", None, "B", "b.", 1.0, True),
    ("choice", None, "C", "It is red", 0.0, False),
    ("caption", None, ["A red dog.", "a cat"], "a red dog", None, True),
    ("caption", None, "the blue water", "", 0.0, False),
]
ANSWERED = {}  # prompt -> (prediction, grey of its image)


def scripted(model, prompts, pixel_values, max_new_tokens):
    """`generate` of a model that knows ANSWERED by heart; each image must be that of its prompt."""
    assert len(prompts) <= 5 and len(pixel_values) == len(prompts)
    for prompt, image in zip(prompts, pixel_values):
        middle = image[0, image.shape[1] // 2].mean() * model.image_std[0] + model.image_mean[0]
        assert middle.item() == pytest.approx(ANSWERED[tuple(prompt)][1] / 255, abs=0.01)
    return [ANSWERED[tuple(prompt)][0] for prompt in prompts]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A checkpoint of stage sft with an untrained projector, prompt v1 and padded images."""
    path = tmp_path_factory.mktemp("sft") / "ckpt.pt"
    flags = pretrain.Args()
    model = PatchAlignedModel(
        {name: getattr(flags, name) for name in pretrain.CONFIG}
        | {"prompt": "v1", "geometry": "pad"}
    )
    save_checkpoint(path, model, "sft", {})
    return path, model


def write_records(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def mixed(sft, tmp_path):
    """A file of all tasks, two records to an image, and ANSWERED; questions have different lengths,
    so batches mix their order."""
    (tmp_path / "images").mkdir()
    records = []
    for i, (task, kind, answer, prediction, _, _) in enumerate(MIXED):
        name, grey = f"{i // 2}.png", 20 + 10 * (i // 2)
        Image.new("RGB", (200, 100), (grey,) * 3).save(tmp_path / "images" / name)
        turns = [
            {"from": "human", "value": "red " * ((5 * i) % 12 + 1)},
            {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "blue"},
            {"from": "gpt", "value": "it does not matter"},
        ]
        records.append(
            {
                "id": f"r{i}",
                "image": name,
                "conversations": turns,
                "task": task,
                "answer": answer,
                "kind": kind,
            }
        )
        prompt = tokenize_prompt(
            turns[:-1], sft[1].tokenizer, "v1", sft[1].grid[0] * sft[1].grid[1]
        )
        ANSWERED[tuple(prompt)] = prediction, grey
    return write_records(tmp_path / "mixed.jsonl", records)


def test_a_file_of_all_tasks(sft, mixed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PatchAlignedModel, "generate", scripted)
    args = evaluation.Args([str(sft[0])], data=[mixed], out=str(tmp_path / "out"), batch_size=5)
    evaluation.main(args)
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    lines = [
        json.loads(line)
        for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    ]

    assert [line["id"] for line in lines] == [f"r{i}" for i in range(len(MIXED))]
    for line, (task, kind, answer, prediction, score, parsed) in zip(lines, MIXED):
        score = line["score"] if score is None else score
        assert line == {
            "id": line["id"],
            "file": "mixed",
            "task": task,
            "kind": kind,
            "prediction": prediction,
            "answer": answer,
            "score": pytest.approx(score),
            "parsed": parsed,
        }
    captions = evaluation.caption_scores(
        ["a red dog", ""], [["A red dog.", "a cat"], ["the blue water"]]
    )
    values = {
        "mIoU": (1 + 5 / 40 + 1 / 32) / 4,
        "Acc@0.5": 1 / 4,
        "mIoU (square)": (80 / 160 + 1 + 1 / 16) / 4,
        "Acc@0.5 (square)": 2 / 4,
        "accuracy": 2.6 / 4,
        "exact": 2 / 4,
        "accuracy/color": 0.8,
        "exact/color": 1,
        "accuracy/number": 0.5,
        "exact/number": 0,
        "choice": 0.5,
        **captions,
    }
    assert {key: score["value"] for key, score in result["scores"].items()} == pytest.approx(
        {f"mixed/{key}": value for key, value in values.items()}
    )
    assert all(
        score["low"] <= score["value"] <= score["high"] for score in result["scores"].values()
    )
    assert result["scores"]["mixed/mIoU"]["low"] < result["scores"]["mixed/mIoU"]["high"]
    assert {
        score["n"] for key, score in result["scores"].items() if "color" in key or "choice" in key
    } == {2}
    assert (result["checkpoint"], result["stage"]) == (
        str(sft[0]),
        "sft",
    ) and "versus" not in result
    assert (result["records"], result["unread"]) == ({"mixed": 12}, {"mixed": 4})
    printed = capsys.readouterr().out
    assert re.search(r"mixed/accuracy/color +2 +0\.800 \[", printed) and re.search(
        r"unread +4 of 12", printed
    )
    assert printed.splitlines()[-1].endswith(f"next: python probe.py {sft[0]}")


def test_checkpoints_are_compared_on_the_same_draws(sft, mixed, tmp_path, monkeypatch, capsys):
    """A model that knows, one that says nothing, and one that says what the first does: differences
    from the first, 0 in every draw for the last; where the first is right at least as often in
    every draw, its lead is never above 0."""
    paths, load = (
        [tmp_path / name / "ckpt.pt" for name in ("first", "silent", "same")],
        evaluation.load_checkpoint,
    )

    def loaded(path, *options, **named):
        model, checkpoint = load(path, *options, **named)
        speaks = (
            scripted
            if "silent" not in str(path)
            else lambda model, prompts, pixels, tokens: [""] * len(prompts)
        )
        monkeypatch.setattr(model, "generate", functools.partial(speaks, model))
        return model, checkpoint

    monkeypatch.setattr(evaluation, "load_checkpoint", loaded)
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(sft[0].read_bytes())
    evaluation.main(evaluation.Args([str(p) for p in paths], data=[mixed], batch_size=5))
    first, silent, same = (json.loads((p.parent / "eval.json").read_text()) for p in paths)
    assert first["scores"] == same["scores"] and same["versus"]["checkpoint"] == silent["versus"][
        "checkpoint"
    ] == str(paths[0])
    assert all(
        d == {"difference": 0, "low": 0, "high": 0} for d in same["versus"]["scores"].values()
    )
    assert same["versus"]["scores"].keys() == same["scores"].keys()
    assert all(score["value"] == pytest.approx(0, abs=1e-9) for score in silent["scores"].values())
    for key, d in silent["versus"]["scores"].items():
        assert (
            d["difference"] == pytest.approx(-first["scores"][key]["value"], abs=1e-9)
            and d["low"] <= d["difference"] <= d["high"] <= 0
        )
        assert d["low"] == pytest.approx(-first["scores"][key]["high"], abs=1e-9)
    assert silent["unread"] == {"mixed": 12} and same["unread"] == {"mixed": 4}
    assert re.search("silent - first .*same - first", capsys.readouterr().out.splitlines()[1])


def test_the_frame_of_boxes_is_a_flag_and_a_limit_is_spread(sft, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(PatchAlignedModel, "generate", scripted)
    evaluation.main(
        evaluation.Args(
            [str(sft[0])],
            data=[mixed],
            out=str(tmp_path),
            batch_size=5,
            box_frame="square",
            limit=6,
        )
    )
    result = json.loads((tmp_path / "eval.json").read_text())
    assert (
        result["records"] == {"mixed": 6} and result["scores"]["mixed/mIoU"]["n"] == 2
    )  # r0 and r2 of r0, r2, .., r10
    scores = result["scores"]
    assert scores["mixed/mIoU (image)"]["value"] == pytest.approx((1 + 1 / 32) / 2)
    assert scores["mixed/mIoU"]["value"] == pytest.approx((1 / 2 + 1 / 16) / 2)


# ---- bad input -----------------------------------------------------------------------------------


def turns(*said):
    return [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 4, said)]


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            {"task": "segment"},
            "record r1: \"task\" is 'segment'; choose one of caption, refer, vqa, choice",
        ),
        ({"task": ["vqa"]}, "record r1: \"task\" is ['vqa']; choose"),
        ({"task": "vqa"}, 'record r1: "answer" null does not match task vqa: expected a text'),
        (
            {"task": "vqa", "answer": ["red", 3]},
            'record r1: "answer" ["red", 3] does not match task vqa: expected a text, or a list',
        ),
        (
            {"task": "choice", "answer": "red"},
            'record r1: "answer" "red" does not match task choice: expected one letter',
        ),
        (
            {"task": "refer", "answer": "red"},
            'record r1: "answer" "red" does not match task refer: expected a box',
        ),
        (
            {"task": "refer", "answer": [9, 0, 3, 4]},
            'record r1: "answer" [9, 0, 3, 4] does not match task refer: expected a box',
        ),
        (
            {"task": "refer", "answer": [40, 0, 42, 20]},
            "record r1: answer: [40, 0, 42, 20] lies outside its 40 x 20 image",
        ),
        (
            {"task": "refer", "answer": [0, 0, 0.5, 1]},
            "record r1: answer: [0, 0, 0.5, 1] looks divided by the image size",
        ),
        (
            {"task": "caption", "answer": []},
            'record r1: "answer" [] does not match task caption: expected a text',
        ),
        ({"answer": "?"}, 'record r1: "answer" "?" does not match task caption'),
        ({"conversations": []}, 'record r1: "conversations" is missing'),
        (
            {"conversations": turns("a", "b", "c", "d")},
            'record r1: "task" is missing; choose one of',
        ),
        (
            {"image": None, "task": "refer", "answer": [0, 0, 4, 4]},
            'record r1: "image" is missing, which task refer is about',
        ),
        ({"image": "gone.png"}, "record r1: there is no image"),
        ({"image": "../x.png"}, "record r1: image '../x.png' is not a path inside"),
    ],
)
def test_bad_records_are_one_line_that_names_them(change, expected, tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "x.png")
    record = {
        "id": "r1",
        "image": "x.png",
        "conversations": turns("Describe the image.", "a red dog"),
    }
    fine = record | {"id": "r0", "task": "refer", "answer": [-1, 0, 41, 20.5]}
    path = write_records(tmp_path / "bad.jsonl", [fine, record | change])
    with pytest.raises(InputError) as error:
        evaluation.read_items([path], tmp_path, 0)
    assert str(error.value).startswith(f"{path}: {expected}") and "\n" not in str(error.value)


def test_what_a_record_may_leave_out(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "x.png")
    records = [
        {"image": "x.png", "conversations": turns("Describe the image.", "a red dog")},
        {
            "conversations": turns("What is red?", "a dog"),
            "task": "vqa",
            "answer": "a dog",
            "kind": 3,
        },
    ]
    caption, text, again = evaluation.read_items(
        [write_records(tmp_path / "few.jsonl", [*records, records[0]])], tmp_path, 0
    )
    assert again["unit"] == caption["unit"] and again["id"] == "2"
    assert (caption["task"], caption["answer"], caption["id"]) == ("caption", "a red dog", "0")
    assert (text["image"], text["kind"]) == (None, "3") and text["unit"] != caption["unit"]
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="two files need two names"):
        evaluation.read_items(
            [tmp_path / "few.jsonl", tmp_path / "other" / "few.jsonl"], tmp_path, 0
        )
    (tmp_path / "empty.jsonl").write_text("\n")
    for path, reason in (
        ("gone.jsonl", "cannot read the file"),
        ("empty.jsonl", "holds no records"),
    ):
        with pytest.raises(InputError, match=f"{path}: {reason}"):
            evaluation.read_items([tmp_path / path], tmp_path, 0)


# ---- from a user's shell -------------------------------------------------------------------------


def test_real_checkpoints(here, world, sft, tmp_path):
    """Stage 1 captions and refuses questions; stage 2 answers all tasks, with and without an image;
    the two side by side."""
    train = [
        "--data",
        world / "train.jsonl",
        "--image-dir",
        world / "images",
        "--steps",
        0,
        "--batch-size",
        8,
    ]
    done = here("pretrain.py", *train, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    first, short = tmp_path / "ckpt.pt", ["--max-new-tokens", 8]
    done = here(
        "eval.py",
        first,
        sft[0],
        "--data",
        world / "test.jsonl",
        "--out",
        tmp_path / "both",
        "--limit",
        4,
        *short,
    )
    assert done.returncode == 0, done.stderr
    names = [first.parent.name, sft[0].parent.name]
    both = [json.loads((tmp_path / "both" / f"eval-{name}.json").read_text()) for name in names]
    assert [b["stage"] for b in both] == ["pretrain", "sft"] and both[1]["versus"][
        "scores"
    ].keys() == both[0]["scores"].keys()
    assert both[0]["records"] == {"test": 4} and both[0]["scores"].keys() == {
        f"test/{m}" for m in evaluation.CAPTION
    }
    assert done.stdout.splitlines()[-1].endswith(
        f"next: look at {tmp_path / 'both' / f'predictions-{names[1]}.jsonl'}"
    )

    done = here("eval.py", first, "--data", world / "test_vqa.jsonl", *short)
    said = f"error: {first}: this is a checkpoint of stage pretrain, which only captions, "
    expected = rf"{said}.* run torchrun sft.py {first} first .*\n"
    assert done.returncode == 2 and re.fullmatch(expected, done.stderr), done.stderr
    text = write_records(
        tmp_path / "text.jsonl",
        [{"conversations": turns("What is 1 + 1?", "B"), "task": "choice", "answer": "B"}] * 2,
    )
    files = [world / "test_vqa.jsonl", world / "test_refer.jsonl", text]
    done = here(
        "eval.py",
        sft[0],
        "--data",
        *files,
        "--image-dir",
        world / "images",
        "--limit",
        5,
        "--out",
        tmp_path / "sft",
        *short,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "sft" / "eval.json").read_text())
    assert result["records"] == {"test_vqa": 5, "test_refer": 5, "text": 2}
    assert {
        "test_vqa/accuracy",
        "test_vqa/exact",
        "test_refer/mIoU",
        "test_refer/Acc@0.5",
        "text/choice",
    } <= result["scores"].keys()
    assert len((tmp_path / "sft" / "predictions.jsonl").read_text().splitlines()) == 12


def test_blind_is_the_score_on_grey_images(here, world, sft, tmp_path):
    for image in (world / "images").glob("test*"):
        (tmp_path / "grey").mkdir(exist_ok=True)
        with Image.open(image) as seen:
            Image.new("RGB", seen.size, "grey").save(tmp_path / "grey" / image.name)
    scores = []
    for images, flags in ((world / "images", ["--blind"]), (tmp_path / "grey", [])):
        done = here(
            *["eval.py", sft[0], "--data", world / "test.jsonl", world / "test_refer.jsonl"],
            *["--image-dir", images, "--max-new-tokens", 8, "--out", tmp_path, *flags],
        )
        assert done.returncode == 0 and ("(blind " in done.stdout) == bool(flags), done.stderr
        scores.append(json.loads((tmp_path / "eval.json").read_text())["scores"])
    assert {k: s["blind"] for k, s in scores[0].items()} == {
        k: s["value"] for k, s in scores[1].items()
    }
    assert scores[0]["test/CIDEr"]["blind"] != scores[0]["test/CIDEr"]["value"]
