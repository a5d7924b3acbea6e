"""Texts: a chat template and a tokenizer from which transformers' processor gets our tokens.

    export   our prompt -> a template of the same text, a tokenizer that reads it as the same tokens
    import   a folder's tokenizer -> one for `data.tokenize`, and the prompt to use it with

Nothing is taken on trust: `read_otherwise` tries template and tokenizer on conversations.
"""
import json

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import runtime
from data import IMAGE_MARKER, IMAGE_TOKEN, ROLES, V1_SYSTEM, chat_frame, tokenize_prompt
from runtime import InputError

# ---- chat templates ------------------------------------------------------------------------------

# A turn's content as text: a string, or a list of images and texts, an item per line. The image
# comes first, as `data.check_turns` has it.
SAID = r"""{%- macro said(content) -%}
{%- set own = namespace(text=content, images=0) -%}
{%- if content is not string -%}
{%- set own.text = content | rejectattr('type', 'equalto', 'image') | map(attribute='text')
    | join('\n') -%}
{%- set own.images = content | selectattr('type', 'equalto', 'image') | list | length -%}
{%- elif '<image>' in content -%}
{%- set own.text = content | replace('<image>', '') | trim -%}
{%- set own.images = 1 -%}
{%- endif -%}
{{- '<image>' * own.images -}}{{- '\n' if own.images and own.text -}}{{- own.text -}}
{%- endmacro -%}
"""
PLAIN = SAID + """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{- said(message.content) + eos_token -}}
{%- elif '<image>' in said(message.content) -%}{{- '<image>' -}}
{%- endif -%}
{%- endfor -%}"""
# What stands around the texts of a conversation is in variables that `frame` sets. The blank before
# an answer belongs to its first word, so a request to generate ends without it. JOINED: no blank
# follows the image token, where the tokenizer puts one of its own.
FRAME = SAID + """{%- set last = namespace(asked=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set last.asked = loop.index -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- OPENING if loop.first else BETWEEN -}}{{- said(message.content) -}}
{%- set ask = LAST_ASK if loop.index == last.asked else ASK -%}
{%- set joined = JOINED and said(message.content).endswith('<image>') and ask.startswith(' ') -%}
{{- ask[1:] if joined else ask -}}
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


def frames(**pieces) -> list[str]:
    """FRAME with its variables, with a blank after the image token and without."""
    return ["".join(f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n"
                    for name, value in (pieces | dict(JOINED=joined)).items()) + FRAME
            for joined in (False, True)]


def candidates(tokenizer, prompt: str) -> list[str]:
    """Chat templates that may render what `data.tokenize` encodes, the better first."""
    if prompt == "plain":
        return [PLAIN]
    if prompt == "v1":
        return frames(OPENING=V1_SYSTEM + " USER: ", BETWEEN="USER: ", ASK=" ASSISTANT:",
                      LAST_ASK=" ASSISTANT:", BLANK=" ", END=tokenizer.eos_token, CLOSING="")
    around, end = chat_frame(tokenizer, tokenizer.chat_template, 2)
    heads = [around[1].removesuffix(" "), around[3].removesuffix(" ")]
    before, found, after = around[2].partition(end)
    own = tokenizer.get_chat_template()
    return [LISTS + own, own, *frames(
        OPENING=around[0], BETWEEN=after if found else around[2], ASK=heads[0], LAST_ASK=heads[1],
        BLANK=around[1][len(heads[0]):], END=(before if found else "") + end,
        CLOSING=around[4].partition(end)[2] if found else around[4])]


def conversations(prompt: str) -> list[list[dict]]:
    """What a template is tried on: with an image, with an earlier answer, without an image."""
    def turns(*texts):
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    if prompt == "plain":
        return [turns("<image>\nDescribe the image.")]
    return [turns("<image>\nWhat is it?"), turns("Who are you?"),
            turns("<image>\nWhat is it?", "A red dog.", "And its left ear?")]


def as_messages(turns: list[dict]) -> list[dict]:
    """Our turns as the messages that a processor takes, with lists of images and texts."""
    def item(line):
        return {"type": "image"} if line == IMAGE_MARKER else {"type": "text", "text": line}

    return [{"role": ROLES[turn["from"]], "content": [item(x) for x in turn["value"].split("\n")]}
            for turn in turns]


def read_otherwise(theirs, template: str, ours, prompt: str) -> list[list[dict]]:
    """The `conversations` that transformers' processor reads as other tokens than we do."""
    image, wrong = theirs.convert_tokens_to_ids(IMAGE_MARKER), []
    for turns in conversations(prompt):
        expected = tokenize_prompt(turns, ours, prompt, int(IMAGE_MARKER in str(turns)))
        try:
            text = theirs.apply_chat_template(as_messages(turns), chat_template=template,
                                              tokenize=False, add_generation_prompt=True)
            found = [IMAGE_TOKEN if token == image else token for token in theirs(text).input_ids]
        except (TemplateError, TypeError, ValueError):      # strings where we have lists, or so
            found = None
        if found != expected:
            wrong.append(turns)
    return wrong


# ---- tokenizers ----------------------------------------------------------------------------------


def rules_of(tokenizer) -> dict:
    """What its tokenizer.json says."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def piecewise(rules: dict) -> dict:
    """The rules, so changed that what follows a special token reads as at the beginning of a text.

    Here the text around an image is encoded piece by piece.
    """
    first = rules["pre_tokenizer"] or {}
    for step in [first, *first.get("pretokenizers", [])]:
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "always"
    return rules


def fast_tokenizer(backend: Tokenizer, like, **options) -> PreTrainedTokenizerFast:
    """A tokenizer with these rules and the special tokens of another."""
    names = {f"{kind}_token": getattr(like, f"{kind}_token") for kind in ("bos", "eos", "unk")}
    clean = getattr(like, "clean_up_tokenization_spaces", False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **names, model_max_length=like.model_max_length,
        clean_up_tokenization_spaces=clean, **options)


def exported_tokenizer(own, prompt: str, where: str) -> tuple[PreTrainedTokenizerFast, str]:
    """Our tokenizer, of the model that `where` names, for a processor -> (tokenizer, template).

    It knows <image>, and puts in by itself only those special tokens that our prompt has.
    InputError: one that has no rules of the tokenizers library; no template gives these tokens.
    """
    if getattr(own, "backend_tokenizer", None) is None:
        raise InputError(f"{where}: its {type(own).__name__} has no tokenizer.json, which an export"
                         " needs")
    rules = piecewise(rules_of(own)) | dict(post_processor=None, truncation=None, padding=None)
    backend = Tokenizer.from_str(json.dumps(rules))
    first = tokenize_prompt(conversations(prompt)[0], own, prompt, 1)[0]
    if prompt != "chat" and first == own.bos_token_id:
        backend.post_processor = TemplateProcessing(
            single=f"{own.bos_token} $A", special_tokens=[(own.bos_token, own.bos_token_id)])
    backend.add_special_tokens([AddedToken(IMAGE_MARKER, normalized=False, special=True)])
    tokenizer = fast_tokenizer(backend, own, pad_token=own.pad_token or own.eos_token,
                               padding_side="left",
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
        raise InputError(f"{where}: its tokenizer does not read a text of prompt {prompt} as the"
                         f" tokens of its parts{example}")
    runtime.log(f"{where}: its tokenizer joins an earlier answer with what stands around it; such"
                " conversations differ in a few tokens")
    return tokenizer, earlier


def kept_of(own) -> dict:
    """What an export changes of a tokenizer, for `restored_tokenizer`."""
    return {"post_processor": rules_of(own)["post_processor"], "chat_template": own.chat_template,
            "pad_token": own.pad_token, "added": IMAGE_MARKER not in own.get_vocab()}


def restored_tokenizer(tokenizer, saved: dict | None):
    """The tokenizer of a folder, to use here; saved: what `kept_of` gave, if we made the folder."""
    if saved:
        rules = rules_of(tokenizer) | {"post_processor": saved["post_processor"]}
        rules["added_tokens"] = [t for t in rules["added_tokens"]
                                 if t["content"] != IMAGE_MARKER or not saved["added"]]
        backend = Tokenizer.from_str(json.dumps(rules))
        restored = fast_tokenizer(backend, tokenizer, pad_token=saved["pad_token"])
        restored.chat_template = saved["chat_template"]
        return restored
    bos = tokenizer.bos_token
    begins = bos is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if begins and tokenizer.chat_template and "bos_token" not in tokenizer.chat_template:
        # transformers' processor lets the tokenizer put it there
        tokenizer.chat_template = "{{- bos_token -}}" + tokenizer.chat_template
        rules = piecewise(rules_of(tokenizer))
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(rules))
    return tokenizer


def usable_prompt(name: str, theirs, ours) -> str:
    """chat where the tokenizer of the folder `name` has a template that can be used here, else v1.

    If transformers reads other tokens with theirs than we do with ours, that is said.
    """
    try:
        tokenize_prompt(conversations("chat")[0], ours, "chat", 1)
    except InputError:
        return "v1"
    wrong = read_otherwise(theirs, theirs.chat_template, ours, "chat")
    if wrong:
        runtime.log(f"{name}: its processor reads some conversations as other tokens than --prompt"
                    f" chat does here, for example {wrong[0]}")
    return "chat"
