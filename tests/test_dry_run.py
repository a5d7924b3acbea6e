"""The dry run against published figures, a closed formula, real steps on a CPU; flag files."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig

import data
import pretrain
import runtime
import sft
from extras import dry_run
from model import PatchAlignedModel

ROOT = Path(runtime.__file__).parent
CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
VICUNA = dict(
    model_type="llama",
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    intermediate_size=11008,
    vocab_size=32000,
)
B, T, FIRST, P = 4, 192, 70, 64  # a batch for the toy backbones; T a multiple of attention's blocks


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A folder with LLaVA-1.5-7B's published configurations, no weights, and a flag file."""
    folder = tmp_path_factory.mktemp("llava")
    for name, config in (("clip", CLIP), ("vicuna", VICUNA)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "clip" / "preprocessor_config.json").write_text(
        json.dumps(dict(crop_size=dict(height=336, width=336)))
    )
    (folder / "flags.txt").write_text(
        f"@{ROOT}/presets/llava-1.5-7b.pretrain.txt\n\n# no weights here\n--vision {folder}/clip"
        f" --llm '{folder}/vicuna'  # folders\n"
    )
    return folder


def config(**changes):
    """The toy backbones, as pretrain.py would take them."""
    return {name: getattr(pretrain.Args(), name) for name in pretrain.CONFIG} | changes


def toy_model(weights, tune, dtype):
    """The toy model as a stage makes it ready: stage 1 (tune ""), or stage 2 (full, lora)."""
    model = PatchAlignedModel(config(), dtype, weights)
    if tune:
        with torch.device("cpu" if weights else "meta"):
            sft.prepare(model, sft.Args("", tune=tune, lora_rank=8, prompt="v1"))
    return model.train()


def real_batch():
    """Random numbers in the shape that the dry run is told."""
    torch.manual_seed(0)
    ids = torch.randint(3, 600, (B, T))
    ids[:, 1 : 1 + P] = data.IMAGE_TOKEN
    labels = ids.clone()
    labels[:, :FIRST] = data.IGNORE
    places = (ids.flatten() == data.IMAGE_TOKEN).nonzero().squeeze(1)
    return dict(
        input_ids=ids,
        labels=labels,
        first_label=FIRST,
        places=places,
        pixel_values=torch.randn(B, 3, 96, 96),
        patch_ids=torch.randint(600, (B, P, 4)),
        patch_weights=torch.full((B, P, 4), 0.25),
    )


def allocated(call):
    """The most bytes that torch's CPU allocator held during the call, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# ---- against a real step -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "tune, checkpointing",
    [("", False), ("full", False), ("full", True), ("lora", False), ("lora", True)],
    ids=["stage1", "full", "full-recomputed", "lora", "lora-recomputed"],
)
def test_memory_is_that_of_a_real_step(tune, dtype, checkpointing):
    """Every part equals what a real step on a CPU holds, both peaks what is allocated, to 3 %."""
    model = toy_model(True, tune, dtype)
    if checkpointing:
        model.llm.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    batch, trained = real_batch(), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)

    def passes():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            sums = model(batch)
        loss = sums["caption_loss"] + sums.get("patch_loss", 0)
        del sums
        loss.backward()

    def update():
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    kept, own = [], {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        sums = model(batch)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    saved = sum(size for pointer, size in storages.items() if pointer not in own)
    kept.clear()
    (sums["caption_loss"] + sums.get("patch_loss", 0)).backward()
    del sums
    update()
    held = dry_run.bytes_of([*model.parameters(), *model.buffers()])
    state = dry_run.bytes_of(
        t for values in optimizer.state.values() for name, t in values.items() if name != "step"
    )
    gradients = dry_run.bytes_of(p.grad for p in trained)
    with_gradients = held + state + gradients
    peak_accumulating = with_gradients + allocated(passes)
    peak_update = with_gradients + allocated(update)
    optimizer.zero_grad(set_to_none=True)
    peak = held + state + allocated(passes)

    found = dry_run.memory(
        toy_model(False, tune, dtype), dry_run.Shape(B, B, T, FIRST), dtype, False, checkpointing
    )
    assert found["frozen"] + found["trained"] == held
    assert (found["gradients"], found["optimizer"]) == (gradients, state)
    assert found["saved"] + found["copies"] == pytest.approx(
        saved, abs=200
    )  # attention's seeds: 16 bytes a layer
    assert found["pass_peak"] == pytest.approx(peak, rel=0.03) and found[
        "update_peak"
    ] == pytest.approx(peak_update, rel=0.001)
    found = dry_run.memory(
        toy_model(False, tune, dtype), dry_run.Shape(B, B, T, FIRST), dtype, True, checkpointing
    )
    assert found["pass_peak"] == pytest.approx(peak_accumulating, rel=0.03)


@pytest.mark.parametrize("tune", ["", "full", "lora"], ids=["stage1", "full", "lora"])
def test_flops_are_those_of_a_real_step(tune):
    """Torch's counter over a real pass; the CPU's fused attention is taken apart for it."""
    model, counter = toy_model(True, tune, torch.float32), FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        sums = model(
            real_batch() | dict(patch_weights=torch.zeros(B, P, 4))
        )  # the patch loss is counted apart
        forward = counter.get_total_flops()
        (sums["caption_loss"] + sums.get("patch_loss", 0)).backward()
    found = dry_run.count_flops(
        toy_model(False, tune, torch.float32), dry_run.Shape(B, B, T, FIRST), torch.float32
    )
    assert (
        found[0]["all"]
        == forward
        == sum(found[0][name] for name in ("encoder", "projector", "llm"))
    )
    scores = 2 * B * T * T * 128 * 4  # made again by fused attention: 4 layers
    assert found[1]["all"] - scores == counter.get_total_flops() - forward


def test_siglip_in_low_precision(tmp_path):
    """Its pooling head is torch's own multi-head attention, which autocast knows."""
    settings = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
    )
    SiglipVisionConfig(**settings).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(dict(size=dict(height=64, width=64)))
    )
    model = PatchAlignedModel(config(vision=str(tmp_path)), torch.bfloat16, weights=False)
    assert dry_run.count_flops(model, dry_run.Shape(2, 2, 40, 20), torch.bfloat16)[0][
        "encoder"
    ] > 2 * 2 * 16 * 2 * (4 * 64**2 + 2 * 64 * 128)


# ---- against what is published -------------------------------------------------------------------


def test_llava_from_its_configuration_alone(llava, run, tmp_path):
    """Parameters, tokens and batch of LLaVA-1.5-7B, from a shell; last, the command to run."""
    flags = [f"@{llava}/flags.txt", "--micro-batch", 2, "--max-length", 640, "--out", "plans"]
    done = run("pretrain.py", *flags, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (
        "vision encoder            303,507,456           0",
        "20,979,712  20,979,712",
        "language model          6,738,415,616",
        "word embeddings         131,072,000",
        "output head             131,072,000",
        "tokens per sample: 576 of the image, text up to --max-length 640",
        "batch 256 = 1 processes x 128 x 2",
    ):
        assert text in done.stdout, text
    products = 4 * 256 * 576 * 32000 * 4096 / 1e12
    assert re.search(rf"patch loss, with every patch labelled +{products:.3f} ", done.stdout)
    assert (
        done.stdout.splitlines()[-1]
        == f"wrote plans/plan.pt; next: torchrun pretrain.py {shlex.join(map(str, flags))}"
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["plans", "plan.pt"]


@pytest.mark.parametrize(
    "tune, checkpointing", [("", False), ("full", False), ("full", True), ("lora", False)]
)
def test_flops_follow_the_closed_formula(llava, tune, checkpointing):
    """LLaVA's step by hand, by the forms that extras/dry_run.py gives."""
    args = runtime.parse(pretrain.Args, "", [f"@{llava}/flags.txt"])
    model = PatchAlignedModel(
        {name: getattr(args, name) for name in pretrain.CONFIG}, torch.bfloat16, weights=False
    )
    if tune:
        with torch.device("meta"):
            sft.prepare(model, sft.Args("", tune=tune, prompt="v1"))
    length, answers, layers = 640, 60, 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    forward, backward = dry_run.count_flops(
        model, dry_run.Shape(1, 1, length, length - answers), torch.bfloat16, checkpointing
    )
    attention, head = 4 * 32 * 4096 * length**2, 2 * 4096 * 32000 * answers
    factors = (
        2
        * length
        * sum(p.numel() for n, p in model.llm.named_parameters() if n.endswith((".A", ".B")))
    )
    once = 2 * layers * length + attention + head
    vision = 2 * 577 * (24 * 12 * 1024**2 + 3 * 14**2 * 1024 * 576 / 577) + 4 * 24 * 1024 * 577**2
    assert forward["llm"] == pytest.approx(once + factors, rel=0.002)
    assert forward["encoder"] == pytest.approx(vision, rel=0.002) and backward["encoder"] == 0
    assert forward["projector"] == 2 * 576 * (1024 + 4096) * 4096
    ways = (2 if tune == "full" else 1) * (once - attention) + 2.5 * attention + 2 * factors
    ways += checkpointing * (
        once - head - 2 * 32 * 4096 * 11008 * length
    )  # a layer's last product is not needed again
    assert backward["llm"] == pytest.approx(ways, rel=0.01)


def test_stage_two_in_shards_before_stage_one_has_run(llava, here, tmp_path, monkeypatch):
    """sft.py takes stage 1's plan as a checkpoint; an eighth of the optimizer's 50 GiB per GPU."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.chdir(tmp_path)
    assert (
        here("pretrain.py", f"@{llava}/flags.txt", "--dry-run", "--out", tmp_path).returncode == 0
    )
    plan, preset = tmp_path / "plan.pt", f"@{ROOT}/presets/llava-1.5-7b.sft.txt"
    done = here("sft.py", plan, preset, "--micro-batch", 1, "--max-length", 640, "--dry-run")
    assert done.returncode == 0, done.stderr
    trained = 6_738_415_616 + 20_979_712
    assert re.search(
        r"language model +6,738,415,616 +6,738,415,616\n(.*\n)+"
        rf" +all +7,062,902,784 +{trained:,}\n",
        done.stdout,
    ), done.stdout
    for name, size in (
        ("weights, trained, float32", trained / 2),
        ("gradients", trained / 2),
        ("AdamW's two moments", trained),
    ):
        assert re.search(rf"{name} +{size / 2**30:.3f}\n", done.stdout), name
    assert "batch 128 = 8 processes x 16 x 1, in shards, activations recomputed" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(
        "nothing was written; next: torchrun --nproc_per_node 8 sft.py"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plan.pt"]
    monkeypatch.delenv("WORLD_SIZE")
    assert (
        "plan.pt: a checkpoint of stage plan"
        in here("sft.py", plan, "--steps", 0, "--out", tmp_path / "sft").stderr
    )


# ---- tokens and flag files -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "presets").glob("*.txt")), ids=lambda path: path.stem
)
def test_presets_are_flags_of_their_stage(preset):
    """Every word is a flag of the stage in the name; none names a file that the user brings."""
    stage = {"pretrain": pretrain, "sft": sft}[preset.stem.rsplit(".", 1)[-1]]
    args = runtime.parse(
        stage.Args, "", ["ckpt.pt"] * (stage is sft) + [f"@{preset}", "--steps", "10"]
    )
    assert (
        args.steps == 10
        and args.batch_size > 0
        and not args.data
        and preset.read_text().startswith("# ")
    )
    assert (
        args.out == f"runs/{preset.stem.replace('.pretrain', '/pretrain').replace('.sft', '/sft')}"
    )


def test_flag_files(tmp_path, capfd):
    """Words as in a shell, without comments; later flags win; what is wrong is one line."""
    (tmp_path / "more").write_text("--steps 3\n")
    (tmp_path / "flags").write_text(
        f"# a comment\n\n--data 'my records.jsonl' --lr 2e-3  # more\n@{tmp_path}/more\n--overfit\n"
    )
    args = runtime.parse(pretrain.Args, "", ["--lr", "1", f"@{tmp_path}/flags", "--steps", "7"])
    assert (args.data, args.lr, args.steps, args.overfit) == ("my records.jsonl", 2e-3, 7, True)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "open").write_text("--out 'half\n")
    (tmp_path / "unknown").write_text("--step 3\n")
    for name, message in (
        ("none", "No such file .*none"),
        ("bytes", "not UTF-8"),
        ("open", 'line "--out \'half": no closing quotation'),
        ("unknown", "--step"),
    ):
        with pytest.raises(SystemExit) as stopped:
            runtime.parse(pretrain.Args, "", [f"@{tmp_path}/{name}"])
        error = capfd.readouterr().err
        assert (
            stopped.value.code == 2
            and error.startswith("error: ")
            and error.count("\n") == 1
            and re.search(message, error)
        ), error


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--max-length", "65"],
            "--max-length 65 leaves no room for text beside an image's 64 tokens",
        ),
        (["--vision", "no/model"], "--vision no/model: AutoModel cannot load it"),
        (["--batch-size", "7"], "--batch-size 7 is not a positive multiple of the 2 processes"),
    ],
)
def test_a_dry_run_refuses_in_one_line(flags, message, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["pretrain.py", *flags, "--dry-run", "--out", str(tmp_path)])
    monkeypatch.setattr("toy.ensure_once", lambda: pytest.fail("a dry run made the toy world"))
    with pytest.raises(SystemExit) as stopped:
        runtime.run(pretrain.main, pretrain.Args, pretrain.__doc__)
    error = capfd.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch(f"error: {message}.*\n", error), error
