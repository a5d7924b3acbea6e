"""Stage 2: train the projector and the language model on conversations; loss on the answers only.

    torchrun sft.py runs/pretrain/ckpt.pt                    # the toy world; `python` is the same
    torchrun sft.py runs/pretrain/ckpt.pt --tune lora --merge      # low-rank factors, then merged
    torchrun --nproc_per_node 8 sft.py runs/pretrain/ckpt.pt --shard --checkpointing \\
             --data llava_v1_5_mix665k.json --image-dir images     # a model that outgrows one GPU
    WORLD_SIZE=8 python sft.py runs/llava-1.5-7b/pretrain/plan.pt \\
             @presets/llava-1.5-7b.sft.txt --dry-run               # what it would take on 8 GPUs

Encoder, projector and language model are those that the checkpoint names. Prompt and geometry may
change: LLaVA crops the images of stage 1 and pads those of stage 2. Records may have several turns,
and need no image.

reads:  a checkpoint of pretrain.py or of python -m hf import, records (data.py)
writes: OUT/ckpt.pt (projector and language model, or its LoRA factors), OUT/metrics.jsonl,
        OUT/resume.pt; with --keep-every N also OUT/ckpt-N.pt, OUT/ckpt-2N.pt, ...
"""
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import runtime
from data import IGNORE, PROMPTS, StepSampler
from labels import GEOMETRIES
from model import (
    PatchAlignedModel, load_checkpoint, load_trained, merge_lora, read_checkpoint, save_checkpoint)
from runtime import InputError

# ---- Args ----------------------------------------------------------------------------------------


@dataclass
class Args:
    """Flags. The recipe is LLaVA-1.5's stage 2; without --data, the toy world's own."""

    checkpoint: str = field(metadata={"positional": True})
    """of pretrain.py or python -m hf import; with --dry-run also a plan.pt"""
    data: str = ""
    """records to train on, .json or .jsonl; none: the toy world"""
    image_dir: str = ""
    """folder of the records' images; none: images/ beside the records"""
    tune: str = field(default="full", metadata={"choices": ["full", "lora"]})
    """what of the language model is trained"""
    shard: bool = False
    """split weights, gradients, optimizer over processes (FSDP2)"""
    out: str = "runs/sft"
    """folder for ckpt.pt, metrics.jsonl and resume.pt"""
    resume: bool = False
    """go on from OUT/resume.pt"""
    # --- model
    prompt: str = field(default="", metadata={"choices": ["", *PROMPTS[1:]]})
    """conversation format; none: v1 (toy world: chat)"""
    geometry: str = field(default="pad", metadata={"choices": list(GEOMETRIES)})
    """how an image becomes a square"""
    lora_rank: int = 128
    """rank of the factors"""
    lora_alpha: float = 256
    """their product is scaled by alpha / rank"""
    lora_dropout: float = 0.05
    """share of a linear map's inputs that its factors do not see"""
    lora_modules: list[str] = field(default_factory=list)
    """linear maps, such as q_proj v_proj; none: all but the head"""
    merge: bool = False
    """with --tune lora: write merged weights in place of the factors"""
    # --- optimisation
    steps: int = -1
    """updates; -1: one pass over the data (toy world: 600)"""
    batch_size: int = 0
    """global, over all processes; 0: 128 (toy world: 32)"""
    micro_batch: int = 0
    """samples per process and forward pass; 0: its whole share"""
    lr: float = 0
    """peak, language model; 0: 2e-5, with LoRA 2e-4 (toy world: 1e-3)"""
    projector_lr: float = 0
    """peak, projector; 0: 2e-5 (toy world: 1e-3)"""
    seed: int = 0
    """of the data order, of LoRA's initial values and dropout"""
    overfit: bool = False
    """train on the first batch only: the loss must fall"""
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
    checkpointing: bool = False
    """recompute activations: less memory, a third more time"""
    save_every: int = 200
    """steps between writes of resume.pt"""
    keep_every: int = 0
    """steps between checkpoints to keep; 0: none"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    dry_run: bool = False
    """print parameters, FLOPs and memory; write nothing"""


WARMUP, CLIP = 0.03, 1.0        # share of the steps with rising rate; largest norm of the gradient
FREE = {"checkpoint", "out", "resume", "micro_batch", "workers", "cache_features", "save_every",
        "keep_every", "log_every", "val_every", "skip_bad", "shard", "checkpointing", "merge"}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check(args: Args) -> Args:
    """Fill in what depends on the data; refuse what makes no sense."""
    runtime.check_lowest(
        args, steps=-1, batch_size=0, micro_batch=0, lr=0, projector_lr=0, val_every=0,
        save_every=1, keep_every=0, log_every=1, seed=0, max_length=1, lora_rank=1, lora_dropout=0)
    if args.lora_dropout >= 1:
        raise InputError(f"--lora-dropout {args.lora_dropout} must be below 1")
    names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_modules", "merge")
    given = [f"--{name.replace('_', '-')}" for name in names
             if getattr(args, name) != getattr(Args(""), name)]
    if given and args.tune != "lora":
        raise InputError(f"{', '.join(given)}: of use with --tune lora only")
    if args.shard and runtime.world() == 1:
        raise InputError("--shard splits the model over processes: start it with"
                         " torchrun --nproc_per_node N, N > 1")
    if args.data:
        image_dir = args.image_dir or str(Path(args.data).parent / "images")
        args = dataclasses.replace(args, image_dir=image_dir)
        recipe = dict(steps=-1, batch_size=128, lr=2e-5 if args.tune == "full" else 2e-4,
                      projector_lr=2e-5, prompt="v1")
    else:
        import toy

        folder, recipe = runtime.toy_data(args, toy, "image_dir", "val_data"), toy.SFT
        args = dataclasses.replace(
            args, data=str(folder / "train_sft.jsonl"), val_data=str(folder / "val_sft.jsonl"),
            image_dir=str(folder / "images"))
    filled = {name: getattr(args, name) or recipe[name]
              for name in ("batch_size", "lr", "projector_lr", "prompt")}
    steps = recipe["steps"] if args.steps < 0 else args.steps
    return dataclasses.replace(args, steps=steps, **filled)


def dry_run(args: Args) -> None:
    """Print what the run would take, from configurations alone."""
    from extras import dry_run

    config = check_stage(args.checkpoint, "plan")["config"]
    args = check(args)
    model = PatchAlignedModel(config, dry_run.precision(args), weights=False)
    with torch.device("meta"):
        prepare(model, args)
    dry_run.report(model, args, "sft")
    command = dry_run.command("sft.py").replace("plan.pt", "ckpt.pt")
    print(f"nothing was written; next: {command}, once stage 1 has written its ckpt.pt")


# ---- model ---------------------------------------------------------------------------------------


def check_stage(path: str, *more: str) -> dict:
    """A checkpoint from pretraining, an import, or a stage of `more`. InputError: of another."""
    checkpoint = read_checkpoint(path)
    if checkpoint["stage"] not in ("pretrain", "import", *more):
        raise InputError(f"{path}: a checkpoint of stage {checkpoint['stage']}; sft.py starts from"
                         " one that torchrun pretrain.py has written, or python -m hf import")
    return checkpoint


def inherit(args: Args, dtype: torch.dtype) -> PatchAlignedModel:
    """The model of a checkpoint, ready to be tuned; says what it inherits."""
    check_stage(args.checkpoint)
    model, checkpoint = load_checkpoint(args.checkpoint, dtype=dtype)
    c = checkpoint["config"]
    runtime.log(
        f"inherited from {args.checkpoint}: {c['projector']} between {c['vision']}"
        f" ({c['image_size']} px, hidden state {c['feature_layer']}) and {c['llm']}; patch loss"
        f" {c['patch_loss']}, weight {c['patch_weight']:g}, tau {c['tau']:g};"
        f" {runtime.shown(checkpoint['metrics'])}. New here: prompt {args.prompt}, geometry"
        f" {args.geometry}, tune {args.tune}")
    return prepare(model, args)


def prepare(model: PatchAlignedModel, args: Args) -> PatchAlignedModel:
    """Give a model of stage 1 what stage 2 has of its own: prompt, geometry, trained weights."""
    model.config |= dict(prompt=args.prompt, geometry=args.geometry)
    lora = dict(rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout,
                modules=args.lora_modules)
    model.tune(args.tune, lora if args.tune == "lora" else None)
    if args.tune == "full" or args.shard:               # trained weights are float32, and
        model.llm.float()                               # shards of one dtype
    if args.checkpointing:
        options = dict(use_reentrant=False)
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model.train()


def shard(model: PatchAlignedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Split what is trained, and the language model, over all processes.

    Each decoder layer is gathered when it is needed. The encoder, small and frozen, stays whole.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = dict(mesh=init_device_mesh(device.type, (runtime.world(),)), mp_policy=policy)
    lists = [m for m in model.llm.modules() if isinstance(m, torch.nn.ModuleList)]
    for layer in max(lists, key=len):
        fully_shard(layer, **options)
    fully_shard(model, ignored_params=set(model.encoder.parameters()), **options)


def save(path: Path, model: PatchAlignedModel, metrics: dict, dtype: torch.dtype) -> None:
    """The checkpoint; the language model's weights in the dtype in which they were multiplied."""
    state = model.trained_state()                       # on every rank: shards are gathered
    if model.config["tune"] == "full":
        state = {name: tensor.to(dtype) if name.startswith("llm.") else tensor
                 for name, tensor in state.items()}
    if runtime.rank() == 0:
        with runtime.atomic(path) as temporary:
            save_checkpoint(temporary, model, "sft", metrics, state)


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

    # ---- model
    model, state, first = inherit(args, dtype), None, 0
    runtime.lock(out)
    if args.resume:
        state = runtime.load_resume(out / "resume.pt", args, FREE)
        if state["config"] != model.config:
            raise InputError(f"--resume: {out / 'resume.pt'} is not from {args.checkpoint}, whose"
                             " backbones or losses are others")
        load_trained(model, state["model"], out / "resume.pt")
        first = state["step"]
    if args.shard:
        model.encoder.to(device)                        # the rest goes there in shards
        shard(model, device, dtype)
    else:
        model.to(device)
    projector = list(model.projector.parameters())
    rest = [p for p in model.llm.parameters() if p.requires_grad]
    parameters = projector + rest

    # ---- data: what a step trains on is a function of the step alone, so a loader has no state
    options = dict(max_length=args.max_length, require_image=False, checked=False)
    dataset, held_out = model.records(args.data, args.image_dir, **options), None
    if args.val_data:
        held_out = model.records(args.val_data, args.image_dir, **options)
    if args.cache_features:
        from extras.cache import FeatureCache

        dataset = FeatureCache(args.cache_features, model, dataset)
        held_out = held_out and FeatureCache(args.cache_features, model, held_out)
    check_records(dataset, args.skip_bad, every=own_data)
    if held_out:
        check_records(held_out, args.skip_bad, every=own_data)
    steps = args.steps if args.steps >= 0 else max(1, len(dataset) // args.batch_size)
    sampler = StepSampler(len(dataset), args.batch_size, args.seed, rank, world)
    share = args.batch_size // world                    # of a batch, per process
    micro = min(args.micro_batch or share, share)
    validation = held_out and runtime.Validation(held_out, micro, args.workers, device)

    # ---- optimizer: one group per learning rate
    optimizer = torch.optim.AdamW([dict(params=projector, peak=args.projector_lr),
                                   dict(params=rest, peak=args.lr)], weight_decay=0.0,
                                  fused=True)                  # one pass over all weights
    if state:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
    else:
        runtime.begin(out)
    metrics = runtime.Metrics(out / "metrics.jsonl", first)
    batches = iter(runtime.loader(dataset, [
        own for step in range(first, steps)
        for own in runtime.split(sampler.indices(0 if args.overfit else step), micro)
    ], args.workers, device))
    alone = sum(record.get("image") is None for record in dataset.records)
    answers = sum(len(record["conversations"]) for record in dataset.records) // 2
    runtime.log(
        f"{len(dataset)} records, {answers} answers, {alone} records without an image;"
        f" {steps - first} steps of {args.batch_size} = {world} processes x {-(-share // micro)} x"
        f" {micro}; {sum(p.numel() for p in parameters):,} trained parameters"
        f"{' in shards' if args.shard else ''}, learning rates {args.lr:g} and"
        f" {args.projector_lr:g} (projector); {device.type}, {str(dtype).removeprefix('torch.')}")

    def save_state(done: int) -> None:
        trained = model.trained_state()                         # first: it splits FSDP's root again
        whole = get_optimizer_state_dict(model, optimizer, options=WHOLE)
        runtime.save_resume(out / "resume.pt", args, done, config=model.config,
                            model=trained, optimizer=whole)

    # ---- loop
    means = dict(val_loss=("caption_loss", "caption_tokens"))
    val_every, result = args.val_every or max(1, steps // 5), {}
    guard = Guard(out, parameters, device, save_state)
    progress = tqdm(range(first, steps), desc="sft", initial=first, total=steps, disable=rank > 0,
                    mininterval=1)
    with guard:
        for step in progress:
            torch.manual_seed(hash((args.seed, step, rank)))    # dropout needs no state to resume
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * runtime.cosine(step, steps, int(WARMUP * steps))

            # The loss is a sum, divided by the true count of the global batch. The labels tell the
            # count before the first forward pass. Nothing that lies on a GPU is read but in logged
            # steps: the host prepares the next step while the GPU is at this one.
            accumulated = [next(batches) for _ in range(0, share, micro)]
            count = sum(int((b["labels"] != IGNORE).sum()) for b in accumulated)
            count = torch.tensor(count, dtype=torch.float64)
            count = count.to(device, non_blocking=True) if world > 1 else count
            runtime.all_sum([count])
            total = torch.zeros((), dtype=torch.float32, device=device)
            for batch in accumulated:
                with autocast:
                    batch = dataset.complete(runtime.to_device(batch, device))
                    loss = model(batch)["caption_loss"]
                scale = world if args.shard else 1              # FSDP averages over the processes
                (loss * scale / count.float()).backward()
                total += loss.detach()
            gradients = [p.grad for p in parameters if p.grad is not None]
            gradients = [] if args.shard else gradients         # FSDP's are summed already
            runtime.all_sum([*gradients, total])                # sums: the count is global
            norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            guard.watch(step, accumulated, total, norm)
            with guard.update(step + 1):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            if done % args.log_every == 0 or done == steps:
                guard.check()
                loss = runtime.mean(total.item(), count.item())
                metrics.write(done, loss=loss, grad_norm=norm.item(),
                              lr=optimizer.param_groups[1]["lr"], **dataset.metrics())
                progress.set_postfix(loss=loss)
            if validation and (done % val_every == 0 or done == steps):
                result = guard.refuse(done, validation(model, means, autocast))
                metrics.write(done, **result)
                runtime.log(f"step {done}: {runtime.shown(result)}")
            if guard.due() or done % args.save_every == 0 or done == steps:
                guard.save(done)
            if args.keep_every and done % args.keep_every == 0 and done < steps:
                guard.check_whole()
                save(out / f"ckpt-{done}.pt", model, dict(steps=done), dtype)

    # ---- save
    dataset.flush()
    guard.tell_skipped()
    if validation and not result:
        result = guard.refuse(steps, validation(model, means, autocast))
    written = out / ("factors.pt" if args.merge else "ckpt.pt")
    save(written, model, dict(result, steps=steps), dtype)
    if args.merge and rank == 0:
        merged, checkpoint = load_checkpoint(written, dtype=dtype)
        merge_lora(merged)
        with runtime.atomic(out / "ckpt.pt") as path:
            save_checkpoint(path, merged, "sft", checkpoint["metrics"])
        written.unlink()
    runtime.finished(out / "ckpt.pt", ["python", "eval.py", out / "ckpt.pt"])


if __name__ == "__main__":
    runtime.run(main, Args, __doc__)
