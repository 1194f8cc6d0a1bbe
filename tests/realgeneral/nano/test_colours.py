"""Colours of a picture in words."""

from __future__ import annotations

from PIL import Image, ImageColor

from realgeneral.data.sources.packaged import NanoSource
from realgeneral.nano.colours import COLOURS, colour_words


def test_colours_are_told_in_words() -> None:
    """Plain areas by their size, white and specks left out; a recoloured picture has other words."""

    def drawing(*areas: tuple[str, int]) -> Image.Image:
        pixels = [rgb for rgb, count in areas for _ in range(count)]
        picture = Image.new("RGB", (64, 64), "white")
        picture.putdata([ImageColor.getrgb(rgb) for rgb in pixels] + [(255, 255, 255)] * (64 * 64 - len(pixels)))
        return picture

    assert colour_words(drawing()) == ()
    assert colour_words(drawing(("#0067d6", 500), ("#ffc83d", 900), ("#f8312f", 60))) == ("yellow", "blue")
    named = {
        "#f8312f": "red", "#ff822d": "orange", "#ffc83d": "yellow", "#00d26a": "green", "#26c9c9": "cyan",
        "#0067d6": "blue", "#8d65c5": "purple", "#ff9db0": "pink", "#7d4533": "brown", "#9b9b9b": "grey", "#1c1c1c": "black",
    }  # fmt: skip
    assert {rgb: colour_words(drawing((rgb, 400))) for rgb in named} == {rgb: (name,) for rgb, name in named.items()}
    assert set(named.values()) == set(COLOURS)
    assert len(colour_words(drawing(*((rgb, 300) for rgb in list(named)[:8])))) == 3
    source = NanoSource("train")
    prompts = [source.row(5, seed).prompt.split(", ") for seed in range(100)]
    assert 60 < sum(len(parts) == 3 for parts in prompts) < 90
    assert len({parts[1] for parts in prompts if parts[0] == "emoji"}) > 3
