"""Scenes: a named background with two to four objects, and their pixels and masks.

Each object has one colour, one texture and one shape, and may hide parts of others; so every patch
is named by two or more words. Images are 96 x 96 pixels, masks are exact.
"""
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 96                                           # pixels, both sides
COLORS = {"red": (215, 40, 40), "orange": (245, 140, 30), "yellow": (240, 220, 50),
          "green": (30, 150, 60), "blue": (40, 80, 215), "purple": (130, 50, 180),
          "pink": (245, 150, 190), "white": (243, 243, 243), "black": (28, 28, 28)}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
BACKGROUNDS = ("grass", "sand", "water", "bricks", "wood", "snow", "stones", "carpet")
HELD_OUT = set(zip(COLORS, SHAPES))                 # colour and shape: together in `hard` alone
LIGHTS = {"bright": 1.15, "dark": 0.55}             # a background's brightness
OUTLINE = (15, 15, 15)      # every object's, so that its shape does not drown in textures
ROWS, COLUMNS = np.mgrid[0:SIZE, 0:SIZE]


@dataclass
class Thing:
    """One object: centre and radius in pixels, tilt in radians."""

    color: str
    texture: str
    shape: str
    x: float
    y: float
    radius: float
    tilt: float

    @property
    def phrase(self) -> str:
        """The noun phrase that names it, without article."""
        return f"{self.texture} {self.color} {self.shape}"

    @property
    def size(self) -> str:
        """In words."""
        return "large" if self.radius > 21 else "small"

    @property
    def cell(self) -> tuple[int, int]:
        """Column and row of its centre on a 3 x 3 grid."""
        return int(self.x * 3 / SIZE), int(self.y * 3 / SIZE)

    @property
    def place(self) -> str:
        """Its cell of a 3 x 3 grid, in words."""
        column, row = self.cell
        words = ("top", "", "bottom")[row], ("left", "", "right")[column]
        return " ".join(filter(None, words)) or "center"


@dataclass
class Scene:
    """A background such as "dark grass", and objects in drawing order: later ones hide earlier."""

    light: str
    background: str
    things: list


def sample_scene(rng, fits=lambda scene: True) -> Scene:
    """A random scene that `fits`; its objects overlap a little and stay inside the image."""
    while True:
        things = []
        for _ in range(rng.integers(3, 7)):
            r = rng.uniform(16, 26)
            x, y = rng.uniform(r, SIZE - r, 2)
            if all(math.hypot(x - t.x, y - t.y) > 0.75 * (r + t.radius) for t in things):
                named = [str(rng.choice(v)) for v in (list(COLORS), TEXTURES, SHAPES)]
                things.append(Thing(*named, x, y, r, rng.uniform(-0.35, 0.35)))
        if 2 <= len(things) <= 4:
            light = str(rng.choice(list(LIGHTS)))
            scene = Scene(light, str(rng.choice(BACKGROUNDS)), things)
            if fits(scene):
                return scene


def unheard_of(scene: Scene) -> bool:
    """Whether the scene holds a combination that only `hard` may show."""
    return any((t.color, t.shape) in HELD_OUT for t in scene.things)


def distracted(scene: Scene, thing: Thing) -> bool:
    """Whether an object that shares a colour or a shape with `thing` overlaps it."""
    return any(other is not thing and (other.color == thing.color or other.shape == thing.shape)
               and math.hypot(other.x - thing.x, other.y - thing.y)
               < 0.9 * (other.radius + thing.radius) for other in scene.things)


# ---- pixels and masks ----------------------------------------------------------------------------

STAR = [((1 if i % 2 == 0 else .45) * math.sin(i * math.pi / 5),
         -(1 if i % 2 == 0 else .45) * math.cos(i * math.pi / 5)) for i in range(10)]
HEART = [(math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a)
                              - math.cos(4 * a)) / 16) for a in np.linspace(0, 2 * math.pi, 40)]
POLYGONS = {                                        # corners, for a radius of 1; rings are united
    "square": [[(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)]],
    "triangle": [[(0, -1), (.95, .8), (-.95, .8)]],
    "diamond": [[(0, -1), (.65, 0), (0, 1), (-.65, 0)]],
    "cross": [[(-.3, -1), (.3, -1), (.3, 1), (-.3, 1)], [(-1, -.3), (1, -.3), (1, .3), (-1, .3)]],
    "star": [STAR],
    "heart": [HEART],
}


def shape_mask(thing: Thing) -> np.ndarray:
    """(SIZE, SIZE) bool: the pixels of the object, before others hide it."""
    image = Image.new("1", (SIZE, SIZE))
    draw = ImageDraw.Draw(image)
    x, y, r = thing.x, thing.y, thing.radius
    if thing.shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=1)
        if thing.shape == "ring":
            draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=0)
    c, s = math.cos(thing.tilt), math.sin(thing.tilt)
    for corners in POLYGONS.get(thing.shape, []):
        draw.polygon([(x + r * (c * u - s * v), y + r * (s * u + c * v)) for u, v in corners],
                     fill=1)
    return np.array(image)


def texture_mask(texture: str, rng) -> np.ndarray:
    """(SIZE, SIZE) bool: where the texture's second tone lies."""
    dx, dy = rng.integers(0, 12, 2)
    x, y = COLUMNS + dx, ROWS + dy
    if texture == "striped":
        return (y if rng.random() < 0.5 else x) % 6 < 3
    if texture == "dotted":
        return ((x % 6 - 2.5) ** 2 + (y % 6 - 2.5) ** 2) < 4.5
    if texture == "checkered":
        return (x // 4 + y // 4) % 2 == 0
    return np.zeros((SIZE, SIZE), bool)


def background_pixels(name: str, rng) -> np.ndarray:
    """(SIZE, SIZE, 3) float: a background, with its own random phase and noise."""
    dx, dy = rng.integers(0, 24, 2)
    x, y, fine = COLUMNS + dx, ROWS + dy, rng.normal(0, 1, (SIZE, SIZE))
    coarse = np.kron(rng.normal(0, 1, (SIZE // 4, SIZE // 4)), np.ones((4, 4)))
    blades = np.repeat(rng.normal(0, 1, (SIZE // 6, SIZE)), 6, 0)
    joints = (y % 12 < 2) | ((x + 12 * (y // 12 % 2)) % 24 < 2)
    base, tone = {
        "grass": ((90, 150, 70), 22 * blades),
        "sand": ((214, 190, 140), 14 * fine),
        "water": ((90, 150, 190), 22 * np.sin(y / 2.5 + 2 * np.sin(x / 9))),
        "bricks": ((160, 90, 75), np.where(joints, 60, 6 * fine)),
        "wood": ((150, 110, 70), 16 * np.sin(x / 3 + 1.5 * np.sin(y / 14)) + 4 * fine),
        "snow": ((195, 202, 215), 7 * coarse),
        "stones": ((130, 130, 130), 24 * coarse),
        "carpet": ((120, 70, 100), 24 * (((x + y) % 12 < 2) | ((x - y) % 12 < 2))),
    }[name]
    return np.array(base, float) + tone[..., None]


def outline(mask: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE) bool: the mask's pixels within two of its border, in rows and columns."""
    padded = np.pad(mask, 2)
    inner = mask.copy()
    for dy, dx in ((0, 2), (4, 2), (2, 0), (2, 4)):
        inner &= padded[dy: dy + SIZE, dx: dx + SIZE]
    return mask & ~inner


def visible(scene: Scene) -> list[np.ndarray]:
    """What is to be seen of each object, then of the background: masks, each pixel in one."""
    owner = np.full((SIZE, SIZE), len(scene.things))
    for i, thing in enumerate(scene.things):
        owner[shape_mask(thing)] = i
    return [owner == i for i in range(len(scene.things) + 1)]


def render(scene: Scene, rng) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pixels (SIZE, SIZE, 3) uint8, and the masks of `visible`."""
    pixels = background_pixels(scene.background, rng) * LIGHTS[scene.light]
    for thing in scene.things:
        mask, color = shape_mask(thing), np.array(COLORS[thing.color], float)
        second = color * 0.45 if color.mean() > 60 else color + 110
        second_here = texture_mask(thing.texture, rng)[..., None]
        pixels[mask] = np.where(second_here, second, color)[mask]
        pixels[outline(mask)] = OUTLINE
    pixels += rng.normal(0, 4, pixels.shape) + rng.normal(0, 6, 3)      # noise, white balance
    return pixels.clip(0, 255).astype(np.uint8), visible(scene)
