"""Draw the pictures of docs/introduction.md: `python docs/pictures/introduction.py [FOLDER]`. No package is needed."""

import sys
from pathlib import Path

FROZEN, LEARNS, INK, LINE = "#d5dbe2", "#7fb0ff", "#1c2530", "#5d6975"
UNIT = 2.0  # pixels for each row or column of the toy
W, H = 560, 204


def box(x: float, y: float, wide: float, high: float, name: str, size: str, learns: bool = False) -> str:
    """A matrix as a rectangle to scale, its name inside or beside it and its size below."""
    fill = LEARNS if learns else FROZEN
    middle = x + wide / 2
    return (
        f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" fill="{fill}" stroke="{LINE}"/>'
        f'<text x="{middle}" y="{y - 8}" text-anchor="middle" font-weight="bold">{name}</text>'
        f'<text x="{middle}" y="{y + high + 16}" text-anchor="middle" font-size="11" fill="{LINE}">{size}</text>'
    )


def sign(x: float, text: str, y: float = 95) -> str:
    """A plus, a times or other words between matrices."""
    return f'<text x="{x}" y="{y}" text-anchor="middle" font-size="18">{text}</text>'


def said(x: float, y: float, text: str) -> str:
    """A remark beside a matrix."""
    return f'<text x="{x}" y="{y}" font-size="12">{text}</text>'


def stripes(x: float, y: float, wide: float, high: float, count: int) -> str:
    """Lines that divide a matrix into steps, as the levels of a quantized one."""
    step = high / count
    return "".join(
        f'<line x1="{x}" x2="{x + wide}" y1="{y + i * step}" y2="{y + i * step}" stroke="{LINE}" stroke-width=".6"/>'
        for i in range(1, count)
    )


def legend(y: float = 194) -> str:
    """What the colours mean."""
    return (
        f'<rect x="12" y="{y - 10}" width="12" height="12" fill="{FROZEN}" stroke="{LINE}"/>'
        f'<text x="30" y="{y}" font-size="11">frozen</text>'
        f'<rect x="86" y="{y - 10}" width="12" height="12" fill="{LEARNS}" stroke="{LINE}"/>'
        f'<text x="104" y="{y}" font-size="11">learns</text>'
    )


def base(name: str = "W", size: str = "60 x 40") -> str:
    """The pretrained matrix."""
    return box(110, 30, 40 * UNIT, 60 * UNIT, name, size)


def pair(a: bool = True, b: bool = True, rank: float = 6, x: float = 260) -> str:
    """B (out, r) and A (r, in)."""
    tall = box(x, 30, rank * UNIT, 60 * UNIT, "B", "60 x r", b)
    return (
        tall + sign(x + rank * UNIT + 22, "·") + box(x + rank * UNIT + 44, 60, 40 * UNIT, rank * UNIT, "A", "r x 40", a)
    )


def lora() -> str:
    return base() + sign(225, "+ s") + pair()


def dora() -> str:
    length = box(30, 30, 4 * UNIT, 60 * UNIT, "m", "60", True)
    return (
        length
        + sign(74, "/ |·|  ×")
        + base()
        + sign(225, "+ s")
        + pair()
        + said(260, 194, "m: the length of each row of the result")
    )


def vera() -> str:
    scales = box(240, 30, 3 * UNIT, 60 * UNIT, "b", "60", True) + box(378, 60, 3 * UNIT, 14 * UNIT, "d", "r", True)
    tall = box(290, 30, 14 * UNIT, 60 * UNIT, "B", "60 x r, random")
    wide = box(424, 60, 40 * UNIT, 14 * UNIT, "A", "r x 40, random")
    times = sign(267, "×") + sign(348, "·") + sign(403, "×", 80)
    return base() + sign(215, "+") + scales + tall + wide + times


def qlora() -> str:
    return base("W in 4 bits", "16 levels") + stripes(110, 30, 40 * UNIT, 60 * UNIT, 15) + sign(225, "+ s") + pair()


def dylora() -> str:
    tall = box(260, 30, 8 * UNIT, 60 * UNIT, "B", "60 x r") + (
        f'<rect x="260" y="30" width="{3 * UNIT}" height="{60 * UNIT}" fill="{LEARNS}" stroke="{LINE}"/>'
    )
    wide = box(320, 60, 40 * UNIT, 8 * UNIT, "A", "r x 40") + (
        f'<rect x="320" y="60" width="{40 * UNIT}" height="{3 * UNIT}" fill="{LEARNS}" stroke="{LINE}"/>'
    )
    return (
        base()
        + sign(225, "+ s")
        + tall
        + sign(298, "·")
        + wide
        + said(260, 194, "k columns of B and k rows of A, k drawn at each step")
    )


PICTURES = {"lora": lora, "dora": dora, "vera": vera, "qlora": qlora, "dylora": dylora}


def svg(name: str) -> str:
    """The picture of a method, on white so that it can be read on a dark page too."""
    about = f"{name}: which matrices are frozen and which learn"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" role="img" aria-label="{about}" '
        f'font-family="sans-serif" font-size="14" fill="{INK}">\n'
        f'<rect width="{W}" height="{H}" fill="#ffffff"/>\n{PICTURES[name]()}\n{legend()}\n</svg>\n'
    )


def main(folder: Path) -> None:
    """Write all pictures."""
    for name in PICTURES:
        (folder / f"intro-{name}.svg").write_text(svg(name), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
