"""Open models of transformers that say what is where in an image.

    tags      what may be there     noun phrases of a caption, a file of tags, or Florence-2
    boxes     where each tag is     Grounding DINO, by score and non-maximum suppression
    masks     its outline           SAM 2 from the boxes, or SAM 3 from the tags without boxes

All models see a batch of images at once. Weights are float32, products bfloat16 on a GPU.
"""
import re
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence

from data import read_text
from labels import LETTER, STOP_WORDS, content_words, encode_rle, pieces, transform_image
from runtime import InputError

TEXT_THRESHOLD, NMS = 0.25, 0.7     # least score of a word of a box's phrase; of boxes of one tag,
                                    # intersection over union above which the weaker is dropped
PARTICIPLE = re.compile(r"\w{2,}ing")
NAMES = frozenset(
    "building ceiling clothing painting railing awning wedding king ring string wing thing spring"
    " swing sling icing frosting lightning pudding stuffing morning evening siding dressing"
    " earring".split())


def noun_phrases(caption: str, stop_words=STOP_WORDS) -> list[str]:
    """Candidates for noun phrases of a caption, in lower case, each once.

    Runs of words between stop words, signs and numbers, less what is said not to be there. A word
    in -ing ends the run and is dropped, unless it is one of NAMES or follows an article. A small
    rule (ours) without a parser: verbs in other forms stay, as in "a brown dog runs"; a detector
    finds what there is of them.
    """
    phrases, run, previous = [], [], ""
    for word, said in [*pieces(caption, stop_words), (".", True)]:
        named = word in NAMES or previous in ("a", "an", "the")
        content = said and LETTER.search(word) and word.removesuffix("'s") not in stop_words
        if content and (named or not PARTICIPLE.fullmatch(word)):
            run.append(word)
        elif run:
            phrases.append(" ".join(run))
            run = []
        previous = word
    return list(dict.fromkeys(phrases))


def read_tags(path: Path) -> dict[str, list[str]]:
    """A file of tags, a line per image, as RAM writes them: "a.jpg<TAB>dog | grass | ball".

    -> {name: tags}. InputError: not UTF-8, or a line without a tab.
    """
    found = {}
    for i, line in enumerate(read_text(path).splitlines(), 1):
        name, tab, tags = line.partition("\t")
        if not tab and line.strip():
            raise InputError(f"{path}: line {i}: expected an image's name, a tab, and its tags:"
                             " a | b | c")
        if line.strip():
            tags = [tag.strip() for tag in re.split(r"[|,]", tags)]
            found[name.strip()] = list(dict.fromkeys(filter(None, tags)))
    return found


def suppress(boxes: torch.Tensor, scores: torch.Tensor, overlap: float) -> list[int]:
    """Non-maximum suppression of boxes (n, 4), [x0, y0, x1, y1] -> numbers that remain, best first.

    One is dropped if its intersection over union with a better one is larger than `overlap`.
    """
    area, kept = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1), []
    for i in scores.argsort(descending=True, stable=True).tolist():
        first = torch.maximum(boxes[i, :2], boxes[kept, :2])
        last = torch.minimum(boxes[i, 2:], boxes[kept, 2:])
        common = (last - first).clamp(min=0).prod(1)
        if (common <= overlap * (area[i] + area[kept] - common)).all():
            kept.append(i)
    return kept


def same_tag(label: str, tags: list[str]) -> str | None:
    """The tag of whose words a detector's label, which may be part of one or several, has most."""
    words, shares = set(content_words(label)), []
    for tag in tags:
        own = content_words(tag)
        shares.append(len(words & set(own)) / len(own) if own else 0)
    return tags[shares.index(max(shares))] if max(shares, default=0) else None


# ---- models --------------------------------------------------------------------------------------


def opened(flag: str, name: str, kinds: list[type], device: torch.device, threshold: float):
    """The model of a folder or hub name, by the one of `kinds` that takes its form. InputError."""
    known = {form: kind for kind in kinds for form in kind.forms}
    try:
        form = transformers.AutoConfig.from_pretrained(name).model_type
        if form in known:
            return known[form](name, device, threshold)
    except Exception as error:                      # whatever transformers and safetensors raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{flag} {name}: cannot be loaded; is it a complete model folder, or a hub"
                         f" name? ({reason})") from None
    raise InputError(f"{flag} {name}: a {form}; expected {' or '.join(known)}")


def weights(kind: type, name: str, device: torch.device):
    """A model of transformers, in evaluation mode."""
    return kind.from_pretrained(name).to(device).eval()


class Florence:
    """Florence-2 as a tagger: it captions the images."""

    forms = ("florence2",)

    def __init__(self, name: str, device: torch.device, threshold: float):
        self.processor = transformers.Florence2Processor(
            transformers.CLIPImageProcessorPil.from_pretrained(name),
            transformers.AutoTokenizer.from_pretrained(name))
        self.model = weights(transformers.Florence2ForConditionalGeneration, name, device)

    def __call__(self, images: list[Image.Image]) -> list[str]:
        """Detailed captions, greedy."""
        inputs = self.processor(images=images, text=["<DETAILED_CAPTION>"] * len(images),
                                return_tensors="pt", padding=True).to(self.model.device)
        written = self.model.generate(**inputs, max_new_tokens=128, num_beams=1, do_sample=False)
        texts = self.processor.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in texts]


class GroundingDino:
    """Grounding DINO: tags -> boxes."""

    forms = ("grounding-dino",)

    def __init__(self, name: str, device: torch.device, threshold: float):
        self.processor = transformers.GroundingDinoProcessor(
            transformers.GroundingDinoImageProcessorPil.from_pretrained(name),
            transformers.AutoTokenizer.from_pretrained(name))
        self.model = weights(transformers.GroundingDinoForObjectDetection, name, device)
        self.threshold, self.room = threshold, self.model.config.max_text_len       # tokens

    def prompts(self, tags: list[str]) -> list[list[str]]:
        """The tags in as many lists as the model's longest text makes necessary."""
        lists, room = [], 0
        for tag in tags:
            ids = self.processor.tokenizer(tag, add_special_tokens=False).input_ids
            room -= len(ids) + 1                    # and a full stop
            if room < 0 or not lists:
                lists.append([])
                room = self.room - 2 - len(ids) - 1             # [CLS] and [SEP]
            lists[-1].append(tag)
        return lists

    def __call__(self, images: list[Image.Image], tags: list[list[str]]) -> list[list[tuple]]:
        """Per image: (tag, score, box in pixels, None: no mask)."""
        found = [[] for _ in images]
        asked = [(i, prompt) for i, own in enumerate(tags) for prompt in self.prompts(own)]
        for start in range(0, len(asked), max(len(images), 1)):
            chunk = asked[start: start + len(images)]
            inputs = self.processor(
                images=[images[i] for i, _ in chunk], text=[prompt for _, prompt in chunk],
                return_tensors="pt", padding=True, truncation=True,
                max_length=self.room).to(self.model.device)
            outputs = self.model(**inputs)
            outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
            results = self.processor.post_process_grounded_object_detection(
                outputs, inputs.input_ids, self.threshold, TEXT_THRESHOLD,
                target_sizes=[images[i].size[::-1] for i, _ in chunk])
            for (i, prompt), result in zip(chunk, results):
                boxes = result["scores"].tolist(), result["boxes"].tolist(), result["text_labels"]
                found[i] += [(tag, score, box, None) for score, box, label in zip(*boxes)
                             if (tag := same_tag(label, prompt))]
        return found


class Sam2:
    """SAM 2: boxes -> masks."""

    forms = ("sam2", "sam2_video")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, name: str, device: torch.device, threshold: float):
        self.model = weights(transformers.Sam2Model, name, device)
        self.side = self.model.config.prompt_encoder_config.image_size

    def __call__(self, images: list[Image.Image], boxes: list[list]) -> list[torch.Tensor]:
        """Per image: bool (its boxes, height, width). Images without boxes are not looked at."""
        asked, device = [i for i, own in enumerate(boxes) if own], self.model.device
        masks = [torch.zeros(0, *image.size[::-1], dtype=torch.bool) for image in images]
        if not asked:
            return masks
        scaled = [torch.tensor(boxes[i]) * (self.side / torch.tensor(images[i].size * 2))
                  for i in asked]
        logits = self.model(                        # (images, most boxes, 1, height / 4, width / 4)
            pixel_values=pixels([images[i] for i in asked], self).to(device),
            input_boxes=pad_sequence(scaled, True).to(device), multimask_output=False).pred_masks
        for i, own in zip(asked, logits):
            masks[i] = upsample(own[: len(boxes[i]), 0], images[i].size)
        return masks


class Sam3:
    """SAM 3: tags -> masks, with boxes and scores."""

    forms = ("sam3", "sam3_video")
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, name: str, device: torch.device, threshold: float):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        self.model = weights(transformers.Sam3Model, name, device)
        self.side, self.threshold = self.model.config.image_size, threshold

    def __call__(self, images: list[Image.Image], tags: list[list[str]]) -> list[list[tuple]]:
        """Per image: (tag, score, box in pixels, mask bool (height, width)).

        Images are encoded once, whatever the number of their tags.
        """
        device, found = self.model.device, [[] for _ in images]
        asked = [(i, tag) for i, own in enumerate(tags) for tag in own]
        if not asked:
            return found
        seen = self.model.get_vision_features(pixels(images, self).to(device))
        for start in range(0, len(asked), len(images)):
            chunk = asked[start: start + len(images)]
            which = torch.tensor([i for i, _ in chunk], device=device)
            text = self.tokenizer([tag for _, tag in chunk], return_tensors="pt", max_length=32,
                                  padding="max_length", truncation=True).to(device)
            features = type(seen)(
                fpn_hidden_states=tuple(x[which] for x in seen.fpn_hidden_states),
                fpn_position_encoding=tuple(x[which] for x in seen.fpn_position_encoding))
            out = self.model(vision_embeds=features, input_ids=text.input_ids,
                             attention_mask=text.attention_mask)
            scores = out.pred_logits.float().sigmoid() * out.presence_logits.float().sigmoid()
            rows = zip(chunk, scores, out.pred_boxes.float().cpu(), out.pred_masks)
            for (i, tag), own, boxes, masks in rows:                # own: (queries,)
                kept = (own > self.threshold).nonzero()[:, 0]
                boxes = boxes[kept.cpu()] * torch.tensor(images[i].size * 2)
                masks = upsample(masks[kept].float().sigmoid() - 0.5, images[i].size)
                found[i] += zip([tag] * len(kept), own[kept].tolist(), boxes.tolist(), masks)
        return found


def pixels(images: list[Image.Image], model: Sam2 | Sam3) -> torch.Tensor:
    """Images stretched to the square that a SAM sees, (n, 3, side, side)."""
    form = model.side, "stretch", model.mean, model.std, Image.Resampling.BILINEAR
    return torch.stack([transform_image(image, *form) for image in images])


def upsample(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks (n, h, w), positive inside -> bool (n, height, width); size: (width, height)."""
    if not len(masks):
        return torch.zeros(0, *size[::-1], dtype=torch.bool)
    large = interpolate(masks.float()[None], size[::-1], mode="bilinear", align_corners=False)
    return (large[0] > 0).cpu()


# ---- images -> regions ---------------------------------------------------------------------------


class Annotator:
    """tagger, detector, segmenter -> regions. InputError: models that do not fit together."""

    def __init__(self, tagger: str, detector: str, segmenter: str, device: torch.device,
                 dtype: torch.dtype, threshold: float, stop_words: list[str] | None = None):
        self.stop_words = STOP_WORDS if stop_words is None else frozenset(stop_words)
        self.tags_of = read_tags(Path(tagger)) if Path(tagger).is_file() else None
        self.device, self.dtype = device, dtype
        self.florence = self.detector = self.segmenter = None
        if segmenter:
            self.segmenter = opened("--segmenter", segmenter, [Sam2, Sam3], device, threshold)
        if bool(detector) == isinstance(self.segmenter, Sam3):
            raise InputError("--from images needs --detector (with or without a SAM 2 as"
                             " --segmenter), or a SAM 3 as --segmenter alone")
        if tagger != "caption" and self.tags_of is None:
            flag = "--tagger (neither caption nor a file)"
            self.florence = opened(flag, tagger, [Florence], device, threshold)
        if detector:
            self.detector = opened("--detector", detector, [GroundingDino], device, threshold)
        models = filter(None, (tagger, detector, segmenter))
        self.source = "+".join(Path(name).name for name in models)

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], captions: list[str],
                 names: list[str]) -> list[tuple[str, list[dict]]]:
        """RGB images, captions ("" for none), names -> per image its caption and its regions.

        The caption is Florence-2's where there was none. Regions {phrase, bbox or rle, score,
        source}, best first.
        """
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            told = self.florence(images) if self.florence else captions
            tags = [noun_phrases(text, self.stop_words) for text in told]
            if self.tags_of is not None:
                tags = [self.tags_of.get(name, []) for name in names]
            found = (self.detector or self.segmenter)(images, tags)
            found = [kept(own, image.size) for own, image in zip(found, images)]
            if self.detector and self.segmenter:
                masks = self.segmenter(images, [[row[2] for row in own] for own in found])
                found = [[(*row[:3], mask) for row, mask in zip(own, several)]
                         for own, several in zip(found, masks)]
        regions = [[self.region(*row) for row in own if row[3] is None or row[3].any()]
                   for own in found]                # a mask of no pixel names nothing
        return [(caption or text, own) for caption, text, own in zip(captions, told, regions)]

    def region(self, tag: str, score: float, box: list[float], mask) -> dict:
        """A record's region."""
        shape = {"bbox": box} if mask is None else {"rle": encode_rle(mask.numpy())}
        return {"phrase": tag, **shape, "score": round(score, 4), "source": self.source}


def kept(found: list[tuple], size: tuple[int, int]) -> list[tuple]:
    """What is left of (tag, score, box, mask) after suppression among those of one tag.

    Boxes are cut to the image of this (width, height). Those of other tags may overlap: a patch may
    have many words.
    """
    rows = []
    for tag in dict.fromkeys(row[0] for row in found):
        own = [row for row in found if row[0] == tag]
        boxes = torch.tensor([row[2] for row in own]).clamp(min=0).minimum(torch.tensor(size * 2))
        boxes = boxes.mul(10).round().div(10)
        solid = ((boxes[:, 2:] - boxes[:, :2]).amin(1) > 0).nonzero()[:, 0]
        scores = torch.tensor([row[1] for row in own])[solid]
        for i in solid[suppress(boxes[solid], scores, NMS)].tolist():
            box = [round(n, 1) for n in boxes[i].tolist()]
            rows.append((tag, own[i][1], box, own[i][3]))
    return sorted(rows, key=lambda row: -row[1])
