"""Scores of any checkpoint: captions, referring expressions, questions and multiple choice.

    caption   BLEU-1..4, ROUGE-L and CIDEr (that is CIDEr-D), against one or more references
    refer     mean IoU and Acc@0.5 of the predicted box
    vqa       VQA accuracy, and the share of answers that match to the letter (exact)
    choice    the share of right letters

    python eval.py runs/sft/ckpt.pt                            # the toy world
    python eval.py runs/caption_sft/ckpt.pt runs/sft/ckpt.pt   # side by side; paired differences
    python eval.py ckpt.pt --data refcoco.jsonl vqa.jsonl --image-dir images --box-frame square

Answers are greedy. What cannot be read as an answer counts as wrong, and is counted: unread. Each
score has a 95% interval: percentiles of a bootstrap that draws images, with all their records.
Checkpoints are compared on the same draws. --blind says beside each score what the same model gets
without seeing.

reads:  checkpoints; LLaVA records with "task", "answer" and optional "kind", a sub-group. The model
        answers the last request, earlier turns are context. Without "answer", what the record
        itself says there is the answer; without "task", one answer about an image is a caption
writes: eval.json, predictions.jsonl beside each ckpt.pt (eval-NAME.json beside NAME.pt), or in OUT
"""
import json
import math
import os
import re
import shlex
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import regex
import torch
from PIL import Image
from tqdm import tqdm

import data
import runtime
from labels import ALIKE, SPACELESS, check_frame, check_region, lowered, transform_image, view_box
from model import load_checkpoint, read_checkpoint
from runtime import InputError

# ---- Args ----------------------------------------------------------------------------------------


@dataclass
class Args:
    """Flags of eval.py."""

    checkpoints: list[str] = field(metadata={"positional": True})
    """checkpoints to evaluate; later ones are compared with the first"""
    data: list[str] = field(default_factory=list)
    """files of records; none: the toy world's"""
    image_dir: str = ""
    """folder of the records' images; none: images/ beside the first file"""
    box_frame: str = field(default="image", metadata={"choices": ["image", "square"]})
    """what predicted boxes are relative to (LLaVA: square)"""
    vqa_official: bool = False
    """VQA as the official script: equal answers are compared as they are"""
    blind: bool = False
    """answer with grey images too: what needs no looking"""
    limit: int = 0
    """records of each file, spread evenly over it; 0: all"""
    out: str = ""
    """folder for eval.json and predictions.jsonl; none: beside the checkpoint"""
    # --- generation
    batch_size: int = 64
    """records answered at a time"""
    max_new_tokens: int = 64
    """longest answer, in tokens"""
    dtype: str = field(default="auto", metadata={"choices": ["auto", "float32", "bfloat16"]})
    """auto: bfloat16 on a GPU that has it"""
    seed: int = 0
    """of the bootstrap's draws"""


DRAWS, FEW = 1000, 50           # of the bootstrap; images below which CIDEr is noted as unreliable
TOY = ("test", "test_vqa", "test_refer", "test_instruct", "hard_vqa", "hard_refer",
       "hard_instruct", "distract_refer")           # without --data

# ---- captions ------------------------------------------------------------------------------------

ORDERS = (1, 2, 3, 4)                               # of n-grams
SIGMA, BETA = 6.0, 1.2          # CIDEr-D's length penalty, in words; ROUGE-L's weight of recall
CHARACTER = rf"(?!{SPACELESS.pattern})[\p{{L}}\p{{N}}][\p{{M}}\u200c\u200d]*"     # and its marks
TOKEN = regex.compile(
    SPACELESS.pattern + r"\p{M}*|\w+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\p{N}+(?:[.,:]\p{N}+)+"
    rf"|(?:{CHARACTER}|_)+(?:-(?:{CHARACTER}|_)+)*")


def words(text):
    """Lower-case words of a caption, without punctuation: "isn't" is is + n't, "dog's" dog + 's.

    Ours, after the Penn Treebank tokenizer of coco-caption, which needs Java. Hyphenated words and
    numbers stay whole; symbols such as & and %, which it keeps, are dropped. In scripts without
    spaces (Chinese, Japanese, Thai) each character is a word.
    """
    return TOKEN.findall(lowered(text))


def ngrams(tokens):
    """Counts of the n-grams of a list of words: a Counter for each of ORDERS."""
    return [Counter(zip(*(tokens[i:] for i in range(n)))) for n in ORDERS]


def common_length(a, b):
    """Length of the longest common subsequence of two lists."""
    row = [0] * (len(b) + 1)
    for x in a:
        previous, row = row, [0]
        for j, y in enumerate(b):
            row.append(previous[j] + 1 if x == y else max(previous[j + 1], row[j]))
    return row[-1]


def rouge_l(candidate, references):
    """ROUGE-L (Lin, 2004) as in coco-caption: F of the best precision and the best recall."""
    common = [common_length(candidate, r) for r in references]
    precision = max(common) / max(1, len(candidate))
    recall = max(c / max(1, len(r)) for c, r in zip(common, references))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0


def cider_d(candidate, reference, rarity):
    """CIDEr-D (Vedantam et al., CVPR 2015), times ten, of two lists of `ngrams`.

    rarity: n-gram -> log(documents / documents that hold it).
    """
    similarity = 0.0
    for counts, others in zip(candidate, reference):
        u, v = ({gram: n * rarity(gram) for gram, n in c.items()} for c in (counts, others))
        norm = math.sqrt(sum(x * x for x in u.values()) * sum(x * x for x in v.values()))
        if norm:
            shared = sum(min(x, v[gram]) * v[gram] for gram, x in u.items() if gram in v)
            similarity += shared / norm
    longer = candidate[0].total() - reference[0].total()
    return 10 * similarity / len(ORDERS) * math.exp(-(longer**2) / (2 * SIGMA**2))


def caption_statistics(candidates, references):
    """What caption scores are made of, a row per caption, to be added up: float64 (n, 13).

    Columns: CIDEr-D, ROUGE-L; BLEU's matching n-grams of each order, its n-grams of each order, the
    candidate's length and the closest reference's; 1. Document frequencies are those of all
    references given here, a document per caption.
    """
    candidates = [words(c) for c in candidates]
    references = [[words(r) for r in several] for several in references]
    grams = [[ngrams(r) for r in several] for several in references]
    documents = Counter(gram for several in grams
                        for gram in {gram for r in several for counts in r for gram in counts})

    def rarity(gram):
        return math.log(len(grams) / max(1, documents[gram]))

    rows = []
    for candidate, several, counted in zip(candidates, references, grams):
        own, size, limits = ngrams(candidate), len(candidate), [Counter() for _ in ORDERS]
        for reference in counted:                   # the largest count in any one reference
            limits = [a | b for a, b in zip(limits, reference)]
        matching = [(a & b).total() for a, b in zip(own, limits)]
        closest = min((abs(len(r) - size), len(r)) for r in several)[1]
        cider = sum(cider_d(own, r, rarity) for r in counted) / len(counted)
        totals = [counts.total() for counts in own]
        rows.append([cider, rouge_l(candidate, several), *matching, *totals, size, closest, 1])
    return np.float64(rows)


def mean(column):
    """The score that is the mean of a column of statistics, from sums (..., k), counts last."""
    return lambda sums: sums[..., column] / sums[..., -1]


def bleu(order):
    """Corpus BLEU (Papineni et al., 2002) up to an order, from summed `caption_statistics`.

    The small numbers, for what has no n-gram, are coco-caption's.
    """
    def score(sums):
        matching, total, size, closest = (sums[..., 2:6], sums[..., 6:10], sums[..., 10],
                                          sums[..., 11])
        precisions = ((matching + 1e-15) / (total + 1e-9))[..., :order]
        brevity = np.exp(np.minimum(0, 1 - (closest + 1e-9) / (size + 1e-15)))
        return precisions.prod(-1) ** (1 / order) * brevity
    return score


CAPTION = {**{f"BLEU-{n}": bleu(n) for n in ORDERS}, "ROUGE-L": mean(1), "CIDEr": mean(0)}


def caption_scores(candidates, references):
    """{BLEU-1, .., BLEU-4, ROUGE-L, CIDEr} of n captions, as pycocoevalcap for the same words.

    candidates: n texts; references: n lists of one or more texts. CIDEr is CIDEr-D, from 0 to 10.
    InputError: no captions, other numbers of them, or one without a reference.
    """
    if not candidates or len(candidates) != len(references) or not all(references):
        raise InputError(f"{len(candidates)} captions and {len(references)} lists of references:"
                         " give each caption one or more references")
    sums = caption_statistics(candidates, references).sum(0)
    return {name: float(score(sums)) for name, score in CAPTION.items()}


# ---- visual questions ----------------------------------------------------------------------------

# Of https://github.com/GT-Vision-Lab/VQA, vqaEval.py (v2): words it maps, signs it strips.
NUMBERS = {word: str(i) for i, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
CONTRACTIONS = """'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't
don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll
ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
you've""".split()
RESTORED = {w[:i] + w[i + 1:]: w for w in CONTRACTIONS for i, sign in enumerate(w) if sign == "'"}
RESTORED["somebody'd"] = "somebodyd"                # the script's own
SIGNS = ';/[]"{}()=+\\_-><@`,?!'


def normalised(text):
    """An answer as the official VQA script compares it.

    Signs become blanks, or nothing where one stands beside a blank (and all of them in a text with
    a comma between digits). Periods go, except before a digit. Lower case, number words as digits,
    no articles, missing apostrophes restored. Ours: NFC and straight apostrophes first.
    """
    text = unicodedata.normalize("NFC", text).replace("\u2019", "'")
    joined, clean = re.search(r"\d,\d", text), text
    for sign in SIGNS:
        nothing = joined or sign + " " in text or " " + sign in text
        clean = clean.replace(sign, "" if nothing else " ")
    clean = re.sub(r"\.(?!\d)", "", clean, count=32)    # the script passes re.UNICODE as a count
    numbered = (NUMBERS.get(w, w) for w in clean.lower().split())
    return " ".join(RESTORED.get(w, w) for w in numbered if w not in ("a", "an", "the"))


def vqa_accuracy(prediction, answers, official=False):
    """The VQA accuracy of a prediction, in [0, 1] (Antol et al., ICCV 2015; v2).

    answers: usually ten texts: the mean, over leaving out each in turn, of min(matches among the
    others / 3, 1), so fewer than four cannot give 1. One answer (a text, or a list of one) is
    matched, 1 or 0. Prediction and answers are `normalised` first, as in LLaVA's and lmms-eval's
    evaluation, and to a question whose answers are mostly yes or no the first word is the answer,
    as in POPE. official: as the official script, which normalises only where answers differ (so
    "Yes" is wrong where ten people said "yes") and reads no first word. InputError: no answer.
    """
    answers = [answers] if isinstance(answers, str) else answers
    if not answers:
        raise InputError("a prediction is compared with one or more answers, here none")
    texts = [re.sub(r"[\n\t]", " ", text).strip() for text in (prediction, *answers)]
    if not official or len(answers) == 1 or len(set(texts[1:])) > 1:
        texts = list(map(normalised, texts))
    if not official and asks_yes_or_no(texts[1:]):
        texts[0] = yes_or_no(texts[0]) or texts[0]
    matches = [answer == texts[0] for answer in texts[1:]]
    if len(matches) == 1:
        return float(matches[0])
    return sum(min((sum(matches) - match) / 3, 1) for match in matches) / len(matches)


def asks_yes_or_no(answers):
    """Whether more than half of the normalised answers are yes or no."""
    return sum(answer in ("yes", "no") for answer in answers) > len(answers) / 2


def yes_or_no(text):
    """The first word of an answer, if it is yes or no, else None: "Yes, there is a dog." -> yes.

    "Yes or no" is neither.
    """
    first, *more = [*words(text)[:3], ""]
    other = {"yes": "no", "no": "yes"}.get(first)
    return first if other and other not in more else None


# ---- boxes and letters ---------------------------------------------------------------------------

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
FOUR = r"\s*[\s,;]\s*".join([f"({NUMBER})"] * 4)
POINT = rf"[\[(<]\s*({NUMBER})\s*[\s,;]\s*({NUMBER})\s*[\])>]"
NOT_CORNERS = r"size|width|height|extent|radius|\b[wh]\b"
IN_BRACKETS = [re.compile(rf"[\[({{<]\s*{FOUR}\s*[\])}}>]"),        # [a, b, c, d] or (a, b), (c, d)
               re.compile(POINT + rf"(?:(?!{NOT_CORNERS})[^\d()\[\]]){{0,40}}" + POINT)]
ALONE = re.compile(rf"(?<![\w.]){FOUR}(?![\w%]|\.\d)")             # a, b, c, d
NAME = r"(?<![a-z0-9])(?:[xy](?:[0-2]|min|max)|left|top|right|bottom)"
NAMED = re.compile(rf"({NAME})\s*(?:[=:]|is)?\s*({NUMBER})(?![\w%]|[.,]\d)")     # x1=a, y1=b, ...
CORNERS = [names.split() for names in (
    "x1 y1 x2 y2", "x0 y0 x1 y1", "xmin ymin xmax ymax", "left top right bottom")]
# An order that an answer states and that is another: (x, y, w, h), [ymin, xmin, ymax, xmax].
OTHER_ORDER = re.compile(r"\bc?x\w*\W+c?y\w*\W+w\w*\W+h|\by\w*\W+x\w*\W+y\w*\W+x")
# Another spelling of the same: "0.1" -> 0.1, x_min -> xmin, <a><b> -> a, b
SPELLED = [(r"[\"'`]", ""), ("\u3001", ","), (r"\b([xy])[-_ ](?=min|max)", r"\1"),
           (r"(?<=\d)\s*>\s*<\s*(?=[\d.])", ", ")]


def parse_box(text):
    """The four numbers of a box in an answer: [x0, y0, x1, y1], relative, corners in order.

    They belong together: in one bracket, as two points, behind the corners' names, or as the only
    numbers there are. Of several boxes the first. None: unread, or not all in [0, 1].
    """
    text = unicodedata.normalize("NFKC", text).lower()
    for form, plain in SPELLED:
        text = re.sub(form, plain, text)
    if OTHER_ORDER.search(text):
        return None
    named = dict(reversed(NAMED.findall(text)))
    numbers = next(([named[name] for name in names] for names in CORNERS
                    if named.keys() >= set(names)), None)
    text = re.sub(r"[\[(]\W*[\])]", "", re.sub(NAME, "", text))     # (x1, y1) = (0.1, 0.2)
    found = min(filter(None, (form.search(text) for form in IN_BRACKETS)), default=None,
                key=lambda match: match.start())
    if found:
        numbers = found.groups()
    elif not numbers and (found := ALONE.search(text)):
        only = not re.search(r"\d", text[: found.start()] + text[found.end():])
        numbers = found.groups() if only else None
    if not numbers:
        return None
    a, b, c, d = map(float, numbers)
    box = [min(a, c), min(b, d), max(a, c), max(b, d)]
    return box if all(0 <= n <= 1 for n in box) else None


# How an answer declares a letter, the strongest forms first. A letter stands alone: not in T-shirt,
# U.S., M&M, Mr. T. A capital A or I before a word is a word ("A dog"), unless that word says
# otherwise ("A because").
GOES_ON = r"\s+(?:because|since|as|is|for|or|and)\b"
BEFORE = (r"(?<![A-Za-z0-9])(?<![A-Za-z0-9][-'&])(?<!\b[A-Za-z]\.)"
          r"(?<!\bMr\.\s)(?<!\bDr\.\s)(?<!\bSt\.\s)(?<!\bMs\.\s)")
AFTER = r"(?![A-Za-z0-9]|[-'&][A-Za-z0-9]|\.[A-Za-z]\b)"
CAPITAL = rf"{BEFORE}([B-HJ-Z]|[AI](?!\s+[a-z])|A(?={GOES_ON})){AFTER}"
LETTER = rf"{BEFORE}([A-Za-z]){AFTER}"
LAST = LETTER + r"(?=\W*$|[).:\]])"
ENDS = rf"(?=\W*$|\s*[).:,;!]|{GOES_ON})"
IS = (r"(?:\W|\b(?:is|are|was|be|would|must|should|option|choice|letter|either|both|clearly|likely|"
      r"therefore|thus)\b)*")
RIGHT = (r"\W+(?:is|was|seems|looks|would be|must be)\W+(?:the\W+|most\W+|likely\W+|clearly\W+)*"
         r"(?:correct|right|true|best|answer|accurate|appropriate)\b")
SO = (r"it's|it is|that's|that is|must be|should be|has to be|would be|so|therefore|hence|thus|"
      r"I would say|I'd say|I think|I believe|my guess|definitely|probably|certainly|obviously|but")
DECLARED = [[re.compile(form) for form in forms] for forms in (
    [rf"^\W*{LETTER}\W*$"],                                    # B   (b)   B.
    [rf"(?i:\banswers?{IS}){CAPITAL}", rf"(?i:\banswers?{IS}){LAST}",          # The answer is B
     rf"(?i:\banswers? (?:to|for|of)\b[^.\n]*?\b(?:is|be)\b{IS}){CAPITAL}",
     rf"(?i:\b(?:choose|pick|select|go with|going with){IS}){CAPITAL}",
     rf"(?:答案|正解|选|選)[^A-Za-z0-9]{{0,8}}{LETTER}",
     rf"(?:(?:^|[.,;\n])\W*|\b(?i:and|but|so|option|choice|that)\s+){CAPITAL}(?i:{RIGHT})"],
    [rf"(?:^|\n)\W*{LETTER}[).:\]]", rf"^\W*{CAPITAL}{ENDS}",  # B) red   B because it is red
     rf"^\W*{BEFORE}([B-HJ-Zb-hj-z]){AFTER}", rf"^\W*{LETTER}(?:\s*\n|\s+[-\u2013\u2014]\s)",
     rf"[(\[{{]{LETTER}[)\]}}]",                               # it must be (B)
     rf"(?:^|[.,;!?:\n])\s*{CAPITAL}\W*(?=$|\n)",             # A dog is here. B
     rf"(?:\b(?i:{SO})\b)(?i:{IS}){CAPITAL}{ENDS}"],           # It's B!
    [rf"(?i:\b(?:option|choice|letter)){IS}{CAPITAL}",         # option B
     rf"(?i:\b(?:option|choice|letter)){IS}{LAST}"])]
ALSO = re.compile(                                             # A or B
    rf"\W*(?:or|and|/|,|&)\W*(?:(?:possibly|maybe|perhaps|also|even)\W+)?{CAPITAL}{ENDS}")
REJECTED = re.compile(                                         # not B; B is wrong
    rf"(?i:\bnot|n't|neither|nor|rather than|instead of)\b{IS}{CAPITAL}"
    rf"|(?:{CAPITAL}\W*(?:and|or|,)\W*)?{CAPITAL}\W*(?i:is|are|was|seems|can|could|would)\W*"
    r"(?i:definitely|clearly|also|both)?\W*(?i:wrong|incorrect|false|not|n't|ruled out|impossible)")


def parse_choice(text):
    """The letter that an answer declares, as a capital; None: unread, or two letters remain.

    The first form of DECLARED that names a letter decides. What is said to be wrong does not count,
    nor do a model's thoughts before its answer.
    """
    text = unicodedata.normalize("NFKC", text).rpartition("</think>")[2].translate(ALIKE)
    text = re.sub(r"[*_`$]+", " ", text)                        # **B**
    rejected = {letter for found in REJECTED.findall(text) for letter in found}
    for forms in DECLARED:
        named = set()
        for found in (found for form in forms for found in form.finditer(text)):
            while found:                                        # "A, B or C": all of them
                named.add(found[1].upper())
                found = ALSO.match(text, found.end(1))
        if named - rejected:
            return (named - rejected).pop() if len(named - rejected) == 1 else None
    return None


def iou(a, b):
    """Intersection over union of two boxes [x0, y0, x1, y1]; 0 for an empty or inverted one."""
    if min(a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1]) <= 0:
        return 0.0
    common = (max(0, min(a[2], b[2]) - max(a[0], b[0]))
              * max(0, min(a[3], b[3]) - max(a[1], b[1])))
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def box_in_pixels(box, image_size, frame, geometry, aspect=1.0):
    """A relative box in pixels of the original image.

    frame: relative to the "image", or to the "square" that the encoder sees of it (where that is
    not one, width / height = aspect).
    """
    view = (0, 0, *image_size) if frame == "image" else view_box(image_size, geometry, aspect)
    x0, y0, x1, y1 = view
    return [x0 + box[0] * (x1 - x0), y0 + box[1] * (y1 - y0),
            x0 + box[2] * (x1 - x0), y0 + box[3] * (y1 - y0)]


# ---- records -------------------------------------------------------------------------------------

TASKS = {"caption": "a text, or a list of texts, none of them empty",
         "refer": "a box [x0, y0, x1, y1] with x0 < x1 and y0 < y1, in pixels of the original"
                  " image, not [x, y, width, height]",
         "vqa": "a text, or a list of texts (usually ten)",
         "choice": "one letter"}                    # what "answer" has to be


def fits(task, answer):
    """Whether an answer has the form that TASKS asks for."""
    if task == "refer":
        box = isinstance(answer, list) and len(answer) == 4
        return (box and all(type(n) in (int, float) and abs(n) < 1e9 for n in answer)
                and answer[0] < answer[2] and answer[1] < answer[3])
    if task == "choice":
        return isinstance(answer, str) and re.fullmatch("[A-Za-z]", answer) is not None
    texts = [answer] if isinstance(answer, str) else answer
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        return False
    return all(map(words, texts)) if task == "caption" else any(map(str.strip, texts))


def read_item(record, index, path, image_dir, sizes):
    """One record -> {where, file, id, task, kind, answer, conversations, image, image_size, unit}.

    image: its path or None; image_size: for refer; unit: what the bootstrap draws together; sizes:
    of the images opened so far. InputError: whatever keeps the record from being scored.
    """
    name = str(index) if record.get("id") is None else data.id_of(record["id"])
    where = f"{path}: record {name}"
    turns, image = record.get("conversations"), record.get("image")
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        raise InputError(f'{where}: "conversations" is missing or not a list of turns')
    said = turns[-1].get("value") if turns[-1].get("from") in ("gpt", "assistant") else None
    usual = "caption" if len(turns) == 2 and said and image is not None else None
    task = record.get("task", usual)
    if task not in list(TASKS):                     # a list, since not all JSON can be hashed
        raise InputError(f'{where}: "task" is {"missing" if task is None else repr(task)}; choose'
                         f" one of {', '.join(TASKS)}")
    answer = record.get("answer", said if task == "caption" else None)
    if not fits(task, answer):
        raise InputError(f'{where}: "answer" {json.dumps(answer)[:60]} does not match task {task}:'
                         f" expected {TASKS[task]}")
    if image is None and task in ("caption", "refer"):
        raise InputError(f'{where}: "image" is missing, which task {task} is about')
    image = None if image is None else data.image_path(record, image_dir, where)
    if image and not os.path.isfile(image):
        raise InputError(f"{where}: there is no image {image}; --image-dir names the folder that"
                         " images are in")
    if task == "refer":
        if image not in sizes:
            sizes[image], _ = data.image_header(image, where)
        check_region({"bbox": answer}, sizes[image], f"{where}: answer")
    kind = None if record.get("kind") is None else str(record["kind"])
    return dict(where=where, file=Path(path).stem, id=name, task=task,
                kind=kind, answer=answer, conversations=turns, image=image,
                image_size=sizes.get(image), unit=str(image or (path, index)))


def read_items(paths, image_dir, limit):
    """The records of several files, `limit` of each at even steps (0: all), checked -> items."""
    stems = [Path(path).stem for path in paths]
    if len(set(stems)) < len(stems):
        raise InputError(f"--data {' '.join(map(str, paths))}: scores are named after their files,"
                         " so two files need two names")
    items, sizes = [], {}
    for path in paths:
        chosen = runtime.spread(list(enumerate(data.read_records(path))), limit)
        items += [read_item(record, i, path, image_dir, sizes) for i, record in chosen]
    boxes = [item for item in items if item["task"] == "refer"]
    check_frame(*([item[key] for item in boxes] for key in ("where", "answer", "image_size")))
    return items


def answerable(path, items, toy):
    """The items that a checkpoint can answer: all, or captions alone if its prompt is plain.

    toy: they are the toy world's, of which such a checkpoint gets the first file. InputError: other
    tasks in the user's own files.
    """
    checkpoint = read_checkpoint(path)
    stage, questions = checkpoint["stage"], [i for i in items if i["task"] != "caption"]
    if checkpoint["config"]["prompt"] != "plain" or not questions:
        return items
    if not toy:
        raise InputError(f"{path}: this is a checkpoint of stage {stage}, which only captions, but"
                         f" {questions[0]['where']} has task {questions[0]['task']}; run torchrun"
                         f" sft.py {shlex.quote(str(path))} first or give --data with captions"
                         " only")
    runtime.log(f"{path}: a checkpoint of stage {stage} only captions, so {TOY[0]}.jsonl alone")
    return [item for item in items if item["file"] == TOY[0]]


# ---- answers and scores --------------------------------------------------------------------------


def predict(model, items, batch_size, max_new_tokens, blind=False):
    """Greedy answers to the items, in their order. A batch holds prompts of about one length.

    blind: with a grey image in the place of each.
    """
    patches, prompt = model.patches, model.config["prompt"]
    prompts = [data.tokenize_prompt(item["conversations"], model.tokenizer, prompt,
                                    patches if item["image"] else 0, item["where"])
               for item in items]
    order = sorted(range(len(items)), key=lambda i: (items[i]["task"], -len(prompts[i])))
    predictions = [""] * len(items)
    for batch in tqdm(runtime.split(order, batch_size), desc="answers", leave=False):
        images = [data.open_image(items[i]["image"], items[i]["where"])
                  for i in batch if items[i]["image"]]
        images = [Image.new("RGB", image.size, "grey") if blind else image for image in images]
        pixels = [transform_image(image, *model.image_form) for image in images]
        pixels = torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0)
        texts = model.generate([prompts[i] for i in batch], pixels, max_new_tokens)
        for i, text in zip(batch, texts):
            predictions[i] = text
    return predictions


def measure(task, items, predictions, geometry, box_frame, aspect=1.0, official=False):
    """Predictions of one file's items of one task, as what scores are made of.

    -> statistics (n, k), a row per item, the first column its own score, the last one 1; {metric:
    function of their sums}; whether each prediction could be read as an answer. official: see
    `vqa_accuracy`.
    """
    answers = [item["answer"] for item in items]
    if task == "caption":
        several = [[answer] if isinstance(answer, str) else answer for answer in answers]
        return caption_statistics(predictions, several), CAPTION, list(map(bool, predictions))
    if task == "vqa":
        rows, read = [], []
        for text, answer in zip(predictions, answers):
            every = [answer] if isinstance(answer, str) else answer
            rows.append([vqa_accuracy(text, answer, official), text in map(str.strip, every), 1])
            two = not official and asks_yes_or_no(list(map(normalised, every)))
            read.append(yes_or_no(text) is not None if two else bool(text))
        return np.float64(rows), {"accuracy": mean(0), "exact": mean(1)}, read
    if task == "choice":
        letters = list(map(parse_choice, predictions))
        rows = [[letter == answer.upper(), 1] for letter, answer in zip(letters, answers)]
        return np.float64(rows), {"choice": mean(0)}, [letter is not None for letter in letters]

    boxes, frames, rows, metrics = list(map(parse_box, predictions)), [box_frame], [], {}
    if any(view_box(i["image_size"], geometry, aspect) != (0, 0, *i["image_size"]) for i in items):
        frames.append("square" if box_frame == "image" else "image")
    for box, item in zip(boxes, items):
        size, (x0, y0, x1, y1) = item["image_size"], item["answer"]
        inside = max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])
        overlaps = [iou(box_in_pixels(box, size, frame, geometry, aspect), inside) if box else 0.0
                    for frame in frames]
        rows.append([*overlaps, *(overlap >= 0.5 for overlap in overlaps), 1])
    for i, frame in enumerate(frames):
        note = f" ({frame})" if i else ""
        metrics |= {f"mIoU{note}": mean(i), f"Acc@0.5{note}": mean(len(frames) + i)}
    return np.float64(rows), metrics, [box is not None for box in boxes]


def bootstrap(statistics, units, draws, seed):
    """Sums of the statistics (n, k) in samples with replacement -> (draws, k).

    units (n): what is drawn together; a sample has as many of them as there are. The same units and
    seed give the same samples.
    """
    names, unit = np.unique(units, return_inverse=True)
    totals = np.zeros((len(names), statistics.shape[1]))
    np.add.at(totals, unit, statistics)
    rng, n = np.random.default_rng(seed), len(names)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ totals
                     for _ in range(draws)])


def interval(draws):
    """The middle 95% of the bootstrap's scores; rounded, since sums in another order differ."""
    return dict(zip(("low", "high"), np.percentile(draws, (2.5, 97.5)).round(10).tolist()))


def evaluate(path, items, args, device):
    """One checkpoint -> (its eval.json, lines of predictions.jsonl, {KEY: scores of the draws}).

    CIDEr's document frequencies are those of all records of a file, in every draw and every kind.
    """
    dtype = runtime.precision(device, args.dtype)
    model, checkpoint = load_checkpoint(path, device, dtype)
    model.eval()
    predictions = predict(model, items, args.batch_size, args.max_new_tokens)
    blind = args.blind and predict(model, items, args.batch_size, args.max_new_tokens, blind=True)
    groups, lines, scores, samples, notes = {}, [None] * len(items), {}, {}, []
    for i, item in enumerate(items):
        groups.setdefault((item["file"], item["task"]), []).append(i)
    for (file, task), group in groups.items():
        members = [items[i] for i in group]
        how = model.config["geometry"], args.box_frame, model.aspect, args.vqa_official
        statistics, metrics, parsed = measure(task, members, [predictions[i] for i in group], *how)
        unseen = measure(task, members, [blind[i] for i in group], *how)[0] if blind else None
        images = len({item["unit"] for item in members})
        if task == "caption" and images < FEW:
            notes.append(f"{file}: captions of {images} images; CIDEr weighs words by their rarity"
                         f" among the references, so with fewer than {FEW} it says little")
        for i, score, readable in zip(group, statistics[:, 0].tolist(), parsed):
            lines[i] = {key: items[i][key] for key in ("id", "file", "task", "kind")} | dict(
                prediction=predictions[i], answer=items[i]["answer"], score=score, parsed=readable)
        for kind in [None, *sorted({item["kind"] for item in members} - {None})]:
            rows = [n for n, item in enumerate(members) if kind in (None, item["kind"])]
            units = [members[n]["unit"] for n in rows]
            sums = bootstrap(statistics[rows], units, DRAWS, args.seed)
            for metric, score in metrics.items():
                key = f"{file}/{metric}" + (f"/{kind}" if kind else "")
                value = round(float(score(statistics[rows].sum(0))), 10)
                samples[key] = score(sums)
                scores[key] = {"value": value, **interval(samples[key]), "n": len(rows)}
                if blind:
                    scores[key]["blind"] = round(float(score(unseen[rows].sum(0))), 10)
    records = Counter(line["file"] for line in lines)
    unread = {file: sum(not line["parsed"] for line in lines if line["file"] == file)
              for file in records}
    result = dict(checkpoint=str(path), stage=checkpoint["stage"], records=records, unread=unread,
                  notes=notes, scores=scores)
    return result, lines, samples


# ---- report and main -----------------------------------------------------------------------------


def versus(result, samples, first, first_samples):
    """Paired differences of a checkpoint's scores from the first one's, on the same draws."""
    found = {}
    for key in result["scores"]:
        if key in first_samples:
            gain = result["scores"][key]["value"] - first["scores"][key]["value"]
            found[key] = {"difference": round(gain, 10),
                          **interval(samples[key] - first_samples[key])}
    return {"checkpoint": first["checkpoint"], "scores": found}


def report(names, results):
    """Aligned table: a row per score, a column per checkpoint and per difference from the first.

    Exact match has rows where it differs from the accuracy.
    """
    header = [*names, *(f"{name} - {names[0]}" for name in names[1:])]
    rows = [["score [95 %]", "n", *header]]
    for key in dict.fromkeys(key for result in results for key in result["scores"]):
        found = [result["scores"].get(key) for result in results]
        accuracy = key.replace("/exact", "/accuracy")
        if accuracy != key and found == [r["scores"].get(accuracy) for r in results]:
            continue
        differences = [result["versus"]["scores"].get(key) for result in results[1:]]
        rows.append([
            key, next(score["n"] for score in found if score),
            *(s and f"{s['value']:.3f} [{s['low']:.2f}, {s['high']:.2f}]"
              + (f" (blind {s['blind']:.3f})" if "blind" in s else "") for s in found),
            *(d and f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
              for d in differences)])
    counts = [f"{sum(r['unread'].values())} of {sum(r['records'].values())}" for r in results]
    notes = dict.fromkeys(note for result in results for note in result["notes"])
    return "\n".join([
        runtime.table([*rows, ["unread", "", *counts, *[""] * (len(results) - 1)]]),
        *(f"note: {note}" for note in notes)])


def main(args):
    """Evaluate the checkpoints one after another; compare them with the first."""
    device = runtime.start(args.seed)
    runtime.check_lowest(args, limit=0, seed=0, batch_size=1, max_new_tokens=1)
    sources = args.data
    if not sources:
        import toy

        folder = toy.ensure()
        sources = [str(folder / f"{name}.jsonl") for name in TOY]
    image_dir = args.image_dir or Path(sources[0]).parent / "images"
    items = read_items(sources, image_dir, args.limit)
    shares = [answerable(path, items, not args.data) for path in args.checkpoints]
    times = "twice, the second time with grey images" if args.blind else "once"
    runtime.log(f"{len(items)} records, each answered {times} by {len(shares)} checkpoints")

    names, files = runtime.outputs(args.checkpoints, args.out, "eval.json", "predictions.jsonl")
    for scores_file, _ in files:
        runtime.lock(scores_file)
    results, samples = [], []
    for path, share, (scores_file, predictions_file) in zip(args.checkpoints, shares, files):
        result, lines, drawn = evaluate(path, share, args, device)
        if results:
            result["versus"] = versus(result, drawn, results[0], samples[0])
        results.append(result)
        samples.append(drawn)
        with runtime.atomic(predictions_file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with runtime.atomic(scores_file) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    runtime.log(report(names, results))
    following = f"look at {files[-1][1]}"
    if len(results) == 1:
        first = args.checkpoints[0]
        tune = ["torchrun", "sft.py", first] + ["--data", "..."] * bool(args.data)
        following = tune if results[0]["stage"] == "pretrain" else ["python", "probe.py", first]
    runtime.finished([file for pair in files for file in pair], following)


if __name__ == "__main__":
    runtime.run(main, Args, __doc__)
