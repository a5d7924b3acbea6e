"""The benchmark on a CPU and a tiny shape: a row for everyone, failures included, resuming, the
peers' correction, the training step."""

import json
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from kernels import bench
from kernels.patch_loss import IMPLEMENTATIONS, TILES
from runtime import InputError

pytestmark = pytest.mark.skipif(
    bench.CUDA, reason="a GPU has other cases; there the benchmark itself is the test"
)
SHAPE, CASE = "37x24x101", bench.Case(37, 24, 101)


def rows(out):
    return [row for row in bench.read_rows(out / "rows.jsonl") if "case" in row]


def test_everyone_has_a_row_and_a_second_call_measures_what_is_missing(tmp_path, monkeypatch):
    args = bench.Args(out=str(tmp_path), shapes=SHAPE, repeats=2)
    bench.main(args)
    first = rows(tmp_path)
    timed = {row["provider"]: row for row in first if row["case"]["run"] == bench.BOTH}
    peers = {"naive", "liger-kernel", "cut-cross-entropy", "F.linear_cross_entropy", "torch.mm"}
    assert (
        set(timed) == peers | {f"ours: {impl}" for impl in bench.ANYWHERE}
        and set(bench.ANYWHERE) <= IMPLEMENTATIONS.keys()
    )
    for name, row in timed.items():
        if name in ("liger-kernel", "cut-cross-entropy"):
            assert row["error"] == "RuntimeError: needs a GPU" and "time_ms" not in row
        elif name != "F.linear_cross_entropy" or hasattr(F, "linear_cross_entropy"):
            assert row["error"] is None and row["memory_bytes"] >= 0
            assert len(row["time_ms"]) == 2 and all(
                0 < low <= middle <= high for middle, low, high in row["time_ms"]
            )
            assert name == "torch.mm" or row["loss_error"] < 1e-6 and row["grad_error"] < 1e-5
    assert {row["case"]["edge"] for row in first} == {
        "",
        "nothing labelled",
        "duplicate targets",
        "zero-norm word",
    }
    assert all(row["passed"] for row in first if row["provider"].startswith("ours"))
    assert {f.name for f in tmp_path.iterdir()} == {"rows.jsonl", "bench.json", "bench.txt"}
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == len(first)
    assert "FAILED" not in (tmp_path / "bench.txt").read_text()

    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    lost = json.loads(lines[3])  # the row of one provider, and half of the last line
    (tmp_path / "rows.jsonl").write_text("".join(lines[:3] + lines[4:-1]) + lines[-1][:20])
    measured = []
    monkeypatch.setattr(
        bench,
        "measure_case",
        lambda case, wanted, repeats, write: measured.extend((case.run, p.name) for p in wanted),
    )
    bench.main(args)
    last = json.loads(lines[-1])
    assert measured == [(row["case"]["run"], row["provider"]) for row in (lost, last)]


def test_whoever_raises_is_a_row_with_the_error_and_the_others_go_on(tmp_path, monkeypatch):
    def refuse(inputs):
        raise RuntimeError("no such kernel\nmore")

    everyone = {p.name: p for p in bench.providers(CASE)}
    wanted = [bench.Provider("broken", "", refuse), everyone["ours: chunked"], everyone["torch.mm"]]
    measured = []
    bench.measure_case(CASE, wanted, 1, measured.append)  # memory in a process of its own, for once
    broken, ours, floor = measured
    assert broken["error"] == "RuntimeError: no such kernel" and "time_ms" not in broken
    assert (
        ours["error"] is None
        and ours["passed"]
        and ours["memory_bytes"] > 0
        and len(ours["time_ms"]) == 2
    )
    assert "no such kernel" in bench.table([dict(row, device="here") for row in measured])


@pytest.mark.parametrize("fault", [1e-4, math.nan])
def test_a_wrong_implementation_misses_its_gate(tmp_path, monkeypatch, fault):
    def wrong(i):
        return bench.ours("reference")(i) * (1 + fault)

    monkeypatch.setattr(bench, "providers", lambda case: [bench.Provider("ours: wrong", "", wrong)])
    with pytest.raises(SystemExit) as stopped:
        bench.main(bench.Args(out=str(tmp_path), shapes=SHAPE, repeats=1))
    assert stopped.value.code == 1 and {
        row["case"]["edge"] for row in rows(tmp_path) if row["passed"]
    } <= {"nothing labelled"}


def irregular():
    """Float64 inputs with padding in the first column, unlabelled rows, repeated targets and shares
    that do not add up to 1."""
    i = bench.make_inputs(bench.Case(37, 24, 101, k=5, h="float64", w="float64"), 0)
    weights = torch.rand(37, 5, dtype=torch.float64)
    weights[::3, 0] = weights[::4, 2] = weights[1] = weights[36] = 0
    i.ids[5, 1] = i.ids[5, 3]
    return i._replace(weights=weights)


@pytest.mark.parametrize(
    "form", ["single target", "F.linear_cross_entropy", "definition", "chunked"]
)
def test_every_form_of_the_loss_is_the_float64_reference(form):
    if form == "F.linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs torch 2.13")
    loss = {
        "single target": bench.single_target(
            lambda x, w_hat, targets: F.cross_entropy(x @ w_hat.T, targets)
        ),
        "F.linear_cross_entropy": bench.single_target(partial(bench.torch_chunked, rows=8)),
        "definition": bench.plain(bench.definition),
        "chunked": bench.plain(partial(bench.chunked, rows=8)),
    }[form]
    inputs = irregular()
    value, gradient = bench.truth(inputs)
    got = bench.step(loss, inputs, True)
    assert (got - value).abs() < 1e-6 * value  # w_hat went through float32
    assert (inputs.h.grad - gradient).norm() < 1e-6 * gradient.norm()
    assert (bench.step(loss, inputs, False) - value).abs() < 1e-6 * value and inputs.h.grad is None


def test_training_step(monkeypatch):
    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    llm = dict(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    monkeypatch.setattr(bench, "MICRO", (2,))
    monkeypatch.setattr(bench, "TOKENS", 5)
    measured = []
    bench.measure_step(1, measured.append, vision, llm)
    assert [row["provider"] for row in measured] == list(bench.VARIANTS)
    assert all(
        row["error"] is None and len(row["time_ms"]) == 2 and row["tokens"] == 20
        for row in measured
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(shapes="5x0x7"), "--shapes 5x0x7"),
        (dict(repeats=-1), "less than 0"),
        (dict(tiles=True), "GPU"),
        (dict(report=True), "no measurements"),
    ],
)
def test_bad_flags_are_named(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        bench.main(bench.Args(out=str(tmp_path), **flags))


def test_from_a_shell(run, tmp_path):
    """Started as a script, from elsewhere: the project's modules are found, and a bad flag costs
    one line."""
    done = run("kernels/bench.py", "--out", tmp_path, "--shapes", "5x7", cwd=tmp_path)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: --shapes 5x7: ")
        and len(done.stderr.splitlines()) == 1
    ), done.stderr


def test_tiles_that_fail_are_rows_and_the_shipped_ones_stay(monkeypatch):
    """On a GPU alone it measures; here every tile is refused, and said to be."""
    monkeypatch.setattr(bench, "CANDIDATES", {0: [TILES["sm_80", torch.float32][0]], 1: []})
    shipped, measured = dict(TILES), []
    bench.measure_tiles(CASE, 1, measured.append)
    assert len(measured) == 2 and all("need a GPU" in row["error"] for row in measured)
    assert TILES == shipped and len({row["setting"] for row in measured}) == 2
