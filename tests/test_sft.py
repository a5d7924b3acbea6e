"""Stage 2 from a user's shell: full and LoRA; one process, two, and two in shards give the same; it
resumes, merges, refuses bad input."""

import contextlib
import json
import re
import shutil

import pytest
import torch

import data
import sft
from model import load_checkpoint, read_checkpoint

SMALL = ["--lora-rank", 4, "--lora-alpha", 8]
TUNE = {"full": [], "lora": ["--tune", "lora", *SMALL, "--lora-dropout", 0]}


@pytest.fixture(scope="module")
def start(here, world, tmp_path_factory):
    """An untrained projector's checkpoint, of stage pretrain."""
    out = tmp_path_factory.mktemp("start")
    done = here(
        "pretrain.py",
        "--data",
        world / "train.jsonl",
        "--image-dir",
        world / "images",
        "--steps",
        0,
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    return out / "ckpt.pt"


@pytest.fixture(scope="module")
def flags(start, world):
    """A short run on the small world; later flags override earlier ones."""
    return [
        start,
        "--data",
        world / "train_sft.jsonl",
        "--image-dir",
        world / "images",
        "--val-data",
        world / "val_sft.jsonl",
        "--steps",
        4,
        "--batch-size",
        8,
        "--log-every",
        1,
        "--prompt",
        "chat",
        "--lr",
        1e-3,
        "--projector-lr",
        3e-3,
    ]


def finished(done):
    """The standard output of a run that must have succeeded."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def log(folder, key="loss"):
    """{step: value} of a key of metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def assert_same(a, b, tolerance):
    """Two runs logged the same losses and ended in the same weights."""
    for key in ("loss", "val_loss", "grad_norm"):
        assert log(a, key) == pytest.approx(log(b, key), rel=tolerance), key
    states = [read_checkpoint(folder / "ckpt.pt")["model"] for folder in (a, b)]
    assert states[0].keys() == states[1].keys()
    difference = torch.cat(
        [(states[0][name].float() - states[1][name].float()).abs().flatten() for name in states[0]]
    )
    assert (
        difference.mean() <= tolerance and difference.max() <= 100 * tolerance
    )  # Adam divides small gradients


@pytest.fixture(scope="module", params=["full", "lora"])
def straight(request, here, flags, tmp_path_factory):
    """One process, batches in one piece: (how it is tuned, its folder, what it printed)."""
    out = tmp_path_factory.mktemp(request.param)
    return request.param, out, finished(here("sft.py", *flags, *TUNE[request.param], "--out", out))


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="on GPUs the products are in bfloat16, which rounds differently in smaller batches",
)
@pytest.mark.parametrize(
    "how", [["--micro-batch", 3], ["--shard", "--checkpointing"]], ids=["replicated", "sharded"]
)
def test_two_processes_give_what_one_gives(ranks, flags, straight, how, tmp_path):
    tune, out, _ = straight
    if tune == "lora" and "--shard" not in how:
        pytest.skip("replicated, LoRA's gradients are summed by the same line")
    said = finished(ranks("sft.py", *flags, *TUNE[tune], *how, "--out", tmp_path))
    assert "2 processes" in said and ("in shards" in said) == ("--shard" in how)
    assert_same(out, tmp_path, 2e-5)


def test_what_is_trained_and_said(straight, start):
    """The checkpoint holds what was trained and nothing else, it moved, and the run says what it
    inherited."""
    tune, out, said = straight
    between = r"mlp2x_gelu between backbones/toy-clip \(96 px, .* and backbones/toy-llama; patch"
    assert re.search(rf"inherited from .*ckpt.pt: {between}", said)
    assert re.search(r"records, \d+ answers, \d+ records without an image", said)
    assert (
        said.splitlines()[-1] == f"wrote {out / 'ckpt.pt'}; next: python eval.py {out / 'ckpt.pt'}"
    )
    checkpoint, before = read_checkpoint(out / "ckpt.pt"), read_checkpoint(start)
    names = set(checkpoint["model"])
    assert (
        checkpoint["stage"] == "sft"
        and checkpoint["config"]["tune"] == tune
        and checkpoint["config"]["prompt"] == "chat"
    )
    assert {n for n in names if n.startswith("projector.")} == set(before["model"])
    assert all(n.endswith((".A", ".B")) for n in names - set(before["model"])) == (tune == "lora")
    assert not any("vision" in n or n.startswith("encoder") for n in names)
    model, _ = load_checkpoint(out / "ckpt.pt")
    fresh, _ = load_checkpoint(start)
    assert (model.projector[0].weight != fresh.projector[0].weight).any()
    moved = [
        n
        for n, p in model.llm.named_parameters()
        if p.requires_grad and (n.endswith(".B") and p.any() or tune == "full")
    ]
    assert (
        len(moved)
        == sum(n.endswith(".B") or tune == "full" for n in names - set(before["model"]))
        > 20
    )
    assert log(out)[4] < log(out)[1] and set(log(out, "val_loss")) == {1, 2, 3, 4}
    assert [log(out, "lr")[step] for step in (1, 3)] == [
        1e-3,
        5e-4,
    ]  # cosine, no warm-up in 4 steps
    if tune == "full":  # Adam moves a weight by about its group's learning rate a step
        far = [
            max(
                (p - q).abs().max()
                for p, q in zip(
                    getattr(model, part).parameters(), getattr(fresh, part).parameters()
                )
            )
            for part in ("projector", "llm")
        ]
        assert 2 < far[0] / far[1] < 4


def test_only_answers_are_learnt_and_images_are_optional(start, world):
    """Every label is an answer's token or the end of one, whatever the number of turns."""
    model, _ = load_checkpoint(start)
    model.config |= dict(prompt="chat", geometry="pad")
    dataset = model.records(world / "train_sft.jsonl", world / "images", require_image=False)
    seen = set()
    for record, sample in zip(dataset.records, (dataset[i] for i in range(len(dataset)))):
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        learnt = model.tokenizer.decode([t for t in sample["labels"] if t != data.IGNORE])
        assert learnt == "".join(f" {answer}</s>" for answer in answers)
        seen.add((len(answers) > 1, "image" in record))
    assert {(True, True), (True, False)} <= seen
    alone = data.collate(
        [dataset[i] for i, r in enumerate(dataset.records) if "image" not in r][:2], model.pad_id
    )
    model.tune("full")
    model(alone)[
        "caption_loss"
    ].backward()  # no image at all: the projector's gradient is zero, not absent
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())


def test_merged_lora_generates_what_the_factors_do(here, flags, world, tmp_path):
    """With large factors, so that they matter; and training itself is the same, merged or not."""
    large = [
        *flags,
        *SMALL,
        "--tune",
        "lora",
        "--lora-modules",
        "q_proj",
        "down_proj",
        "--lr",
        0.03,
        "--out",
    ]
    finished(here("sft.py", *large, tmp_path / "factors"))
    finished(here("sft.py", *large, tmp_path / "merged", "--merge"))
    factors, merged = (
        load_checkpoint(tmp_path / name / "ckpt.pt")[0].eval() for name in ("factors", "merged")
    )
    assert merged.config["tune"] == "full" and "lora" not in merged.config
    assert {n.rsplit(".", 2)[-2] for n in factors.trained_state() if n.endswith(".A")} == {
        "q_proj",
        "down_proj",
    }
    records = data.read_records(world / "train.jsonl")[:6]
    prompts = [
        data.tokenize_prompt(r["conversations"], factors.tokenizer, "chat", 64) for r in records
    ]
    pixels = torch.stack(
        [
            factors.records(world / "train.jsonl", world / "images")[i]["pixel_values"]
            for i in range(6)
        ]
    )
    said = [model.generate(prompts, pixels, max_new_tokens=12) for model in (factors, merged)]
    assert said[0] == said[1]
    factors.llm.apply(lambda m: setattr(m, "scale", 0.0))
    assert factors.generate(prompts, pixels, max_new_tokens=12) != said[0]


def test_the_recipe_is_llavas(start):
    full, lora = (
        sft.check(sft.Args(str(start), data="there/talk.json", tune=tune))
        for tune in ("full", "lora")
    )
    assert (full.lr, full.projector_lr, full.batch_size, full.prompt, full.image_dir) == (
        2e-5,
        2e-5,
        128,
        "v1",
        "there/images",
    )
    assert (lora.lr, lora.projector_lr) == (2e-4, 2e-5)
    for checkpointing in (False, True):
        model = sft.inherit(
            sft.Args(str(start), prompt="chat", geometry="stretch", checkpointing=checkpointing),
            torch.float32,
        )
        assert (model.config["prompt"], model.config["geometry"]) == ("chat", "stretch")
        assert model.llm.model.gradient_checkpointing == checkpointing


@pytest.fixture(scope="module")
def broken(flags, world, tmp_path_factory):
    """(flags of eight steps, the file of an image that only the sixth step needs)."""
    images = tmp_path_factory.mktemp("broken") / "images"
    shutil.copytree(world / "images", images)
    records = data.read_records(world / "train_sft.jsonl")
    sampler = data.StepSampler(len(records), 8, 0)
    steps = [{records[i].get("image") for i in sampler.indices(step)} for step in range(6)]
    name = sorted(steps[5] - set().union(*steps[:5]) - {None})[0]
    more = ["--steps", 8, "--save-every", 4, "--image-dir", images]
    return [*flags, *more], images / name


@contextlib.contextmanager
def cut(image):
    """The file, broken off while the context is open."""
    whole = image.read_bytes()
    image.write_bytes(whole[:700])
    yield
    image.write_bytes(whole)


@pytest.mark.parametrize("tune", ["dropout", "sharded"])
def test_resuming_in_mid_epoch_is_not_noticeable(ranks, here, broken, tune, tmp_path):
    """An image of the sixth step is broken: one line, and resume.pt of step 5, but of step 4 where
    an error stops the gathering of shards. Mended and
    resumed, dropout and all, the run ends as if unstopped."""
    arguments, image = broken
    sharded = ["sft.py", *arguments, "--shard"]
    dropping = ["sft.py", *arguments, *TUNE["lora"], "--lora-dropout", 0.2]

    def stage(*more):
        if tune == "sharded":
            return ranks(*sharded, "--out", *more)
        return here(*dropping, "--out", *more)

    finished(stage(tmp_path / "straight", "--keep-every", 3))
    kept = sorted(f.name for f in (tmp_path / "straight").glob("ckpt*"))
    assert kept == ["ckpt-3.pt", "ckpt-6.pt", "ckpt.pt"]
    with cut(image):
        stopped = stage(tmp_path / "run")
    assert re.search(rf"error: .*{image.name}.*truncated", stopped.stderr), stopped.stderr
    assert stopped.returncode
    left = {f.name for f in (tmp_path / "run").iterdir()} - {".lock"}  # of one ended by a signal
    assert left == {"resume.pt", "metrics.jsonl"}
    step = 4 if tune == "sharded" else 5
    assert f"at step {step}" in finished(stage(tmp_path / "run", "--resume"))
    assert_same(tmp_path / "straight", tmp_path / "run", 0)
    early, last = (read_checkpoint(tmp_path / "straight" / name) for name in (kept[0], kept[-1]))
    assert early["metrics"] == {"steps": 3} and last["metrics"]["steps"] == 8
    assert early["model"].keys() == last["model"].keys()
    assert any((early["model"][n] != t).any() for n, t in last["model"].items())


def test_what_may_change_when_a_run_goes_on(here, flags, tmp_path):
    """Where the checkpoint lies may change; what it holds, or another learning rate, may not."""
    flags = [*flags[1:], *TUNE["lora"], "--out", tmp_path / "run"], flags[0]
    arguments, checkpoint = flags
    finished(here("sft.py", checkpoint, *arguments, "--save-every", 2, "--steps", 2))
    moved = shutil.copy(checkpoint, tmp_path / "moved.pt")
    other = read_checkpoint(checkpoint)
    torch.save(other | {"config": other["config"] | {"tau": 0.5}}, tmp_path / "other.pt")
    goes_on = [*arguments, "--steps", 2, "--resume"]
    changed = here("sft.py", checkpoint, *goes_on, "--lr", 0.5)
    assert changed.returncode and "with --lr 0.001; use the same flags" in changed.stderr
    refused = here("sft.py", tmp_path / "other.pt", *goes_on)
    assert re.search("^error: --resume: .*resume.pt is not from .*other.pt", refused.stderr)
    assert "at step 2" in finished(here("sft.py", moved, *goes_on))


def test_gradients_are_clipped(here, flags, start, tmp_path, monkeypatch):
    """Clipped to far below Adam's epsilon, they move nothing."""
    monkeypatch.setattr(sft, "CLIP", 1e-14)
    finished(here("sft.py", *flags, "--steps", 1, "--out", tmp_path))
    before, after = (read_checkpoint(path)["model"] for path in (start, tmp_path / "ckpt.pt"))
    assert max((after[name] - tensor).abs().max() for name, tensor in before.items()) < 1e-6


def test_overfitting_one_batch(here, flags, tmp_path):
    finished(here("sft.py", *flags, "--overfit", "--steps", 30, "--out", tmp_path))
    assert log(tmp_path)[30] < 0.6 * log(tmp_path)[1]


BROKEN = {
    "stage": (
        ["{sft}"],
        "a checkpoint of stage sft; sft.py starts from one that torchrun pretrain.py has written",
    ),
    "checkpoint": (["nowhere.pt"], "nowhere.pt: no such checkpoint file"),
    "merge": (
        ["{start}", "--merge", "--lora-rank", 4],
        "--lora-rank, --merge: of use with --tune lora only",
    ),
    "shard": (
        ["{start}", "--shard"],
        "--shard splits the model over processes: start it with torchrun",
    ),
    "modules": (
        ["{start}", "--tune", "lora", "--lora-modules", "query", "{data}"],
        "--lora-modules query: choose from the language",
    ),
    "prompt": (["{start}", "--prompt", "plain"], "--prompt: invalid choice"),
    "data": (["{start}", "--image-dir", "x"], "--image-dir needs --data"),
    "empty": (["{start}", "{empty}"], "holds no records"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_one_line(case, here, start, world, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    whole = read_checkpoint(start)
    torch.save(whole | {"stage": "sft"}, tmp_path / "sft.pt")
    filled = {
        "{sft}": [tmp_path / "sft.pt"],
        "{start}": [start],
        "{empty}": ["--data", tmp_path / "empty.jsonl"],
        "{data}": ["--data", world / "train_sft.jsonl", "--image-dir", world / "images"],
    }
    arguments = [a for word in BROKEN[case][0] for a in filled.get(word, [word])]
    done = here("sft.py", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1 and BROKEN[case][1] in done.stderr
    assert not list((tmp_path / "out").glob("ckpt*"))
