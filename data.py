"""From files to batches: everything that happens before the model sees a tensor.

    records        a file of LLaVA records, some with "regions"           read_records
    images         a file -> an upright RGB image                         open_image
    conversations  turns -> token ids, labels on the assistant's text     tokenize
    samples        a record -> pixels, tokens, targets (by labels.py)     Records
    batches        samples -> padded tensors; which records, when         collate, StepSampler

The symbols are those of model.py. Whatever is wrong with the user's files is an `InputError`, one
line that names the file and the record.
"""
import contextlib
import functools
import itertools
import json
import os
import re
import warnings
from pathlib import Path, PurePath

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from labels import (
    STOP_WORDS, check_region, check_unicode, encode_text, patch_targets, patch_words, region_kind,
    region_phrase, sides, transform_image, view_box, word_ids)
from runtime import InputError

IMAGE_TOKEN = -200  # stands for one patch among the token ids; model.splice puts a row of H there
IGNORE = -100       # label without loss
IMAGE_MARKER = "<image>"
PROMPTS = ("plain", "v1", "chat")

# ---- records -------------------------------------------------------------------------------------


def read_records(path, regions=None):
    """Records of a .json file (one list) or a .jsonl file (an object per line) -> list of dicts.

    regions: a second file, of objects {"id", "regions"}. A record whose id is there gets its
    regions in place of its own; others stay as they are. InputError: a malformed file, no record,
    an id twice in `regions` or of two images, or no id in common.
    """
    records = _read_objects(path)
    if regions is None:
        return records
    found, images = {}, {}
    for i, entry in enumerate(_read_objects(regions)):
        if entry.get("id") is None or not isinstance(entry.get("regions"), list):
            raise InputError(f'{regions}: entry {i} needs "id" and a list "regions"')
        if id_of(entry["id"]) in found:
            raise InputError(f'{regions}: id {entry["id"]} occurs twice; put all its regions into'
                             " one entry")
        found[id_of(entry["id"])] = entry["regions"]
    matched = [r for r in records if r.get("id") is not None and id_of(r["id"]) in found]
    if not matched:
        raise InputError(f"{regions}: none of its ids occurs in {path}; were the two files made for"
                         " each other?")
    for record in matched:
        key, image = id_of(record["id"]), record.get("image")
        if images.setdefault(key, image) != image:
            raise InputError(f"{path}: record {key} is of two images, {images[key]} and {image};"
                             f" the regions of {regions} are of one: give each image its own id")
        record["regions"] = found[key]
    return records


def id_of(value):
    """An id as text, by which files are joined: 5, "5" and 5.0 are one."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def read_text(path):
    """A file of UTF-8 text, without its byte order mark. InputError: unreadable, or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror})") from None


def read_json(path):
    """The value of a JSON file. InputError: unreadable, or not JSON."""
    return _parse_json(read_text(path), path, 1)


def _parse_json(text, path, first_line):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path}: line {line}: not valid JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:
        deep = isinstance(error, RecursionError)
        reason = "nested too deep" if deep else "a number of thousands of digits"
        raise InputError(f"{path}: line {first_line}: {reason}") from None


def _read_objects(path):
    """The objects of a .json or .jsonl file."""
    ending = Path(path).suffix.lower()
    if ending not in (".json", ".jsonl"):
        raise InputError(f"{path}: expected a file named .json (one list) or .jsonl (one object per"
                         " line)")
    if ending == ".json":
        objects = read_json(path)
        if not isinstance(objects, list):
            raise InputError(f"{path}: expected a list of records; for one object per line name the"
                             " file .jsonl")
        named = [(f"record {i}", value) for i, value in enumerate(objects)]
    else:
        lines = enumerate(read_text(path).split("\n"), 1)
        named = [(f"line {i}", _parse_json(line, path, i)) for i, line in lines if line.strip()]
    if not named:
        raise InputError(f"{path}: holds no records")
    for name, value in named:
        if not isinstance(value, dict):
            raise InputError(f"{path}: {name} is not an object but {type(value).__name__}")
    return [value for _, value in named]


# ---- images --------------------------------------------------------------------------------------


def image_path(record, image_dir, where):
    """The file of a record's image. InputError: a name that leaves image_dir.

    The name alone is looked at: the user may link other folders into image_dir, a record may not
    step out of it.
    """
    image = record["image"]
    inside = isinstance(image, str) and image and not PurePath(image).is_absolute()
    if not inside or ".." in PurePath(image).parts:
        raise InputError(f"{where}: image {image!r} is not a path inside the image folder")
    return Path(image_dir) / image


# How to turn stored pixels upright, by EXIF orientation (1, and anything else: not at all).
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


def orientation(image):
    """An open image's EXIF orientation, 1 to 8; 1 where a broken block says nothing of it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            value = image.getexif().get(0x0112)
    except Exception:                       # whatever PIL raises on a broken block
        return 1
    return value if value in UPRIGHT else 1


def image_header(path, where):
    """-> ((width, height) upright, EXIF orientation), without decoding pixels. InputError."""
    with _readable(path, where) as image:
        known = image.format != "PNG" or image.info.keys() & {"exif", "XML:com.adobe.xmp"}
        # PIL decodes a PNG to look for what may stand behind its pixels
        turn = orientation(image) if known or _speaks_last(path) else 1
        width, height = image.size
        if turn > 4 and image.format != "TIFF":         # PIL turns TIFF by itself
            width, height = height, width
        return (width, height), turn


def _speaks_last(path):
    """Whether a PNG has a chunk of EXIF or XMP anywhere."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            if head[4:] in (b"eXIf", b"iTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return False


def open_image(path, where):
    """The image at `path`, upright (EXIF orientation applied), RGB: what regions refer to.

    Of several frames the first. Transparent pixels show white; 16-bit grey becomes 8 bits.
    InputError: missing, cut or no image.
    """
    with _readable(path, where) as image:
        image.load()
        turn = UPRIGHT.get(orientation(image))
        if image.mode.startswith("I"):      # 16-bit grey, which PIL's conversion clips at 255
            grey = np.asarray(image).clip(0, 65535) // 257
            image = Image.fromarray(grey.astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)


@contextlib.contextmanager
def _readable(path, where):
    """The open image of a file; what goes wrong inside is an InputError."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:              # a broken file makes PIL raise nearly anything
        reason = getattr(error, "strerror", None) or str(error)     # OSError repeats the path
        raise InputError(f"{where}: cannot read the image {path} ({reason})") from None


# ---- conversations -> token ids and labels -------------------------------------------------------

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
V1_SYSTEM = (  # Vicuna v1.1's, word for word: the language model was trained with it
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def tokenize(conversations, tokenizer, prompt, image_tokens, max_length, where):
    """Turns of one record -> (input_ids, labels), two lists of one length; labels are not shifted.

    conversations: [{"from": "human" | "gpt", "value": text}, ...], by turns, human first.
    image_tokens: patches of the record's image, 0 without one. "<image>" becomes that many
    IMAGE_TOKEN, at the front of its turn, as in LLaVA; without the marker the image comes first.
    Special tokens in what people wrote are plain text. prompt: see `_segments`.
    Labels are IGNORE except on what the assistant says and the token that ends it. Both are cut on
    the right to max_length, patches included. Each segment is encoded on its own: nothing is
    tokenised again to be counted. InputError: no conversation, an empty answer, marker and image
    disagree, or max_length cuts off the image or leaves nothing to learn from.
    """
    turns = check_turns(conversations, image_tokens > 0, where)
    segments = _segments(turns, tokenizer, prompt, where)
    input_ids, labels = _encode_segments(segments, tokenizer, image_tokens)
    input_ids, labels = input_ids[:max_length], labels[:max_length]
    cut = input_ids.count(IMAGE_TOKEN) != image_tokens
    if cut or all(label == IGNORE for label in labels[1:]):
        raise InputError(f"{where}: max_length {max_length} cuts off the image ({image_tokens}"
                         " tokens) or the whole answer; raise it")
    return input_ids, labels


def tokenize_prompt(conversations, tokenizer, prompt, image_tokens, where="question"):
    """Token ids up to where the assistant begins to speak, for generation.

    Arguments as in `tokenize`; a last turn of the assistant's is left out.
    """
    asked = conversations
    if isinstance(asked, list) and asked and isinstance(asked[-1], dict):
        asked = asked[:-1] if ROLES.get(asked[-1].get("from")) == "assistant" else asked
    asked = asked and [*asked, {"from": "gpt", "value": "?"}]
    turns = check_turns(asked, image_tokens > 0, where)[:-1]
    segments = _segments(turns, tokenizer, prompt, where)
    return _encode_segments(segments, tokenizer, image_tokens)[0]


def check_turns(conversations, has_image, where):
    """-> [(role, text), ...], user and assistant in turn, the image's marker in one user turn."""
    if not isinstance(conversations, list) or not conversations:
        raise InputError(f'{where}: "conversations" is missing or not a list of turns')
    turns = []
    for i, turn in enumerate(conversations):
        said = turn.get("from") if isinstance(turn, dict) else None
        role = ROLES.get(said) if isinstance(said, str) else None
        if role != ("user", "assistant")[i % 2] or not isinstance(turn.get("value"), str):
            raise InputError(f'{where}: turn {i} is not {{"from": "{("human", "gpt")[i % 2]}",'
                             ' "value": text}')
        text = turn["value"]
        check_unicode(text, f"{where}: turn {i}")
        if role == "assistant" and not text.strip():
            raise InputError(f"{where}: turn {i}, the answer, is empty")
        if role == "user" and IMAGE_MARKER in text and text.count(IMAGE_MARKER) == 1:
            text = f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()
        turns.append((role, text))
    if len(turns) % 2:
        raise InputError(f"{where}: the last turn is the human's; there is no answer to it")
    markers = sum(text.count(IMAGE_MARKER) for role, text in turns if role == "user")
    if markers > has_image:
        raise InputError(f"{where}: {markers} {IMAGE_MARKER} markers but"
                         f" {'one image' if has_image else 'no image'}")
    if has_image and not markers:
        turns[0] = ("user", f"{IMAGE_MARKER}\n{turns[0][1]}")
    return turns


class Frame(str):
    """Text of a chat template, whose special tokens are special."""


def _segments(turns, tokenizer, prompt, where):
    """A conversation as segments: (text or token ids, whether the model is trained to say it).

    turns: [(role, text), ...]; after a last user turn they end where the assistant begins. Special
    tokens are ids, or stand in a Frame; elsewhere they are text.
    plain  LLaVA's stage 1: the image, then the caption; what the user says is dropped. Ours: the
           caption ends with the end-of-sequence token (LLaVA: a line break), so that generation
           knows where to stop.
    v1     Vicuna v1.1, as in LLaVA-1.5: SYSTEM USER: ... ASSISTANT: answer</s>USER: ... and so on
    chat   the tokenizer's own template.
    """
    if prompt == "chat":
        return _chat_segments(turns, tokenizer, where)
    if prompt not in PROMPTS:
        raise InputError(f"--prompt {prompt!r}: choose one of {', '.join(PROMPTS)}")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{where}: the tokenizer has no end-of-sequence token, which --prompt"
                         f" {prompt} needs")
    bos, end = tokenizer.bos_token_id, ([tokenizer.eos_token_id], True)
    begins = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    segments = [([bos], False)] if begins else []
    if prompt == "plain":
        segments += [(IMAGE_MARKER, False)]
        return segments + [part for _, text in turns[1:] for part in ((text, True), end)]
    opening = V1_SYSTEM + " "
    for role, text in turns:
        if role == "user":
            segments += [(f"{opening}USER: {text} ASSISTANT:", False)]
        else:
            segments += [(f" {text}", True), end]
        opening = ""
    return segments


@functools.lru_cache(maxsize=64)
def chat_frame(tokenizer, template, answers):
    """What a chat template writes around the texts of a conversation with so many answers.

    -> (2 answers + 1 pieces before, between and after its turns; the token that ends an answer).
    The template is rendered once, with marks for texts. So an answer stands in training where
    generation begins, whatever the template does with earlier turns or adds to the last one (the
    empty thoughts of Qwen3). It ends with the first special token after it, or, if none comes
    before the next text, with the end-of-sequence token. InputError: a template that leaves texts
    out, repeats or reorders them.
    """
    marks = [f"@{i}@" for i in range(2 * answers)]
    roles = ("user", "assistant") * answers
    for content in (str, lambda text: [{"type": "text", "text": text}]):    # processors want lists
        messages = [{"role": role, "content": content(mark)} for role, mark in zip(roles, marks)]
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (TemplateError, TypeError, ValueError):
            continue
        if [mark for mark in re.findall(r"@\d+@", text) if mark in marks] == marks:
            break
    else:
        raise InputError("this tokenizer's chat template does not write each text of a conversation"
                         " once and in order; use --prompt v1")
    pieces = re.split("|".join(marks), text)
    found = special_tokens(tokenizer).search(pieces[2])
    return pieces, found[0] if found else tokenizer.eos_token


@functools.lru_cache(maxsize=64)
def special_tokens(tokenizer):
    """A pattern of a tokenizer's special tokens; it matches nothing where there are none."""
    special = {*tokenizer.all_special_tokens,
               *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)}
    longest_first = sorted(filter(None, special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _chat_segments(turns, tokenizer, where):
    """Segments of the tokenizer's chat template; see `chat_frame`."""
    if not tokenizer.chat_template:
        raise InputError(f"{where}: the tokenizer has no chat template for --prompt chat;"
                         " use --prompt v1")
    try:
        pieces, end = chat_frame(tokenizer, tokenizer.chat_template, (len(turns) + 1) // 2)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if end is None:
        raise InputError(f"{where}: neither the chat template nor the tokenizer has a token that"
                         " ends an answer; use --prompt v1")
    segments, opening = [], pieces[0]
    for i, (role, text) in enumerate(turns):
        if role == "user":                          # up to where the assistant begins: not learnt
            head = pieces[i + 1].removesuffix(" ")  # a blank belongs to the answer's first word
            parts = [Frame(opening), text, Frame(head)]
            if not special_tokens(tokenizer).search(text):
                parts = [Frame(opening + text + head)]          # in one piece, as transformers does
            segments += [(part, False) for part in parts]
            blank = pieces[i + 1][len(head):]
        else:                                       # what stands round the end token is not learnt
            before, found, after = pieces[i + 1].partition(end)
            segments += [(blank + text, True), (Frame(before if found else ""), False),
                         ([tokenizer.convert_tokens_to_ids(end)], True)]
            opening = after if found else pieces[i + 1]
    return segments if turns[-1][0] == "user" else [*segments, (Frame(opening), False)]


def end_ids(tokenizer, prompt):
    """The tokens at which generation stops: the end of sequence, and what ends an answer of the
    chat template. InputError: see `_chat_segments`."""
    ends = [tokenizer.eos_token_id]
    if prompt == "chat":
        turns = [("user", ""), ("assistant", "")]
        ends += [ids[0] for ids, learnt in _chat_segments(turns, tokenizer, "generation")
                 if learnt and isinstance(ids, list)]
    return list(dict.fromkeys(token for token in ends if token is not None))


def _encode_segments(segments, tokenizer, image_tokens):
    """Encode each segment on its own -> (input_ids, labels)."""
    input_ids, labels = [], []
    for text, learnt in segments:
        if isinstance(text, list):
            ids = text
        elif learnt:
            ids = encode_text(tokenizer, text)
        else:
            plain = not isinstance(text, Frame)
            first, *rest = text.split(IMAGE_MARKER)
            ids = encode_text(tokenizer, first, plain)
            for part in rest:
                ids = ids + [IMAGE_TOKEN] * image_tokens + encode_text(tokenizer, part, plain)
        input_ids += ids
        labels += ids if learnt else [IGNORE] * len(ids)
    return input_ids, labels


# ---- records -> samples -> batches ---------------------------------------------------------------


class Records(torch.utils.data.Dataset):
    """Records as samples, dicts of:

    id; index; image_size (width, height) of the original; pixel_values (3, height, width);
    input_ids and labels, lists; patch_ids, patch_weights (P, K): rows of zeros where no region is,
    so a record without regions has no patch loss; skipped, ids of records in whose place this one
    stands. Without an image, image_size and the tensors are None.

    Arguments: image_dir, the folder of images; image_size, geometry, mean, std, resample of
    `transform_image`; grid, (rows, columns) of the patches after the projector, or their number
    where they have no places; prompt, max_length of `tokenize`; coverage, threshold of
    `patch_words`; stop_words, None for English; source, the file's name for messages; skip_bad: in
    the place of a record that cannot be read the next one is taken. The form of all records is
    checked at once if `checked`; extras/check.py checks what needs image or tokens as well.
    """

    def __init__(self, records, image_dir, tokenizer, *, image_size, geometry, grid, mean, std,
                 resample=Image.Resampling.BICUBIC, prompt="plain", max_length=2048, coverage=0.25,
                 require_image=True, source="records", pad_id=0, stop_words=None, checked=True):
        self.records, self.image_dir = records, image_dir and Path(image_dir)
        self.tokenizer, self.pad_id = tokenizer, pad_id
        self.geometry, self.grid = geometry, None if isinstance(grid, int) else tuple(grid)
        self.patches = grid if isinstance(grid, int) else grid[0] * grid[1]
        self.image_form = image_size, geometry, mean, std, resample
        self.aspect = sides(image_size)[1] / sides(image_size)[0]
        self.prompt, self.max_length, self.coverage = prompt, max_length, coverage
        self.stop_words = STOP_WORDS if stop_words in (None, "") else frozenset(stop_words)
        self.require_image, self.source, self.skip_bad = require_image, source, False
        self.numbers = range(len(records))          # of the records in their file
        self.known_size = lambda index: None        # of an image that need not be looked at
        self.tokens_of = {}                         # word -> token ids, filled as words occur
        view_box((1, 1), geometry)                  # what is wrong with all records is said now
        _segments([("user", "question"), ("assistant", "answer")], tokenizer, prompt, source)
        if not records:
            raise InputError(f"{source}: holds no records")
        for index in range(len(records) if checked else 0):
            self.check_form(index)

    def name(self, index):
        """What messages call a record: its id, or else its number in the file."""
        record = self.records[index]
        known = isinstance(record, dict) and record.get("id") is not None
        return id_of(record["id"]) if known else str(self.numbers[index])

    def where(self, index):
        """The file and the record, for messages."""
        return f"{self.source}: record {self.name(index)}"

    def check_form(self, index):
        """InputError: a record that no model could take, as far as the file tells."""
        record, where = self.records[index], self.where(index)
        if not isinstance(record, dict):
            raise InputError(f"{where} is not an object")
        image, regions = record.get("image"), record.get("regions")
        if image is None and (self.require_image or regions):
            about = "" if self.require_image else ", which its regions are about"
            raise InputError(f'{where}: "image" is missing{about}')
        if image is not None:
            path = image_path(record, self.image_dir or "", where)
            if self.image_dir is None or not self.image_dir.is_dir():
                raise InputError(f"{where}: --image-dir {self.image_dir} is not a folder, but the"
                                 " record has an image")
            if not os.path.isfile(path):            # False too of a name that no disk can have
                raise InputError(f"{where}: no image {path}")
        if not isinstance(regions or [], list):
            raise InputError(f'{where}: "regions" is not a list')
        for i, region in enumerate(regions or []):
            region_kind(region, f"{where}: regions[{i}]")
            region_phrase(region, f"{where}: regions[{i}]")
        turns = check_turns(record.get("conversations"), image is not None, where)
        if self.prompt == "plain" and len(turns) > 2:
            raise InputError(f"{where}: --prompt plain takes one caption, not {len(turns) // 2}"
                             " answers; use --prompt v1 or chat")

    def check(self, index):
        """-> ((width, height), EXIF orientation, bounds of the regions), or Nones without an image.

        InputError: whatever would keep the record from training, but for pixels that cannot be
        decoded: form, image header, regions against the image, length in tokens.
        """
        self.check_form(index)
        record, where, size, turn, bounds = self.records[index], self.where(index), None, None, None
        if record.get("image") is not None:
            size, turn = self.header(index)
            bounds = [check_region(region, size, f"{where}: regions[{i}]")
                      for i, region in enumerate(record.get("regions") or [])]
        tokenize(record["conversations"], self.tokenizer, self.prompt,
                 self.patches if size else 0, self.max_length, where)
        return size, turn, bounds

    def header(self, index):
        """-> ((width, height) upright, EXIF orientation) of a record's image. InputError."""
        known, where = self.known_size(index), self.where(index)
        path = image_path(self.records[index], self.image_dir or "", where)
        return (known, 1) if known else image_header(path, where)

    def leave_out(self, indices):
        """Drop records. InputError: none is left."""
        gone = set(indices)
        kept = [i for i in range(len(self.records)) if i not in gone]
        if not kept:
            raise InputError(f"{self.source}: none of its records can be used")
        self.numbers = [self.numbers[i] for i in kept]
        self.records = [self.records[i] for i in kept]

    def _lookup(self, word):
        if word not in self.tokens_of:
            self.tokens_of[word] = word_ids(self.tokenizer, word)
        return self.tokens_of[word]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        skipped = []
        for own in itertools.chain(range(index, len(self)), range(index)):
            try:
                return self._load(own) | dict(skipped=skipped)
            except InputError as error:
                if not self.skip_bad:
                    raise InputError(f"{error}; mend it, or pass over it with --skip-bad") from None
                skipped.append(self.name(own))
        raise InputError(f"{self.source}: none of its records can be read")

    def _load(self, index):
        record, where = self.records[index], self.where(index)
        if record.get("image") is None:
            return self.sample(index)
        image = open_image(image_path(record, self.image_dir, where), where)
        return self.sample(index, image.size, transform_image(image, *self.image_form))

    def targets(self, index, image_size):
        """patch_ids, patch_weights (P, K) of a record, by its image's (width, height) alone."""
        record, where = self.records[index], self.where(index)
        words = [[]] * self.patches
        if self.grid:
            words = patch_words(record.get("regions") or [], image_size, self.geometry, self.grid,
                                self.coverage, where, self.aspect, self.stop_words)
        return patch_targets(words, self._lookup)

    def sample(self, index, image_size=None, pixel_values=None):
        """The sample of a record, given its image's (width, height) and pixels.

        extras/cache.py gives no pixels where it has their features.
        """
        record, patch_ids, patch_weights = self.records[index], None, None
        if image_size is not None:
            patch_ids, patch_weights = self.targets(index, image_size)
        input_ids, labels = tokenize(
            record["conversations"], self.tokenizer, self.prompt,
            self.patches if image_size else 0, self.max_length, self.where(index))
        return dict(id=self.name(index), index=index, image_size=image_size,
                    pixel_values=pixel_values, input_ids=input_ids, labels=labels,
                    patch_ids=patch_ids, patch_weights=patch_weights)

    # What a loop asks of a dataset, so that extras/cache.py can stand in this one's place.

    def collate(self, samples):
        """`collate` with the model's padding token."""
        return collate(samples, self.pad_id)

    def complete(self, batch):
        """What a batch on its device still lacks before `forward`: nothing."""
        return batch

    def flush(self):
        """Write what waits to be written: nothing."""

    def metrics(self):
        """What metrics.jsonl should know: nothing."""
        return {}


def collate(samples, pad_id):
    """Samples -> a batch: text padded on the right to the longest T, targets to the largest K.

    ids, a list of B; skipped, ids that were left out; input_ids, labels (B, T) int64; for the N
    samples with an image, in order: pixel_values (N, 3, height, width), patch_ids (N, P, K) int64,
    patch_weights (N, P, K).
    Read off here, on the host, so that a step need not wait for a GPU: places (N P,), where
    input_ids.flatten() holds IMAGE_TOKEN; first_label, the first position with a label, at least 1.
    """
    def pad_text(key, value):
        rows = [torch.tensor(sample[key], dtype=torch.int64) for sample in samples]
        return pad_sequence(rows, True, value)

    def pad_patches(key, nothing):
        if not images:
            return nothing
        longest = max(sample[key].shape[1] for sample in images)
        return torch.stack([pad(sample[key], (0, longest - sample[key].shape[1]))
                            for sample in images])

    images = [sample for sample in samples if sample["image_size"] is not None]
    pixels = [s["pixel_values"] for s in images if s["pixel_values"] is not None]
    input_ids, labels = pad_text("input_ids", pad_id), pad_text("labels", IGNORE)
    return {
        "ids": [sample["id"] for sample in samples],
        "skipped": [name for sample in samples for name in sample.get("skipped", [])],
        "input_ids": input_ids,
        "labels": labels,
        "places": (input_ids.flatten() == IMAGE_TOKEN).nonzero().squeeze(1),
        "first_label": max(1, int((labels != IGNORE).any(0).int().argmax())),
        "pixel_values": torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0),
        "patch_ids": pad_patches("patch_ids", torch.empty(0, 0, 1, dtype=torch.int64)),
        "patch_weights": pad_patches("patch_weights", torch.empty(0, 0, 1)),
    }


class StepSampler:
    """Which records a step trains on, by the step alone: resuming is asking for a later step.

    Epochs are seeded permutations of the records laid end to end; step s is the s-th run of
    batch_size of them (it may span two epochs). A rank takes a contiguous share: the shares of
    ranks 0, 1, ... in order are the batch of one process, so their number changes no data.
    """

    def __init__(self, length, batch_size, seed, rank=0, world=1):
        if length < 1:
            raise InputError("there are no records to sample from")
        if batch_size < 1 or batch_size % world:
            raise InputError(f"--batch-size {batch_size} is not a positive multiple of the {world}"
                             " processes")
        if seed < 0:
            raise InputError(f"--seed {seed} is negative")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.share, self.rank = batch_size // world, rank
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def indices(self, step):
        """Record indices of this rank's share of the global batch: list of batch_size / world."""
        first = step * self.batch_size + self.rank * self.share
        return [int(self._permutation(i // self.length)[i % self.length])
                for i in range(first, first + self.share)]
