"""labels.py: labels follow the pixels exactly, whatever the geometry, grid and form of a region."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import labels

GEOMETRIES = ["pad", "crop", "stretch"]


# ---- labels follow pixels ------------------------------------------------------------------------


def seen_by_the_encoder(mask, size, geometry, grid, **options):
    """The mask drawn as an image, through the pixels' own path, averaged over each patch."""
    image, (height, width) = (
        Image.fromarray(np.uint8(mask) * 255).convert("RGB"),
        labels.sides(size),
    )
    pixels = labels.transform_image(image, size, geometry, [0.0] * 3, [1.0] * 3, **options)[
        0
    ].numpy()
    return pixels.reshape(grid[0], height // grid[0], grid[1], width // grid[1]).mean((1, 3))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_labels_follow_pixels_exactly(geometry):
    # Enlarged without a filter to a multiple of every pixel and every patch edge, the comparison
    # has no tolerance. The encoder's input is a square, or twice as wide or high.
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(90):
        width, height, rows, columns = (int(n) for n in rng.integers(1, 9, 4))
        aspect = float(rng.choice([1, 2, 0.5]))
        x0, y0, x1, y1 = labels.view_box((width, height), geometry, aspect)
        if geometry != "stretch" and x1 - x0 != aspect * (y1 - y0):  # rounded to whole pixels
            continue
        mask, enlarged = rng.random((height, width)) < 0.5, math.lcm(rows, columns)
        size = ((y1 - y0) * enlarged, (x1 - x0) * enlarged)
        expected = seen_by_the_encoder(
            mask, size, geometry, (rows, columns), resample=Image.Resampling.NEAREST
        )
        coverage = labels.region_coverage(
            [{"rle": labels.encode_rle(mask)}],
            (width, height),
            geometry,
            (rows, columns),
            aspect=aspect,
        )
        shapes.add(aspect)
        assert coverage.dtype == np.float32
        np.testing.assert_allclose(coverage, expected[None], atol=2e-6)
    assert len(shapes) == 3


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("image_size", [(97, 61), (50, 83)])
def test_labels_follow_pixels_through_the_real_filter(geometry, image_size):
    width, height = image_size
    y, x = np.mgrid[:height, :width]
    mask = (x - 0.3 * width) ** 2 / 400 + (y - 0.6 * height) ** 2 / 200 < 1
    grid = (4, 7)
    coverage = labels.region_coverage(
        [{"rle": labels.encode_rle(mask)}], image_size, geometry, grid
    )[0]
    assert coverage.max() > 0.8
    np.testing.assert_allclose(
        coverage, seen_by_the_encoder(mask, 28 * 8, geometry, grid), atol=0.02
    )


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_same_shape_in_every_form_is_covered_alike(geometry):
    mask = np.zeros((11, 17), bool)
    mask[2:9, 3:14] = True
    compressed = labels.encode_rle(mask)
    regions = [
        {"bbox": [3, 2, 14, 9]},
        {"polygon": [[3, 2, 14, 2, 14, 9, 3, 9]]},
        {
            "polygon": [[3, 2, 8, 2, 8, 9, 3, 9], [14, 9, 14, 2, 7, 2, 7, 9]]
        },  # two rings that overlap: their union
        {"rle": compressed},
        {"rle": {**compressed, "counts": compressed["counts"].encode()}},
        {"rle": labels.encode_rle(mask, compressed=False)},
    ]
    coverage = labels.region_coverage(regions, (17, 11), geometry, (5, 3))
    assert coverage[0].max() == pytest.approx(1) and coverage[0].min() < 0.5
    np.testing.assert_allclose(coverage, coverage[:1].repeat(len(regions), 0), atol=1e-6)
    for region in regions:
        np.testing.assert_array_equal(labels.region_mask(region, (17, 11), "x"), mask)


def test_boxes_between_pixels():
    # Quarters of a pixel become whole pixels in an image four times as large.
    box = np.array([1.25, -0.75, 6.5, 3.75])  # sticks out of the top: clipped
    mask = np.zeros((4 * 5, 4 * 7), bool)
    mask[:15, 5:26] = True
    coverage = labels.region_coverage([{"bbox": box.tolist()}], (7, 5), "stretch", (4, 3))
    np.testing.assert_allclose(
        coverage,
        labels.region_coverage([{"rle": labels.encode_rle(mask)}], (28, 20), "stretch", (4, 3)),
        atol=1e-6,
    )
    small = mask.reshape(5, 4, 7, 4).mean((1, 3))
    np.testing.assert_allclose(labels.region_mask({"bbox": box.tolist()}, (7, 5), "x"), small)
    beyond, within = labels.region_coverage(
        [{"bbox": [-0.5, -0.75, 7.5, 6]}, {"bbox": [0, 0, 7, 5]}], (7, 5), "pad", (4, 3)
    )
    np.testing.assert_array_equal(beyond, within)  # the padding stays uncovered


def test_polygons_are_even_odd_at_pixel_centres():
    def inside(px, py, ring):  # a ray upwards; the code's rays run along rows
        crossings = 0
        for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1]):
            if (x0 <= px) != (x1 <= px):
                crossings += y0 + (px - x0) * (y1 - y0) / (x1 - x0) > py
        return crossings % 2 == 1

    rng = np.random.default_rng(1)
    for n in (3, 4, 5, 9):  # self-intersecting from 4 on
        ring = [tuple(p) for p in rng.uniform([-1, -1], [14, 11], (n, 2))]
        mask = labels.region_mask({"polygon": [np.ravel(ring).tolist()]}, (13, 10), "x")
        expected = [[inside(x + 0.5, y + 0.5, ring) for x in range(13)] for y in range(10)]
        np.testing.assert_array_equal(mask, np.float32(expected))
    diamond = labels.region_mask(
        {"polygon": [[2.5, 0.5, 4.5, 2.5, 2.5, 4.5, 0.5, 2.5]]}, (5, 5), "x"
    )  # vertices on centres
    assert diamond.sum(1).tolist() == [1, 3, 4, 2, 0] or diamond.sum(1).tolist() == [0, 2, 4, 2, 0]


def test_rle_golden():
    # 6, 1, 40 as they are, then differences to two before: 3, -35, 0, 0, 0, 16; in groups of 5 bits
    # and a sign
    counts = [6, 1, 40, 4, 5, 4, 5, 4, 21]
    mask = np.repeat(np.arange(9) % 2 == 1, counts).reshape(9, 10).T  # column by column
    assert labels.encode_rle(mask) == {"size": [10, 9], "counts": "61X13mN000`0"}
    assert labels.encode_rle(mask, compressed=False) == {"size": [10, 9], "counts": counts}
    assert mask[6, 0] and not mask[0, 6]
    for given in (counts, "61X13mN000`0", b"61X13mN000`0"):
        np.testing.assert_array_equal(labels.decode_rle({"size": [10, 9], "counts": given}), mask)
    assert labels.encode_rle(np.ones((2, 3), bool), compressed=False)["counts"] == [0, 6]
    # 20 needs a second group for its sign, 4 - 20 = -16 just fits into one
    assert (
        labels.encode_rle(np.repeat([[0, 1, 0, 1]], [1, 20, 1, 4], 1).astype(bool))["counts"]
        == "1d01@"
    )


def test_rle_round_trips():
    rng = np.random.default_rng(2)
    for density in (0, 0.02, 0.5, 0.98, 1):
        mask = rng.random((37, 300)) < density
        for compressed in (True, False):
            rle = json.loads(json.dumps(labels.encode_rle(mask, compressed)))
            np.testing.assert_array_equal(labels.decode_rle(rle), mask)


# ---- patch labels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phrase, words",
    [
        ("Two of the man's red T-shirts", ["man", "red", "t-shirts"]),
        ("a dog, a Dog and 3 dogs", ["dog", "dogs"]),
        ("It isn’t in the girl’s café", ["girl", "café"]),
        ("several of them", []),
    ],
)
def test_content_words(phrase, words):
    assert labels.content_words(phrase) == words


def test_patch_words():
    regions = [
        {"phrase": "a red circle", "bbox": [0, 0, 4, 8]},
        {"phrase": "the red grass", "bbox": [0, 4, 5, 8]},
    ]
    grid = labels.patch_words(regions, (8, 8), "stretch", (2, 2), 0.25)
    # the second box covers exactly a quarter of the last patch
    assert grid == [["red", "circle"], [], ["red", "circle", "grass"], ["red", "grass"]]
    assert labels.patch_words(regions, (8, 8), "stretch", (2, 2), 0.26)[3] == []
    assert labels.patch_words([], (8, 8), "pad", (2, 3), 0.25) == [[]] * 6


def test_patch_targets():
    tokens = {"dog": [5], "hot": [6, 7], "sea": [7, 5], "?": []}
    ids, weights = labels.patch_targets(
        [["dog", "hot"], [], ["hot", "sea"], ["?", "dog"], ["dog", "hot"], ["?"]],
        tokens.__getitem__,
    )
    assert (
        ids.dtype == torch.int64
        and weights.dtype == torch.float32
        and ids.shape == weights.shape == (6, 3)
    )
    rows = [{i: w for i, w in zip(*row) if w} for row in zip(ids.tolist(), weights.tolist())]
    # half a patch's share per word, a quarter per token of a two-token word; token 7 belongs to
    # both words of patch 2
    assert rows == [
        {5: 0.5, 6: 0.25, 7: 0.25},
        {},
        {6: 0.25, 7: 0.5, 5: 0.25},
        {5: 1.0},
        {5: 0.5, 6: 0.25, 7: 0.25},
        {},
    ]
    assert labels.patch_targets([[], []], tokens.__getitem__)[0].shape == (2, 1)
