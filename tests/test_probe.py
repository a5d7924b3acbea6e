"""probe.py against closed forms and worked examples, and on a model whose answers are known."""

import base64
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import probe
import runtime
from extras import page, picture


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- entropy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "width"), [(5, 11), (11, 11)])
def test_entropy_of_orthogonal_rows_is_ln_n_whatever_their_lengths(n, width):
    rows = torch.linalg.qr(random(width, width))[0][:n] * torch.arange(1, n + 1)[:, None]
    more = torch.cat([rows, -3 * rows, torch.zeros(2, width)])
    assert probe.von_neumann_entropy(rows) == pytest.approx(math.log(n), abs=1e-12)
    assert probe.von_neumann_entropy(more) == pytest.approx(math.log(n), abs=1e-12)


@pytest.mark.parametrize("width", [3, 40])  # covariance and Gram
def test_entropy_of_parallel_rows_of_two_directions_and_of_none(width):
    parallel = random(7, 1) * random(1, width)
    for rows in (parallel, parallel[:1]):
        assert probe.von_neumann_entropy(rows) == pytest.approx(0, abs=1e-12)
    assert probe.von_neumann_entropy(torch.zeros(7, width)) == 0
    rows = torch.zeros(10, width)
    rows[:3, 0], rows[3:, 1] = 2.0, 5.0
    binary = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert probe.von_neumann_entropy(rows) == pytest.approx(binary, abs=1e-9)


def test_entropy_does_not_depend_on_the_side_or_the_chunks(monkeypatch):
    rows = random(37, 23)
    s = torch.linalg.svdvals(F.normalize(rows, dim=1)).square() / 37
    expected = pytest.approx(-(s * s.log()).sum().item(), abs=1e-10)
    assert probe.von_neumann_entropy(rows) == expected
    assert probe.von_neumann_entropy(F.pad(rows, (0, 50))) == expected
    monkeypatch.setattr(probe, "CHUNK", 1000)
    assert probe.von_neumann_entropy(rows) == expected


def test_entropies_per_image_pooled_and_without_the_mean():
    first, second, third = torch.eye(3)
    x = torch.stack([torch.stack([first, first]), torch.stack([second, third])])  # (2, 2, 3)
    mean, pooled, centred = probe.entropies(x, "cpu")
    assert mean == pytest.approx(math.log(2) / 2)
    assert pooled == pytest.approx(1.5 * math.log(2))  # weights 1/2, 1/4, 1/4
    rest = (x - x.mean((0, 1))).flatten(0, 1)
    assert centred == pytest.approx(probe.von_neumann_entropy(rest), abs=1e-6)
    assert centred < math.log(2) < pooled  # the centred rows lie in a plane


def test_energy_is_divided_between_one_direction_images_and_patches():
    first, second, third = torch.eye(3)
    x = torch.stack([torch.stack([first, 2 * first]), torch.stack([second, third])])  # (2, 2, 3)
    shares = probe.energy_shares(x)  # means: (1, 0, 0), (0, .5, .5); of all: (.5, .25, .25)
    assert shares == pytest.approx({"shared": 0.375, "between": 0.375, "within": 0.25})
    mean, pooled, _ = probe.entropies(x, "cpu")
    assert pooled - mean == pytest.approx(math.log(2))  # of two images that share no direction


def test_collapse_does_not_pass_for_diversity_once_the_mean_is_removed():
    x = random(1, 16, dtype=torch.float32) + 1e-8 * random(100, 16, dtype=torch.float32)
    assert max(probe.entropies(x.view(10, 10, 16), "cpu")) < 1e-6


# ---- alignment and recall ------------------------------------------------------------------------

W = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [3, 3, 0]])  # cosines ignore lengths
H = torch.tensor([[3, 0, 0.1], [0.9, 1, 0]])
WORDS = [[(0,), (2,)], [(1, 2)]]  # two words; one word of two tokens


def test_alignment_of_a_worked_example():
    first = (3 + 0.1) / math.sqrt(9.01) / 2
    second = 1 / math.sqrt(1.81) / math.sqrt(2)
    expected = pytest.approx((first + second) / 2, abs=1e-6)
    assert probe.alignment(H, W, WORDS) == expected
    stretched = W * torch.tensor([[1], [7], [1], [1]])  # tokens count as unit vectors
    assert probe.alignment(H, stretched, WORDS) == expected


def test_recall_of_a_worked_example(monkeypatch):
    nearest = probe.nearest_rows(H, W, 3)
    assert nearest.tolist() == [[0, 3, 2], [3, 1, 0]]
    monkeypatch.setattr(probe, "CHUNK", 3)
    assert torch.equal(probe.nearest_rows(H, W, 3), nearest)
    assert probe.word_recall(nearest, WORDS) == pytest.approx([0.25, 0.75, 1.0])


def test_anisotropy_is_the_mean_over_all_pairs(monkeypatch):
    monkeypatch.setattr(probe, "CHUNK", 4 * 12 * 7)
    w = random(50, 12, dtype=torch.float32) + 1
    cosine = F.normalize(w, dim=1) @ F.normalize(w, dim=1).T
    expected = (cosine.sum() - 50) / (50 * 49)
    scaled = w * torch.arange(1, 51)[:, None]
    table = torch.cat([scaled, torch.zeros(3, 12)])
    assert probe.anisotropy(table) == pytest.approx(expected.item(), abs=1e-5)


# ---- matching pursuit ----------------------------------------------------------------------------


def test_pursuit_of_an_orthonormal_dictionary_takes_the_largest_coefficients():
    dictionary, x = torch.linalg.qr(random(9, 9))[0], random(6, 9, seed=1)
    indices, coefficients, explained = probe.matching_pursuit(4 * x, 2 * dictionary, 5)
    inner = F.normalize(x, dim=1) @ dictionary.T
    order = inner.abs().argsort(1, descending=True)[:, :5]
    assert torch.equal(indices, order)
    torch.testing.assert_close(coefficients, inner.gather(1, order))
    torch.testing.assert_close(explained, inner.gather(1, order).square().cumsum(1))


def test_pursuit_recovers_a_planted_combination():
    dictionary = F.normalize(random(40, 64, seed=2), dim=1)
    planted = torch.tensor([2, -1.5, 1]).double()
    x = dictionary[[5, 17, 30]].T @ planted
    indices, coefficients, explained = probe.matching_pursuit(x[None], dictionary, 3)
    assert indices.tolist() == [[5, 17, 30]]
    torch.testing.assert_close(coefficients[0] * x.norm(), planted)
    assert explained[0, 2] == pytest.approx(1) and explained[0, 1] < 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pursuit_is_greedy_and_least_squares_at_every_step(dtype, monkeypatch):
    monkeypatch.setattr(probe, "CHUNK", 4 * 6 * 19 * 2)  # chunks of three rows
    dictionary, x = random(53, 19, seed=3), random(7, 19, seed=4)
    found = probe.matching_pursuit(x.to(dtype), dictionary.to(dtype), 6)
    indices, coefficients, explained = found
    d, u = F.normalize(dictionary, dim=1), F.normalize(x, dim=1)
    close = {"atol": 1e-5 if dtype == torch.float32 else 1e-12, "rtol": 0}
    for i in range(7):
        residual = u[i]
        for k in range(6):
            assert indices[i, k] == (d @ residual).abs().argmax()
            basis = d[indices[i, : k + 1]].T
            fit = torch.linalg.lstsq(basis, u[i, :, None]).solution
            residual = u[i] - (basis @ fit).squeeze(1)
            left = residual.square().sum()
            torch.testing.assert_close(explained[i, k].double(), 1 - left, **close)
        torch.testing.assert_close(coefficients[i].double(), fit.squeeze(1), **close)
    assert (explained.diff(dim=1) >= 0).all()


def test_pursuit_survives_repeated_rows_zero_rows_and_more_atoms_than_dimensions():
    d = random(3, 3, dtype=torch.float32)
    dictionary = torch.cat([d, d, torch.zeros(1, 3), -2 * d])
    x = torch.stack([d[0], d[0] + 0.3 * d[2], torch.zeros(3)])
    indices, coefficients, explained = probe.matching_pursuit(x, dictionary, 8)
    assert all(len(set(row)) == 8 for row in indices.tolist())
    assert coefficients.isfinite().all() and coefficients.abs().max() < 10
    torch.testing.assert_close(explained[:, -1], torch.tensor([1.0, 1, 0]))
    atoms = F.normalize(dictionary, dim=1)[indices]
    fitted = torch.einsum("nk,nkd->nd", coefficients, atoms)
    torch.testing.assert_close(fitted, F.normalize(x, dim=1))
    with pytest.raises(ValueError, match="1 .. 10"):
        probe.matching_pursuit(x, dictionary, 11)


def test_pursuit_stays_orthogonal_among_nearly_parallel_atoms():
    base = random(1, 20, seed=6)
    dictionary = (base + 0.001 * random(30, 20, seed=7)).float()
    x = (3 * base + random(50, 20, seed=8)).float()
    indices, _, explained = probe.matching_pursuit(x, dictionary, 8)
    for i in range(50):
        basis, u = dictionary[indices[i]].double().T, F.normalize(x[i].double(), dim=0)
        fit = torch.linalg.lstsq(basis, u[:, None], driver="gelsd").solution
        rest = (u - (basis @ fit).squeeze(1)).square().sum().item()
        assert explained[i, -1].item() == pytest.approx(1 - rest, abs=2e-5)  # one pass: 6e-3


def test_rotation_keeps_angles_and_loses_directions():
    d = random(30, 12)
    r = probe.rotated(d, torch.Generator().manual_seed(0))
    torch.testing.assert_close(r @ r.T, d @ d.T)
    assert (r - d).norm() > 0.5 * d.norm()


def test_a_large_vocabulary_needs_no_second_table(monkeypatch):
    """No product is larger than the (20011, 40) table itself: chunks, not patches x words."""
    largest, matmul = [0], torch.Tensor.__matmul__

    def counted(a, b):
        out = matmul(a, b)
        largest[0] = max(largest[0], out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    monkeypatch.setattr(probe, "CHUNK", 2**18)
    w, x = random(20011, 40, dtype=torch.float32), random(300, 40, dtype=torch.float32)
    probe.nearest_rows(x, w, 10)
    both = torch.cat([x, probe.rotated(x, torch.Generator().manual_seed(0))])
    probe.matching_pursuit(both, w, 4)
    assert 0 < largest[0] <= 2**18 + len(w)


# ---- a model that turns a patch's colour into the colour's own word ------------------------------


TOKENS = [
    "<unk>",
    "Ġred",
    "Ġblue",
    "Ġgrey",
    "x",
    "Ġ7",
    "Ġ",
    *(f"Ġ{a}{b}" for a in "klmnopqr" for b in "aeiouwy"),
]


def word_tokenizer():
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


class Model:
    grid, tokenizer = (4, 4), word_tokenizer()
    image_mean, image_std, aspect = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], 1
    image_form = 40, "pad", image_mean, image_std
    config = {"image_size": 40, "geometry": "pad", "coverage": 0.25}
    word_embeddings = random(len(TOKENS), 24, dtype=torch.float32)

    def eval(self):
        return self

    def encode(self, pixels):
        return F.adaptive_avg_pool2d(pixels, self.grid).flatten(2).transpose(1, 2)  # (B, P, 3)

    def projector(self, z):
        red = z[..., 0] - z[..., 2]
        scores = torch.stack([red, -red, 0 * red + 0.3], 2)  # of red, blue, grey
        return self.word_embeddings[1:4][scores.argmax(2)]


def write_data(folder, regions=True):
    """Two grey 40 x 20 images, which "pad" puts into rows 10 .. 30 of a 40 x 40 square.

    The first is red at the top right and blue at the bottom left, both labelled "red", rightly and
    wrongly. The second is the first upside down.
    """
    (folder / "images").mkdir()
    pixels = np.full((20, 40, 3), 128, np.uint8)
    pixels[:10, 30:], pixels[10:, :10] = (255, 0, 0), (0, 0, 255)
    records = []
    for name, top, bottom in (("one", 0, 10), ("two", 10, 0)):
        boxes = [
            {"phrase": "a red box", "bbox": [30, top, 40, top + 10]},
            {"phrase": "a red box", "bbox": [0, bottom, 10, bottom + 10]},
        ]
        image = Image.fromarray(pixels if top == 0 else pixels[::-1].copy())
        image.save(folder / "images" / f"{name}.png")
        record = {"id": name, "image": f"{name}.png"}
        records.append(record | ({"regions": boxes} if regions else {}))
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return records


def test_looks_tell_of_each_patch_its_words_where_it_is(tmp_path):
    records, model, images = write_data(tmp_path), Model(), tmp_path / "images"
    z, h, words = probe.collect(model, records, images, batch_size=1)
    assert z.shape == (2, 16, 3) and h.shape == (2, 16, 24)
    assert [i for i, row in enumerate(words) if row] == [7, 8, 20, 27]  # (row 1, column 3), (2, 0)
    seen = probe.looks(model, records, [0, 1], h, images, 3)
    texts, (first, second) = seen["texts"], seen["images"]
    pixels = np.asarray(first["view"], int)
    assert (abs(pixels[10:20, 30:] - (255, 0, 0)) < 9).all()
    assert (abs(pixels[20:30, :10] - (0, 0, 255)) < 9).all()
    assert (abs(pixels[:10] - 128) < 9).all()
    assert np.array_equal(second["view"], pixels[::-1])
    nearest = [texts[i] for i in first["near"][:, 0].tolist()]
    assert nearest == ["grey"] * 7 + ["red", "blue"] + ["grey"] * 7
    assert first["right"] == [None] * 7 + [True, False] + [None] * 7
    assert second["right"] == [None] * 4 + [False] + [None] * 6 + [True] + [None] * 4
    assert first["labels"][7] == first["labels"][8] == ["red"] and not first["labels"][0]
    w = F.normalize(model.word_embeddings.double(), dim=1)
    rows = w[[TOKENS.index("Ġ" + text) for text in texts]]
    cosines = F.normalize(h.double(), dim=2) @ rows.T
    assert (first["map"] / 127 - cosines[0]).abs().max() < 0.005
    torch.testing.assert_close(first["cosines"].double(), cosines[0].topk(5).values)
    assert torch.equal(first["atoms"][:, 0], first["near"][:, 0])
    assert first["weights"][:, 0].tolist() == pytest.approx([1] * 16)


# ---- the picture ---------------------------------------------------------------------------------


def test_areas_are_connected_along_edges_and_do_not_wrap():
    assert sorted(picture.areas("abaaabccb", 3)) == [[0, 3, 4], [1], [2], [5, 8], [6, 7]]
    assert sorted(picture.areas("abaaaa", 3)) == [[0, 2, 3, 4, 5], [1]]  # joined below


def test_panel_outlines_each_area_and_leaves_the_photograph():
    view = Image.new("RGB", (picture.PANEL, picture.PANEL), (90, 90, 90))
    texts = ["dog", "dog", "dog", "cat"] * 2 + ["dog"] * 8
    right = [True] * 3 + [None] + [True] * 3 + [None] + [False] * 8
    drawn, side = picture.panel(view, (4, 4), texts, right), picture.PANEL // 4
    for x, y, frame in ((1, 50, True), (3 * side - 2, 50, True), (3 * side + 1, 50, None),
                        (50, 2 * side - 2, True), (50, 2 * side + 1, False)):
        assert drawn.getpixel((x, y)) == picture.FRAME[frame]
    for inner in ((side, 10), (50, side), (2 * side, side + 30), (side, 3 * side)):
        assert drawn.getpixel(inner) == (90, 90, 90)  # no line within an area
    assert (np.asarray(drawn) == 90).all(2).mean() > 0.9


@pytest.mark.parametrize("columns", [8, 16])
def test_words_are_legible_stand_on_their_own_area_and_never_collide(columns, monkeypatch):
    rng, boxes = np.random.default_rng(0), []

    def placed(text, own, taken, place=picture.place):
        spot = place(text, own, taken)
        if spot:
            boxes.append((text, *spot, own))
        return spot

    monkeypatch.setattr(picture, "place", placed)
    view = Image.new("RGB", (picture.PANEL, picture.PANEL))
    texts = rng.choice(["a", "checkered", "photographer", "dog"], columns**2).tolist()
    picture.panel(view, (columns, columns), texts, rng.choice([True, False], columns**2).tolist())
    assert len(boxes) > 10
    for i, (text, box, font, own) in enumerate(boxes):
        x0, y0, x1, y1 = box
        assert font.size >= 12 and font.getlength(text) <= x1 - x0
        assert 0 <= x0 and 0 <= y0 and x1 <= picture.PANEL and y1 <= picture.PANEL
        assert sum(picture.overlap(box, one) for one in own) > 0.5 * (x1 - x0) * (y1 - y0)
        assert not any(picture.overlap(box, other[1]) for other in boxes[:i])


def test_words_of_the_dictionary():
    tokenizer, w = Model.tokenizer, Model.word_embeddings.clone()
    w[2] = 1e-6  # a row that training never touched
    ids, texts, whole = probe.word_rows(tokenizer, w)
    assert whole and ids.tolist() == [1, 3, *range(7, 63)]  # not <unk>, x, Ġ7, Ġ
    assert texts[:3] == ["red", "grey", "ka"]
    ids, texts, whole = probe.word_rows(tokenizer, w[:40])
    assert not whole and ids.tolist() == [1, *range(3, 40)]
    assert texts[:5] == ["red", "grey", "x", "7", "Ġ"]


# ---- the whole stage -----------------------------------------------------------------------------


def probed(folder, monkeypatch, regions=True, model=Model, first=None, **flags):
    """probe.main on two checkpoints of the model, or one of `first` -> their probe.json."""
    write_data(folder, regions)
    monkeypatch.setattr(probe, "load_checkpoint", lambda path, device, dtype: (
        (first if first and "plain" in str(path) else model)(), {}))
    files = [folder / name / "ckpt.pt" for name in ("plain", "labelled")]
    for file in files:
        file.parent.mkdir()
        file.touch()
    named = {"data": str(folder / "test.jsonl"), "atoms": 3, "show": 1} | flags
    probe.main(probe.Args([str(file) for file in files], **named))
    return [json.loads((file.parent / "probe.json").read_text()) for file in files]


def test_main_writes_the_agreed_keys_the_picture_and_the_table(tmp_path, monkeypatch, capsys):
    first, second = probed(tmp_path, monkeypatch)
    assert first["checkpoint"] != second.pop("checkpoint") and first.items() > second.items()
    assert set(first["entropy"]) == {
        "encoder",
        "projected",
        "encoder_pooled",
        "projected_pooled",
        "encoder_centred",
        "projected_centred",
    }
    assert sum(first["energy"]["projected"].values()) == pytest.approx(1)
    assert first["effective_rank"]["projected"] == math.exp(first["entropy"]["projected"])
    assert set(first["recall"]) == {"1", "5", "10"}
    assert first["recall"]["1"] == 0.5  # "box" has no token; one box is red
    assert (first["patches"], first["images"], first["labelled"]) == (32, 2, 4)
    assert first["words_per_patch"] == 1
    pursuit = first["pursuit"]
    assert pursuit["explained"][0] == pytest.approx(1) and len(pursuit["control"]) == 3
    assert pursuit["control"][0] < 0.8
    with Image.open(tmp_path / "plain" / "probe.png") as image:
        height = picture.PANEL + 4 * picture.LINE + 3 * picture.GAP
        assert image.size == (2 * picture.PANEL + 3 * picture.GAP, height)
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[1].split() == ["plain", "labelled"]
    assert any(line.startswith("recall@1 ") and line.count(" 0.500 (") == 2 for line in printed)
    assert printed[-1].endswith(f"next: look at {tmp_path}/plain/probe.png")


def test_main_without_regions_reports_entropy_and_energy_alone(tmp_path, monkeypatch):
    first, _ = probed(tmp_path, monkeypatch, regions=False, show=0)
    assert first["align"] is first["chance"] is first["recall"]["1"] is None
    assert first["entropy"]["projected"] > 0 and first["pursuit"]["recall"] == [None] * 3
    assert first["pursuit"]["patches"] == 32 and first["pursuit"]["explained"][0] > 0.5
    assert not (tmp_path / "plain" / "probe.png").exists()


class Diverged(Model):
    word_embeddings = Model.word_embeddings * math.nan


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(coverage=25), "--coverage 25 is a share"),
        (dict(atoms=0), "--atoms 0 is less than 1"),
        (dict(model=Diverged), "not finite"),
    ],
)
def test_bad_input_is_one_clear_line(flags, message, tmp_path, monkeypatch):
    with pytest.raises(runtime.InputError, match=message):
        probed(tmp_path, monkeypatch, **flags)
    assert not list(tmp_path.glob("*/probe.*"))


def test_chance_is_the_mean_over_all_pairs_of_patches_and_words():
    w, n = Model.word_embeddings, 600
    names = torch.randint(1, 60, (n,), generator=torch.Generator().manual_seed(1)).tolist()
    h = w[names] + 0.5 * random(n, 24, seed=5, dtype=torch.float32) + w[1]
    args, x = probe.Args([], atoms=2, pursuit_patches=50), h.view(10, 60, 24)
    result = probe.analyse(Model(), x, x, [[(i,)] for i in names], args)
    cosine = F.normalize(h, dim=1) @ F.normalize(w, dim=1)[names].T  # (patches, words)
    spread = 4 * cosine.std().item() / math.sqrt(n)
    assert result["align"] == pytest.approx(cosine.diagonal().mean().item(), abs=1e-5)
    assert result["chance"] == pytest.approx(cosine.mean().item(), abs=spread)
    assert result["align"] > result["chance"] + 0.3
    assert result["recall"]["5"] > 0.5 > 0.3 > result["recall_chance"]["5"]
    pursuit = result["pursuit"]
    assert pursuit["patches"] == 50
    assert pursuit["recall"][1] > 0.5 > 0.2 > pursuit["control_recall"][1]
    table = probe.scores(result)
    for title, score, note, other in (
        ("recall@5", result["recall"]["5"], "chance", result["recall_chance"]["5"]),
        (
            "pursuit words found, 2 atoms",
            pursuit["recall"][1],
            "control",
            pursuit["control_recall"][1],
        ),
        ("pursuit energy, 1 atoms", pursuit["explained"][0], "control", pursuit["control"][0]),
    ):
        assert table[title] == f"{score:.3f} ({note} {other:.3f})"
    assert result["anisotropy"]["norm"] == pytest.approx(w.norm(dim=1).mean().item())


def test_outputs_never_collide(tmp_path):
    def outputs(checkpoints, out=""):
        names, files = runtime.outputs(checkpoints, out, "probe.json")
        return names, [str(file) for (file,) in files]

    assert outputs(["a/ckpt.pt", "b/ckpt.pt"]) == (["a", "b"], ["a/probe.json", "b/probe.json"])
    for checkpoints, out in (
        (["a/ckpt.pt", "b/ckpt.pt"], "x"),
        (["r/one.pt", "r/two.pt"], ""),
        (["x/a/ckpt.pt", "y/a/ckpt.pt"], "o"),
    ):
        names, files = outputs(checkpoints, out)
        assert len(set(names)) == len(set(files)) == 2
    beside = outputs(["r/ckpt.pt", "r/ckpt-100.pt"])[1]
    assert beside == ["r/probe-r.json", "r/probe-ckpt-100.json"]
    assert outputs(["r/ckpt-100.pt"])[1] == ["r/probe-ckpt-100.json"]  # never as that of ckpt.pt
    pair = runtime.outputs(["r/ckpt-100.pt"], "", "eval.json", "predictions.jsonl")[1][0]
    assert [file.name for file in pair] == ["eval-ckpt-100.json", "predictions-ckpt-100.jsonl"]
    mixed = ["llava-hf/llava-1.5-7b-hf", str(tmp_path), f"{tmp_path}/mm_projector.bin"]
    names, files = outputs(mixed)
    assert names == ["llava-1.5-7b-hf", tmp_path.name, "mm_projector"]
    assert files == [
        "runs/llava-1.5-7b-hf/probe.json",
        f"{tmp_path}/probe-{tmp_path.name}.json",
        f"{tmp_path}/probe-mm_projector.json",
    ]
    with pytest.raises(runtime.InputError, match="two of them would be written to one file"):
        outputs(["a/ckpt.pt", "./a/ckpt.pt"], "o")


# ---- the page ------------------------------------------------------------------------------------


class Grey(Model):
    """Sees red nowhere: each patch is grey, a little blue."""

    def projector(self, z):
        w = self.word_embeddings
        return (F.normalize(w[3], dim=0) + 0.1 * F.normalize(w[2], dim=0)).expand(*z.shape[:2], -1)


def written_page(folder, monkeypatch):
    """The page of Grey and Model on two images -> (its file, its data)."""
    file = folder / "page.html"
    probed(folder, monkeypatch, first=Grey, page=str(file))
    text = file.read_text()
    start = text.index('id="data">') + len('id="data">')
    return file, json.loads(text[start:text.index("</script>", start)])


def test_page_holds_what_the_looks_hold(tmp_path, monkeypatch):
    file, data = written_page(tmp_path, monkeypatch)
    assert [c["name"] for c in data["checkpoints"]] == ["plain", "labelled"]
    assert data["words"][0] == "red" and data["mapped"] == len(data["words"])
    assert len(data["views"]) == len(data["captions"]) == 2  # shared by the checkpoints
    grey, own = (c["images"][0] for c in data["checkpoints"])
    assert own["right"] == "-------10-------" and grey["right"] == "-------00-------"
    assert own["labels"][7] == [0] and own["labels"][0] == []
    maps = np.frombuffer(base64.b64decode(own["map"]), np.int8).reshape(16, data["mapped"])
    assert maps[7, 0] == 127 and data["words"][maps[8].argmax()] == "blue"
    assert [data["words"][own["near"][5 * i]] for i in (0, 7, 8)] == ["grey", "red", "blue"]
    assert own["cosines"][35] == own["weights"][21] == 1000


def test_page_takes_any_text_and_keeps_its_size(tmp_path, monkeypatch):
    seen = {"texts": ["</script><b>", "dog", "cat"], "images": [dict(
        view=Image.new("RGB", (300, 300)), grid=(16, 16), labels=[["dog"]] * 256,
        right=[True] * 256, near=torch.zeros(256, 2, dtype=torch.int64),
        cosines=torch.rand(256, 2), atoms=torch.ones(256, 2, dtype=torch.int64),
        weights=torch.rand(256, 2), map=torch.ones(256, 3, dtype=torch.int8))]}
    monkeypatch.setattr(page, "ROOM", 2 * 256)
    page.write(tmp_path / "page.html", ["x"], ["<img> & </script>"], [seen])
    text = (tmp_path / "page.html").read_text()
    start = text.index('id="data">') + len('id="data">')
    data = json.loads(text[start:text.index("</script>", start)])
    assert data["words"] == ["dog", "</script><b>"] and data["mapped"] == 2  # no room for the cat
    assert data["captions"] == ["<img> & </script>"]
    assert len(base64.b64decode(data["checkpoints"][0]["images"][0]["map"])) == 2 * 256


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    playwright = pytest.importorskip("playwright.sync_api")
    if not chromium:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [360, 1100])
def test_page_in_a_browser(tmp_path, monkeypatch, browser, width):
    file, _ = written_page(tmp_path, monkeypatch)
    tab, said = browser.new_page(viewport={"width": width, "height": 800}), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(file.as_uri())

    def shown(identity):
        return tab.locator(f"#{identity}").inner_text()

    def cell(i):
        return tab.locator(f".cell[data-i='{i}']")

    def colour(i):
        return cell(i).evaluate("cell => getComputedStyle(cell).backgroundColor")

    # pointing, keeping, arrow keys
    cell(7).hover()
    assert shown("where") == "Patch in row 2, column 4" and "Wrong" in shown("verdict")
    assert shown("near").split()[:2] == ["grey", "0.995"] and shown("own") == "red"
    cell(8).click()
    cell(1).hover()
    assert shown("where").startswith("Patch in row 3, column 1")  # kept
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowLeft"):
        tab.keyboard.press(key)
    assert shown("where").startswith("Patch in row 2, column 2")
    tab.keyboard.press("End")
    assert shown("where").startswith("Patch in row 2, column 4")
    tab.keyboard.press("ArrowRight")  # the edge
    tab.keyboard.press("Home")
    assert tab.evaluate("document.activeElement.dataset.i") == "4"
    assert cell(4).get_attribute("aria-label").startswith("row 2, column 1: grey, ")
    tab.keyboard.press("Enter")
    cell(7).hover()
    assert shown("where").startswith("Patch in row 2, column 4")

    # the other checkpoint, in place
    tab.get_by_label("labelled").check()
    assert "Right" in shown("verdict") and shown("near").split()[:2] == ["red", "1.000"]
    assert shown("score").endswith("plain 0 of 2, labelled 1 of 2.")
    assert "labelled (2 of 4 right)" in shown("checkpoints")
    assert "Right" not in shown("legend")

    # a word, typed or from the patch
    assert colour(7) == "rgba(0, 0, 0, 0)"
    tab.get_by_label("Where is the word").fill("red")
    assert shown("legend").startswith("Cosine with “red”")
    assert colour(7) != colour(0) == colour(1) != "rgba(0, 0, 0, 0)"
    tab.locator("#near button").nth(1).focus()
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.tagName") == "BUTTON"  # the focus stays
    assert "Cosine with “red”" not in shown("legend")
    tab.get_by_label("Where is the word").fill("nonsense")
    tab.keyboard.press("Enter")
    assert "not among" in shown("legend")
    tab.get_by_role("button", name="Clear").click()
    assert colour(7) == "rgba(0, 0, 0, 0)" and not shown("legend")

    # right and wrong, the other image, nothing wider than the window, nothing to complain of
    shadow = "cell => getComputedStyle(cell).boxShadow"
    tab.get_by_role("button", name="Image 1").click()
    cell(0).hover()
    assert "rgb(60, 255, 90)" in cell(7).evaluate(shadow)
    border = "cell => getComputedStyle(cell).borderStyle"
    assert cell(8).evaluate(border) == "dashed"
    tab.get_by_label("Right (green)").uncheck()
    assert cell(8).evaluate(border) == "solid" and cell(7).evaluate(shadow) == "none"
    tab.get_by_role("button", name="Image 2").click()
    assert "two.png" in shown("caption") and cell(4).get_attribute("class").split()[1] == "no"
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert not said
    tab.close()


def test_the_committed_page_is_of_this_template():
    root = Path(probe.__file__).parent
    before, after = (root / "extras/page.html").read_text().split("{{data}}")
    committed = (root / "docs/page.html").read_text()
    assert committed.startswith(before) and committed.endswith(after)
    assert len(committed) < 1_000_000
