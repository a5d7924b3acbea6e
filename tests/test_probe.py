"""probe.py against closed forms and worked examples, and one run of it on a model small enough to know every answer of."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import probe
from data import InputError


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --------------------------------------------------------------------------------------------------------------- entropy


@pytest.mark.parametrize(("n", "width"), [(5, 11), (11, 11)])
def test_entropy_of_orthogonal_rows_is_ln_n_whatever_their_lengths(n, width):
    rows = torch.linalg.qr(random(width, width))[0][:n] * torch.arange(1, n + 1)[:, None]
    assert probe.von_neumann_entropy(rows) == pytest.approx(math.log(n), abs=1e-12)
    assert probe.von_neumann_entropy(torch.cat([rows, -3 * rows, torch.zeros(2, width)])) == pytest.approx(math.log(n), abs=1e-12)


def test_entropy_of_parallel_rows_and_of_none_is_zero():
    rows = random(7, 1) * random(1, 5)
    assert probe.von_neumann_entropy(rows) == pytest.approx(0, abs=1e-12)
    assert probe.von_neumann_entropy(rows.T @ rows[:, :1] * random(1, 13)) == pytest.approx(0, abs=1e-12)
    assert probe.von_neumann_entropy(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("width", [3, 40])                      # covariance and Gram
def test_entropy_of_two_orthogonal_groups_is_binary_entropy(width):
    rows = torch.zeros(10, width)
    rows[:3, 0], rows[3:, 1] = 2.0, 5.0
    assert probe.von_neumann_entropy(rows) == pytest.approx(-0.3 * math.log(0.3) - 0.7 * math.log(0.7), abs=1e-9)


def test_entropy_does_not_depend_on_the_side_or_the_chunks(monkeypatch):
    rows = random(37, 23)
    u = rows / rows.norm(dim=1, keepdim=True)
    s = torch.linalg.svdvals(u).square() / len(u)
    expected = -(s * s.log()).sum().item()
    assert probe.von_neumann_entropy(rows) == pytest.approx(expected, abs=1e-10)
    assert probe.von_neumann_entropy(torch.nn.functional.pad(rows, (0, 50))) == pytest.approx(expected, abs=1e-10)
    monkeypatch.setattr(probe, "CHUNK", 1000)
    assert probe.von_neumann_entropy(rows) == pytest.approx(expected, abs=1e-10)


def test_entropies_per_image_pooled_and_without_the_mean():
    first, second, third = torch.eye(3)
    x = torch.stack([torch.stack([first, first]), torch.stack([second, third])])                # (2 images, 2 patches, 3)
    mean, pooled, centred = probe.entropies(x, "cpu")
    assert mean == pytest.approx(math.log(2) / 2)
    assert pooled == pytest.approx(1.5 * math.log(2))           # weights 1/2, 1/4, 1/4
    y = x - x.mean((0, 1))
    assert centred == pytest.approx(probe.von_neumann_entropy(y.flatten(0, 1)), abs=1e-6)
    assert centred < math.log(2) < pooled                       # the centred rows lie in a plane


def test_collapse_does_not_pass_for_diversity_once_the_mean_is_removed():
    x = (torch.ones(100, 1) * random(1, 16, dtype=torch.float32) + 1e-8 * random(100, 16, dtype=torch.float32)).view(10, 10, 16)
    assert max(probe.entropies(x, "cpu")) < 1e-6


# ------------------------------------------------------------------------------------------------- alignment and recall

W = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [3, 3, 0]])                                # cosines ignore the lengths
H = torch.tensor([[3, 0, 0.1], [0.9, 1, 0]])
WORDS = [[(0,), (2,)], [(1, 2)]]                                # two words of a token each; one word of two tokens


def test_alignment_of_a_worked_example():
    first = (3 + 0.1) / math.sqrt(9.01) / 2
    second = 1 / math.sqrt(1.81) / math.sqrt(2)
    assert probe.alignment(H, W, WORDS) == pytest.approx((first + second) / 2, abs=1e-6)
    stretched = W * torch.tensor([[1], [7], [1], [1]])          # a word's tokens are averaged as unit vectors
    assert probe.alignment(H, stretched, WORDS) == pytest.approx((first + second) / 2, abs=1e-6)


def test_recall_of_a_worked_example(monkeypatch):
    assert probe.nearest_rows(H, W, 3).tolist() == [[0, 3, 2], [3, 1, 0]]
    monkeypatch.setattr(probe, "CHUNK", 3)
    nearest = probe.nearest_rows(H, W, 3)
    assert nearest.tolist() == [[0, 3, 2], [3, 1, 0]]
    assert probe.word_recall(nearest, WORDS).tolist() == pytest.approx([0.25, 0.75, 1.0])


# ----------------------------------------------------------------------------------------------------- matching pursuit


def test_pursuit_of_an_orthonormal_dictionary_takes_the_largest_coefficients():
    dictionary, x = torch.linalg.qr(random(9, 9))[0], random(6, 9, seed=1)
    indices, coefficients, explained = probe.matching_pursuit(4 * x, 2 * dictionary, 5)
    inner = x / x.norm(dim=1, keepdim=True) @ dictionary.T
    order = inner.abs().argsort(1, descending=True)[:, :5]
    assert torch.equal(indices, order)
    torch.testing.assert_close(coefficients, inner.gather(1, order))
    torch.testing.assert_close(explained, inner.gather(1, order).square().cumsum(1))


def test_pursuit_recovers_a_planted_combination():
    dictionary = torch.nn.functional.normalize(random(40, 64, seed=2), dim=1)
    x = dictionary[[5, 17, 30]].T @ torch.tensor([2, -1.5, 1]).double()
    indices, coefficients, explained = probe.matching_pursuit(x[None], dictionary, 3)
    assert indices.tolist() == [[5, 17, 30]]
    torch.testing.assert_close(coefficients[0] * x.norm(), torch.tensor([2, -1.5, 1]).double())
    assert explained[0, 2] == pytest.approx(1) and explained[0, 1] < 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pursuit_is_greedy_and_least_squares_at_every_step(dtype, monkeypatch):
    monkeypatch.setattr(probe, "CHUNK", 4 * 6 * 19 * 2)             # chunks of three rows
    dictionary, x = random(53, 19, seed=3), random(7, 19, seed=4)
    indices, coefficients, explained = probe.matching_pursuit(x.to(dtype), dictionary.to(dtype), 6)
    d, u = (t / t.norm(dim=1, keepdim=True) for t in (dictionary, x))
    close = {"atol": 1e-5 if dtype == torch.float32 else 1e-12, "rtol": 0}
    for i in range(7):
        residual = u[i]
        for k in range(6):
            assert indices[i, k] == (d @ residual).abs().argmax()
            basis = d[indices[i, : k + 1]].T
            fit = torch.linalg.lstsq(basis, u[i, :, None]).solution
            residual = u[i] - (basis @ fit).squeeze(1)
            torch.testing.assert_close(explained[i, k].double(), 1 - residual.square().sum(), **close)
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
    atoms = torch.nn.functional.normalize(dictionary, dim=1)[indices]
    torch.testing.assert_close(torch.einsum("nk,nkd->nd", coefficients, atoms), torch.nn.functional.normalize(x, dim=1))
    with pytest.raises(ValueError, match="1 .. 10"):
        probe.matching_pursuit(x, dictionary, 11)


def test_pursuit_stays_orthogonal_among_nearly_parallel_atoms():
    base = random(1, 20, seed=6)
    dictionary, x = base + 0.001 * random(30, 20, seed=7), 3 * base + random(50, 20, seed=8)
    indices, _, explained = probe.matching_pursuit(x.float(), dictionary.float(), 8)
    for i in range(50):
        basis, u = dictionary.float()[indices[i]].double().T, torch.nn.functional.normalize(x[i].float().double(), dim=0)
        fit = torch.linalg.lstsq(basis, u[:, None], driver="gelsd").solution
        rest = (u - (basis @ fit).squeeze(1)).square().sum().item()
        assert explained[i, -1].item() == pytest.approx(1 - rest, abs=2e-5)                     # 6e-3 with one pass of Gram-Schmidt


def test_rotation_keeps_angles_and_loses_directions():
    d = random(30, 12)
    r = probe.rotated(d, torch.Generator().manual_seed(0))
    torch.testing.assert_close(r @ r.T, d @ d.T)
    assert (r - d).norm() > 0.5 * d.norm()


# -------------------------------------------------------- a model that turns a patch's colour into the colour's own word


TOKENS = ["<unk>", "Ġred", "Ġblue", "Ġgrey", "x", "Ġ7", "Ġ", *(f"Ġ{a}{b}" for a in "klmnopqr" for b in "aeiouwy")]


def word_tokenizer():
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
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
        return torch.nn.functional.adaptive_avg_pool2d(pixels, self.grid).flatten(2).transpose(1, 2)            # (B, P, 3)

    def projector(self, z):
        return self.word_embeddings[1:4][torch.stack([z[..., 0] - z[..., 2], z[..., 2] - z[..., 0], 0 * z[..., 0] + 0.3], 2).argmax(2)]


def write_data(folder, regions=True):
    """Grey 40 x 20 images, which "pad" puts into rows 10 .. 30 of a 40 x 40 square: red at the top right, blue at the bottom
    left, both wrongly or rightly labelled "red"; the second image is the first one upside down."""
    (folder / "images").mkdir()
    pixels = np.full((20, 40, 3), 128, np.uint8)
    pixels[:10, 30:], pixels[10:, :10] = (255, 0, 0), (0, 0, 255)
    records = []
    for name, top, bottom in (("one", 0, 10), ("two", 10, 0)):
        boxes = [{"phrase": "a red box", "bbox": [30, top, 40, top + 10]}, {"phrase": "a red box", "bbox": [0, bottom, 10, bottom + 10]}]
        Image.fromarray(pixels if top == 0 else pixels[::-1].copy()).save(folder / "images" / f"{name}.png")
        records.append({"id": name, "image": f"{name}.png", **({"regions": boxes} if regions else {})})
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return records


def test_panel_shows_each_word_where_the_patch_is(tmp_path):
    records, model = write_data(tmp_path), Model()
    z, h, words = probe.collect(model, records, tmp_path / "images", 1)
    assert z.shape == (2, 16, 3) and h.shape == (2, 16, 24)
    assert [i for i, row in enumerate(words) if row] == [7, 8, 20, 27]                          # first: (row 1, column 3), (2, 0)
    (view, panel), (_, second) = probe.panels(model, records, h, words, tmp_path / "images", probe.Palette())
    assert view.size == panel.size == (probe.PANEL, probe.PANEL)
    cell = probe.PANEL // 4
    middle = {(r, c): view.getpixel((c * cell + cell // 2, r * cell + cell // 2)) for r in range(4) for c in range(4)}
    assert middle[1, 3][0] > 240 > 20 > middle[1, 3][2] and middle[2, 0][2] > 240 > 20 > middle[2, 0][0]
    assert all(abs(v - 128) < 9 for at, colour in middle.items() if at not in ((1, 3), (2, 0)) for v in colour)
    for (row, column), sign, frame in (((1, 3), 1, True), ((2, 0), -1, False)):                 # the second box is mislabelled: red frame
        x, y = column * cell, row * cell
        tint = panel.getpixel((x + 15, y + 15))
        assert sign * (tint[0] - tint[2]) > 60
        assert panel.getpixel((x + 2, y + cell // 2)) == probe.FRAME[frame]
    assert panel.getpixel((2, cell // 2)) not in probe.FRAME.values()
    assert second.getpixel((3 * cell + 2, 2 * cell + cell // 2)) == probe.FRAME[True]
    assert len({panel.getpixel((c * cell + 15, r * cell + 15)) for r in (1, 2) for c in (1, 2)}) == 1           # plain grey


def test_areas_are_connected_along_edges_and_do_not_wrap():
    assert sorted(probe.areas("abaaabccb", (3, 3))) == [[0, 3, 4], [1], [2], [5, 8], [6, 7]]


def test_panel_with_narrow_patches_names_areas_once():
    view = Image.new("RGB", (probe.PANEL, probe.PANEL), (90, 90, 90))
    black = probe.Palette({"a": (0, 0, 0), "": (0, 0, 0)})
    plain = probe.panel(view, (16, 16), ["a"] * 128 + [""] * 128, [None] * 256, black)
    bright = (np.asarray(plain).max(2) > 200).nonzero()
    assert len(bright[0]) and np.ptp(bright[0]) < 25 and np.ptp(bright[1]) < 25


def test_words_of_the_dictionary():
    tokenizer, w = Model.tokenizer, Model.word_embeddings.clone()
    w[2] = 1e-6                                                 # a row that training never touched
    ids, texts, whole = probe.word_rows(tokenizer, w)
    assert whole and ids.tolist() == [1, 3, *range(7, 63)] and texts[:3] == ["red", "grey", "ka"]                  # not <unk>, x, Ġ7, Ġ
    ids, texts, whole = probe.word_rows(tokenizer, w[:40])
    assert not whole and ids.tolist() == [1, *range(3, 40)] and texts[:5] == ["red", "grey", "x", "7", "Ġ"]


def run(tmp_path, monkeypatch, regions=True, **flags):
    write_data(tmp_path, regions)
    monkeypatch.setattr(probe, "load_checkpoint", lambda path, device, dtype: (Model(), {"stage": "pretrain"}))
    checkpoints = [tmp_path / name / "ckpt.pt" for name in ("plain", "labelled")]
    for path in checkpoints:
        path.parent.mkdir()
        path.touch()
    probe.main(probe.Args([str(c) for c in checkpoints], data=str(tmp_path / "test.jsonl"), atoms=3, show=1, **flags))
    return [json.loads((c.parent / "probe.json").read_text()) for c in checkpoints]


def test_main_writes_the_agreed_keys_the_picture_and_the_table(tmp_path, monkeypatch, capsys):
    first, second = run(tmp_path, monkeypatch)
    assert first["checkpoint"] != second.pop("checkpoint") and first.items() > second.items()
    assert set(first["entropy"]) == set(probe.ENTROPIES) and set(first["recall"]) == {"1", "5", "10"}
    assert first["recall"]["1"] == 0.5                          # "box" has no token; "red" is nearest on one of the two boxes
    assert (first["patches"], first["images"], first["labelled"]) == (32, 2, 4)
    assert first["pursuit"]["explained"][0] == pytest.approx(1) and len(first["pursuit"]["control"]) == 3
    assert first["pursuit"]["control"][0] < 0.8
    with Image.open(tmp_path / "plain" / "probe.png") as image:
        assert image.size == (3 * probe.PANEL + 4 * probe.GAP, probe.PANEL + 4 * probe.LINE + 2 * probe.GAP)
    printed = capsys.readouterr().out.strip().splitlines()
    assert "plain" in printed[0] and "labelled" in printed[0] and "chance" in "".join(printed)
    assert "probe.png" in printed[-1] and printed[-1].endswith(f"next: look at {tmp_path}/plain/probe.png")


def test_main_without_regions_reports_entropy_alone(tmp_path, monkeypatch):
    first, _ = run(tmp_path, monkeypatch, regions=False)
    assert first["align"] is first["chance"] is first["recall"]["1"] is None and first["entropy"]["projected"] > 0


def test_chance_is_the_mean_over_all_pairs_of_patches_and_words():
    model, n = Model(), 600
    names = torch.randint(1, 60, (n,), generator=torch.Generator().manual_seed(1)).tolist()
    h = model.word_embeddings[names] + 0.5 * random(n, 24, seed=5, dtype=torch.float32) + model.word_embeddings[1]
    args = probe.Args([], atoms=2, pursuit_patches=50)
    result = probe.analyse(model, h.view(10, 60, 24), h.view(10, 60, 24), [[(i,)] for i in names], args)
    unit = torch.nn.functional.normalize
    cosine = unit(h, dim=1) @ unit(model.word_embeddings, dim=1)[names].T                       # (patches, words)
    assert result["align"] == pytest.approx(cosine.diagonal().mean().item(), abs=1e-5)
    assert result["chance"] == pytest.approx(cosine.mean().item(), abs=4 * cosine.std().item() / math.sqrt(n))
    assert result["align"] > result["chance"] + 0.3 and result["recall"]["5"] > 0.5 > 0.3 > result["recall_chance"]["5"]
    assert result["pursuit"]["patches"] == 50 and result["pursuit"]["recall"][1] > 0.5 > 0.2 > result["pursuit"]["control_recall"][1]


def test_outputs_never_collide():
    assert probe.outputs(["a/ckpt.pt", "b/ckpt.pt"], "")[0] == ["a", "b"]
    for checkpoints, out in ((["a/ckpt.pt", "b/ckpt.pt"], "x"), (["x/a/ckpt.pt", "y/a/ckpt.pt"], "o"), (["r/one.pt", "r/two.pt"], "")):
        names, files = probe.outputs(checkpoints, out)
        assert len(set(names)) == len(set(files)) == 2
    assert [f.name for f in probe.outputs(["r/ckpt.pt", "r/ckpt-100.pt"], "")[1]] == ["probe-r.json", "probe-ckpt-100.json"]
    assert [f.name for f in probe.outputs(["r/ckpt-100.pt"], "")[1]] == ["probe-ckpt-100.json"]         # never as that of ckpt.pt
    with pytest.raises(InputError, match="two of them would be written to one file"):
        probe.outputs(["a/ckpt.pt", "a/ckpt.pt"], "o")
