"""The projectors: from the vision encoder's patch features to the language model's word-embedding space.

    Z (B, P_v, D_v)  ->  H (B, P, D)

`linear` and `mlp2x_gelu` (LLaVA's and LLaVA-1.5's) map each patch on its own, so P = P_v. A projector that pools patches belongs
here too: give it an entry in PROJECTORS and its pooled grid in `output_grid`; patch labels follow that grid by themselves.
"""
from torch import nn


def linear(D_v: int, D: int) -> nn.Module:
    """One linear map, as in LLaVA."""
    return nn.Sequential(nn.Linear(D_v, D))


def mlp2x_gelu(D_v: int, D: int) -> nn.Module:
    """Two linear maps with a GELU between them, as in LLaVA-1.5."""
    return nn.Sequential(
        nn.Linear(D_v, D),      # b p D_v -> b p D
        nn.GELU(),
        nn.Linear(D, D),        # b p D   -> b p D
    )


PROJECTORS = {"linear": linear, "mlp2x_gelu": mlp2x_gelu}


def output_grid(kind: str, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of patches, (rows, columns), after projector `kind`, from the encoder's grid."""
    return grid                 # both projectors above keep every patch
