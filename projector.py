"""The projectors: from the encoder's patch features to the language model's word-embedding space.

    Z (B, P_v, D_v)  ->  H (B, P, D)

    linear         one linear map of each patch (LLaVA)                            P = P_v
    mlp2x_gelu     two with a GELU between them (LLaVA-1.5)                        P = P_v
    pixel_shuffle  pool x pool neighbours side by side, then one linear map        P = P_v / pool^2
                   (Idefics3, nanoVLM)
    c_abstractor   convolutions, average pooling to a smaller grid, convolutions,  P = P_v / pool^2,
                   MLP (Honeybee)                                                      rounded

Patches are in rows of the grid, from the top left. Patch labels follow `output_grid` by themselves.
A new projector needs its builder in PROJECTORS, and its name in POOLING if it pools, or in
PLACELESS if its outputs have no places in the image, like a resampler's: it gets no patch labels.
"""
import torch
from torch import nn
from torch.nn import functional as F


def linear(D_v: int, D: int, grid: tuple[int, int], pool: int) -> nn.Module:
    """One linear map, as in LLaVA. grid (rows, columns) and pool have no meaning here."""
    return nn.Sequential(nn.Linear(D_v, D))


def mlp2x_gelu(D_v: int, D: int, grid: tuple[int, int], pool: int) -> nn.Module:
    """Two linear maps with a GELU between them, as in LLaVA-1.5. grid and pool have no meaning."""
    return nn.Sequential(
        nn.Linear(D_v, D),      # b p D_v -> b p D
        nn.GELU(),
        nn.Linear(D, D),        # b p D   -> b p D
    )


# ---- pixel shuffle -------------------------------------------------------------------------------


class PixelShuffle(nn.Module):
    """Space to depth, then one linear map without bias (Laurençon et al., 2024: Idefics3)."""

    def __init__(self, D_v: int, D: int, grid: tuple[int, int], pool: int):
        super().__init__()
        self.grid, self.pool = grid, pool
        self.linear = nn.Linear(D_v * pool * pool, D, bias=False)

    def forward(self, Z: torch.Tensor) -> torch.Tensor:
        """(B, P_v, D_v) -> (B, P_v / pool^2, D)."""
        (rows, columns), r = self.grid, self.pool
        x = Z.unflatten(1, (rows // r, r, columns // r, r))     # b (h r w s) d -> b h r w s d
        x = x.transpose(2, 3).flatten(3)                        # b h r w s d   -> b h w (r s d)
        return self.linear(x.flatten(1, 2))                     # b h w (r s d) -> b (h w) D


# ---- C-Abstractor --------------------------------------------------------------------------------


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, channels, rows, columns)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, rows, columns) -> the same."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def convolution(inner: int, outer: int, size: int, groups: int = 1) -> nn.Sequential:
    """A convolution without bias, and a norm."""
    layer = nn.Conv2d(inner, outer, size, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, ChannelNorm(outer))


class Bottleneck(nn.Module):
    """RegNet's Y block (Radosavovic et al., CVPR 2020): 1 x 1, depthwise 3 x 3, squeeze, excite."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.reduce = convolution(inner, outer, 1).append(nn.SiLU())
        self.spatial = convolution(outer, outer, 3, groups=outer).append(nn.SiLU())
        squeezed = max(1, inner // 4)
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(outer, squeezed, 1), nn.SiLU(),
            nn.Conv2d(squeezed, outer, 1), nn.Sigmoid())
        self.expand = convolution(outer, outer, 1)
        self.shortcut = nn.Identity() if inner == outer else convolution(inner, outer, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inner, rows, columns) -> (B, outer, rows, columns)."""
        y = self.spatial(self.reduce(x))
        return F.silu(self.expand(y * self.excite(y)) + self.shortcut(x))


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor (Cha et al., CVPR 2024): three blocks, pooling, three blocks, an MLP.

    A learned position table comes first. Ours: its width is the encoder's.
    """

    def __init__(self, D_v: int, D: int, grid: tuple[int, int], pool: int):
        super().__init__()
        self.grid = grid
        table = torch.zeros(1, grid[0] * grid[1], D_v)
        self.positions = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.before = nn.Sequential(*(Bottleneck(D_v, D_v) for _ in range(3)))
        self.pool = nn.AdaptiveAvgPool2d(output_grid("c_abstractor", grid, pool))
        self.after = nn.Sequential(*(Bottleneck(D_v, D_v) for _ in range(3)))
        self.readout = nn.Sequential(nn.Linear(D_v, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, Z: torch.Tensor) -> torch.Tensor:
        """(B, P_v, D_v) -> (B, P, D)."""
        x = (Z + self.positions).transpose(1, 2)                # b (h w) d  -> b d (h w)
        x = x.unflatten(2, self.grid)                           # b d (h w)  -> b d h w
        x = self.after(self.pool(self.before(x)))               # b d h w    -> b d h' w'
        return self.readout(x.flatten(2).transpose(1, 2))       # b d h' w'  -> b (h' w') D


PROJECTORS = {"linear": linear, "mlp2x_gelu": mlp2x_gelu, "pixel_shuffle": PixelShuffle,
              "c_abstractor": CAbstractor}
POOLING = ("pixel_shuffle", "c_abstractor")
PLACELESS = {}                              # kind: (grid, pool) -> number of outputs


def output_grid(kind: str, grid: tuple[int, int], pool: int) -> tuple[int, int] | int:
    """The grid (rows, columns) of patches after projector `kind`, from the encoder's grid.

    A pooling projector divides each side by `pool`. One of PLACELESS has a number of outputs in the
    place of a grid. ValueError: `pixel_shuffle` cannot divide.
    """
    if kind in PLACELESS:
        return PLACELESS[kind](grid, pool)
    if kind not in POOLING:
        return grid
    rows, columns = grid
    if kind == "pixel_shuffle" and (rows % pool or columns % pool):
        raise ValueError(f"pool {pool}: the encoder's grid of {rows} x {columns} patches is not a"
                         " multiple of it; choose another or --projector c_abstractor, which takes"
                         " any")
    return max(1, round(rows / pool)), max(1, round(columns / pool))
