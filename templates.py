"""The texts of llava.py: a chat template and a tokenizer from which transformers' processor gets the tokens that `data.tokenize` makes
here, and back. Apart so that each reads in one sitting.

    export      our prompt -> a template of the same text, and a tokenizer that reads it as the same tokens   exported_tokenizer
    import      a folder's tokenizer -> one for `data.tokenize`, and the prompt to use it with          restored_tokenizer, usable_prompt

Nothing is taken on trust: `read_otherwise` tries each pair of template and tokenizer on conversations and compares tokens.
"""
import json

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import data
import runtime
from data import IMAGE_MARKER, IMAGE_TOKEN, InputError

# ------------------------------------------------------------------------------------------------------------------------ chat templates


# A turn's content as text: a string, or a list of {"type": "image"} and {"type": "text", "text": ...}, an item per line.
SAID = r"""{%- macro said(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for item in content -%}{{- '' if loop.first else '\n' -}}{{- '<image>' if item.type == 'image' else item.text -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
PLAIN = SAID + """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{- said(message.content) + eos_token -}}
{%- elif '<image>' in said(message.content) -%}{{- '<image>' -}}
{%- endif -%}
{%- endfor -%}"""
# What stands around the texts of a conversation, in variables that `frame` sets. The blank before an answer belongs to its first word, so a
# request to generate ends without it. JOINED: no blank follows the image token, where the tokenizer puts one of its own.
FRAME = SAID + """{%- set last = namespace(asked=0) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set last.asked = loop.index -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- OPENING if loop.first else BETWEEN -}}{{- said(message.content) -}}
{%- set ask = LAST_ASK if loop.index == last.asked else ASK -%}
{{- ask[1:] if JOINED and said(message.content).endswith('<image>') and ask.startswith(' ') else ask -}}
{%- elif message.role == 'assistant' -%}
{{- BLANK + said(message.content) + END -}}{%- if loop.last -%}{{- CLOSING -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}"""
LISTS = SAID + """{%- set own = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set own.messages = own.messages + [dict(message, content=said(message.content))] -%}
{%- endfor -%}
{%- set messages = own.messages %}
"""


def frame(**pieces) -> str:
    """FRAME with its variables."""
    return "".join(f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in pieces.items()) + FRAME


def candidates(tokenizer, prompt: str) -> list[str]:
    """Chat templates that may render what `data.tokenize` encodes, the better first: the tokenizer's own where it does."""
    if prompt == "plain":
        return [PLAIN]
    if prompt == "v1":
        pieces = dict(OPENING=data.V1_SYSTEM + " USER: ", BETWEEN="USER: ", ASK=" ASSISTANT:", LAST_ASK=" ASSISTANT:", BLANK=" ",
                      END=tokenizer.eos_token, CLOSING="")
        return [frame(JOINED=joined, **pieces) for joined in (False, True)]
    around, end = data.chat_frame(tokenizer, tokenizer.chat_template, 2)
    heads = [around[1].removesuffix(" "), around[3].removesuffix(" ")]
    before, found, after = around[2].partition(end)
    closing = around[4].partition(end)[2] if found else around[4]
    pieces = dict(OPENING=around[0], BETWEEN=after if found else around[2], ASK=heads[0], LAST_ASK=heads[1],
                  BLANK=around[1][len(heads[0]):], END=(before if found else "") + end, CLOSING=closing)
    own = tokenizer.get_chat_template()
    return [LISTS + own, own, *(frame(JOINED=joined, **pieces) for joined in (False, True))]


def conversations(prompt: str) -> list[list[dict]]:
    """What a template is tried on: with the image first, with the image last, with an earlier answer, without an image."""
    def turns(*texts):
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    if prompt == "plain":
        return [turns("<image>\nDescribe the image.")]
    return [turns("<image>\nWhat is it?"), turns("What is it?\n<image>"), turns("<image>\nWhat is it?", "A red dog.", "And its left ear?"),
            turns("Who are you?")]


def as_messages(turns: list[dict]) -> list[dict]:
    """Our turns as the messages that a processor takes, with lists of images and texts."""
    def content(text):
        return [{"type": "image"} if line == IMAGE_MARKER else {"type": "text", "text": line} for line in text.split("\n")]

    return [{"role": data.ROLES[turn["from"]], "content": content(turn["value"])} for turn in turns]


def read_otherwise(theirs, template: str, ours, prompt: str) -> list[list[dict]]:
    """The `conversations` that transformers' processor, with their tokenizer and template, reads as other tokens than we do with ours."""
    image, wrong = theirs.convert_tokens_to_ids(IMAGE_MARKER), []
    for turns in conversations(prompt):
        expected = data.tokenize_prompt(turns, ours, prompt, int(IMAGE_MARKER in str(turns)))
        try:
            text = theirs.apply_chat_template(as_messages(turns), chat_template=template, tokenize=False, add_generation_prompt=True)
            found = [IMAGE_TOKEN if token == image else token for token in theirs(text).input_ids]
        except (TemplateError, TypeError, ValueError):          # it wants strings where we have lists, or the other way round
            found = None
        if found != expected:
            wrong.append(turns)
    return wrong


# ---------------------------------------------------------------------------------------------------------------------------- tokenizers


def piecewise(rules: dict) -> dict:
    """The rules of tokenizer.json, changed so that what stands after a special token reads as at the beginning of a text: here the text
    around an image is encoded piece by piece."""
    first = rules["pre_tokenizer"] or {}
    for step in [first, *first.get("pretokenizers", [])]:
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "always"
    return rules


def exported_tokenizer(own, prompt: str, where: str) -> tuple[PreTrainedTokenizerFast, str]:
    """Our tokenizer (of the model that `where` names) with <image> and with only those special tokens put in by itself that our prompt has
    -> (tokenizer, chat template). InputError: one without the rules of the tokenizers library, or no template gives the same tokens."""
    if getattr(own, "backend_tokenizer", None) is None:
        raise InputError(f"{where}: its {type(own).__name__} has no tokenizer.json, which an export needs")
    rules = piecewise(json.loads(own.backend_tokenizer.to_str()))
    backend = Tokenizer.from_str(json.dumps(rules | dict(post_processor=None, truncation=None, padding=None)))
    begins = prompt != "chat" and data.tokenize_prompt(conversations(prompt)[0], own, prompt, 1)[0] == own.bos_token_id
    if begins:
        backend.post_processor = TemplateProcessing(single=f"{own.bos_token} $A", special_tokens=[(own.bos_token, own.bos_token_id)])
    backend.add_special_tokens([AddedToken(IMAGE_MARKER, normalized=False, special=True)])
    names = {f"{kind}_token": getattr(own, f"{kind}_token") for kind in ("bos", "eos", "unk")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **names, pad_token=own.pad_token or own.eos_token, padding_side="left",
        model_max_length=own.model_max_length, clean_up_tokenization_spaces=getattr(own, "clean_up_tokenization_spaces", False),
        model_input_names=["input_ids", "attention_mask"])
    earlier, example = "", ""
    for template in candidates(own, prompt):
        wrong = read_otherwise(tokenizer, template, own, prompt)
        if not wrong:
            return tokenizer, template
        if all(len(turns) > 1 for turns in wrong):
            earlier = earlier or template
        example = example or f", for example {wrong[0]}"
    if not earlier:
        raise InputError(f"{where}: its tokenizer does not read a text of prompt {prompt} as the tokens of its parts{example}")
    runtime.log(f"{where}: its tokenizer joins an earlier answer with what stands around it; such conversations differ in a few tokens")
    return tokenizer, earlier


def kept_of(own) -> dict:
    """What an export changes of a tokenizer, for `restored_tokenizer`."""
    return {"post_processor": json.loads(own.backend_tokenizer.to_str())["post_processor"], "chat_template": own.chat_template,
            "pad_token": own.pad_token, "added": IMAGE_MARKER not in own.get_vocab()}


def restored_tokenizer(tokenizer, saved: dict | None):
    """The tokenizer of a folder, to use here; saved: what `kept_of` gave, if we made the folder."""
    if saved:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules["added_tokens"] = [t for t in rules["added_tokens"] if t["content"] != IMAGE_MARKER or not saved["added"]]
        names = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "unk")}
        restored = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(rules | {"post_processor": saved["post_processor"]})), **names,
            pad_token=saved["pad_token"], model_max_length=tokenizer.model_max_length,
            clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces)
        restored.chat_template = saved["chat_template"]
        return restored
    begins = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if begins and tokenizer.chat_template and "bos_token" not in tokenizer.chat_template:
        tokenizer.chat_template = "{{- bos_token -}}" + tokenizer.chat_template    # transformers' processor lets the tokenizer put it there
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(piecewise(json.loads(tokenizer.backend_tokenizer.to_str()))))
    return tokenizer


def usable_prompt(name: str, theirs, ours) -> str:
    """chat where the tokenizer of the folder `name` has a template that can be used here, else v1. That transformers reads other tokens,
    with theirs, than we do, with ours, is said."""
    try:
        data.tokenize_prompt(conversations("chat")[0], ours, "chat", 1)
    except InputError:
        return "v1"
    wrong = read_otherwise(theirs, theirs.chat_template, ours, "chat")
    if wrong:
        runtime.log(f"{name}: its processor reads some conversations as other tokens than --prompt chat does here, for example {wrong[0]}")
    return "chat"
