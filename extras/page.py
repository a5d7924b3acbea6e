"""The page of probe.py: some photographs, and of every patch its words, to point at.

One file that needs no network: page.html with the data put in. Of each checkpoint and patch it
holds the nearest words, the atoms of the decomposition, the words of its label, and the cosine with
some words of all (`ROOM`): those of the labels first, then those that are near most often.
"""
import base64
import io
import json
from collections import Counter
from pathlib import Path

import runtime

ROOM = 3_600_000    # bytes of cosines: a page of 24 images and two checkpoints has at most 8 MB
SMALL = 100         # pixels: smaller images are stored without loss and shown with sharp edges


def source(view):
    """An image as the address of itself."""
    file, kind = io.BytesIO(), "png" if view.width <= SMALL else "jpeg"
    view.save(file, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def choose_words(looks):
    """-> (all words of the page, how many of them, from the first, have cosines)."""
    images = [(look["texts"], image) for look in looks for image in look["images"]]
    labels = {word for texts, image in images for row in image["labels"] for word in row}
    near = Counter(texts[i] for texts, image in images for i in image["near"].flatten().tolist())
    atoms = Counter(texts[i] for texts, image in images for i in image["atoms"].flatten().tolist())
    known = {text for look in looks for text in look["texts"]}
    common = [word for word, _ in near.most_common() + atoms.most_common()]
    words = dict.fromkeys([*sorted(labels & known), *common, *sorted(labels)])
    room = ROOM // sum(len(image["labels"]) for _, image in images)
    return list(words), min(room, len(words.keys() & known))


def content(names, captions, looks):
    """What the page knows, as plain values; looks: of each checkpoint, as of probe.looks."""
    words, mapped = choose_words(looks)
    index, views = {word: i for i, word in enumerate(words)}, {}
    checkpoints = []
    for name, look in zip(names, looks):
        own = {text: i for i, text in reversed(list(enumerate(look["texts"])))}
        columns = [own.get(word, 0) for word in words[:mapped]]
        texts = [index.get(text) for text in look["texts"]]
        images = []
        for image in look["images"]:
            images.append(dict(
                view=views.setdefault(source(image["view"]), len(views)),
                small=image["view"].width <= SMALL, rows=image["grid"][0], columns=image["grid"][1],
                right="".join("-" if r is None else str(int(r)) for r in image["right"]),
                labels=[[index[word] for word in row] for row in image["labels"]],
                near=[texts[i] for i in image["near"].flatten().tolist()],
                cosines=image["cosines"].mul(1000).round().int().flatten().tolist(),
                atoms=[texts[i] for i in image["atoms"].flatten().tolist()],
                weights=image["weights"].mul(1000).round().int().flatten().tolist(),
                map=base64.b64encode(image["map"][:, columns].numpy().tobytes()).decode()))
        lacks = [i for i, word in enumerate(words[:mapped]) if word not in own]
        checkpoints.append(dict(name=name, lacks=lacks, images=images))
    return dict(words=words, mapped=mapped, captions=captions, views=list(views),
                checkpoints=checkpoints)


def write(path, names, captions, looks):
    """Write the page. names: of the checkpoints; captions: of the images."""
    data = json.dumps(content(names, captions, looks), separators=(",", ":"))
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    with runtime.atomic(path) as temporary:
        # "<" would let a text end the script that holds it
        text = page.replace("{{data}}", data.replace("<", "\\u003c"))
        temporary.write_text(text, encoding="utf-8")
