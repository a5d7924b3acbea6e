"""Analysis of any checkpoint: how far the projector compresses, how well patches align with words, and of how many.

Three questions about the patch embeddings H = projector(Z), each answered beside a control (definitions in README.md,
symbols in model.py):

    compression     von Neumann entropy of the patches before (Z) and after (H) the projector; again with the mean removed,
                    because patches that all collapse onto one direction would pass for well compressed
    alignment       cosine between a patch and the words that name what it shows, and recall@k among the nearest rows of the
                    whole vocabulary; control: the same patches with the words of randomly permuted patches
    decomposition   orthogonal matching pursuit of a patch over word embeddings; control: the same dictionary, randomly
                    rotated. If one word per patch were enough, the curve would be flat from K = 1 on

Beside them stands the anisotropy of the words themselves, the mean cosine of two different ones: where it is high, so is chance.

    python probe.py runs/pretrain/ckpt.pt                               # toy world
    python probe.py runs/caption/ckpt.pt runs/pretrain/ckpt.pt          # side by side
    python probe.py ckpt.pt --data val.jsonl --image-dir images --images 1000
    python probe.py llava-hf/llava-1.5-7b-hf --data val.jsonl           # any LlavaForConditionalGeneration, folder or hub name
    python probe.py mm_projector.bin --vision openai/clip-vit-large-patch14-336 --llm lmsys/vicuna-7b-v1.5 --data val.jsonl

reads:   each checkpoint and the backbones that it names; records with regions (default: the toy world's test split)
writes:  probe.json beside each checkpoint, in a LLaVA folder, or in runs/NAME of a hub name; probe.png beside the first (or both in --out)
"""

import colorsys
import json
import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm

import data
import llava
import runtime
from model import load_checkpoint


@dataclass
class Args:
    """Flags of probe.py."""

    checkpoints: list[str] = field(metadata={"positional": True})
    """checkpoints to analyse, side by side; LLaVA folders, hub names and mm_projector.bin as well"""
    vision: str = ""
    """of an mm_projector.bin: the encoder that it was trained with"""
    llm: str = ""
    """of an mm_projector.bin: the language model"""
    data: str = ""
    """records (JSON or JSONL); none: the toy world's test split"""
    regions: str = ""
    """optional second file of {id, regions}, joined on id"""
    coverage: float = 0
    """share of a patch that a region must cover to label it; 0: as in the checkpoint's training"""
    image_dir: str = ""
    """folder that the records' image paths are relative to; none: images/ beside the records"""
    out: str = ""
    """folder for probe.json and probe.png; none: beside the checkpoint"""
    images: int = 300
    """images to analyse, spread evenly over the records (all patches are kept in memory); 0 = all"""
    batch_size: int = 32
    """images encoded at a time"""
    atoms: int = 8
    """K: words per patch in the matching pursuit"""
    pursuit_patches: int = 4096
    """labelled patches decomposed, drawn at random; 0 = all"""
    show: int = 4
    """images in the picture"""
    seed: int = 0
    """seed of the permutations, the rotation and the draw of patches"""


# ------------------------------------------------------------------------------------------------------------------------ measures: entropy

CHUNK = 2**26                                                   # largest similarity block held at once, in elements (256 MiB)
RECALLS = ("1", "5", "10")                                      # k of recall@k, as keys of probe.json
ENTROPIES = ("encoder", "projected", "encoder_pooled", "projected_pooled", "encoder_centred", "projected_centred")


def unit(x):
    """Rows of x scaled to length one; rows of zeros stay zero."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def von_neumann_entropy(x):
    """Entropy in nats of the spectrum of rho = (1/n) sum_i x_i x_i^T / |x_i|^2 for x (n, D) (after Kim et al., CVPR 2023).

    From 0 (all rows parallel) to ln min(n, D). Rows of zeros are ignored; a set without any other row has entropy 0.
    """
    n, width = x.shape
    if n <= width:                                              # Gram and covariance share their non-zero eigenvalues
        u = unit(x.double())
        gram = u @ u.T                                          # (n, n)
    else:
        gram = x.new_zeros(width, width, dtype=torch.float64)   # (D, D)
        for rows in x.split(max(1, CHUNK // (4 * width))):
            u = unit(rows.double())
            gram += u.T @ u
    trace = gram.trace()                                        # = number of non-zero rows
    if trace == 0:
        return 0.0
    return torch.special.entr(torch.linalg.eigvalsh(gram / trace).clamp_min(0)).sum().item()


def centred(x):
    """x minus its mean row. What is left of (numerically) equal rows is rounding noise, and is set to zero."""
    mean = x.mean(0, dtype=torch.float64)
    x = x - mean.to(x)
    return x * (x.norm(dim=-1, keepdim=True) > 1e-5 * mean.norm())


def entropies(x, device):
    """x (N, P, D) -> mean over images, pooled over the set, pooled with the mean removed (three floats, nats)."""
    pooled = x.flatten(0, 1).to(device)
    per_image = [von_neumann_entropy(image.to(device)) for image in x]
    return sum(per_image) / len(per_image), von_neumann_entropy(pooled), von_neumann_entropy(centred(pooled))


# ----------------------------------------------------------------------------------------------------------- measures: alignment and recall


def pairs(words):
    """The words of n patches, words[i] = list of words, each the tuple of its token ids, as index arrays.

    -> patch (M,), word (M,), tokens (distinct words, longest): pair m says that word[m] names patch[m]; tokens is padded with -1.
    """
    index = {}
    both = [(i, index.setdefault(t, len(index))) for i, row in enumerate(words) for t in row]
    longest = max(map(len, index))
    tokens = torch.tensor([[*t, *[-1] * (longest - len(t))] for t in index])
    return *torch.tensor(both).T, tokens


def average(values, patch):
    """values (M, ...) of the pairs -> mean over each patch's words, then over patches (...)."""
    n = int(patch.max()) + 1
    total = values.new_zeros(n, *values.shape[1:]).index_add_(0, patch, values)
    return (total / torch.bincount(patch).view(-1, *[1] * (values.ndim - 1))).mean(0)


def word_vectors(tokens, w):
    """w_t of each word: mean of the unit rows of w (V, D) at its tokens (words, longest; -1 = padding), renormalised."""
    real = (tokens >= 0).unsqueeze(-1).to(w.device)
    rows = unit(w[tokens.clamp_min(0).to(w.device)].float()) * real                 # (words, longest, D)
    return unit(rows.sum(1) / real.sum(1))                                          # (words, D)


def alignment(h, w, words):
    """Mean over patches of the mean over their words of cos(h_i, w_t). h (n, D), w (V, D), words as in pairs, none empty."""
    patch, word, tokens = pairs(words)
    vectors = word_vectors(tokens, w)
    chunks = zip(patch.split(2**14), word.split(2**14))
    return average(torch.cat([(unit(h[p].to(vectors)) * vectors[t.to(w.device)]).sum(1).cpu() for p, t in chunks]), patch).item()


def nearest_rows(h, w, k):
    """Indices (n, k) of the rows of w (V, D) of highest cosine with each row of h (n, D), best first."""
    w = unit(w.float())
    chunks = tqdm(h.split(CHUNK // len(w) + 1), desc="nearest words", leave=False)
    return torch.cat([(unit(rows.to(w)) @ w.T).topk(k).indices.cpu() for rows in chunks])


def anisotropy(w):
    """Mean cosine of two different rows of w (V, D), exact over all pairs; rows of zeros are left out. 0 for random directions.

    With s the sum of the n unit rows, the cosines of all ordered pairs add up to |s|^2, n of them with themselves.
    """
    total, n = w.new_zeros(w.shape[1], dtype=torch.float64), 0
    for rows in w.split(CHUNK // (4 * w.shape[1]) + 1):
        u = unit(rows.double())
        total, n = total + u.sum(0), n + int(u.any(1).sum())
    return ((total.square().sum() - n) / max(1, n * (n - 1))).item()


def word_recall(chosen, words):
    """(K,): share of a patch's words of which some token is among its first k tokens chosen (n, K), mean over patches."""
    patch, word, tokens = pairs(words)
    chunks = zip(patch.split(2**16), word.split(2**16))
    hits = torch.cat([(chosen[p, :, None] == tokens[t, None, :]).any(2) for p, t in chunks])   # (M, K)
    return average((hits.cumsum(1) > 0).float(), patch)


# --------------------------------------------------------------------------------------------------------------- measures: matching pursuit


@torch.no_grad()
def matching_pursuit(x, dictionary, atoms):
    """Orthogonal matching pursuit (Pati et al., 1993) of x_i / |x_i| over the unit rows of a dictionary, all rows at once.

    x (n, D), dictionary (V, D), atoms = K <= V. Returns three tensors (n, K):
        indices       rows of the dictionary in the order chosen: largest |correlation| with the residual, never one twice
        coefficients  least-squares fit of x_i / |x_i| by all K unit atoms (signed; 0 for an atom that the others span)
        explained     share of the energy explained by the first k + 1 atoms, never decreasing
    The atoms are orthogonalised as they arrive, A^T = Q R, so that the residual is x minus its projections on the q's and
    the coefficients solve R c = Q^T x. Raises ValueError when the dictionary has fewer than K rows.
    """
    if not 1 <= atoms <= len(dictionary):
        raise ValueError(f"matching_pursuit: atoms must lie in 1 .. {len(dictionary)} (dictionary rows), not {atoms}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dictionary = unit(dictionary.to(dtype))
    rows = CHUNK // (4 * max(len(dictionary), atoms * x.shape[1])) + 1
    parts = [_pursue(unit(chunk.to(dictionary)), dictionary, atoms) for chunk in x.split(rows)]
    return tuple(torch.cat(column).to(x.device) for column in zip(*parts))


def _pursue(x, dictionary, atoms):
    """matching_pursuit for one chunk of unit rows: x (n, D), dictionary (V, D) unit rows."""
    n, width = x.shape
    residual = x.clone()                                        # (n, D)
    q = x.new_zeros(n, atoms, width)                            # orthonormal basis of the chosen atoms
    r = torch.eye(atoms, dtype=x.dtype, device=x.device).repeat(n, 1, 1)
    b = x.new_zeros(n, atoms)                                   # Q^T x
    indices = torch.zeros(n, atoms, dtype=torch.int64, device=x.device)
    for k in range(atoms):
        pick = (residual @ dictionary.T).abs_().scatter_(1, indices[:, :k], -1).argmax(1)           # (n,): none twice
        atom = dictionary[pick]                                 # (n, D)
        along = x.new_zeros(n, atoms)
        rest = atom
        for _ in range(2):                                      # twice is enough: the second pass removes the first one's rounding
            part = torch.einsum("nkd,nd->nk", q, rest)
            rest = rest - torch.einsum("nkd,nk->nd", q, part)
            along += part
        norm = rest.norm(dim=1)
        new = norm > torch.finfo(x.dtype).eps ** 0.5            # false: spanned by the earlier atoms; q = 0, hence coefficient 0
        q[:, k] = torch.where(new, 1 / norm.clamp_min(1e-30), 0)[:, None] * rest
        b[:, k] = (q[:, k] * residual).sum(1)
        residual = residual - b[:, k, None] * q[:, k]
        r[:, :k, k] = along[:, :k]
        r[:, k, k] = torch.where(new, norm, 1)
        indices[:, k] = pick
    coefficients = torch.linalg.solve_triangular(r, b.unsqueeze(2), upper=True).squeeze(2)
    return indices, coefficients, b.square().cumsum(1).clamp_max(1)


def rotated(x, generator):
    """The rows (n, D) under one random rotation: the same mutual angles, no relation left to the words. Patches turned one way see the
    words as they would see words turned the other way, and there are fewer of them."""
    q, r = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=torch.float64))
    return x @ (q * r.diagonal().sign()).T.to(x)                                    # signs: uniform over the orthogonal group


def word_rows(tokenizer, w):
    """Dictionary for the pursuit and the picture: (ids (n,), texts, whether they are whole words).

    Whole words are the tokens that stand for a space and letters ("Ġdog", "▁dog"); where the tokenizer has fewer than 50 of
    them, all rows. Special tokens and rows near zero are left out.
    """
    norm = w.float().norm(dim=1)
    usable = (norm > 1e-3 * norm.median()).tolist()
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(min(len(w), len(tokenizer))) if usable[i] and i not in special]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    texts = {i: tokenizer.decode([i]).strip() for i in ids}                         # "" for a bare "Ġ"
    whole = [i for i, token in zip(ids, tokens) if str(token)[:1] in ("Ġ", "▁") and texts[i].isalpha()]
    chosen, named = (whole if len(whole) >= 50 else ids), dict(zip(ids, tokens))
    return torch.tensor(chosen), [texts[i] or str(named[i]) for i in chosen], len(whole) >= 50


# ------------------------------------------------------------------------------------------------- collection: one checkpoint over the data


def model_input(record, model, image_dir):
    """A record's image as the encoder's input (3, height, width), and the list of words of each of its patches."""
    where, c = f"record {record.get('id')}", model.config
    image = data.open_image(data.image_path(record, image_dir, where), where)
    words = data.patch_words(record.get("regions") or [], image.size, c["geometry"], model.grid, c["coverage"], where, model.aspect)
    return data.transform_image(image, *model.image_form), words


@torch.inference_mode()
def collect(model, records, image_dir, batch_size):
    """Encode the records' images -> Z (N, P_v, D_v), H (N, P, D), float32 on the CPU, and the words of the N P patches (see pairs)."""
    z, h, words = [], [], []
    for start in tqdm(range(0, len(records), batch_size), desc="images", leave=False):
        pixels, names = zip(*(model_input(r, model, image_dir) for r in records[start : start + batch_size]))
        features = model.encode(torch.stack(pixels))                                # (B, P_v, D_v)
        z.append(features.float().cpu())
        h.append(model.projector(features).float().cpu())                           # (B, P, D)
        words += [row for image in names for row in image]
    z, h = torch.cat(z), torch.cat(h)
    if not (z.isfinite().all() and h.isfinite().all()):
        raise data.InputError("the checkpoint gives patch embeddings that are not finite: did its training diverge?")
    tokens = {name: tuple(data.word_ids(model.tokenizer, name)) for name in {name for row in words for name in row}}
    return z, h, [[tokens[name] for name in row if tokens[name]] for row in words]


@torch.inference_mode()
def analyse(model, z, h, words, args):
    """Every number of probe.json for one checkpoint, from what collect returns."""
    generator = torch.Generator().manual_seed(args.seed)
    w = model.word_embeddings.detach().float()                                      # (V, D)
    scores = [s for pair in zip(entropies(z, w.device), entropies(h, w.device)) for s in pair]
    rows, flat = [i for i, names in enumerate(words) if names], h.flatten(0, 1)     # (N P, D)
    result = {"entropy": dict(zip(ENTROPIES, scores)),
              "effective_rank": {key: math.exp(s) for key, s in zip(ENTROPIES, scores)},
              "align": None, "chance": None, "recall": dict.fromkeys(RECALLS), "recall_chance": dict.fromkeys(RECALLS)}
    if rows:
        labelled, true = flat[rows], [words[i] for i in rows]
        nearest = nearest_rows(labelled, w, min(10, len(w)))
        permuted = [true[i] for i in torch.randperm(len(true), generator=generator).tolist()]
        for align, recall, names in (("align", "recall", true), ("chance", "recall_chance", permuted)):
            result[align], curve = alignment(labelled, w, names), word_recall(nearest, names).tolist()
            result[recall] = {k: curve[min(int(k), len(curve)) - 1] for k in RECALLS}
    sample = [(rows or range(len(flat)))[i] for i in torch.randperm(len(rows) or len(flat), generator=generator).tolist()]
    sample = sample[: args.pursuit_patches or None]
    result["anisotropy"] = {"vocabulary": anisotropy(w), "whole_words": anisotropy(w[word_rows(model.tokenizer, w)[0].to(w.device)]),
                            "norm": w.norm(dim=1).mean().item()}
    result["pursuit"] = pursuit(flat[sample], w, [words[i] for i in sample] if rows else None, model.tokenizer, args.atoms, generator)
    return result | {"words_per_patch": sum(map(len, words)) / max(1, len(rows)), "labelled": len(rows),
                     "patches": len(flat), "images": len(h)}


def pursuit(x, w, words, tokenizer, atoms, generator):
    """Mean matching-pursuit curves of x (n, D) over the word rows of w, and over their rotation; words: of each row, or None."""
    ids, _, whole = word_rows(tokenizer, w)
    result = {"dictionary": len(ids), "whole_words": whole, "patches": len(x)}
    both = torch.cat([x, rotated(x, generator)]).to(w.device)                       # one pass over the dictionary serves both
    chosen, _, explained = matching_pursuit(both, w[ids.to(w.device)], min(atoms, len(ids)))
    for energy, found, rows in (("explained", "recall", slice(len(x))), ("control", "control_recall", slice(len(x), None))):
        result[energy] = explained[rows].mean(0).tolist()
        result[found] = word_recall(ids[chosen[rows].cpu()], words).tolist() if words else [None] * explained.shape[1]
    return result


# ---------------------------------------------------------------------------------------------- picture: what word each patch is nearest to

PANEL, GAP, LINE = 400, 12, 18                                  # side of a panel, space between panels, height of a text line, pixels
FONTS = [ImageFont.load_default(size) for size in (14, 12, 11, 10, 9, 8)]
INK, FRAME = (240, 240, 240), {True: (60, 255, 90), False: (255, 50, 50)}        # frames: the word names the patch, it does not


class Palette(dict):
    """word -> colour: a colour's name in that colour, each other word in the next hue, by steps of the golden ratio."""

    def __missing__(self, word):
        hue = len(self) * 0.618034 % 1
        named = word in ImageColor.colormap
        self[word] = ImageColor.getrgb(word) if named else tuple(int(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.7, 0.95))
        return self[word]


def unnormalised(pixels, mean, std):
    """The encoder's input (3, height, width) as a PIL image of PANEL x PANEL: what the model sees, borders included."""
    pixels = pixels * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    image = Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
    return image.resize((PANEL, PANEL), Image.Resampling.NEAREST if 2 * image.width <= PANEL else Image.Resampling.LANCZOS)


def cell(grid, i):
    """Box (x0, y0, x1, y1) in a panel of patch i, row-major, of a grid (rows, columns)."""
    row, column = divmod(i, grid[1])
    return (column * PANEL // grid[1], row * PANEL // grid[0], (column + 1) * PANEL // grid[1], (row + 1) * PANEL // grid[0])


def areas(texts, grid):
    """Patches that share a text, connected along edges: list of sorted lists of patch numbers."""
    left, found = set(range(len(texts))), []
    while left:
        area = [left.pop()]
        for i in area:                                          # grows while it is walked
            column = i % grid[1]
            sides = {i - grid[1], i + grid[1], *[i - 1] * (column > 0), *[i + 1] * (column < grid[1] - 1)}
            area += (near := [j for j in sides & left if texts[j] == texts[i]])
            left.difference_update(near)
        found.append(sorted(area))
    return found


def panel(view, grid, texts, right, palette):
    """The dimmed view, each patch tinted for its nearest word, texts[i], and framed by right[i]: True, False, None (no label).

    Every patch is named where a word fits into it, else each connected area of three patches or more, once.
    """
    image = Image.blend(view, Image.new("RGB", view.size), 0.45)
    tint, narrow = image.copy(), PANEL // grid[1] < 36
    for i, text in enumerate(texts):
        ImageDraw.Draw(tint).rectangle(cell(grid, i), fill=palette[text])
    image = Image.blend(image, tint, 0.45)
    draw = ImageDraw.Draw(image)
    for i in range(len(texts)):
        x0, y0, x1, y1 = cell(grid, i)
        draw.rectangle((x0, y0, x1, y1), outline=(0, 0, 0))
        if right[i] is not None:
            draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=FRAME[right[i]], width=1 if narrow else 2)
    named = [area[len(area) // 2] for area in areas(texts, grid) if len(area) > 2] if narrow else range(len(texts))
    for i in named:
        x0, y0, x1, y1 = cell(grid, i)
        room = PANEL / 4 if narrow else x1 - x0 - 4
        font = next((f for f in FONTS if f.getlength(texts[i]) <= room), FONTS[-1])
        text = next(t for n in range(len(texts[i]), -1, -1) if font.getlength(t := texts[i][:n]) <= room)
        half = font.getlength(text) / 2 + 2                     # keeps the name inside the panel
        x = min(max((x0 + x1) / 2, half), PANEL - half)
        draw.text((x, (y0 + y1) / 2), text, INK, font, anchor="mm", stroke_width=1, stroke_fill=(0, 0, 0))
    return image


@torch.inference_mode()
def panels(model, records, h, words, image_dir, palette):
    """(view, panel) of each record; h (N, P, D) and the N P patches' words (see pairs) in the order of the records."""
    w, per_image, tiles = model.word_embeddings.detach(), h.shape[1], []
    ids, texts, _ = word_rows(model.tokenizer, w)
    nearest = nearest_rows(h.flatten(0, 1), w[ids.to(w.device)], 1).squeeze(1).tolist()
    right = [any(ids[j] in t for t in names) if names else None for j, names in zip(nearest, words)]
    for n, record in enumerate(records):
        here = slice(n * per_image, (n + 1) * per_image)
        view = unnormalised(model_input(record, model, image_dir)[0], model.image_mean, model.image_std)
        tiles.append((view, panel(view, model.grid, [texts[j] for j in nearest[here]], right[here], palette)))
    return tiles


def sheet(records, columns, names):
    """The whole picture: a row per record, the encoder's view, then each checkpoint's panel, with a caption below."""
    height = PANEL + 2 * LINE + GAP
    image = Image.new("RGB", ((1 + len(columns)) * (PANEL + GAP) + GAP, (len(records) + 1) * height - PANEL), (24, 24, 28))
    draw = ImageDraw.Draw(image)
    for n, title in enumerate(["the encoder's input", *names]):
        draw.text((GAP + n * (PANEL + GAP), 4), title, INK, FONTS[0])
    for n, record in enumerate(records):
        top = LINE + GAP + n * height
        for c, tile in enumerate([columns[0][n][0], *(column[n][1] for column in columns)]):
            image.paste(tile, (GAP + c * (PANEL + GAP), top))
        phrases = " | ".join(dict.fromkeys(region["phrase"] for region in record.get("regions") or [])) or "(no regions)"
        caption = textwrap.wrap(f"{record['image']}:  {phrases}", image.width // 7, max_lines=2, placeholder=" ...")
        draw.text((GAP, top + PANEL + 2), "\n".join(caption), INK, FONTS[1])
    draw.text((GAP, image.height - LINE - 2), "each patch: its nearest word; framed green: it names the patch, red: it does not, "
              "no frame: no label", INK, FONTS[1])
    return image


# ------------------------------------------------------------------------------------------------------------------------------------ table


def report(names, results):
    """Aligned table, one column per checkpoint; chance levels and controls stand in brackets beside the scores."""

    def row(title, note, pairs):
        return [title, *(None if score is None else f"{score:.3f} ({note} {control:.3f})" for score, control in pairs)]

    rows = [["", *names]]
    for key in ENTROPIES:
        title = "entropy, " + key.replace("encoder", "Z").replace("projected", "H").replace("_", " ")
        rows.append(row(title, "rank", [(r["entropy"][key], r["effective_rank"][key]) for r in results]))
    rows.append(row("two random words, cosine", "whole words", [
        (r["anisotropy"]["vocabulary"], r["anisotropy"]["whole_words"]) for r in results]))
    rows.append(row("alignment", "chance", [(r["align"], r["chance"]) for r in results]))
    rows += [row(f"recall@{k}", "chance", [(r["recall"][k], r["recall_chance"][k]) for r in results]) for k in RECALLS]
    pursuits = [r["pursuit"] for r in results]
    for title, score, control in (("energy", "explained", "control"), ("words found", "recall", "control_recall")):
        for k in (1, 2, 4, 8, 16):
            if k <= min(len(p[score]) for p in pursuits):
                rows.append(row(f"pursuit {title}, {k} atoms", "rotated", [(p[score][k - 1], p[control][k - 1]) for p in pursuits]))
    rows.append(["words per patch", *(f"{r['words_per_patch']:.2f} ({r['labelled']} of {r['patches']} labelled)" for r in results)])
    return runtime.table(rows)


READING = ("entropy in nats, rank = exp(entropy): H below Z is compression, unless 'H centred' collapses too; scores count only above "
           "their brackets; pursuit that still rises after 1 atom: a patch holds several words")


# ------------------------------------------------------------------------------------------------------------------------------------- main


def spread(items, n):
    """n of the items at even steps; all of them for n = 0."""
    return [items[i * len(items) // n] for i in range(n)] if 0 < n < len(items) else list(items)


def outputs(checkpoints, out):
    """Short distinct names of the checkpoints, and where the probe.json of each goes: no two different ones to one file."""
    folder = [llava.is_folder(c) for c in checkpoints]
    names = [Path(c).resolve().parent.name if Path(c).name == "ckpt.pt" else Path(c).resolve().name if is_folder else Path(c).stem
             for c, is_folder in zip(checkpoints, folder)]
    if len(set(names)) < len(names):
        names = [c.strip("./").replace("/", "-") for c in checkpoints]
    beside = [Path(c) if Path(c).is_dir() else Path("runs", Path(c).name) if is_folder else Path(c).parent
              for c, is_folder in zip(checkpoints, folder)]
    folders = [Path(out or b) for b in beside]
    other = [not out and Path(c).name != "ckpt.pt" and not f for c, f in zip(checkpoints, folder)]      # than the folder's usual one
    files = [f / (f"probe-{n}.json" if folders.count(f) > 1 or o else "probe.json") for f, n, o in zip(folders, names, other)]
    if len(set(files)) < len(files):
        raise data.InputError(f"{' '.join(map(str, checkpoints))}: two of them would be written to one file; name each once")
    return names, files


def probe(path, records, shown, image_dir, palette, args, device):
    """One checkpoint -> (its probe.json, its column of the picture). The model is freed on return."""
    with llava.opened(path, args.vision, args.llm) as checkpoint:
        model, _ = load_checkpoint(checkpoint, device, runtime.precision(device))
    model.config["coverage"] = args.coverage or model.config["coverage"]
    model.eval()
    z, h, words = collect(model, records, image_dir, args.batch_size)
    result = {"checkpoint": str(path)} | analyse(model, z, h, words, args)
    if not result["pursuit"]["whole_words"]:
        runtime.log(f"{path}: fewer than 50 whole-word tokens, so the dictionary is the whole vocabulary")
    per_image = h.shape[1]
    shown_words = [names for i in shown for names in words[i * per_image : (i + 1) * per_image]]
    return result, panels(model, [records[i] for i in shown], h[shown], shown_words, image_dir, palette)


def main(args):
    """Analyse the checkpoints one after another and write their numbers and the picture."""
    device = runtime.start(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = False               # orthogonalisation needs float32's whole mantissa
    if not 0 <= args.coverage <= 1:
        raise data.InputError(f"--coverage {args.coverage} is a share of a patch, at most 1")
    if args.images < 0 or args.atoms < 1 or args.batch_size < 1 or args.pursuit_patches < 0 or args.show < 0:
        raise data.InputError("--images, --pursuit-patches and --show must be 0 or more, --atoms and --batch-size 1 or more")
    source = Path(args.data)
    if not args.data:
        from toy import ensure

        source = ensure() / "test.jsonl"
    image_dir = args.image_dir or source.parent / "images"
    records = spread([r for r in data.read_records(source, args.regions or None) if r.get("image")], args.images)
    if not records:
        raise data.InputError(f"{source}: no record has an image: nothing to analyse")
    shown = spread([i for i, r in enumerate(records) if r.get("regions")] or range(len(records)), args.show) if args.show else []

    names, files = outputs(args.checkpoints, args.out)
    results, columns, palette = [], [], Palette()
    for path, file in zip(args.checkpoints, files):
        result, column = probe(path, records, shown, image_dir, palette, args, device)
        results.append(result)
        columns.append(column)
        with runtime.atomic(file) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    runtime.log(report(names, results))
    runtime.log(READING)
    if shown:
        files.append(files[0].parent / "probe.png")
        with runtime.atomic(files[-1]) as temporary:
            sheet([records[i] for i in shown], columns, names).save(temporary, format="PNG")
    baseline = "runs/caption_only"
    following = f"torchrun pretrain.py --patch-weight 0 --out {baseline} && python probe.py {baseline}/ckpt.pt {args.checkpoints[0]}"
    alone = len(results) == 1 and args.checkpoints[0].endswith(".pt") and not args.data              # of the toy world
    runtime.log(f"wrote {', '.join(map(str, files))}; next: {following if alone else f'look at {files[-1]}'}")


if __name__ == "__main__":
    runtime.run(main, Args, __doc__, bad_input=data.InputError)
