"""Stage 1: train the projector, everything else frozen, on L_caption + patch_weight * L_patch.

    torchrun pretrain.py                                  # the toy world, CPU or GPU; `python pretrain.py` is the same
    torchrun pretrain.py --patch-weight 0 --out runs/caption_only             # the baseline: same code, same data order
    torchrun --nproc_per_node 8 pretrain.py --vision openai/clip-vit-large-patch14-336 --llm lmsys/vicuna-7b-v1.5 \\
             --data blip_laion_cc_sbu_558k.json --image-dir images --regions regions.jsonl
    python pretrain.py @presets/llava-1.5-7b.pretrain.txt --dry-run           # what it would take, from configuration alone

reads:  records (data.py), the two backbones (Hugging Face folders or hub names)
writes: OUT/ckpt.pt (the projector), OUT/resume.pt (training state, for --resume), OUT/metrics.jsonl (a line per logged step);
        with --cache-features DIR the encoder's features to DIR (features.py)
"""
import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import cost
import runtime
import toy
from data import GEOMETRIES, IGNORE, PROMPTS, InputError, StepSampler, collate
from features import FeatureCache
from kernels.patch_loss import default_impl, patch_loss
from model import PatchAlignedModel, load_trained, save_checkpoint
from projector import PROJECTORS

# ------------------------------------------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    """Flags of pretrain.py. The recipe is LLaVA-1.5's stage 1; without --data, the toy world's own steps and batch."""

    out: str = "runs/pretrain"
    """folder for ckpt.pt, resume.pt and metrics.jsonl"""
    data: str = ""
    """records to train on, .json or .jsonl; none: the toy world"""
    image_dir: str = ""
    """folder that the records' image paths are relative to; none: images/ beside the records"""
    regions: str = ""
    """file of {id, regions} to join to the records"""
    val_data: str = ""
    """records to validate on (toy world: its validation split)"""
    vision: str = "backbones/toy-clip"
    """vision encoder: a Hugging Face folder or hub name"""
    llm: str = "backbones/toy-llama"
    """language model: a Hugging Face folder or hub name"""
    projector: str = field(default="mlp2x_gelu", metadata={"choices": list(PROJECTORS)})
    """kind of projector"""
    pool: int = 2
    """pixel_shuffle and c_abstractor make one patch of pool x pool"""
    image_size: int = 0
    """side of the encoder's square input in pixels; 0: what its image processor says"""
    geometry: str = field(default="crop", metadata={"choices": list(GEOMETRIES)})
    """how an image becomes a square"""
    feature_layer: int = -2
    """which of the encoder's hidden states is Z; -2 is the penultimate layer"""
    prompt: str = field(default="plain", metadata={"choices": list(PROMPTS)})
    """conversation format; plain: the caption after the image"""
    max_length: int = 2048
    """tokens per sample, patches included; longer ones are cut"""
    coverage: float = 0.25
    """share of a patch that a region must cover to label it"""
    patch_loss: str = field(default="softmax", metadata={"choices": ["softmax", "cosine"]})
    """softmax over the vocabulary, or the plain cosine pull"""
    patch_weight: float = 1
    """weight of the patch loss; 0 is the caption-only baseline"""
    patch_schedule: str = field(default="constant", metadata={"choices": ["constant", "decay"]})
    """decay: the weight falls linearly to 0 over the steps"""
    tau: float = 0.07
    """temperature of the softmax patch loss"""
    centre_words: bool = False
    """patch loss on word and patch embeddings less the mean word embedding"""
    steps: int = -1
    """optimizer updates; -1: one pass over the data (toy world: see toy.PRETRAIN)"""
    batch_size: int = 0
    """global batch, over all processes; 0: 256 (toy world: see toy.PRETRAIN)"""
    micro_batch: int = 0
    """samples per process and forward pass, gradients accumulate over them; 0: the whole share of the process"""
    lr: float = 1e-3
    """peak learning rate"""
    warmup: float = 0.03
    """share of the steps with rising learning rate, before the cosine"""
    clip: float = 1.0
    """largest norm of the gradient"""
    val_every: int = 0
    """steps between validations; 0: about five in all"""
    save_every: int = 200
    """steps between writes of resume.pt"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    dtype: str = field(default="auto", metadata={"choices": ["auto", "float32", "bfloat16"]})
    """of the frozen backbones and the matrix products; auto: bfloat16 on a GPU that has it, else float32"""
    workers: int = -1
    """data loading processes per rank; -1: 4 on a GPU, 0 on a CPU"""
    cache_features: str = ""
    """folder that keeps the encoder's features, so that later epochs and runs need neither images nor encoder; none: nothing is kept"""
    seed: int = 0
    """of the projector's initial values and of the data order"""
    resume: bool = False
    """go on from OUT/resume.pt"""
    overfit: bool = False
    """train on the first batch only, over and over: both losses must fall"""
    dry_run: bool = False
    """print parameters, FLOPs and memory from configuration alone; write OUT/plan.pt, of which sft.py --dry-run does the same"""


CONFIG = ("vision", "llm", "projector", "pool", "image_size", "geometry", "feature_layer", "prompt", "coverage", "tau", "patch_weight",
          "patch_loss", "centre_words")                        # the flags that a checkpoint remembers: later stages need none of them
FREE = {"out", "resume", "micro_batch", "workers", "cache_features", "save_every", "log_every", "val_every"}      # these change no result


def check(args: Args) -> Args:
    """Fill in what depends on the data; refuse what makes no sense."""
    for name, low in (("steps", -1), ("batch_size", 0), ("micro_batch", 0), ("patch_weight", 0), ("warmup", 0), ("save_every", 1),
                      ("pool", 1), ("log_every", 1), ("val_every", 0), ("seed", 0)):
        if getattr(args, name) < low:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} is less than {low}")
    for name in ("tau", "coverage", "lr", "clip"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name} {getattr(args, name)} is not above 0")
    if args.coverage > 1:
        raise InputError(f"--coverage {args.coverage} is a share of a patch, at most 1")
    if not args.data:
        for name in ("image_dir", "regions", "val_data"):
            if getattr(args, name):
                raise InputError(f"--{name.replace('_', '-')} needs --data; without it the toy world is used")
        folder = toy.DATA if args.dry_run else toy.ensure_once()
        steps, batch_size = toy.PRETRAIN["steps"], toy.PRETRAIN["batch_size"]
        args = dataclasses.replace(
            args, data=str(folder / "train.jsonl"), val_data=str(folder / "val.jsonl"), image_dir=str(folder / "images"),
            steps=steps if args.steps < 0 else args.steps, batch_size=args.batch_size or batch_size)
    return dataclasses.replace(args, batch_size=args.batch_size or 256, image_dir=args.image_dir or str(Path(args.data).parent / "images"))


def check_temperature(args: Args, model: PatchAlignedModel) -> None:
    """Refuse a tau that the loss refuses, before the first step: it depends on the size of the vocabulary."""
    nothing = torch.zeros(1, 1, device=model.device)
    try:
        if args.patch_loss == "softmax":
            patch_loss(model.word_embeddings[:1], model.word_embeddings, nothing.long(), nothing, args.tau)
    except ValueError as error:
        raise InputError("--" + str(error).split(", or impl=")[0]) from None


# ------------------------------------------------------------------------------------------------------------------- validation

@torch.inference_mode()
def validate(model: PatchAlignedModel, loader: DataLoader, cache: FeatureCache | None, device: torch.device, autocast) -> dict:
    """Mean caption loss per token and patch loss per labelled patch over the validation records, nats."""
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in loader:
        with autocast:
            batch = runtime.to_device(batch, device)
            sums = model(cache.complete(model, batch) if cache else batch)
        totals += torch.stack([sums[k].double() for k in ("caption_loss", "caption_tokens", "patch_loss", "patches")])
    if cache:
        cache.flush()
    runtime.all_sum([totals])
    caption, tokens, patch, patches = totals.tolist()
    return dict(val_caption_loss=runtime.mean(caption, tokens), val_patch_loss=runtime.mean(patch, patches))


# ------------------------------------------------------------------------------------------------------------------------- main

def dry_run(args: Args) -> None:
    """Print what the run would take: see cost.py. Neither weights nor images are read; only the configuration is written."""
    if runtime.rank() == 0:
        data, args = args.data, check(args)
        model = PatchAlignedModel({name: getattr(args, name) for name in CONFIG}, cost.precision(args), weights=False)
        with runtime.atomic(Path(args.out) / "plan.pt") as path:
            save_checkpoint(path, model, "plan", {}, state={})
        cost.report(model, args, data, "pretrain")
        print(f"wrote {Path(args.out) / 'plan.pt'}; next: {cost.command('pretrain.py')}")


def main(args: Args) -> None:
    """Train and write the checkpoint."""
    if args.dry_run:
        return dry_run(args)

    # ---- set-up
    device = runtime.start(args.seed)
    dtype, rank, world = runtime.precision(device, args.dtype), runtime.rank(), runtime.world()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    own_data, args, out = bool(args.data), check(args), Path(args.out)

    # ---- model: backbones in `dtype`, the projector in float32
    model = PatchAlignedModel({name: getattr(args, name) for name in CONFIG}, dtype).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    check_temperature(args, model)

    # ---- data: which records each step takes is a function of the step alone, so resuming needs no loader state
    dataset = model.records(args.data, args.image_dir, args.regions, args.max_length)
    cache = FeatureCache(args.cache_features, model, dataset) if args.cache_features else None
    batched = functools.partial(cache.collate if cache else collate, pad_id=model.pad_id)
    sampler = StepSampler(len(dataset), args.batch_size, args.seed, rank, world)
    steps = args.steps if args.steps >= 0 else max(1, len(dataset) // args.batch_size)
    share = args.batch_size // world
    micro = min(args.micro_batch or share, share)
    validation = kept = None
    if args.val_data:
        held_out = model.records(args.val_data, args.image_dir, max_length=args.max_length)
        own = list(range(rank, len(held_out), world))
        kept = FeatureCache(args.cache_features, model, held_out) if args.cache_features else None
        validation = runtime.loader(kept or held_out, [own[i: i + micro] for i in range(0, len(own), micro)],
                                    functools.partial(kept.collate if kept else collate, pad_id=model.pad_id), args.workers, device)

    # ---- optimizer
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    first = 0
    if args.resume:
        state = runtime.load_resume(out / "resume.pt", args, FREE, InputError)
        load_trained(model, state["model"], out / "resume.pt")
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    elif rank == 0:
        if (out / "ckpt.pt").exists():
            print(f"{out / 'ckpt.pt'} is there and will be replaced; --resume goes on from its run, --out names another folder")
        (out / "resume.pt").unlink(missing_ok=True)                                                  # an earlier run's: never to go on from
    metrics = runtime.Metrics(out / "metrics.jsonl", first)
    shares = (sampler.indices(0 if args.overfit else step) for step in range(first, steps))
    index_lists = [own[i: i + micro] for own in shares for i in range(0, share, micro)]
    batches = iter(runtime.loader(cache or dataset, index_lists, batched, args.workers, device))
    annotated = sum(bool(r.get("regions")) for r in dataset.records)
    implementation = default_impl(model.word_embeddings) if args.patch_loss == "softmax" else "plain torch"
    runtime.log(f"{len(dataset)} records, {annotated} with regions; "
                f"{steps - first} steps of {args.batch_size} = {world} processes x {-(-share // micro)} x {micro}; "
                f"{model.grid[0]} x {model.grid[1]} patches; vocabulary {len(model.word_embeddings)}; "
                f"{sum(p.numel() for p in parameters):,} trained parameters; {device.type}, {str(dtype).removeprefix('torch.')}; "
                f"patch loss {args.patch_loss} ({implementation}), weight {args.patch_weight:g}, tau {args.tau:g}")

    # ---- loop
    val_every, result, clock = args.val_every or max(1, steps // 5), {}, runtime.Clock(device, first)
    progress = tqdm(range(first, steps), desc="pretrain", initial=first, total=steps, disable=rank > 0, mininterval=1)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * runtime.cosine(step, steps, int(args.warmup * steps))

        # Losses are sums, divided by the true counts of the global batch, which the labels tell before the first forward pass. Here and
        # below nothing that lies on a GPU is read, but in steps that are logged: the host prepares the next step while the GPU is at this.
        with clock("data"):
            accumulated = [next(batches) for _ in range(0, share, micro)]
        counts = torch.tensor([sum(int((b["labels"] != IGNORE).sum()) for b in accumulated),
                               sum(int((b["patch_weights"].sum(-1) > 0).sum()) for b in accumulated)], dtype=torch.float64)
        counts = counts.to(device, non_blocking=True) if world > 1 else counts
        runtime.all_sum([counts])
        tokens, patches = counts.float().clamp_min(1)
        totals = torch.zeros(2, dtype=torch.float32, device=device)                                  # caption, patch: sums
        weight = args.patch_weight * (1 - step / steps if args.patch_schedule == "decay" else 1)
        with clock("model"):
            for batch in accumulated:
                with autocast:
                    batch = runtime.to_device(batch, device)
                    sums = model(cache.complete(model, batch) if cache else batch)
                loss = sums["caption_loss"] / tokens + weight * sums["patch_loss"] / patches
                loss.backward()
                totals += torch.stack([sums["caption_loss"].detach(), sums["patch_loss"].detach()])
            runtime.all_sum([p.grad for p in parameters] + [totals])                                 # sums, not means: counts are global
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if done % args.log_every == 0 or done == steps:
            caption, patch = (runtime.mean(total, count) for total, count in zip(totals.tolist(), counts.tolist()))
            metrics.write(done, caption_loss=caption, patch_loss=patch, lr=optimizer.param_groups[0]["lr"], grad_norm=norm.item(),
                          **clock.read(done, args.batch_size), **({"cache_hits": cache.share()} if cache else {}))
            progress.set_postfix(caption=caption, patch=patch)
        if validation is not None and (done % val_every == 0 or done == steps):
            with clock("validation"):
                result = validate(model, validation, kept, device, autocast)
            metrics.write(done, **result)
            runtime.log(f"step {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in result.items() if v is not None))
        if done % args.save_every == 0 or done == steps:
            runtime.save_resume(out / "resume.pt", args, done, model=model.trained_state(), optimizer=optimizer.state_dict())

    # ---- save
    if cache:
        cache.flush()
    if validation is not None and not result:
        result = validate(model, validation, kept, device, autocast)
    if rank == 0:
        with runtime.atomic(out / "ckpt.pt") as path:
            save_checkpoint(path, model, "pretrain", dict(result, steps=steps))
    source = f" --data {args.val_data or args.data} --image-dir {args.image_dir}" if own_data else ""
    runtime.log(f"wrote {out / 'ckpt.pt'}; next: python probe.py {out / 'ckpt.pt'}{source}")


if __name__ == "__main__":
    runtime.run(main, Args, __doc__, InputError)
