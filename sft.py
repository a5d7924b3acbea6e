"""Stage 2: train the projector and the language model, in full or through LoRA, on conversations; loss on the answers only.

    torchrun sft.py runs/pretrain/ckpt.pt                                     # the toy world, CPU or GPU; `python sft.py ...` is the same
    torchrun sft.py runs/pretrain/ckpt.pt --tune lora --merge                 # low-rank factors, merged into the weights at the end
    torchrun --nproc_per_node 8 sft.py runs/pretrain/ckpt.pt --shard --checkpointing \\
             --data llava_v1_5_mix665k.json --image-dir images                # a model that outgrows one GPU
    WORLD_SIZE=8 python sft.py runs/llava-1.5-7b/pretrain/plan.pt @presets/llava-1.5-7b.sft.txt --dry-run   # what it would take on 8 GPUs

Encoder, projector and language model are those that the checkpoint names. The prompt and the geometry may change: LLaVA crops the images
of stage 1 and pads those of stage 2. Records may have several turns, and no image.

reads:  a checkpoint of pretrain.py, records (data.py)
writes: OUT/ckpt.pt (projector and language model, or its LoRA factors), OUT/resume.pt (training state, for --resume), OUT/metrics.jsonl;
        with --keep-every N also OUT/ckpt-N.pt, OUT/ckpt-2N.pt, ...; with --cache-features DIR the encoder's features to DIR (features.py)
"""
import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import cost
import runtime
import toy
from data import GEOMETRIES, IGNORE, PROMPTS, InputError, StepSampler, collate
from features import FeatureCache
from model import PatchAlignedModel, load_checkpoint, load_trained, merge_lora, read_checkpoint, save_checkpoint

# ------------------------------------------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    """Flags of sft.py. The recipe is LLaVA-1.5's stage 2; without --data, the toy world's own steps, batch and rates."""

    checkpoint: str = field(metadata={"positional": True})
    """checkpoint of pretrain.py, or of python model.py import, to start from; with --dry-run also the plan.pt of pretrain.py --dry-run"""
    out: str = "runs/sft"
    """folder for ckpt.pt, resume.pt and metrics.jsonl"""
    data: str = ""
    """records to train on, .json or .jsonl; none: the toy world"""
    image_dir: str = ""
    """folder that the records' image paths are relative to; none: images/ beside the records"""
    val_data: str = ""
    """records to validate on (toy world: its validation split)"""
    prompt: str = field(default="", metadata={"choices": ["", *PROMPTS[1:]]})
    """conversation format; none: v1 (toy world: chat)"""
    geometry: str = field(default="pad", metadata={"choices": list(GEOMETRIES)})
    """how an image becomes a square"""
    max_length: int = 2048
    """tokens per sample, patches included; longer ones are cut"""
    tune: str = field(default="full", metadata={"choices": ["full", "lora"]})
    """what is trained of the language model: all of it, or low-rank factors beside its linear maps"""
    lora_rank: int = 128
    """rank of the factors"""
    lora_alpha: float = 256
    """their product is scaled by alpha / rank"""
    lora_dropout: float = 0.05
    """share of a linear map's inputs that its factors do not see"""
    lora_modules: list[str] = field(default_factory=list)
    """names of the linear maps, such as q_proj v_proj; none: all but the output head"""
    merge: bool = False
    """with --tune lora: write merged weights in place of the factors"""
    steps: int = -1
    """optimizer updates; -1: one pass over the data (toy world: see toy.SFT)"""
    batch_size: int = 0
    """global batch, over all processes; 0: 128 (toy world: see toy.SFT)"""
    micro_batch: int = 0
    """samples per process and forward pass, gradients accumulate over them; 0: the whole share of the process"""
    lr: float = 0
    """peak learning rate of the language model; 0: 2e-5, with LoRA 2e-4 (toy world: see toy.SFT)"""
    projector_lr: float = 0
    """peak learning rate of the projector; 0: 2e-5 (toy world: see toy.SFT)"""
    warmup: float = 0.03
    """share of the steps with rising learning rate, before the cosine"""
    clip: float = 1.0
    """largest norm of the gradient"""
    shard: bool = False
    """split weights, gradients and optimizer state over the processes (FSDP2)"""
    checkpointing: bool = False
    """recompute the language model's activations in the backward pass: less memory, a third more time"""
    val_every: int = 0
    """steps between validations; 0: about five in all"""
    save_every: int = 200
    """steps between writes of resume.pt"""
    keep_every: int = 0
    """steps between checkpoints to keep, for a curve over the fine-tuning; 0: none"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    dtype: str = field(default="auto", metadata={"choices": ["auto", "float32", "bfloat16"]})
    """of the frozen weights and the matrix products; auto: bfloat16 on a GPU that has it, else float32"""
    workers: int = -1
    """data loading processes per rank; -1: 4 on a GPU, 0 on a CPU"""
    cache_features: str = ""
    """folder that keeps the encoder's features, so that later epochs and runs need neither images nor encoder; none: nothing is kept"""
    seed: int = 0
    """of the data order, of LoRA's initial values and dropout"""
    resume: bool = False
    """go on from OUT/resume.pt"""
    overfit: bool = False
    """train on the first batch only, over and over: the loss must fall"""
    dry_run: bool = False
    """print parameters, FLOPs and memory from configuration alone, and write nothing"""


FREE = {"checkpoint", "out", "resume", "micro_batch", "workers", "cache_features", "save_every", "keep_every", "log_every", "val_every",
        "shard", "checkpointing", "merge"}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check(args: Args) -> Args:
    """Fill in what depends on the data; refuse what makes no sense."""
    for name, low in (("steps", -1), ("batch_size", 0), ("micro_batch", 0), ("lr", 0), ("projector_lr", 0), ("warmup", 0), ("val_every", 0),
                      ("save_every", 1), ("keep_every", 0), ("log_every", 1), ("seed", 0), ("max_length", 1), ("lora_rank", 1),
                      ("lora_dropout", 0)):
        if getattr(args, name) < low:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} is less than {low}")
    if not args.clip > 0 or args.lora_dropout >= 1:
        raise InputError(f"--clip {args.clip} must be above 0, --lora-dropout {args.lora_dropout} below 1")
    defaults = Args("")
    given = [f"--{n.replace('_', '-')}" for n in ("lora_rank", "lora_alpha", "lora_dropout", "lora_modules", "merge")
             if getattr(args, n) != getattr(defaults, n)]
    if given and args.tune != "lora":
        raise InputError(f"{', '.join(given)}: of use with --tune lora only")
    if args.shard and runtime.world() == 1:
        raise InputError("--shard splits the model over processes: start it with torchrun --nproc_per_node N, N > 1")
    if args.data:
        args = dataclasses.replace(args, image_dir=args.image_dir or str(Path(args.data).parent / "images"))
        recipe = dict(steps=-1, batch_size=128, lr=2e-5 if args.tune == "full" else 2e-4, projector_lr=2e-5, prompt="v1")
    else:
        for name in ("image_dir", "val_data"):
            if getattr(args, name):
                raise InputError(f"--{name.replace('_', '-')} needs --data; without it the toy world is used")
        folder = toy.DATA if args.dry_run else toy.ensure_once()
        args = dataclasses.replace(args, data=str(folder / "train_sft.jsonl"), val_data=str(folder / "val_sft.jsonl"),
                                   image_dir=str(folder / "images"))
        recipe = toy.SFT
    return dataclasses.replace(args, steps=recipe["steps"] if args.steps < 0 else args.steps, **{
        name: getattr(args, name) or recipe[name] for name in ("batch_size", "lr", "projector_lr", "prompt")})


# ------------------------------------------------------------------------------------------------------------------------ model

def check_stage(path: str, *more: str) -> dict:
    """The config of a checkpoint from pretraining, an import, or one of `more` stages. InputError: a checkpoint of another stage."""
    checkpoint = read_checkpoint(path)
    if checkpoint["stage"] not in ("pretrain", "import", *more):
        raise InputError(f"{path}: a checkpoint of stage {checkpoint['stage']}; sft.py starts from one that torchrun pretrain.py has"
                         " written, or python model.py import")
    return checkpoint["config"]


def inherit(args: Args, dtype: torch.dtype) -> PatchAlignedModel:
    """The model of a checkpoint, ready to be tuned. InputError: neither pretrained nor imported, or see `load_checkpoint`."""
    check_stage(args.checkpoint)
    model, checkpoint = load_checkpoint(args.checkpoint, dtype=dtype)
    config, metrics = checkpoint["config"], checkpoint["metrics"]
    reached = ", ".join(f"{k.replace('_', ' ')} {v:.6g}" for k, v in metrics.items() if v is not None)
    runtime.log(f"inherited from {args.checkpoint}: {config['projector']} between {config['vision']} ({config['image_size']} px, hidden "
                f"state {config['feature_layer']}) and {config['llm']}; patch loss {config['patch_loss']}, weight "
                f"{config['patch_weight']:g}, tau {config['tau']:g}; {reached}. New here: prompt {args.prompt}, geometry {args.geometry}, "
                f"tune {args.tune}")
    return prepare(model, args)


def prepare(model: PatchAlignedModel, args: Args) -> PatchAlignedModel:
    """Give a model of stage 1 what stage 2 has of its own: prompt, geometry, and what is trained, in float32."""
    model.config |= dict(prompt=args.prompt, geometry=args.geometry)
    lora = dict(rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout, modules=args.lora_modules)
    model.tune(args.tune, lora if args.tune == "lora" else None)
    if args.tune == "full" or args.shard:                                                            # trained weights are float32, and
        model.llm.float()                                                                            # shards of one dtype
    if args.checkpointing:
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def shard(model: PatchAlignedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Split what is trained, and the language model, over all processes: each decoder layer is gathered when it is needed. The encoder,
    small and frozen, stays whole."""
    mesh = init_device_mesh(device.type, (runtime.world(),))
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    layers = max((m for m in model.llm.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, ignored_params=set(model.encoder.parameters()), **options)


# ------------------------------------------------------------------------------------------------------------------- validation

@torch.no_grad()
def validate(model: PatchAlignedModel, loader: DataLoader, count: int, cache: FeatureCache | None, device: torch.device, autocast) -> dict:
    """Mean loss per token of the answers over the validation records, nats. Batches from `count` on only keep this process in step."""
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for i, batch in enumerate(loader):
        with autocast:
            batch = runtime.to_device(batch, device)
            sums = model(cache.complete(model, batch) if cache else batch)
        if i < count:
            totals += torch.stack([sums[k].double() for k in ("caption_loss", "caption_tokens")])
    if cache:
        cache.flush()
    runtime.all_sum([totals])
    model.train()
    return dict(val_loss=runtime.mean(*totals.tolist()))


# ------------------------------------------------------------------------------------------------------------------------- main

def dry_run(args: Args) -> None:
    """Print what the run would take: see cost.py. Neither weights nor images are read, and nothing is written."""
    if runtime.rank():
        return
    config = check_stage(args.checkpoint, "plan")
    data, args = args.data, check(args)
    model = PatchAlignedModel(config, cost.precision(args), weights=False)
    with torch.device("meta"):
        prepare(model, args)
    cost.report(model, args, data, "sft")
    print(f"nothing was written; next: {cost.command('sft.py').replace('plan.pt', 'ckpt.pt')}, once stage 1 has written its ckpt.pt")


def main(args: Args) -> None:
    """Train and write the checkpoint."""
    if args.dry_run:
        return dry_run(args)

    # ---- set-up
    device = runtime.start(args.seed)
    dtype, rank, world = runtime.precision(device, args.dtype), runtime.rank(), runtime.world()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    args, out = check(args), Path(args.out)

    # ---- model
    model, state, first = inherit(args, dtype), None, 0
    if args.resume:
        state = runtime.load_resume(out / "resume.pt", args, FREE, InputError)
        if state["config"] != model.config:
            raise InputError(f"--resume: {out / 'resume.pt'} is not from {args.checkpoint}, whose backbones or losses are others")
        load_trained(model, state["model"], out / "resume.pt")
        first = state["step"]
    if args.shard:
        model.encoder.to(device)                                                                     # the rest goes there in shards
        shard(model, device, dtype)
    else:
        model.to(device)
    projector, rest = list(model.projector.parameters()), [p for p in model.llm.parameters() if p.requires_grad]
    parameters = projector + rest

    # ---- data: which records each step takes is a function of the step alone, so resuming needs no loader state
    dataset = model.records(args.data, args.image_dir, max_length=args.max_length, require_image=False)
    cache = FeatureCache(args.cache_features, model, dataset) if args.cache_features else None
    batched = functools.partial(cache.collate if cache else collate, pad_id=model.pad_id)
    sampler = StepSampler(len(dataset), args.batch_size, args.seed, rank, world)
    steps = args.steps if args.steps >= 0 else max(1, len(dataset) // args.batch_size)
    share = args.batch_size // world
    micro = min(args.micro_batch or share, share)
    validation = kept = None
    if args.val_data:
        held_out = model.records(args.val_data, args.image_dir, max_length=args.max_length, require_image=False)
        own = list(range(rank, len(held_out), world))
        index_lists = [own[i: i + micro] for i in range(0, -(-len(held_out) // world), micro)]       # shards are gathered together, so
        counted = sum(map(bool, index_lists))                                                        # every rank has as many batches
        kept = FeatureCache(args.cache_features, model, held_out) if args.cache_features else None
        validation = runtime.loader(kept or held_out, [indices or [0] for indices in index_lists],
                                    functools.partial(kept.collate if kept else collate, pad_id=model.pad_id), args.workers, device)
    shares = (sampler.indices(0 if args.overfit else step) for step in range(first, steps))
    index_lists = [own[i: i + micro] for own in shares for i in range(0, share, micro)]
    batches = iter(runtime.loader(cache or dataset, index_lists, batched, args.workers, device))

    # ---- optimizer: one group per learning rate
    optimizer = torch.optim.AdamW([dict(params=projector, peak=args.projector_lr), dict(params=rest, peak=args.lr)], weight_decay=0.0)
    if state:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
    elif rank == 0:
        if (out / "ckpt.pt").exists():
            print(f"{out / 'ckpt.pt'} is there and will be replaced; --resume goes on from its run, --out names another folder")
        (out / "resume.pt").unlink(missing_ok=True)                                                  # an earlier run's: never to go on from
    metrics = runtime.Metrics(out / "metrics.jsonl", first)
    with_image = sum(r.get("image") is not None for r in dataset.records)
    turns = sum(len(r["conversations"]) for r in dataset.records) // 2
    runtime.log(f"{len(dataset)} records, {turns} answers, {len(dataset) - with_image} records without an image; "
                f"{steps - first} steps of {args.batch_size} = {world} processes x {-(-share // micro)} x {micro}; "
                f"{sum(p.numel() for p in parameters):,} trained parameters{' in shards' if args.shard else ''}, learning rates "
                f"{args.lr:g} and {args.projector_lr:g} (projector); {device.type}, {str(dtype).removeprefix('torch.')}")

    # ---- loop
    val_every, result, clock = args.val_every or max(1, steps // 5), {}, runtime.Clock(device, first)
    progress = tqdm(range(first, steps), desc="sft", initial=first, total=steps, disable=rank > 0, mininterval=1)
    for step in progress:
        torch.manual_seed(hash((args.seed, step, rank)))                                             # dropout needs no state to resume
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * runtime.cosine(step, steps, int(args.warmup * steps))

        # The loss is a sum, divided by the true count of the global batch, which the labels tell before the first forward pass. Here and
        # below nothing that lies on a GPU is read, but in steps that are logged: the host prepares the next step while the GPU is at this.
        with clock("data"):
            accumulated = [next(batches) for _ in range(0, share, micro)]
        count = torch.tensor(sum(int((b["labels"] != IGNORE).sum()) for b in accumulated), dtype=torch.float64)
        count = count.to(device, non_blocking=True) if world > 1 else count
        runtime.all_sum([count])
        total = torch.zeros((), dtype=torch.float32, device=device)
        with clock("model"):
            for batch in accumulated:
                with autocast:
                    batch = runtime.to_device(batch, device)
                    loss = model(cache.complete(model, batch) if cache else batch)["caption_loss"]
                (loss * (world if args.shard else 1) / count.float()).backward()                     # FSDP averages over the processes
                total += loss.detach()
            gradients = [] if args.shard else [p.grad for p in parameters if p.grad is not None]     # FSDP's are reduced
            runtime.all_sum([*gradients, total])                                                     # sums, not means: the count is global
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if done % args.log_every == 0 or done == steps:
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            loss = runtime.mean(total.item(), count.item())
            metrics.write(done, loss=loss, lr=optimizer.param_groups[1]["lr"], grad_norm=norm.item(),
                          **clock.read(done, args.batch_size), **({"cache_hits": cache.share()} if cache else {}))
            progress.set_postfix(loss=loss)
        if validation is not None and (done % val_every == 0 or done == steps):
            with clock("validation"):
                result = validate(model, validation, counted, kept, device, autocast)
            metrics.write(done, **result)
            runtime.log(f"step {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in result.items() if v is not None))
        if done % args.save_every == 0 or done == steps:
            runtime.save_resume(out / "resume.pt", args, done, config=model.config, model=model.trained_state(),
                                optimizer=get_optimizer_state_dict(model, optimizer, options=WHOLE))
        if args.keep_every and done % args.keep_every == 0 and done < steps:
            save(out / f"ckpt-{done}.pt", model, dict(steps=done), dtype)

    # ---- save
    if cache:
        cache.flush()
    if validation is not None and not result:
        result = validate(model, validation, counted, kept, device, autocast)
    written = out / ("factors.pt" if args.merge else "ckpt.pt")
    save(written, model, dict(result, steps=steps), dtype)
    if args.merge and rank == 0:
        merged, checkpoint = load_checkpoint(written, dtype=dtype)
        merge_lora(merged)
        with runtime.atomic(out / "ckpt.pt") as path:
            save_checkpoint(path, merged, "sft", checkpoint["metrics"], merged.trained_state())
        written.unlink()
    runtime.log(f"wrote {out / 'ckpt.pt'}; next: python eval.py {out / 'ckpt.pt'}")


def save(path: Path, model: PatchAlignedModel, metrics: dict, dtype: torch.dtype) -> None:
    """The checkpoint, from rank 0; weights of the language model in the dtype in which they were multiplied."""
    state = model.trained_state()                                                                    # every rank: shards are gathered
    if model.config["tune"] == "full":
        state = {name: tensor.to(dtype) if name.startswith("llm.") else tensor for name, tensor in state.items()}
    if runtime.rank() == 0:
        with runtime.atomic(path) as temporary:
            save_checkpoint(temporary, model, "sft", metrics, state)


if __name__ == "__main__":
    runtime.run(main, Args, __doc__, InputError)
