"""How the toy world's language model is made: a tokenizer, and a small Llama on text alone.

From fixed seeds and from scratch, on the texts of texts.py. What the encoder's training (vision.py)
has in common with it is here as well. No stage imports either.
"""
import itertools
import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import runtime
from toy import records
from toy.texts import Text, drill, sample_text, shortened

SEED, TEST_SEED = 1 << 26, 1 << 27      # far from the data's: no image of a split is ever seen here
BUDGET = {"tokenizer": 20_000, "images": 40_000,            # texts, images
          "vision": 2000, "drills": 400, "texts": 3100, "places": 2000,     # optimizer steps
          "unseen images": 768, "unseen texts": 640}        # for the report
CHAT = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% if m.role == 'user' and (not"
        " loop.last or add_generation_prompt) %} ASSISTANT:{% endif %}{% endfor %}")


def optimise(model: torch.nn.Module, loss_of_step: Callable[[int], torch.Tensor], steps: int,
             rate: float, name: str) -> None:
    """Minimise `loss_of_step(step)`, in bfloat16, with warm-up and cosine decay.

    Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for the rest.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, 2 * rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        own, lambda step: runtime.cosine(step, steps, steps // 20)) for own in (muon, adam)]
    progress = tqdm(range(steps), desc=name, mininterval=10)
    for step in progress:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of_step(step)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (muon, adam, *schedules):
            each.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def pad(rows: list[list]) -> torch.Tensor:
    """Rows of numbers as one tensor (B, T), filled up with 0."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)


# ---- tokenizer and language model ----------------------------------------------------------------


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Llama's special tokens, in the language model's folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (sample_text(np.random.default_rng(SEED + i)) for i in range(BUDGET["tokenizer"]))
    said = (part.removesuffix("</s>") for text in texts
            for part in (text.first, *(x for turn in text.turns for x in turn[1:])))
    tokenizer.train_from_iterator(said, trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<pad>", "<s>", "</s>"], min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>")
    fast.chat_template = CHAT
    fast.save_pretrained(records.LLM)
    return fast


def encode(tokenizer, texts: list[Text]) -> tuple[dict, torch.Tensor, list[list[str]]]:
    """Texts -> the model's inputs, the weight (B, T) of each token's loss, each token's kind.

    The attention mask (B, 1, T, T) shows a turn that stands apart the first part and itself, and
    its positions go on from there. A random scene cannot be predicted, the answers about it can:
    its tokens weigh a tenth, those of questions nothing. A caption alone counts as an answer: what
    it is like is all that the language model learns from it. Kind "": no answer.
    """
    parts = [part for text in texts
             for part in (f"<s>{text.first}", *(x for turn in text.turns for x in turn[1:]))]
    tokens, rows = iter(tokenizer(parts, add_special_tokens=False)["input_ids"]), []
    for text in texts:
        ids = next(tokens)
        turn, position = [0] * len(ids), list(range(len(ids)))
        weight, kinds = [0.1] * len(ids), [""] * len(ids)
        for number, (kind, _, _) in enumerate(text.turns, 1):
            q, a = next(tokens), next(tokens)
            start, length = turn.count(0) if text.apart else len(ids), len(q) + len(a)
            ids, turn = ids + q + a, turn + [number if text.apart else 0] * length
            position = position + list(range(start, start + length))
            weight = weight + [0.0] * len(q) + [1.0] * len(a)
            kinds = kinds + [""] * len(q) + [kind] * len(a)
        rows.append((ids, turn, position, weight, kinds))
    ids, turn, position, weight = (pad([row[i] for row in rows]) for i in range(4))
    T = ids.shape[1]
    sees = (turn[:, None, :] == 0) | (turn[:, None, :] == turn[:, :, None])
    mask = (sees & torch.ones(T, T, dtype=torch.bool).tril())[:, None]  # nobody sees padding, last
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=position)
    return inputs, weight, [row[4] for row in rows]


@torch.no_grad()
def ready_to_look_up(model: LlamaForCausalLM) -> None:
    """Initial weights from which look-ups emerge within hundreds of steps, not thousands.

    As in mimetic initialization (Trockman and Kolter, ICML 2023), queries resemble keys, so that
    equal words find each other, and what a head reads it writes back as it was. The biases of the
    first layer's first heads let them look one, two and three words back: the key's bias is the
    query's, turned as its rotary embedding turns it over that distance, on the four fastest
    frequencies. Training is free to change them all.
    """
    words = model.get_input_embeddings().weight
    model.lm_head.weight.copy_(words)
    words.mul_(10)                                  # large against what the blocks add
    for layer in model.model.layers:
        q, k, v, o = (getattr(layer.self_attn, f"{name}_proj").weight for name in "qkvo")
        k.mul_(0.6).add_(q, alpha=0.8)
        o.mul_(0.7).add_(v.T, alpha=0.7)
    first, frequencies = model.model.layers[0].self_attn, model.model.rotary_emb.inv_freq
    half = frequencies.numel()
    for head in range(3):
        at, turn = 2 * half * head, (head + 1) * frequencies[:4]
        first.q_proj.bias[at: at + 4] = 3
        first.k_proj.bias[at: at + 4] = 3 * turn.cos()
        first.k_proj.bias[at + half: at + half + 4] = 3 * turn.sin()


def train_llm(tokenizer) -> dict:
    """A small Llama on text alone -> the share of exact answers per kind, on unseen scenes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=4,
        num_attention_heads=4, attention_bias=True, max_position_embeddings=512, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, initializer_range=0.07))
    ready_to_look_up(model)

    def loss_of(texts):
        inputs, weight, _ = encode(tokenizer, texts)
        hidden, weight = model.model(**inputs).last_hidden_state[:, :-1], weight[:, 1:]
        keep = weight > 0
        targets = inputs["input_ids"][:, 1:][keep]
        losses = F.cross_entropy(model.lm_head(hidden[keep]), targets, reduction="none")
        return (losses * weight[keep]).sum() / weight.sum()

    def drills(step):
        rng = np.random.default_rng([SEED, 0, step])
        boxes = rng.random() < 0.3
        count = int(rng.integers(2, 5 if boxes else 9))
        return loss_of([drill(rng, count, boxes) for _ in range((128 if boxes else 512) // count)])

    def texts(step):
        rng = np.random.default_rng([SEED, 1, step])
        return loss_of([sample_text(rng) for _ in range(32)])

    def places(step):
        rng = np.random.default_rng([SEED, 2, step])
        return loss_of([shortened(sample_text(rng), rng) for _ in range(40)])

    optimise(model, drills, BUDGET["drills"], 1e-3, "drills")
    optimise(model, texts, BUDGET["texts"], 1e-3, "texts")
    optimise(model, places, BUDGET["places"], 1e-3, "places")
    report = exact_answers(model.eval(), tokenizer)
    model.half().save_pretrained(records.LLM)
    return report


@torch.no_grad()
def exact_answers(model: LlamaForCausalLM, tokenizer) -> dict[str, float]:
    """The share of answers whose every token is the likeliest, by kind of question.

    About unseen scenes, told in sentences or in a grid; of boxes found in a grid, the share with an
    intersection over union of a half.
    """
    right, count = defaultdict(int), defaultdict(int)
    for i in range(BUDGET["unseen texts"] // 80):
        rng = np.random.default_rng([TEST_SEED, i])
        texts = [text for text in (sample_text(rng) for _ in range(80)) if text.apart]
        inputs, _, kinds = encode(tokenizer, texts)
        said, ids = model(**inputs).logits[:, :-1].argmax(-1), inputs["input_ids"][:, 1:]
        for row, named in enumerate(kinds):
            at = 1
            for kind, run in itertools.groupby(named[1:]):
                length = len(list(run))
                span, at = slice(at - 1, at - 1 + length), at + length
                if kind in ("", "caption"):         # a caption has no single right wording
                    continue
                count[kind] += 1
                if kind == "grid box":
                    texts = [tokenizer.decode(x[row, span]) for x in (said, ids)]
                    boxes = [[float(n) for n in re.findall(r"\.\d\d", text)] for text in texts]
                    right[kind] += len(boxes[0]) == 4 and overlap(*boxes) >= 0.5
                else:
                    right[kind] += bool((said[row, span] == ids[row, span]).all())
    return {kind: right[kind] / count[kind] for kind in sorted(count)}


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area = sum(max(0, x[2] - x[0]) * max(0, x[3] - x[1]) for x in (a, b)) - width * height
    return width * height / area if area else 0.0
