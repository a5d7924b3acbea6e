"""Stage 1: train the projector, all else frozen, on L_caption + patch_weight * L_patch.

The patch loss is on for the first third of the steps: it gives each patch its words, then captions
alone go on from there. Throughout (--patch-schedule constant) it aligns more, and costs captions.

    torchrun pretrain.py                          # the toy world; `python pretrain.py` is the same
    torchrun pretrain.py --patch-weight 0 --out runs/caption_only      # baseline: same data order
    torchrun --nproc_per_node 8 pretrain.py --vision openai/clip-vit-large-patch14-336 \\
             --llm lmsys/vicuna-7b-v1.5 --data blip_laion_cc_sbu_558k.json --image-dir images \\
             --regions regions.jsonl
    python pretrain.py @presets/llava-1.5-7b.pretrain.txt --dry-run    # what it would take

reads:  records with regions (data.py), two backbones (Hugging Face folders or hub names)
writes: OUT/ckpt.pt (the projector), OUT/metrics.jsonl (a line per logged step), OUT/resume.pt;
        with --keep-every N also OUT/ckpt-0.pt, OUT/ckpt-N.pt, OUT/ckpt-2N.pt, ...
"""
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import runtime
from data import IGNORE, PROMPTS, StepSampler
from kernels.patch_loss import check_overflow, default_impl
from labels import GEOMETRIES, read_stop_words
from model import PatchAlignedModel, load_trained, save_checkpoint
from projector import PROJECTORS
from runtime import InputError

# ---- Args ----------------------------------------------------------------------------------------


@dataclass
class Args:
    """Flags. The recipe is LLaVA-1.5's stage 1; without --data, the toy world's own."""

    data: str = ""
    """records to train on, .json or .jsonl; none: the toy world"""
    image_dir: str = ""
    """folder of the records' images; none: images/ beside the records"""
    regions: str = ""
    """file of {id, regions} to join to the records"""
    vision: str = "backbones/toy-clip"
    """vision encoder: a Hugging Face folder or hub name"""
    llm: str = "backbones/toy-llama"
    """language model, likewise"""
    patch_weight: float = 1
    """weight of the patch loss; 0: the caption-only baseline"""
    out: str = "runs/pretrain"
    """folder for ckpt.pt, metrics.jsonl and resume.pt"""
    resume: bool = False
    """go on from OUT/resume.pt"""
    # --- model
    projector: str = field(default="mlp2x_gelu", metadata={"choices": list(PROJECTORS)})
    """kind"""
    pool: int = 2
    """pixel_shuffle, c_abstractor: one patch of pool x pool"""
    image_size: int = 0
    """side of the encoder's input, pixels; 0: its image processor's"""
    geometry: str = field(default="crop", metadata={"choices": list(GEOMETRIES)})
    """how an image becomes a square"""
    feature_layer: int = -2
    """which hidden state of the encoder is Z"""
    prompt: str = field(default="plain", metadata={"choices": list(PROMPTS)})
    """conversation format"""
    # --- loss
    patch_loss: str = field(default="softmax", metadata={"choices": ["softmax", "cosine"]})
    """over the vocabulary, or the plain pull"""
    patch_schedule: str = field(default="first",
                                metadata={"choices": ["first", "constant", "decay"]})
    """first: a third of the steps; decay: linearly to 0"""
    tau: float = 0.07
    """temperature of the softmax patch loss"""
    coverage: float = 0.25
    """share of a patch that a region must cover to label it"""
    centre_words: bool = False
    """patch loss on embeddings less the mean word embedding"""
    stop_words: str = ""
    """words of a phrase that label nothing: a file, or none; else English"""
    # --- optimisation
    steps: int = -1
    """updates; -1: one pass over the data (toy world: 500)"""
    batch_size: int = 0
    """global, over all processes; 0: 256 (toy world: 32)"""
    micro_batch: int = 0
    """samples per process and forward pass; 0: its whole share"""
    lr: float = 1e-3
    """peak learning rate"""
    seed: int = 0
    """of the projector's initial values and the data order"""
    overfit: bool = False
    """train on the first batch only, on both losses throughout: both must fall"""
    # --- data
    val_data: str = ""
    """records to validate on (toy world: its validation split)"""
    val_every: int = 0
    """steps between validations; 0: about five in all"""
    max_length: int = 2048
    """tokens per sample, patches included; longer ones are cut"""
    skip_bad: bool = False
    """leave out records that cannot be used, and count them"""
    cache_features: str = ""
    """folder that keeps Z: later epochs and runs need no encoder"""
    workers: int = -1
    """data loading processes per rank; -1: 4 on a GPU, 0 on a CPU"""
    # --- machine
    dtype: str = field(default="auto", metadata={"choices": ["auto", "float32", "bfloat16"]})
    """auto: bfloat16 on a GPU that has it"""
    save_every: int = 200
    """steps between writes of resume.pt"""
    keep_every: int = 0
    """steps between checkpoints to keep; 0: none"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    dry_run: bool = False
    """print parameters, FLOPs and memory; write OUT/plan.pt, for sft.py --dry-run"""


WARMUP, CLIP = 0.03, 1.0        # share of the steps with rising rate; largest norm of the gradient
CONFIG = ("vision", "llm", "projector", "pool", "image_size", "geometry", "feature_layer", "prompt",
          "coverage", "tau", "patch_weight", "patch_loss", "centre_words", "stop_words")
FREE = {"out", "resume", "micro_batch", "workers", "cache_features", "save_every", "log_every",
        "val_every", "skip_bad", "keep_every"}                                 # change no result


def check(args: Args) -> Args:
    """Fill in what depends on the data; refuse what makes no sense."""
    runtime.check_lowest(args, steps=-1, batch_size=0, micro_batch=0, patch_weight=0, save_every=1,
                         keep_every=0, pool=1, log_every=1, val_every=0, seed=0)
    for name in ("tau", "coverage", "lr"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name} {getattr(args, name)} is not above 0")
    if args.coverage > 1:
        raise InputError(f"--coverage {args.coverage} is a share of a patch, at most 1")
    if args.data:
        image_dir = args.image_dir or str(Path(args.data).parent / "images")
        return dataclasses.replace(args, batch_size=args.batch_size or 256, image_dir=image_dir)
    import toy

    folder = runtime.toy_data(args, toy, "image_dir", "regions", "val_data")
    return dataclasses.replace(
        args, data=str(folder / "train.jsonl"), val_data=str(folder / "val.jsonl"),
        image_dir=str(folder / "images"), batch_size=args.batch_size or toy.PRETRAIN["batch_size"],
        steps=toy.PRETRAIN["steps"] if args.steps < 0 else args.steps)


def config_of(args: Args) -> dict:
    """What a checkpoint remembers of the flags."""
    config = {name: getattr(args, name) for name in CONFIG}
    return config | dict(stop_words=read_stop_words(args.stop_words))


def dry_run(args: Args) -> None:
    """Print what the run would take; write its configurations for stage 2's dry run."""
    from extras import dry_run

    args = check(args)
    config = config_of(args)
    model = PatchAlignedModel(config, dry_run.precision(args), weights=False)
    with runtime.atomic(Path(args.out) / "plan.pt") as path:
        save_checkpoint(path, model, "plan", {}, state={})
    dry_run.report(model, args, "pretrain")
    runtime.finished(Path(args.out) / "plan.pt", dry_run.command("pretrain.py"))


# ---- main ----------------------------------------------------------------------------------------


def main(args: Args) -> None:
    """Train and write the checkpoint."""
    if args.dry_run:
        return dry_run(args) if runtime.rank() == 0 else None
    from extras.check import check_records
    from extras.guard import Guard

    # ---- set-up
    device = runtime.start(args.seed)
    rank, world = runtime.rank(), runtime.world()
    dtype = runtime.precision(device, args.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    own_data, args, out = bool(args.data), check(args), Path(args.out)
    runtime.lock(out)

    # ---- model: backbones in `dtype`, the projector in float32
    model = PatchAlignedModel(config_of(args), dtype).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if args.patch_weight and model.grid is None:
        raise InputError(f"--projector {args.projector}: its outputs have no places in the image,"
                         " so no region can label them; use --patch-weight 0")
    if args.patch_loss == "softmax":
        try:
            check_overflow(args.tau, len(model.word_embeddings), torch.float32)
        except ValueError as error:
            raise InputError("--" + str(error).split(", or impl=")[0]) from None

    # ---- data: what a step trains on is a function of the step alone, so a loader has no state
    options = dict(max_length=args.max_length, checked=False)
    dataset, held_out = model.records(args.data, args.image_dir, args.regions, **options), None
    if args.val_data:
        held_out = model.records(args.val_data, args.image_dir, **options)
    if args.cache_features:
        from extras.cache import FeatureCache

        dataset = FeatureCache(args.cache_features, model, dataset)
        held_out = held_out and FeatureCache(args.cache_features, model, held_out)
    learns = check_records(dataset, args.skip_bad, every=own_data)
    if held_out:
        check_records(held_out, args.skip_bad, every=own_data)
    if args.patch_weight and not learns:
        raise InputError(f"{args.data}: no patch has a label, so --patch-weight"
                         f" {args.patch_weight:g} has nothing to teach; give regions (--regions,"
                         " python annotate.py), or --patch-weight 0")
    steps = args.steps if args.steps >= 0 else max(1, len(dataset) // args.batch_size)
    sampler = StepSampler(len(dataset), args.batch_size, args.seed, rank, world)
    share = args.batch_size // world                    # of a batch, per process
    micro = min(args.micro_batch or share, share)
    validation = held_out and runtime.Validation(held_out, micro, args.workers, device)

    # ---- optimizer
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=True)
    first = 0
    if args.resume:
        state = runtime.load_resume(out / "resume.pt", args, FREE)
        load_trained(model, state["model"], out / "resume.pt")
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    else:
        runtime.begin(out)
    metrics = runtime.Metrics(out / "metrics.jsonl", first)
    batches = iter(runtime.loader(dataset, [
        own for step in range(first, steps)
        for own in runtime.split(sampler.indices(0 if args.overfit else step), micro)
    ], args.workers, device))
    annotated = sum(bool(record.get("regions")) for record in dataset.records)
    impl = default_impl(model.word_embeddings) if args.patch_loss == "softmax" else "plain torch"
    runtime.log(
        f"{len(dataset)} records, {annotated} with regions; {steps - first} steps of"
        f" {args.batch_size} = {world} processes x {-(-share // micro)} x {micro};"
        f" {' x '.join(map(str, model.grid or [model.patches]))} patches;"
        f" vocabulary {len(model.word_embeddings)};"
        f" {sum(p.numel() for p in parameters):,} trained parameters; {device.type},"
        f" {str(dtype).removeprefix('torch.')}; patch loss {args.patch_loss} ({impl}), weight"
        f" {args.patch_weight:g} ({args.patch_schedule}), tau {args.tau:g}")

    def save_state(done: int) -> None:
        runtime.save_resume(out / "resume.pt", args, done, model=model.trained_state(),
                            optimizer=optimizer.state_dict())

    def save(path: Path, metrics: dict) -> None:
        if rank == 0:
            with runtime.atomic(path) as temporary:
                save_checkpoint(temporary, model, "pretrain", metrics)

    # ---- loop
    means = dict(val_caption_loss=("caption_loss", "caption_tokens"),
                 val_patch_loss=("patch_loss", "patches"))
    val_every, result = args.val_every or max(1, steps // 5), {}
    guard = Guard(out, parameters, device, save_state)
    progress = tqdm(range(first, steps), desc="pretrain", initial=first, total=steps,
                    disable=rank > 0, mininterval=1)
    with guard:
        if args.keep_every and first == 0:
            save(out / "ckpt-0.pt", dict(steps=0))
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * runtime.cosine(step, steps, int(WARMUP * steps))
            weight = args.patch_weight
            if args.patch_schedule == "decay":
                weight = weight * (1 - step / steps)
            elif args.patch_schedule == "first" and not args.overfit:
                weight = weight * (step < steps / 3)

            # Losses are sums, divided by the true counts of the global batch. The labels tell the
            # counts before the first forward pass. Nothing that lies on a GPU is read but in logged
            # steps: the host prepares the next step while the GPU is at this one.
            accumulated = [next(batches) for _ in range(0, share, micro)]
            counts = torch.tensor([
                sum(int((b["labels"] != IGNORE).sum()) for b in accumulated),
                sum(int((b["patch_weights"].sum(-1) > 0).sum()) for b in accumulated),
            ], dtype=torch.float64)
            counts = counts.to(device, non_blocking=True) if world > 1 else counts
            runtime.all_sum([counts])
            tokens, patches = counts.float().clamp_min(1)
            totals = torch.zeros(2, dtype=torch.float32, device=device)     # caption, patch: sums
            for batch in accumulated:
                with autocast:
                    sums = model(dataset.complete(runtime.to_device(batch, device)))
                caption, patch = sums["caption_loss"], sums["patch_loss"]
                (caption / tokens + weight * patch / patches).backward()
                totals += torch.stack([caption.detach(), patch.detach()])
            runtime.all_sum([p.grad for p in parameters] + [totals])  # sums: counts are global
            norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            guard.watch(step, accumulated, totals, norm)
            with guard.update(step + 1):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            if done % args.log_every == 0 or done == steps:
                guard.check()
                caption, patch = map(runtime.mean, totals.tolist(), counts.tolist())
                metrics.write(done, caption_loss=caption, patch_loss=patch, grad_norm=norm.item(),
                              lr=optimizer.param_groups[0]["lr"], **dataset.metrics())
                progress.set_postfix(caption=caption, patch=patch)
            if validation and (done % val_every == 0 or done == steps):
                result = guard.refuse(done, validation(model, means, autocast))
                metrics.write(done, **result)
                runtime.log(f"step {done}: {runtime.shown(result)}")
            if guard.due() or done % args.save_every == 0 or done == steps:
                guard.save(done)
            if args.keep_every and done % args.keep_every == 0 and done < steps:
                guard.check_whole()
                save(out / f"ckpt-{done}.pt", dict(steps=done))

    # ---- save
    dataset.flush()
    guard.tell_skipped()
    if validation and not result:
        result = guard.refuse(steps, validation(model, means, autocast))
    save(out / "ckpt.pt", dict(result, steps=steps))
    source = args.val_data or ("..." if args.skip_bad else args.data)   # probe.py takes no bad one
    source = ["--data", source, "--image-dir", args.image_dir] * own_data
    runtime.finished(out / "ckpt.pt", ["python", "probe.py", out / "ckpt.pt", *source])


if __name__ == "__main__":
    runtime.run(main, Args, __doc__)
