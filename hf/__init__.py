"""Checkpoints to and from `LlavaForConditionalGeneration` folders; original LLaVA's projectors.

    ours                   LlavaForConditionalGeneration
    encoder                vision_tower; its position table interpolated where we interpolate it
    projector mlp2x_gelu   multi_modal_projector: linear_1, exact GELU, linear_2
    projector linear       linear_1, the activation "linear" (none), the identity as linear_2
    language model         language_model and lm_head, LoRA merged
    <image>                a spare row of W, or a new one, the mean of the others: its logit is the
                           mean of theirs, so greedy generation never picks it
    feature_layer          vision_feature_layer; vision_feature_select_strategy is "default" (drop
                           one class token) or "full" (none)
    geometry               the image processor: crop is PerceiverImageProcessor, which like us
                           cuts before it resizes; pad and stretch are LlavaImageProcessor
    prompt                 a chat template of the same text, a tokenizer that reads the same tokens

What LLaVA cannot express is refused. Before anything is kept, both directions compare what the
language model is given and what it answers on an image of noise (compare.py), so a difference that
this table does not know is refused too. Settings that LLaVA has no word for stand in config.json
under "patch_aligned"; an import takes them from there.
"""
from hf.export import export
from hf.imports import import_folder, is_folder, opened, projector_checkpoint

__all__ = ["export", "import_folder", "is_folder", "opened", "projector_checkpoint"]
