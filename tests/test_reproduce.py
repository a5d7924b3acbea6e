"""reproduce.py: its statistics against known values, what it runs and what it leaves, and a report
whose numbers are worked by hand.

The stages here are stand-ins of a few lines, in a folder with a copy of reproduce.py: it finds the
stages beside itself.
"""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import reproduce
from reproduce import ALIGNED, BASE, Args, check, main
from runtime import InputError

REPOSITORY = Path(reproduce.__file__).parent
STAND_IN = """
import json, os, sys, time
from pathlib import Path
script, given = Path(sys.argv[0]).name, sys.argv[1:]
value = lambda name: given[given.index(name) + 1] if name in given else None
with open("calls", "a") as file:
    file.write(" ".join([script, *given]) + "\\n")
trains = script in ("pretrain.py", "sft.py")
out = Path(value("--out") or Path(given[0]).parent)
out.mkdir(parents=True, exist_ok=True)
if value("--fail") == value("--seed") != None:
    print("some words")
    sys.stderr.write("train:  10%|#   | 1/10\\rtrain:  20%|##  | 2/10")
    sys.stderr.write("\\nerror: the reason\\ntrain:  20%|##  | 2/10\\n")
    sys.exit(2)
if "--sleep" in given and "--resume" not in given:
    (out / "resume.pt").touch()
    (out / "pid").write_text(str(os.getpid()))
    time.sleep(60)
if trains:
    (out / "resume.pt").touch()
    (out / "metrics.jsonl").write_text('{"step": 30, "val_caption_loss": 0.5}\\n')
    for step in range(int(value("--keep-every") or 30), 30, int(value("--keep-every") or 30)):
        (out / f"ckpt-{step}.pt").touch()
    (out / "ckpt.pt").touch()
elif script == "probe.py":
    (out / "probe.json").write_text('{"align": 0.3, "chance": null}')
elif "--lazy" not in given:
    score = {"value": 5.0, "low": 4.0, "high": 6.0, "n": 9}
    (out / "eval.json").write_text(json.dumps({"scores": {"test/CIDEr": score}}))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with the stand-ins and a copy of reproduce.py."""
    for name in ("pretrain", "probe", "sft", "eval"):
        (tmp_path / f"{name}.py").write_text(STAND_IN)
    shutil.copy(REPOSITORY / "reproduce.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    return tmp_path


def calls(place):
    """The command lines of the stand-ins since the last look, in the order of their starts."""
    file = place / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def alive(pid):
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


ONE = dict(variants=[BASE], seeds=1, jobs=1)

# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "freedom, quantile", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (40, 1.96)]
)
def test_intervals_are_those_of_the_tables(freedom, quantile):
    """Of values 0 and 1 in turn, half of the interval is the quantile times the mean's error."""
    values = [i % 2 for i in range(freedom + 1)]
    found, error = (
        reproduce.mean_interval(values),
        statistics.stdev(values) / math.sqrt(len(values)),
    )
    assert found == dict(
        mean=statistics.fmean(values), half=pytest.approx(quantile * error, rel=1e-4)
    )
    assert reproduce.mean_interval([3.0]) == dict(mean=3.0, half=None)


def test_paired_difference_worked_by_hand():
    """Differences 0.1, 0.3, 0.2 over the seeds of both: mean 0.2, deviation 0.1."""
    change = reproduce.change({0: 1.0, 1: 2.0, 2: 3.0, 7: 50.0}, {2: 3.2, 1: 2.3, 0: 1.1, 8: 90.0})
    assert change == pytest.approx(
        dict(difference=0.2, half=4.3027 * 0.1 / math.sqrt(3), percent=10)
    )
    shown = reproduce.shown_change
    assert shown(change) == "+10.0% (+0.200 ± 0.248)"
    assert reproduce.change({0: 1.0}, {1: 1.0}) is None is shown(None)
    assert reproduce.change({0: -2.0}, {0: -3.0}) == dict(difference=-1.0, half=None, percent=-50.0)
    assert shown(reproduce.change({0: 4e-4}, {0: 0.5})) == "+0.500"
    assert (
        shown(reproduce.change({0: 0.0, 1: 0.0}, {0: 0.5, 1: 0.5})) == "**+0.500** (+0.500 ± 0.000)"
    )


# ---- planning ------------------------------------------------------------------------------------


def plan(**given):
    """{label: [command]} of a set of flags."""
    args = check(Args(**given))
    return {
        f"{name}-{seed}": [reproduce.made_by(s, args) for s in reproduce.stages(name, seed, args)]
        for name, seed in reproduce.cells(args)
    }


def test_a_cell_is_the_six_commands_that_a_user_types(place):
    commands = plan(
        out="o/",
        seeds=2,
        pretrain_flags="--steps 7 --data a.jsonl",
        probe_flags="--data 'b c'",
        caption_eval_flags="--data d",
        sft_flags="--data e",
        eval_flags="--data f g",
    )
    assert list(commands) == [
        f"{name}-{seed}" for seed in (0, 1) for name in (BASE, ALIGNED)
    ]
    cell = "OUT/patch-aligned-1"
    assert commands["patch-aligned-1"] == [
        f"python pretrain.py --steps 7 --data a.jsonl --seed 1 --out {cell}/pretrain",
        f"python probe.py {cell}/pretrain/ckpt.pt --data 'b c'",
        f"python eval.py {cell}/pretrain/ckpt.pt --data d",
        f"python sft.py {cell}/pretrain/ckpt.pt --data e --seed 1 --out {cell}/sft",
        f"python probe.py {cell}/sft/ckpt.pt --data 'b c'",
        f"python eval.py {cell}/sft/ckpt.pt --data f g",
    ]


def test_what_the_variants_and_ablations_change(place):
    commands = plan(seeds=1, ablations=True)
    flags = {
        label: line[0].removeprefix("python pretrain.py ").partition("--seed 0")[0].strip()
        for label, line in commands.items()
    }
    assert flags.pop("caption-only-0") == "--patch-weight 0"
    assert flags.pop("patch-aligned-0") == ""
    constant = "--patch-schedule constant"
    assert flags == {
        "constant-0": constant,
        "decay-0": "--patch-schedule decay",
        "constant-0.1-0": f"{constant} --patch-weight 0.1",
        "constant-0.3-0": f"{constant} --patch-weight 0.3",
        "constant-0.3-tau-0.03-0": f"{constant} --patch-weight 0.3 --tau 0.03",
        "tau-0.03-0": "--tau 0.03",
        "weight-0.3-0": "--patch-weight 0.3",
        "weight-3-0": "--patch-weight 3",
        "cosine-0": "--patch-loss cosine",
        "centre-words-0": "--centre-words",
        "linear-caption-only-0": "--projector linear --patch-weight 0",
        "linear-0": "--projector linear",
    }
    for stage in (0, 3):
        kept = [label for label, line in commands.items() if "--keep-every 100" in line[stage]]
        assert kept == ["caption-only-0", "patch-aligned-0"]


def test_the_stages_know_every_flag_that_is_given_to_them(place):
    """What reproduce.py writes on a command line, the real pretrain.py, probe.py, sft.py and
    eval.py read."""
    import eval as evaluation
    import pretrain
    import probe
    import runtime
    import sft

    modules = {"pretrain.py": pretrain, "probe.py": probe, "eval.py": evaluation, "sft.py": sft}
    (place / "runs/quick/caption-only-0/sft").mkdir(parents=True)
    (place / "runs/quick/caption-only-0/sft/ckpt-100.pt").touch()
    first, *others = plan(ablations=True, quick=True).values()
    for command in [*first, *(commands[0] for commands in others)]:
        _, script, *given = command.split()
        runtime.parse(modules[script].Args, "", given)


def test_quick_is_one_seed_in_a_folder_of_its_own(place):
    args = check(Args(quick=True))
    assert (args.out, args.seeds) == ("runs/quick", 1)
    assert check(Args(quick=True, out="else")).out == "else"
    assert check(Args(quick=True, seeds=5)).seeds == 5 == check(Args()).seeds
    pretrain, *_ = plan(quick=True, pretrain_flags="--lr 1")["caption-only-0"]
    assert pretrain.startswith("python pretrain.py --steps 100 --lr 1 --patch-weight 0")


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(variants=["caption"]), "--variants caption: choose from caption-only"),
        (dict(seeds=-1), "--seeds -1 is less than 0"),
        (dict(budget=-1), "--budget -1 is less than 0"),
        (dict(sft_flags="--steps 3 --seed=4"), "--sft-flags: --seed cannot be given there"),
        (dict(pretrain_flags="--patch-weight 1"), "--pretrain-flags: --patch-weight cannot"),
        (
            dict(pretrain_flags="--data x", sft_flags="--data y"),
            "--probe-flags, --caption-eval-flags, --eval-flags: no --data",
        ),
        (
            dict(caption_eval_flags="--data 'x"),
            "--caption-eval-flags --data 'x: no closing quotation",
        ),
    ],
)
def test_flags_that_make_no_sense_are_refused(given, message):
    with pytest.raises(InputError, match="^" + message):
        check(Args(**given))


# ---- running -------------------------------------------------------------------------------------


def test_it_runs_once_and_goes_on_where_something_is_missing(place, capsys):
    args = Args(**ONE, keep_every=10)
    main(args)
    lines = calls(place)
    assert [line.split(".")[0] for line in lines] == [
        "pretrain",
        "probe",
        "eval",
        "sft",
        "probe",
        "eval",
        "probe",
        "probe",
        "eval",
        "eval",
        "eval",
    ]
    tuned = "runs/reproduce/caption-only-0/sft"
    first = "runs/reproduce/caption-only-0/pretrain"
    assert lines[-5:-3] == [
        f"probe.py {first}/ckpt-{step}.pt --show 0 --out {first}/step-{step}" for step in (10, 20)
    ]
    assert lines[-3:] == [
        f"eval.py {tuned}/{name}.pt --limit 300 --out {tuned}/step-{step}"
        for name, step in (("ckpt-10", 10), ("ckpt-20", 20), ("ckpt", 30))
    ]
    assert capsys.readouterr().out.endswith("results.md; next: read runs/reproduce/results.md\n")
    cell = Path("runs/reproduce/caption-only-0")
    left = {str(f.relative_to(cell)) for f in cell.rglob("*") if f.is_file()}
    assert (
        "sft/ckpt.pt" in left
        and "pretrain/ckpt.pt" in left
        and "sft/step-20/eval.json" in left
        and "step-20.log" in left
    )
    assert not any("resume" in name or "ckpt-" in name for name in left)

    main(args)
    assert calls(place) == []
    main(dataclasses.replace(args, report=True))
    assert calls(place) == []
    (place / tuned / "probe.json").unlink()
    main(dataclasses.replace(args, seeds=2))
    assert [line.split()[0] for line in calls(place)] == [
        "probe.py",
        *(line.split()[0] for line in lines),
    ]


@pytest.mark.parametrize(
    "other", [dict(sft_flags="--steps 3"), dict(keep_every=7), dict(probe_flags="--images 3")]
)
def test_results_of_other_flags_are_not_mixed(place, other):
    args = Args(**ONE | dict(variants=[ALIGNED]))
    main(args)
    shutil.move("runs/reproduce", "elsewhere")  # the folder may be moved, and goes by another name
    main(dataclasses.replace(args, out=str(place / "elsewhere")))
    calls(place)
    with pytest.raises(
        InputError,
        match=r"^elsewhere/patch-aligned-0 is from `python .*`, where it would now be `python .*"
        "delete that",
    ):
        main(dataclasses.replace(args, out="elsewhere", **other))
    (place / "elsewhere/patch-aligned-0/sft.command.json").unlink()
    with pytest.raises(InputError, match="is from `another program`"):
        main(dataclasses.replace(args, out="elsewhere"))
    assert calls(place) == []


def test_the_budget_ends_the_stages_and_the_next_call_resumes_them(place, capsys):
    args = Args(**ONE | dict(seeds=2, jobs=2), budget=2.5, sft_flags="--sleep 1")
    began = time.time()
    main(args)
    assert time.time() - began < 10
    assert "incomplete: 6 stages or more are left" in capsys.readouterr().out and not list(
        place.rglob("results.md")
    )
    for seed in (0, 1):
        assert not alive(int(Path(f"runs/reproduce/caption-only-{seed}/sft/pid").read_text()))
    assert len(calls(place)) == 8
    file = Path("runs/reproduce/caption-only-0/sft.command.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "abc; def"}))
    main(dataclasses.replace(args, budget=60))
    assert json.loads(file.read_text())["commit"].startswith("abc; def; ")  # it ran on all of them
    lines = calls(place)
    assert [line.split()[0] for line in lines].count("sft.py") == 2 and len(lines) == 8
    assert all(line.endswith("--resume") == line.startswith("sft.py") for line in lines)
    assert (
        json.loads(Path("runs/reproduce/caption-only-0/sft.command.json").read_text())["seconds"]
        > 0.5
    )


def test_jobs_are_how_many_run_at_a_time(place, monkeypatch):
    most, start = [0], reproduce.start

    def counted(*arguments):
        running[:] = [p for p in running if p.poll() is None] + [process := start(*arguments)]
        most[0] = max(most[0], len(running))
        return process

    running = []
    monkeypatch.setattr(reproduce, "start", counted)
    main(Args(seeds=2, jobs=3))
    assert most == [3]


def test_a_failing_stage_is_one_line_and_ends_the_others(place):
    folder = "runs/reproduce/caption-only-1"
    with pytest.raises(InputError) as error:
        failing = "--sleep 1 --fail 1"
        main(Args(variants=[BASE], seeds=2, jobs=2, keep_every=0, pretrain_flags=failing))
    assert str(error.value) == (
        f"python pretrain.py --sleep 1 --fail 1 --patch-weight 0 --seed 1 --out {folder}/pretrain"
        f" failed ({folder}/pretrain.log): the reason"
    )
    assert "some words" in (place / folder / "pretrain.log").read_text()
    pids = list(place.rglob("pid"))
    assert not any(alive(int(file.read_text())) for file in pids)
    assert len(calls(place)) == 1 + len(pids)


def test_a_stage_that_writes_nothing_or_is_killed_has_failed(place):
    with pytest.raises(
        InputError, match=r"eval\.py .* failed \(.*captions\.log\): no .*eval\.json"
    ):
        main(Args(**ONE, caption_eval_flags="--limit 3 --lazy"))
    (place / "eval.py").write_text("import os; os.abort()")
    with pytest.raises(InputError, match=r"failed \(.*captions\.log\): ended by signal 6"):
        main(Args(**ONE, caption_eval_flags="--limit 3 --lazy"))


def sleeper(place):
    """Wait for the number of the process that sleeps in place of pretraining."""
    file, until = place / "runs/reproduce/caption-only-0/pretrain/pid", time.time() + 60
    while not (file.exists() and file.read_text()) and time.time() < until:
        time.sleep(0.05)
    return int(file.read_text())


@pytest.fixture
def interruptible():
    """SIGINT interrupts, as in a terminal; in the background it may be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_stages(place, capsys, interruptible):
    threading.Thread(target=lambda: (sleeper(place), os.kill(os.getpid(), signal.SIGINT))).start()
    with pytest.raises(SystemExit) as ended:
        main(Args(**ONE, pretrain_flags="--sleep 1"))
    assert ended.value.code == 130 and "run the same command again" in capsys.readouterr().out
    assert not alive(sleeper(place))


def test_being_ended_ends_the_stages(place):
    command = [
        sys.executable,
        "reproduce.py",
        "--jobs",
        "1",
        "--seeds",
        "1",
        "--pretrain-flags",
        "--sleep 1",
    ]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE, text=True
    )
    pid = sleeper(place)
    process.terminate()
    assert "Traceback" not in process.communicate(timeout=20)[1] and process.returncode == 143
    assert not alive(pid)


# ---- report --------------------------------------------------------------------------------------


def fabricate(out, label, align, scores, curve=None, steps=90):
    """A cell's files, as the stages would write them; scores {KEY: value}, curve {step: {KEY:
    value}}."""

    def evaluation(folder, values):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "eval.json").write_text(
            json.dumps(
                {
                    "scores": {
                        key: {
                            "value": v,
                            "low": v - 0.04,
                            "high": v + 0.05,
                            "n": 10 - 3 * key.endswith("/color"),
                        }
                        for key, v in values.items()
                    }
                }
            )
        )

    for stage, key in (("pretrain", "val_caption_loss"), ("sft", "val_loss")):
        folder = out / label / stage
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ckpt.pt").touch()
        evaluation(folder, scores if stage == "sft" else {"flickr/CIDEr": 2 * align})
        (folder / "probe.json").write_text(
            json.dumps(
                {
                    "align": align,
                    "chance": 0.05,
                    "entropy": {"encoder": 2.0, "projected": 1.5},
                    "recall": {"5": None},
                    "pursuit": {"recall": [0.1, 0.25]},
                }
            )
        )
        (folder / "metrics.jsonl").write_text(
            f'{{"step": {steps - 1}, "{key}": 9.0}}\n{{"step": {steps}, "{key}": 0.7}}\n'
        )
    for step, values in (curve or {}).items():
        evaluation(out / label / "sft" / f"step-{step}", values)


def row(text, label):
    """The cells of a table's row."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def reported(keep_every=0, **flags):
    """results.md of fabricated cells, whose stages were all run on one machine, in a minute
    each."""
    args = Args(out="o", report=True, keep_every=keep_every, **flags)
    here = dict(
        hardware="an abacus", python="3.11", torch="2", transformers="5", commit="abc", date="today"
    )
    for name, seed in reproduce.cells(check(args)):
        there = (Path("o") / f"{name}-{seed}").exists()
        for stage in reproduce.stages(name, seed, check(args)) if there else []:
            stage.output.touch()
            command = reproduce.made_by(stage, check(args))
            reproduce.record(stage, command=command, seconds=60, **here)
    main(args)
    return Path("o/results.md").read_text()


GROUNDING, ANSWERS, INSTRUCTIONS = (
    "flickr_test_refer/Acc@0.5",
    "flickr_test_vqa/accuracy",
    "flickr_test_instruct/exact",
)


def test_report_worked_by_hand(place):
    """Grounding: 0.4, 0.5, 0.6 against +0.1, +0.12, +0.08, so +20 %, deviation 0.02, half-width
    4.30265 * 0.02 / sqrt(3) = 0.0497, clear. Answers: the same mean gain of 0.1 with deviation 0.1,
    not clear."""
    for seed, (base, gain, other) in enumerate(
        [(0.4, 0.1, 0.0), (0.5, 0.12, 0.1), (0.6, 0.08, 0.2)]
    ):
        for variant, more in ((BASE, 0), (ALIGNED, 1)):
            scores = {
                ANSWERS: 0.8 + more * other,
                f"{ANSWERS}/color": 0.9,
                "flickr_test_vqa/exact": 0.123,
                GROUNDING: base + more * gain,
                "hard_refer/Acc@0.5": 0.7 + more,
                "flickr_test_refer/Acc@0.5 (square)": 0.31,
                INSTRUCTIONS: 0.5 - more * 0.1,
                "flickr_test_instruct/accuracy": 0.99,
                "flickr_test_instruct/choice": 0.25,
                "flickr_test_vqa/unheard-of": 0.1,
                "hard_refer/Acc@0.5/only": 0.7 + more,
            }
            fabricate(place / "o", f"{variant}-{seed}", 0.1 + 0.2 * more, scores)
    text = reported(seeds=4)
    assert row(text, "grounding, Acc@0.5, flickr_test_refer") == [
        "0.500 ± 0.248",
        "0.600 ± 0.228",
        "**+20.0%** (+0.100 ± 0.050)",
        "+16%",
    ]
    assert row(text, "question answering, flickr_test_vqa") == [
        "0.800 ± 0.000",
        "0.900 ± 0.248",
        "+12.5% (+0.100 ± 0.248)",
        "+4%",
    ]
    assert row(text, "question answering, color, flickr_test_vqa")[2:] == [
        "+0.0% (+0.000 ± 0.000)",
        "",
    ]
    assert row(text, "instruction following, flickr_test_instruct")[2:] == [
        "**-20.0%** (-0.100 ± 0.000)",
        "+3%",
    ]
    assert row(text, "grounding, Acc@0.5, hard_refer")[-1] == ""
    assert row(text, "grounding, Acc@0.5 (square), flickr_test_refer")[0] == "0.310 ± 0.000"
    assert row(text, "multiple choice, flickr_test_instruct")[0] == "0.250 ± 0.000"
    assert row(text, "words among 2 atoms")[0] == "0.250 ± 0.000" and "4 atoms" not in text
    assert row(text, "captions, CIDEr, flickr")[:2] == ["0.200 ± 0.000", "0.600 ± 0.000"]
    assert row(text, "caption loss, validation, nats per token")[0] == "0.700 ± 0.000"
    assert ", only" not in text  # the only kind of its file says nothing new
    assert (
        "0.123" not in text
        and "0.990" not in text
        and "unheard-of" not in text
        and "recall@5" not in text
    )
    assert "fine-tuning steps" not in text and "Ablations" not in text
    kept = json.loads(Path("o/results.json").read_text())
    first = next(r for r in kept["rows"] if r["key"] == GROUNDING and r["part"] == reproduce.AFTER)
    assert (
        first["scores"][ALIGNED]["seeds"] == pytest.approx({"0": 0.5, "1": 0.62, "2": 0.68})
        and first["paper"] == 16
    )
    assert "\n- hardware: an abacus\n" in text
    assert (
        "- minutes, mean: pretrain 1.0, probe 1.0, captions 1.0, sft 1.0, sft-probe 1.0, eval 1.0\n"
        in text
    )
    assert "**Not complete: 12 of 48 stages have not run.**" in text


def test_one_seed_has_no_interval(place):
    for variant, score in ((BASE, 0.4), (ALIGNED, 0.5)):
        fabricate(place / "o", f"{variant}-0", 0.1, {GROUNDING: score})
    text = reported(seeds=1, variants=[BASE, ALIGNED])
    assert "Not complete" not in text and "**+" not in text
    assert row(text, "grounding, Acc@0.5, flickr_test_refer") == [
        "0.400",
        "0.500",
        "+25.0%",
        "+16%",
    ]
    assert row(text, "alignment")[0] == "0.100"


def test_curve_and_ablations(place):
    for seed in (0, 1, 2):
        for variant, more in ((BASE, 0), (ALIGNED, 0.02)):
            scores = {GROUNDING: 0.6 + 0.01 * seed + more * 2, ANSWERS: 0.9 + more}
            curve = {
                30: {GROUNDING: 0.3 - more + 0.01 * seed},
                60: {GROUNDING: 0.5 + more},
                90: {GROUNDING: scores[GROUNDING] + 0.01},
            }
            fabricate(place / "o", f"{variant}-{seed}", 0.1, scores, curve)
            early = place / "o" / f"{variant}-{seed}" / "pretrain/step-0"
            early.mkdir()
            (early / "probe.json").write_text(json.dumps({"entropy": {"projected": 2.5 + more}}))
    fabricate(place / "o", "linear-caption-only-0", 0.1, {GROUNDING: 0.2})
    fabricate(place / "o", "linear-0", 0.2, {GROUNDING: 0.3})
    fabricate(place / "o", "tau-0.03-0", 0.3, {GROUNDING: 0.3})
    text = reported(keep_every=30, seeds=3, ablations=True)
    assert row(text, "grounding, Acc@0.5, flickr_test_refer, 30 steps")[:2] == [
        "0.310 ± 0.025",
        "0.290 ± 0.025",
    ]
    assert row(text, "grounding, Acc@0.5, flickr_test_refer, 90 steps")[1] == "0.660 ± 0.025"
    assert [row(text, f"entropy of H per image, nats, {step} steps")[1] for step in (0, 90)] == [
        "2.520 ± 0.000",
        "1.500 ± 0.000",
    ]
    table = text.partition("## Ablations")[2]
    assert row(table, "linear")[-2] == "0.300" and row(table, "linear-caption-only")[-2] == "0.200"
    assert row(table, "tau-0.03")[-2:] == ["0.300", ""] and row(table, "tau-0.03")[1] == "0.300"


def test_figures_are_drawn_from_the_committed_json(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    specification = importlib.util.spec_from_file_location(
        "figures", REPOSITORY / "docs" / "figures.py"
    )
    figures = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(figures)
    for name in ("results.json", "bench.json"):
        shutil.copy(REPOSITORY / "docs" / name, tmp_path)
    monkeypatch.setattr(figures, "HERE", tmp_path)
    figures.draw_results()
    figures.draw_compression()
    figures.draw_bench()
    for name in ("results", "compression", "bench"):
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000


def test_nothing_to_report(place):
    with pytest.raises(InputError, match="nothing to report yet"):
        main(Args(report=True))
