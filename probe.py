"""What do projected patches share with words? Three measures, a table, a picture of checkpoints.

The projector turns the encoder's patch features Z into patch embeddings H, which stand among the
language model's word embeddings W (symbols: model.py). Each measure is compared with something:

    compression     How varied are the patches? Von Neumann entropy in nats; exp of it is the
                    effective rank, a number of directions. Compare H with Z: lower is compression.
                    "Centred" leaves out the mean patch. If "H centred" is near zero, all patches
                    are alike, and that is collapse. Pooled entropy is the mean per image plus what
                    lies between images. The energy of unit patches says the same of variances: the
                    shares of the one direction of all, of the images, of patches within an image.
    alignment       Does a patch resemble the words that name what it shows? Mean cosine of the two;
                    recall@k, the share of its words among the k nearest of the whole vocabulary.
                    Compare with chance: the same patches, each with the words of another patch,
                    drawn at random. A patch that resembles all words alike scores no more. Chance
                    is high where two random words have a high cosine, which the table has as well.
    decomposition   Of how many words is a patch made? Orthogonal matching pursuit writes it as a
                    weighted sum of k = 1 .. K words, the atoms: the share of its energy that they
                    explain, and the share of its own words among them. Compare with the control:
                    the words under one random rotation, which keeps the angles between them and
                    takes their meaning. Compare k with 1: if one word per patch were enough, the
                    curve would be flat from there on.

    python probe.py runs/pretrain/ckpt.pt                               # the toy world
    python probe.py runs/caption/ckpt.pt runs/pretrain/ckpt.pt          # side by side
    python probe.py ckpt.pt --data val.jsonl --image-dir images --images 1000 --page page.html
    python probe.py llava-hf/llava-1.5-7b-hf --data val.jsonl           # LLaVA, folder or hub name
    python probe.py mm_projector.bin --vision NAME --llm NAME --data val.jsonl

reads:   checkpoints and the backbones that they name; records with regions
writes:  probe.json beside each checkpoint (a hub name: in runs/NAME); beside the first probe.png, a
         picture, and of the toy world page.html, in which one points at patches
"""
import json
import math
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import regex
import torch
from PIL import Image
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import runtime
from data import image_header, image_path, open_image, read_records
from labels import check_frame, patch_words, transform_image, word_ids
from model import load_checkpoint


@dataclass
class Args:
    """Flags of probe.py."""

    checkpoints: list[str] = field(metadata={"positional": True})
    """shown side by side: ckpt.pt, LLaVA folders, hub names, mm_projector.bin"""
    data: str = ""
    """records with regions, .json or .jsonl; none: the toy world's test split"""
    image_dir: str = ""
    """folder of the records' images; none: images/ beside the records"""
    regions: str = ""
    """second file of {id, regions}, joined on id"""
    images: int = 300
    """images to analyse, spread evenly over the records; 0: all"""
    out: str = ""
    """folder for all that is written; none: beside the checkpoint"""
    # --- pictures
    show: int = 2
    """images in the picture; 0: no picture"""
    page: str = ""
    """page.html to write, patches to point at; none: only of the toy world"""
    page_images: int = 24
    """images in the page"""
    # --- measures
    coverage: float = 0
    """share of a patch that a region covers to label it; 0: as in training"""
    atoms: int = 8
    """K, words per patch in the decomposition"""
    pursuit_patches: int = 4096
    """labelled patches to decompose, drawn at random; 0: all"""
    seed: int = 0
    """seed of the permutation, the rotation and the draw of patches"""
    # --- mm_projector.bin
    vision: str = ""
    """vision encoder that it was trained with"""
    llm: str = ""
    """language model that it was trained with"""


# ---- compression ---------------------------------------------------------------------------------

CHUNK = 2**26                               # numbers in the largest block held at once (256 MiB)
ENTROPIES = {"encoder": "Z", "projected": "H",                      # keys of probe.json: titles
             "encoder_pooled": "Z pooled", "projected_pooled": "H pooled",
             "encoder_centred": "Z centred", "projected_centred": "H centred"}
unit = partial(F.normalize, dim=-1)         # rows scaled to length one; rows of zeros stay zero


def von_neumann_entropy(x):
    """-sum_k lambda_k ln lambda_k of a set of n embeddings, in nats; x (n, D) -> float.

    lambda: the eigenvalues of rho = (1/n) sum_i x_i x_i^T / |x_i|^2 (after Kim et al., CVPR 2023).
    From 0 (all rows parallel) to ln min(n, D). Rows of zeros are ignored; a set of them has 0.
    """
    n, width = x.shape
    if n <= width:                          # U U^T has the non-zero eigenvalues of U^T U
        u = unit(x.double())
        gram = u @ u.T                                                          # (n, n)
    else:
        units = (unit(rows.double()) for rows in x.split(max(1, CHUNK // (4 * width))))
        gram = sum(u.T @ u for u in units)                                      # (D, D)
    rho = gram / gram.trace().clamp_min(0.5)            # the trace: number of non-zero rows, or 0
    return torch.special.entr(torch.linalg.eigvalsh(rho).clamp_min(0)).sum().item()


def entropies(x, device):
    """x (N, P, D) -> entropy in nats: mean over images, of all patches, of all less their mean."""
    images = [von_neumann_entropy(image.to(device)) for image in x]
    pooled = x.flatten(0, 1).to(device)
    mean = pooled.mean(0, dtype=torch.float64)
    rest = pooled - mean.to(pooled)
    rest *= rest.norm(dim=-1, keepdim=True) > 1e-5 * mean.norm()    # else it is rounding noise
    return sum(images) / len(images), von_neumann_entropy(pooled), von_neumann_entropy(rest)


def energy_shares(x):
    """x (N, P, D) -> the energy of its unit rows, 1, divided up: |mean of all|^2, the variance of
    the images' means, the mean variance within an image."""
    means = torch.stack([unit(image.double()).mean(0) for image in x])                      # (N, D)
    shared, images = means.mean(0).square().sum().item(), means.square().sum(1).mean().item()
    return {"shared": shared, "between": images - shared, "within": 1 - images}


# ---- alignment -----------------------------------------------------------------------------------


def pairs(words):
    """words[i]: the words of patch i, each the tuple of its token ids -> patch (M,), word (M,),
    tokens: word[m] names patch[m]; tokens[j] are those of word j, padded with -1."""
    index = {}
    both = [(i, index.setdefault(t, len(index))) for i, row in enumerate(words) for t in row]
    tokens = pad_sequence([torch.tensor(t) for t in index], True, -1)           # (words, longest)
    return *torch.tensor(both).T, tokens


def average(values, patch):
    """values (M, ...) of the pairs -> mean over each patch's words, then over patches (...)."""
    counts = torch.bincount(patch)
    total = values.new_zeros(len(counts), *values.shape[1:]).index_add_(0, patch, values)
    return (total / counts.view(-1, *[1] * (values.ndim - 1))).mean(0)


def word_vectors(w, tokens):
    """w_t (words, D) of words given by their tokens, -1 for none (words, longest): the mean of the
    unit rows of w at the tokens, scaled to length 1."""
    real = (tokens >= 0).unsqueeze(-1).to(w.device)
    rows = unit(w[tokens.clamp_min(0).to(w.device)].float()) * real            # (words, longest, D)
    return unit(rows.sum(1) / real.sum(1))


def alignment(h, w, words):
    """Mean over patches of the mean over their words t of cos(h_i, w_t); None without words.
    h (n, D), w (V, D)."""
    if not any(words):
        return None
    patch, word, tokens = pairs(words)
    vectors = word_vectors(w, tokens)                                           # (words, D)
    cosines = [(unit(h[i].to(vectors)) * vectors[t.to(w.device)]).sum(1).cpu()
               for i, t in zip(patch.split(2**14), word.split(2**14))]
    return average(torch.cat(cosines), patch).item()


def nearest_rows(h, w, k):
    """Indices (n, k) of the rows of w (V, D) of highest cosine with each h_i (n, D), best first."""
    w = unit(w.float())
    chunks = tqdm(h.split(CHUNK // len(w) + 1), desc="nearest words", leave=False)
    return torch.cat([(unit(rows.to(w)) @ w.T).topk(k).indices.cpu() for rows in chunks])


def word_recall(chosen, words):
    """chosen (n, K), token ids, the best first -> list: for k = 1 .. K the share of a patch's words
    with a token among the first k, mean over patches; None without words."""
    if not any(words):
        return [None] * chosen.shape[1]
    patch, word, tokens = pairs(words)
    hits = torch.zeros(len(patch), chosen.shape[1], dtype=torch.bool)
    for column in tokens.T:
        hits |= chosen[patch] == column[word, None]
    return average((hits.cumsum(1) > 0).float(), patch).tolist()


def anisotropy(w):
    """Mean cosine over all pairs of different rows of w (V, D), without rows of zeros: the cosines
    of n rows, each with all of them, add up to |the sum of the unit rows|^2."""
    total, n = w.new_zeros(w.shape[1], dtype=torch.float64), 0
    for rows in w.split(CHUNK // (4 * w.shape[1]) + 1):
        u = unit(rows.double())
        total, n = total + u.sum(0), n + int(u.any(1).sum())
    return ((total.square().sum() - n) / max(1, n * (n - 1))).item()


# ---- decomposition -------------------------------------------------------------------------------


@torch.no_grad()
def matching_pursuit(x, dictionary, atoms):
    """x_i / |x_i| as a weighted sum of K unit rows of a dictionary, its atoms, chosen one by one.

    Orthogonal matching pursuit (Pati et al., 1993). x (n, D), dictionary (V, D), atoms = K <= V
    -> three tensors (n, K):
        indices       rows in the order chosen: each has the largest |correlation| with the residual
        coefficients  least-squares weights of all K (signed; 0 for an atom that others span)
        explained     share of the energy that the first k explain; never decreasing
    Atoms are orthogonalised as they arrive, A^T = Q R: the residual is x less its projections on
    the rows of Q, the weights solve R c = Q^T x. ValueError: a dictionary of fewer than K rows.
    """
    if not 1 <= atoms <= len(dictionary):
        raise ValueError(f"matching_pursuit: atoms lie in 1 .. {len(dictionary)}, not {atoms}")
    n, width = x.shape
    rows = CHUNK // (4 * max(len(dictionary), atoms * width)) + 1
    if n > rows:
        chunks = tqdm(x.split(rows), desc="pursuit", leave=False)
        parts = [matching_pursuit(chunk, dictionary, atoms) for chunk in chunks]
        return tuple(map(torch.cat, zip(*parts)))
    dictionary = unit(dictionary.to(torch.float64 if x.dtype == torch.float64 else torch.float32))
    residual = unit(x.to(dictionary))                                           # (n, D)
    q, b = residual.new_zeros(n, atoms, width), residual.new_zeros(n, atoms)    # b = Q^T x
    r = torch.eye(atoms).to(residual).repeat(n, 1, 1)
    indices = b.long()
    for k in range(atoms):
        correlation = (residual @ dictionary.T).abs_()                          # (n, V)
        pick = correlation.scatter_(1, indices[:, :k], -1).argmax(1)            # none twice
        rest = dictionary[pick]                                                 # (n, D)
        for _ in range(2):                  # the second pass removes the first one's rounding
            along = torch.einsum("nkd,nd->nk", q, rest)
            rest = rest - torch.einsum("nkd,nk->nd", q, along)
            r[:, :k, k] += along[:, :k]
        norm = rest.norm(dim=1)
        new = norm > torch.finfo(norm.dtype).eps ** 0.5     # else others span it: weight 0
        q[:, k] = torch.where(new, 1 / norm.clamp_min(1e-30), 0)[:, None] * rest
        b[:, k] = (q[:, k] * residual).sum(1)
        residual = residual - b[:, k, None] * q[:, k]
        r[:, k, k] = torch.where(new, norm, 1)
        indices[:, k] = pick
    coefficients = torch.linalg.solve_triangular(r, b.unsqueeze(2), upper=True).squeeze(2)
    explained = b.square().cumsum(1).clamp_max(1)
    return indices.to(x.device), coefficients.to(x.device), explained.to(x.device)


def rotated(x, generator):
    """The rows (n, D) turned at random. To turn patches is to turn the words the other way."""
    normal = torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return x @ (q * r.diagonal().sign()).T.to(x)        # signs: uniform over the orthogonal group


def word_rows(tokenizer, w):
    """The rows of w that stand for words -> (ids (n,), their texts, whether they are whole words).

    Whole words are tokens of a space and letters ("Ġdog", "▁dog"); with fewer than 50, all rows
    count. Special tokens and rows near zero are left out.
    """
    norm = w.float().norm(dim=1)
    usable = (norm > 1e-3 * norm.median()).tolist()
    known, special = range(min(len(w), len(tokenizer))), set(tokenizer.all_special_ids)
    ids = [i for i in known if usable[i] and i not in special]
    tokens = dict(zip(ids, map(str, tokenizer.convert_ids_to_tokens(ids))))
    texts = {i: tokenizer.decode([i]).strip() for i in ids}                     # "" for a bare "Ġ"
    letters = regex.compile(r"[\p{L}\p{M}]+")
    whole = [i for i in ids if tokens[i][:1] in ("Ġ", "▁") and letters.fullmatch(texts[i])]
    chosen = whole if len(whole) >= 50 else ids
    return torch.tensor(chosen), [texts[i] or tokens[i] for i in chosen], len(whole) >= 50


# ---- one checkpoint over the data ----------------------------------------------------------------


def model_input(record, model, image_dir):
    """A record's image as the encoder's input (3, height, width), and the words of each patch."""
    where, c = f"record {record.get('id')}", model.config
    image = open_image(image_path(record, image_dir, where), where)
    if model.grid is None:                              # outputs that have no places in the image
        return transform_image(image, *model.image_form), [[]] * model.patches
    words = patch_words(record.get("regions") or [], image.size, c["geometry"], model.grid,
                        c["coverage"], where, model.aspect, c.get("stop_words"))
    return transform_image(image, *model.image_form), words


@torch.inference_mode()
def collect(model, records, image_dir, batch_size=32):
    """Z (N, P_v, D_v), H (N, P, D) of the records' images, float32 on the CPU, and the words of the
    N P patches. InputError: a value that is not finite."""
    z, h, words = [], [], []
    for part in tqdm(runtime.split(records, batch_size), desc="images", leave=False):
        batch = [model_input(record, model, image_dir) for record in part]
        features = model.encode(torch.stack([pixels for pixels, _ in batch]))   # (B, P_v, D_v)
        z.append(features.float().cpu())
        h.append(model.projector(features).float().cpu())                       # (B, P, D)
        words += [row for _, image in batch for row in image]
    z, h = torch.cat(z), torch.cat(h)
    if not (z.isfinite().all() and h.isfinite().all()):
        raise runtime.InputError("patch embeddings are not finite: did the training diverge?")
    tokens = cache(lambda word: tuple(word_ids(model.tokenizer, word)))
    return z, h, [list(filter(None, map(tokens, row))) for row in words]


@torch.inference_mode()
def analyse(model, z, h, words, args):
    """Every number of probe.json, from what `collect` returns."""
    generator = torch.Generator().manual_seed(args.seed)
    w = model.word_embeddings.detach().float()                                  # (V, D)
    scores = [s for pair in zip(entropies(z, w.device), entropies(h, w.device)) for s in pair]
    flat = h.flatten(0, 1)                                                      # (N P, D)
    labelled = [i for i, row in enumerate(words) if row]
    patches, own = flat[labelled], [words[i] for i in labelled]
    nearest = nearest_rows(patches, w, min(10, len(w)))
    others = [own[i] for i in torch.randperm(len(own), generator=generator).tolist()]

    def recall(named):
        curve = word_recall(nearest, named)
        return {k: curve[min(int(k), len(curve)) - 1] for k in ("1", "5", "10")}

    result = {"entropy": dict(zip(ENTROPIES, scores)),
              "energy": {"encoder": energy_shares(z), "projected": energy_shares(h)},
              "effective_rank": dict(zip(ENTROPIES, map(math.exp, scores))),
              "align": alignment(patches, w, own), "chance": alignment(patches, w, others),
              "recall": recall(own), "recall_chance": recall(others)}

    drawn = labelled or range(len(flat))
    order = torch.randperm(len(drawn), generator=generator).tolist()
    drawn = [drawn[i] for i in order][: args.pursuit_patches or None]
    ids, _, whole = word_rows(model.tokenizer, w)
    dictionary, x, n = w[ids.to(w.device)], flat[drawn], len(drawn)
    both = torch.cat([x, rotated(x, generator)]).to(w.device)
    chosen, _, explained = matching_pursuit(both, dictionary, min(args.atoms, len(ids)))
    pursuit = {"dictionary": len(ids), "whole_words": whole, "patches": n}
    for energy, found, rows in (("explained", "recall", slice(n)),
                                ("control", "control_recall", slice(n, None))):
        pursuit[energy] = explained[rows].mean(0).tolist()
        pursuit[found] = word_recall(ids[chosen[rows].cpu()], [words[i] for i in drawn])
    return result | {
        "anisotropy": {"vocabulary": anisotropy(w), "whole_words": anisotropy(dictionary),
                       "norm": w.norm(dim=1).mean().item()},
        "pursuit": pursuit, "words_per_patch": sum(map(len, words)) / max(1, len(labelled)),
        "labelled": len(labelled), "patches": len(flat), "images": len(h)}


# ---- what picture and page show ------------------------------------------------------------------

NEAR = 5                                    # nearest words of a patch, for the page


@torch.inference_mode()
def looks(model, records, shown, h, image_dir, atoms, maps=True):
    """What extras/picture.py and page.py show of the records shown; h (N, P, D) is of all records.

    -> {texts: words; images: a dict per record}, which holds of its patches
        view, grid      the encoder's input as an image; rows, columns
        labels, right   the words that name each patch; whether the nearest is one, None without
        near, cosines   (P, NEAR): the nearest words, as indices into texts, the best first
        atoms, weights  (P, K): its decomposition
        map             (P, len(texts)) int8: 127 times the cosine with every word; if `maps`
    """
    w = model.word_embeddings.detach().float()
    ids, texts, _ = word_rows(model.tokenizer, w)
    inputs = [model_input(records[i], model, image_dir) for i in shown]
    tokens = {word: tuple(word_ids(model.tokenizer, word))
              for _, named in inputs for row in named for word in row}
    known, dictionary = set(texts), unit(w[ids.to(w.device)])
    more = [word for word, own in tokens.items() if own and word not in known]
    others = torch.cat([dictionary[:0], *(word_vectors(w, torch.tensor([tokens[word]]))
                                          for word in more)])
    std, mean = (torch.tensor(t).view(3, 1, 1) for t in (model.image_std, model.image_mean))
    images = []
    for i, (pixels, named) in tqdm(list(zip(shown, inputs)), desc="patches", leave=False):
        pixels = ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        x = unit(h[i].to(dictionary))                                           # (P, D)
        cosines = x @ dictionary.T
        best, near = cosines.topk(min(NEAR, len(ids)))
        cosines = torch.cat([cosines, x @ others.T], 1)
        chosen, weights, _ = matching_pursuit(x, dictionary, min(atoms, len(ids)))
        own = [[word for word in row if tokens[word]] for row in named]
        right = [any(token in tokens[word] for word in row) if row else None
                 for token, row in zip(ids[near[:, 0].cpu()].tolist(), own)]
        images.append(dict(
            view=Image.fromarray(pixels.contiguous().numpy()), grid=model.grid, labels=own,
            right=right, near=near.cpu(), cosines=best.cpu(), atoms=chosen.cpu(),
            weights=weights.cpu(), map=(127 * cosines).round().char().cpu() if maps else None))
    return {"texts": [*texts, *more], "images": images}


def caption(record):
    """A record's image and phrases."""
    phrases = dict.fromkeys(region["phrase"] for region in record.get("regions") or [])
    return f"{record['image']}:  {' | '.join(phrases) or '(no regions)'}"


# ---- table and main ------------------------------------------------------------------------------


def scores(r):
    """{title: text} of one probe.json; in brackets what a score is to be compared with."""
    words, p = r["anisotropy"], r["pursuit"]
    rows = [(f"entropy, {title}", r["entropy"][key], "rank", r["effective_rank"][key])
            for key, title in ENTROPIES.items()]
    rows[4:4] = [(f"between images, {t}", r["entropy"][f"{key}_pooled"] - r["entropy"][key], "of",
                  r["entropy"][f"{key}_pooled"]) for key, t in list(ENTROPIES.items())[:2]]
    rows += [("two random words, cosine", words["vocabulary"], "whole words", words["whole_words"]),
             ("alignment", r["align"], "chance", r["chance"])]
    rows += [(f"recall@{k}", r["recall"][k], "chance", r["recall_chance"][k]) for k in r["recall"]]
    for title, score, control in (("energy", "explained", "control"),
                                  ("words found", "recall", "control_recall")):
        rows += [(f"pursuit {title}, {k} atoms", p[score][k - 1], "control", p[control][k - 1])
                 for k in (1, 2, 4, 8, 16) if k <= len(p[score])]
    column = {title: None if score is None else f"{score:.3f} ({note} {other:.3f})"
              for title, score, note, other in rows}
    for key, title in list(ENTROPIES.items())[:2]:
        parts = r["energy"][key].values()
        column[f"energy of {title}: shared, between, within"] = ", ".join(f"{v:.3f}" for v in parts)
    column["pursuit dictionary"] = f"{p['dictionary']} {('tokens', 'words')[p['whole_words']]}"
    labelled = f"({r['labelled']} of {r['patches']} labelled)"
    return column | {"words per patch": f"{r['words_per_patch']:.2f} {labelled}"}


def probe(path, file, records, shown, page, image_dir, args, device):
    """Write a checkpoint's probe.json -> (it, `looks` of the records shown). Its model is freed."""
    from hf import opened

    with opened(path, args.vision, args.llm) as checkpoint:
        model, _ = load_checkpoint(checkpoint, device, runtime.precision(device))
    model.config["coverage"] = args.coverage or model.config["coverage"]
    model.eval()
    z, h, words = collect(model, records, image_dir)
    if shown and model.grid is None:
        raise runtime.InputError(f"{path}: its projector's outputs have no places in the image;"
                                 " use --show 0, without --page")
    result = {"checkpoint": str(path)} | analyse(model, z, h, words, args)
    with runtime.atomic(file) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    return result, shown and looks(model, records, shown, h, image_dir, args.atoms, bool(page))


def check_units(records, source, image_dir):
    """InputError: boxes that, all together, look like another unit than pixels."""
    from extras.check import given_boxes

    boxes = []
    for record in (record for record in records if record.get("regions")):
        where = f"{source}: record {record.get('id')}"
        size, _ = image_header(image_path(record, image_dir, where), where)
        boxes += given_boxes(record["regions"], where, size)
    check_frame(*([box[i] for box in boxes] for i in range(3)))


def main(args):
    """Analyse the checkpoints one after another; write their numbers and the picture."""
    device = runtime.start(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = False       # the pursuit needs float32's whole mantissa
    runtime.check_lowest(args, images=0, show=0, coverage=0, atoms=1, pursuit_patches=0,
                         page_images=1)
    if args.coverage > 1:
        raise runtime.InputError(f"--coverage {args.coverage} is a share of a patch, at most 1")
    source = Path(args.data)
    if not args.data:
        import toy

        source = toy.ensure() / "test.jsonl"
    image_dir = args.image_dir or source.parent / "images"
    records = [r for r in read_records(source, args.regions or None) if r.get("image")]
    if not records:
        raise runtime.InputError(f"{source}: no record has an image: nothing to analyse")
    records = runtime.spread(records, args.images)
    check_units(records, source, image_dir)
    runtime.log(f"{len(records)} images, {len(args.checkpoints)} checkpoints")
    names, files = runtime.outputs(args.checkpoints, args.out, "probe.json")
    written = [file for file, in files]
    page = args.page or ("" if args.data or not args.show else str(written[0].parent / "page.html"))
    with_regions = [i for i, r in enumerate(records) if r.get("regions")] or range(len(records))
    count = max(args.show, args.page_images if page else 0)
    shown = runtime.spread(with_regions, count) if count else []
    for file in written:
        runtime.lock(file)
    if page:
        Path(page).parent.mkdir(parents=True, exist_ok=True)
    results, seen = zip(*(probe(path, file, records, shown, page, image_dir, args, device)
                          for path, file in zip(args.checkpoints, written)))
    table = [scores(result) for result in results]
    rows = [[title, *(column.get(title) for column in table)] for title in table[0]]
    runtime.log(runtime.table([["", *names], *rows]))
    runtime.log("A score counts above chance or control. H below Z is compression, unless H centred"
                " is near 0.\nPursuit that gains after 1 atom: a patch holds several words.")
    captions = [caption(records[i]) for i in shown]
    if args.show:
        from extras import picture

        written.append(written[0].parent / "probe.png")
        drawn = runtime.spread(range(len(shown)), args.show)
        picture.write(written[-1], names, captions, seen, drawn)
    if page:
        from extras.page import write

        write(page, names, captions, seen)
        written.append(page)
    runtime.finished(written, f"look at {written[-1]}")


if __name__ == "__main__":
    runtime.run(main, Args, __doc__)
