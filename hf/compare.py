"""Whether a model of ours and one of transformers do the same."""
import torch
from torch import nn

from data import IMAGE_TOKEN
from model import PatchAlignedModel
from runtime import InputError


@torch.inference_mode()
def behaviour(model: nn.Module, image_token: int, patches: int, size) -> list[torch.Tensor]:
    """What the language model is given (T, D) and what it answers (T, V), float32.

    For an image of noise of this size (height, width) and four words. model: of either kind;
    image_token: the id of <image> in LLaVA's vocabulary.
    """
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    words = [i for i in range(3, 8) if i != image_token][:4]
    ours = isinstance(model, PatchAlignedModel)
    places = [IMAGE_TOKEN if ours else image_token] * patches
    ids = torch.tensor([[*words[:2], *places, *words[2:]]])
    if ours:
        X = model.splice(ids, model.projector(model.encode(noise)))
        return [X[0].float(), model.llm(inputs_embeds=X).logits[0].float()]
    given = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True)
    logits = model(input_ids=ids, pixel_values=noise.to(model.dtype)).logits
    hook.remove()
    return [given[0][0].float(), logits[0].float()]


def refuse_unless_equal(ours: list, theirs: list, dtype: torch.dtype, problem: str) -> None:
    """InputError unless two results of `behaviour` agree up to the rounding of dtype.

    Words that only one side has do not count.
    """
    for name, a, b in zip(("patch embeddings", "logits"), ours, theirs):
        columns = min(a.shape[1], b.shape[1])
        a, b = a[:, :columns], b[:, :columns]
        error = float((a - b).norm() / a.norm())
        if not error < (1e-3 if dtype == torch.float32 else 0.05):
            raise InputError(f"{problem}: its {name} differ by {error:.1%}")
