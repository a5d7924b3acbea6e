"""data.py: labels on the right tokens, every record once, clear words about bad files."""

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data
from data import IGNORE, IMAGE_TOKEN
from labels import transform_image, view_box, word_ids
from runtime import InputError

GEOMETRIES = ["pad", "crop", "stretch"]

# ---- tokenizers ----------------------------------------------------------------------------------

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "\n",
    "USER",
    "ASSISTANT",
    ":",
    "user",
    "assistant",
]
WORDS += ["a", "red", "circle", "blue", "what", "is", "it"]
(
    UNK,
    BOS,
    EOS,
    START,
    END,
    BREAK,
    USER,
    ASSISTANT,
    COLON,
    USER_,
    ASSISTANT_,
    A,
    RED,
    CIRCLE,
    BLUE,
    WHAT,
    IS,
    IT,
) = range(18)
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Whole words, colons and line breaks; adds BOS; unknown words are 0."""
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|:|[^\s:]+"), "removed", invert=True)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=WORDS[3:5], **special
    )


@pytest.fixture(scope="module")
def chat_tokenizer():
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|:|[^\s:]+"), "removed", invert=True)
    special = {
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "chat_template": CHATML,
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=WORDS[3:4], **special
    )


@pytest.fixture(scope="module")
def llama_like():
    """Puts a space of its own in front of whatever it encodes, as Llama's tokenizer does."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "d", "o", "g", "s", "▁d", "og", "▁dog"]
    inner = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)},
            [("▁", "d"), ("o", "g"), ("▁d", "og")],
            unk_token="<unk>",
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_words_are_tokenised_as_within_a_sentence(tokenizer, llama_like):
    assert word_ids(tokenizer, "red") == [RED] and word_ids(tokenizer, "zebra") == []
    # the trap: an extra blank token in front
    assert llama_like.encode(" dogs", add_special_tokens=False) == [3, 10, 7]
    assert word_ids(llama_like, "dogs") == [10, 7]
    assert word_ids(llama_like, "go") == [6, 5]  # encoded as a blank, "g", "o"
    learnt = data.tokenize(turns("", "dogs"), llama_like, "v1", 0, 999, "x")[1]
    assert [label for label in learnt if label != IGNORE] == [10, 7, 2]


# ---- conversations -------------------------------------------------------------------------------


def test_plain_labels(tokenizer):
    ids, labels = data.tokenize(
        turns("<image>\nwhat is it", "a red circle"), tokenizer, "plain", 3, 99, "x"
    )
    assert ids == [BOS, -200, -200, -200, A, RED, CIRCLE, EOS]
    assert labels == [-100, -100, -100, -100, A, RED, CIRCLE, EOS]
    assert (
        data.tokenize_prompt([{"from": "human", "value": "what is it"}], tokenizer, "plain", 3)
        == ids[:4]
    )
    assert data.tokenize(turns("hello", "red"), tokenizer, "plain", 0, 99, "x") == (
        [BOS, RED, EOS],
        [-100, RED, EOS],
    )
    assert data.tokenize(turns("", "red <image>"), tokenizer, "plain", 2, 99, "x")[0] == [
        BOS,
        -200,
        -200,
        RED,
        UNK,
        EOS,
    ]  # just text


V1_IDS = [
    BOS,
    UNK,
    UNK,
    UNK,
    A,
    UNK,
    USER_,
    *[UNK] * 6,
    ASSISTANT_,
    *[UNK] * 10,  # the system sentences, mostly unknown words
    USER,
    COLON,
    -200,
    -200,
    BREAK,
    WHAT,
    IS,
    IT,
    ASSISTANT,
    COLON,
    A,
    CIRCLE,
    EOS,
    USER,
    COLON,
    WHAT,
    ASSISTANT,
    COLON,
    BLUE,
    EOS,
]
V1_LABELS = [*[-100] * 34, A, CIRCLE, EOS, *[-100] * 5, BLUE, EOS]


def test_v1_labels(tokenizer):
    ids, labels = data.tokenize(
        turns("<image>\nwhat is it", "a circle", "what", "blue"), tokenizer, "v1", 2, 99, "x"
    )
    assert ids == V1_IDS and labels == V1_LABELS
    # without a marker the image comes first; the other names of the roles
    other = [{"from": "user", "value": "what is it"}, {"from": "assistant", "value": "a circle"}]
    assert data.tokenize(other, tokenizer, "v1", 2, 99, "x") == (V1_IDS[:37], V1_LABELS[:37])
    assert (
        data.tokenize_prompt(
            [{"from": "human", "value": "<image>\nwhat is it"}], tokenizer, "v1", 2
        )
        == V1_IDS[:34]
    )
    # the text itself, blanks included
    segments = data._segments(
        [("user", "Q"), ("assistant", "A1"), ("user", "R")], tokenizer, "v1", "x"
    )
    text = "".join(text for text, _ in segments if isinstance(text, str))
    assert text.endswith("to the user's questions. USER: Q ASSISTANT: A1USER: R ASSISTANT:")


def test_chat_labels(chat_tokenizer, tokenizer):
    ids, labels = data.tokenize(
        turns("what <image> is it", "a circle", "what", "blue"), chat_tokenizer, "chat", 2, 99, "x"
    )
    assert ids == [
        START,
        USER_,
        BREAK,
        -200,
        -200,
        BREAK,
        WHAT,
        IS,
        IT,
        END,
        BREAK,
        START,
        ASSISTANT_,
        BREAK,
        A,
        CIRCLE,
        END,
        BREAK,
        START,
        USER_,
        BREAK,
        WHAT,
        END,
        BREAK,
        START,
        ASSISTANT_,
        BREAK,
        BLUE,
        END,
        BREAK,
    ]
    assert labels == [*[-100] * 14, A, CIRCLE, END, *[-100] * 10, BLUE, END, -100]
    assert (
        data.tokenize_prompt(
            [{"from": "human", "value": "what <image> is it"}], chat_tokenizer, "chat", 2
        )
        == ids[:14]
    )
    with pytest.raises(InputError, match="^rec 7: .*--prompt"):
        data.tokenize(turns("what", "blue"), tokenizer, "chat", 0, 99, "rec 7")


def test_truncation(tokenizer):
    conversation = turns("<image>\nwhat is it", "a circle", "what", "blue")
    assert data.tokenize(conversation, tokenizer, "v1", 2, 36, "x") == (V1_IDS[:36], V1_LABELS[:36])
    assert data.tokenize(conversation, tokenizer, "v1", 2, 35, "x")[1][-1] == A
    for too_short in (34, 27, 1):
        with pytest.raises(InputError, match="^rec 7: .*max_length"):
            data.tokenize(conversation, tokenizer, "v1", 2, too_short, "rec 7")
    late = turns("what", "blue", "<image>", "red")
    for cuts_the_image in (31, 34, 37):  # labels survive, patches of the image do not
        with pytest.raises(InputError, match="max_length"):
            data.tokenize(late, tokenizer, "v1", 5, cuts_the_image, "x")


# ---- images --------------------------------------------------------------------------------------


def half(mode, left, right, **options):
    """An 8 x 4 image of two colours, saved and opened again."""
    image = Image.new(mode, (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 0, 255])
    return image, options


@pytest.mark.parametrize(
    "kind, image, options, left, right",
    [
        ("png", *half("L", 10, 200), (10, 10, 10), (200, 200, 200)),
        ("png", *half("P", 0, 1), (255, 0, 0), (0, 0, 255)),
        ("png", *half("P", 0, 1, transparency=0), (255, 255, 255), (0, 0, 255)),
        ("png", *half("RGBA", (255, 0, 0, 51), (0, 0, 255, 255)), (255, 204, 204), (0, 0, 255)),
        ("png", *half("LA", (0, 0), (77, 255)), (255, 255, 255), (77, 77, 77)),
        ("png", *half("I;16", 257 * 128, 65535), (128, 128, 128), (255, 255, 255)),
        ("png", *half("1", 0, 1), (0, 0, 0), (255, 255, 255)),
        ("tiff", *half("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), (255, 0, 0), (0, 0, 0)),
    ],
    ids=["grey", "palette", "transparent palette", "alpha", "grey alpha", "16 bit", "bits", "cmyk"],
)
def test_image_modes(tmp_path, kind, image, options, left, right):
    image.save(tmp_path / f"image.{kind}", **options)
    opened = data.open_image(tmp_path / f"image.{kind}", "x")
    assert opened.mode == "RGB" and opened.size == (8, 4)
    assert opened.getpixel((1, 1)) == left and opened.getpixel((6, 2)) == right


def test_rotated_jpeg_and_broken_files(tmp_path):
    image, _ = half("RGB", (255, 0, 0), (0, 0, 255))
    image, exif = image.resize((64, 32)), Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn clockwise to view
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    opened = data.open_image(tmp_path / "turned.jpg", "x")
    assert (
        opened.size == (32, 64)
        and opened.getpixel((16, 4))[0] > 200
        and opened.getpixel((16, 60))[2] > 200
    )

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "jpeg")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "missing.jpg"):
        with pytest.raises(InputError) as error:
            data.open_image(tmp_path / name, "f.json: record 7")
        assert re.fullmatch(rf"f\.json: record 7: [^\n]*{name}[^\n]*", str(error.value))


def test_padding_has_the_mean_colour_and_values_are_normalised():
    image = Image.new("RGB", (8, 4), (255, 0, 51))
    x = transform_image(image, 8, "pad", [0.2, 0.4, 0.6], [0.5, 0.25, 0.1])
    assert x.shape == (3, 8, 8) and x.dtype == torch.float32
    assert x[:, :2].abs().max() < 0.03 and x[:, 6:].abs().max() < 0.03
    torch.testing.assert_close(x[:, 3, 3], torch.tensor([1.6, -1.6, -4.0]))
    assert view_box((8, 5), "pad") == (0, -1, 8, 7) and view_box((8, 5), "crop") == (1, 0, 6, 5)
    assert view_box((5, 8), "pad") == (-1, 0, 7, 8) and view_box((5, 8), "crop") == (0, 1, 5, 6)
    assert view_box((8, 5), "pad", 2) == (-1, 0, 9, 5) and view_box((8, 5), "crop", 2) == (
        0,
        0,
        8,
        4,
    )
    with pytest.raises(InputError, match="squash"):
        view_box((8, 5), "squash")


# ---- records, batches, steps ---------------------------------------------------------------------


def record(**changes):
    base = {
        "id": "bad-1",
        "image": "dot.png",
        "conversations": turns("<image>", "a red circle"),
        "regions": [{"phrase": "a red circle", "bbox": [0, 0, 4, 4]}],
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def region(**shape):
    return {"regions": [{"phrase": "grass", "bbox": [0, 0, 1, 1]}, {"phrase": "red", **shape}]}


@pytest.fixture
def load(tmp_path, tokenizer):
    """load(records, **options) -> Records over a folder with one 8 x 4 image, dot.png."""
    Image.new("RGB", (8, 4), "red").save(tmp_path / "dot.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "dot.png").read_bytes()[:50])
    defaults = {
        "image_size": 8,
        "geometry": "stretch",
        "grid": (1, 2),
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "source": "train.jsonl",
    }
    return lambda records, folder=tmp_path, **options: data.Records(
        records, folder, tokenizer, **{**defaults, **options}
    )


@pytest.mark.parametrize(
    "broken, says",
    [
        (record(image=None), "image"),
        (record(image="missing.png", regions=None), "missing.png"),
        (record(image="broken.png"), "broken.png"),
        (record(image="../dot.png"), "'../dot.png' is not a path"),
        (record(image="/dot.png"), "'/dot.png' is not a path"),
        (record(image=7), "7 is not a path"),
        (record(conversations=None), "conversations"),
        (record(conversations=[]), "conversations"),
        (record(conversations=turns("<image>")), "no answer"),
        (record(conversations=turns("<image>", "a")[::-1]), "turn 0"),
        (record(conversations=[{"from": "human", "value": "a"}, "b"]), "turn 1"),
        (
            record(conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]),
            "turn 1",
        ),
        (
            record(conversations=[{"from": [], "value": "a"}, {"from": "gpt", "value": "b"}]),
            "turn 0",
        ),
        (record(conversations=turns("<image> <image>", "a")), "2 <image>"),
        (record(conversations=turns("<image>", "a", "b", "c")), "--prompt"),
        (record(regions={"phrase": "a"}), "regions"),
        (record(regions=["a"]), "regions[0]"),
        (record(**region()), "regions[1]: a region has exactly one"),
        (
            record(**region(bbox=[0, 0, 1, 1], polygon=[[0, 0, 1, 0, 1, 1]])),
            "regions[1]: a region has exactly one",
        ),
        (record(**region(bbox=[0, 0, 1, 1], phrase=None)), 'regions[1]: "phrase"'),
        (record(**region(bbox=[0, 0, 1, 1], phrase=" ")), 'regions[1]: "phrase"'),
        (record(**region(bbox=[3, 0, 3, 1])), "regions[1]: bbox"),
        (record(**region(bbox=[0, 2, 3, 1])), "regions[1]: bbox"),
        (record(**region(bbox=[0, 2, 3])), "regions[1]: bbox"),
        (record(**region(bbox=["0", 0, 3, 1])), "regions[1]: bbox"),
        (record(**region(bbox=[0, 0, 3, float("nan")])), "regions[1]: bbox"),
        (record(**region(bbox=[8, 0, 9.5, 4])), "regions[1]: [8, 0, 9.5, 4] lies outside"),
        (record(**region(bbox=[-1.5, 0, 0, 4])), "regions[1]: [-1.5, 0, 0, 4] lies outside"),
        (record(**region(polygon=[[0, 0, 4, 4]])), "regions[1]: a polygon's ring"),
        (record(**region(polygon=[0, 0, 4, 4, 0, 4])), "regions[1]: a polygon"),
        (record(**region(polygon=[[0, 4, 4, 5, 0, 6]])), "regions[1]: [0, 4, 4, 6] lies outside"),
        (record(conversations=turns("<image>", " ")), "turn 1, the answer, is empty"),
        (record(conversations=turns("<image>", "a \ud83d")), "half of a surrogate pair"),
        (record(**region(polygon=[[0, 0, 4, 4, 0, "4"]])), "regions[1]: polygon"),
        (record(**region(rle=[1])), "regions[1]: an rle"),
        (record(**region(rle={"size": 32, "counts": [32]})), "regions[1]: an rle"),
        (record(**region(rle={"size": [8, 4], "counts": [32]})), "regions[1]: rle size"),
        (record(**region(rle={"size": [4, 8], "counts": [31]})), "regions[1]: rle counts"),
        (record(**region(rle={"size": [4, 8], "counts": [40, -8]})), "regions[1]: rle counts"),
        (record(**region(rle={"size": [4, 8], "counts": "é"})), "regions[1]: rle counts"),
        (record(**region(rle={"size": [4, 8], "counts": "P"})), "regions[1]: rle counts"),
    ],
)
def test_broken_records_are_named(load, broken, says):
    with pytest.raises(InputError) as error:
        load([record(id="good"), broken])[1]
    message = str(error.value)
    assert (
        message.startswith("train.jsonl: record bad-1") and says in message and "\n" not in message
    )


def test_settings_are_checked_before_the_first_step(load, tmp_path):
    for options, says in [
        ({"geometry": "squash"}, "squash"),
        ({"folder": tmp_path / "none"}, "--image-dir"),
    ]:
        with pytest.raises(InputError, match=says):
            load([record()], **options)
    with pytest.raises(InputError, match="record bad-1: .*no image"):  # a marker without its image
        load([record(image=None, regions=None)], require_image=False)
    with pytest.raises(InputError, match="record 0"):  # no id: its place in the file
        load([record(id=None, conversations=None)])


def test_batches(load):
    text = {"id": 7, "conversations": turns("what is it", "it is a red circle")}
    many = record(
        id="many",
        regions=[{"phrase": "blue it red circle", "bbox": [-1, 0, 8, 4]}],
        conversations=turns("", "a"),
    )
    dataset = load([record(), text, many], require_image=False)
    batch = data.collate([dataset[i] for i in range(3)], pad_id=99)
    assert batch["ids"] == ["bad-1", "7", "many"]
    assert batch["input_ids"].tolist() == [
        [BOS, IMAGE_TOKEN, IMAGE_TOKEN, A, RED, CIRCLE, EOS],
        [BOS, IT, IS, A, RED, CIRCLE, EOS],
        [BOS, IMAGE_TOKEN, IMAGE_TOKEN, A, EOS, 99, 99],
    ]
    assert batch["labels"][2].tolist() == [IGNORE, IGNORE, IGNORE, A, EOS, IGNORE, IGNORE]
    assert batch["places"].tolist() == [1, 2, 15, 16]
    assert (
        batch["first_label"] == 1 and data.collate([dataset[0], dataset[2]], 99)["first_label"] == 3
    )
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and batch["pixel_values"][
        0, :, 0, 0
    ].tolist() == [1, -1, -1]
    assert batch["patch_ids"].tolist() == [
        [[RED, CIRCLE, 0], [0, 0, 0]],
        [[BLUE, RED, CIRCLE]] * 2,
    ]  # "it" is a stop word
    torch.testing.assert_close(
        batch["patch_weights"], torch.tensor([[[0.5, 0.5, 0], [0, 0, 0]], [[1 / 3] * 3] * 2])
    )
    assert len(data.collate([dataset[1]], 99)["pixel_values"]) == 0


def test_a_workers_error_arrives(load):
    loader = torch.utils.data.DataLoader(
        load([record(image="broken.png")]), num_workers=1, collate_fn=lambda samples: samples
    )
    with pytest.raises(
        InputError, match="train.jsonl: record bad-1: cannot read the image .*broken.png"
    ):
        next(iter(loader))


@pytest.mark.parametrize("length", [1, 7, 24, 50])
def test_sampler(length):
    steps = 3 * length
    alone = [data.StepSampler(length, 8, seed=3).indices(step) for step in range(steps)]
    for world in (2, 4):
        ranks = [
            data.StepSampler(length, 8, seed=3, rank=rank, world=world) for rank in range(world)
        ]
        assert all(len(rank.indices(0)) == 8 // world for rank in ranks)
        assert [[i for rank in ranks for i in rank.indices(step)] for step in range(steps)] == alone
    stream = [i for batch in alone for i in batch]
    epochs = [stream[i : i + length] for i in range(0, len(stream), length)]
    assert len(epochs) == 24 and all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert data.StepSampler(length, 8, seed=3).indices(steps - 1) == alone[-1]  # resuming
    if length > 1:
        assert len(set(map(tuple, epochs))) > 1  # a new order in each epoch, and for each seed
        assert alone != [data.StepSampler(length, 8, seed=4).indices(step) for step in range(steps)]


@pytest.mark.parametrize("arguments", [(0, 8, 0), (5, 0, 0), (5, 8, 0, 0, 3), (5, 8, -1)])
def test_sampler_refuses(arguments):
    with pytest.raises(InputError):
        data.StepSampler(*arguments)


# ---- files ---------------------------------------------------------------------------------------


def test_read_records_and_join_regions(tmp_path):
    records, boxes = (
        [{"id": 1}, {"id": "2"}, {"id": "c"}, {"x": "é"}],
        [{"phrase": "a", "bbox": [0, 0, 1, 1]}],
    )
    (tmp_path / "r.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "r.jsonl").write_text(
        "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n", encoding="utf-8-sig"
    )
    (tmp_path / "regions.jsonl").write_text(
        "\n".join(json.dumps({"id": id, "regions": boxes}) for id in ("1", 2))
    )
    for name in ("r.json", "r.jsonl"):
        assert data.read_records(tmp_path / name) == records
        joined = data.read_records(str(tmp_path / name), tmp_path / "regions.jsonl")
        assert joined == [
            {"id": 1, "regions": boxes},
            {"id": "2", "regions": boxes},
            {"id": "c"},
            {"x": "é"},
        ]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.json", None, "cannot read"),
        ("a.txt", b"[]", ".jsonl"),
        ("a.json", b'[{"id": 1},\n{]', "line 2"),
        ("a.jsonl", b'{"id": 1}\n\n{"id": 2', "line 3"),
        ("a.json", b'{"id": 1}', "list"),
        ("a.json", b'[{"id": 1}, 2]', "record 1"),
        ("a.jsonl", b'{"id": 1}\n\n[]', "line 3"),
        ("a.json", b'[{"id": "\xff"}]', "UTF-8"),
        ("a.jsonl", b"\n", "no records"),
    ],
)
def test_unreadable_files(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        data.read_records(tmp_path / name)
    assert (
        str(error.value).startswith(str(tmp_path / name))
        and says in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    "entries, says",
    [
        ([{"id": "other", "regions": []}], "none of its ids"),
        ([{"id": "a", "regions": []}] * 2, "twice"),
        ([{"id": "a"}], "entry 0"),
    ],
)
def test_regions_that_do_not_fit(tmp_path, entries, says):
    (tmp_path / "r.json").write_text('[{"id": "a"}]')
    (tmp_path / "regions.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=says):
        data.read_records(tmp_path / "r.json", tmp_path / "regions.json")
