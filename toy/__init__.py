"""The toy world: an embedded default that needs no download, in the same files as real data.

    world.py       scenes: objects on a background, drawn with exact masks
    language.py    what can be said about a scene: captions, questions, expressions, conversations
    records.py     scenes -> data/toy, in LLaVA's records
    vision.py      how the encoder was made, a small CLIP (python -m toy --train-backbones)
    train.py       how the language model was made, on texts.py

Every stage reads data/toy as it reads any data set; no stage knows that it is a toy.
"""
from toy.records import (
    DATA, LLM, PRETRAIN, SFT, SPLITS, VERSION, VISION, build, clear, ensure, ensure_once)
from toy.world import SIZE

__all__ = ["DATA", "LLM", "PRETRAIN", "SFT", "SIZE", "SPLITS", "VERSION", "VISION", "build",
           "clear", "ensure", "ensure_once"]
