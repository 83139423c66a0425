"""Draws docs/method.svg, the picture of the method. It needs nothing but Python:

    python docs/draw_method.py

The picture has a light ground of its own, so it reads the same on light and dark pages.
"""

from pathlib import Path

PROMPT = ["And", "the", "king", "was", "wroth"]
RESPONSE = ["And", "the", "king", "was", "angry"]
WIDTH, HEIGHT = 640, 540
INK, QUIET, GROUND = "#1f2937", "#4b5563", "#ffffff"
# Each part's fill and line.
LLM, PROJECTOR, SLM = ("#dbe6fb", "#2f5fb3"), ("#e9e0fa", "#6d3fc0"), ("#fde6d2", "#b45309")
PLAIN = ("#f3f4f6", "#6b7280")
STEP, LEFT = 58, 30  # of the prompt's tokens
FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif"
TITLE = "The frozen LLM reads the prompt once; a projector hands its states to a small model, which writes."


def box(x, y, width, height, colours, title, note=None):
    middle, look = x + width / 2, f'fill="{colours[0]}" stroke="{colours[1]}" stroke-width="2"'
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" {look}/>',
        text(middle, y + height / 2 + (-4 if note else 6), title, size=18, weight=600),
    ]
    return parts + ([text(middle, y + height / 2 + 19, note, fill=QUIET)] if note else [])


def text(x, y, words, size=14, fill=INK, weight=400, anchor="middle"):
    look = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" {look}>{words}</text>'


def notes(*lines):
    """Words beside the picture, each with its height."""
    return [text(332, y, words, fill=QUIET, anchor="start") for y, words in lines]


def token(x, y, word, colours):
    return [
        f'<rect x="{x}" y="{y}" width="52" height="28" rx="6" fill="{colours[0]}" stroke="{colours[1]}"/>',
        text(x + 26, y + 19, word),
    ]


def state(x, y, side, colours):
    return [f'<rect x="{x + 26 - side / 2}" y="{y}" width="{side}" height="{side}" rx="3" fill="{colours[1]}"/>']


def arrow(*points):
    line = " L ".join(f"{x} {y}" for x, y in points)
    return [f'<path d="M {line}" fill="none" stroke="{QUIET}" stroke-width="1.6" marker-end="url(#tip)"/>']


def bracket(top, bottom, title, note):
    x = 508
    return [
        f'<path d="M {x - 8} {top} H {x} V {bottom} H {x - 8}" fill="none" stroke="{QUIET}" stroke-width="1.5"/>',
        text(x + 10, (top + bottom) / 2 - 3, title, size=16, weight=600, anchor="start"),
        text(x + 10, (top + bottom) / 2 + 17, note, fill=QUIET, anchor="start"),
    ]


def draw() -> str:
    parts = [text(LEFT, 32, "Prompt", size=16, weight=600, anchor="start")]
    for place, word in enumerate(PROMPT):
        x = LEFT + STEP * place
        parts += token(x, 44, word, PLAIN)
        parts += arrow((x + 26, 74), (x + 26, 92))
        parts += state(x, 184, 24, LLM)
        parts += arrow((x + 26, 210), (x + 26, 228))
        parts += arrow((x + 26, 272), (x + 26, 290))
        parts += state(x, 294, 14, PROJECTOR)
        parts += arrow((x + 26, 312), (x + 26, 394))
    width = STEP * len(PROMPT) - 6
    parts += box(LEFT, 96, width, 84, LLM, "Large language model", "frozen; all tokens at once")
    parts += box(LEFT, 232, width, 38, PROJECTOR, "Projector")
    parts += box(LEFT, 398, 452, 76, SLM, "Small language model", "trained; one token after another")
    parts += notes((190, "hidden states"), (206, "of the LLM"), (256, "trained"))
    parts += notes((306, "as wide as"), (322, "the small model"))
    parts += [text(LEFT, 513, "Response", size=16, weight=600, anchor="start")]
    for place, word in enumerate(RESPONSE):
        parts += token(126 + 60 * place, 494, word, SLM)
    parts += arrow((392, 476), (392, 491))
    # What was written is read again, by the small model alone.
    parts += arrow((424, 508), (494, 508), (494, 366), (414, 366), (414, 394))
    parts += bracket(96, 316, "once", "for a prompt")
    parts += bracket(398, 474, "each token", "of the response")
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' role="img" style="font-family:{FONTS}">',
        f"<title>{TITLE}</title>",
        f'<defs>{tip}<path d="M 0 0 L 8 4 L 0 8 z" fill="{QUIET}"/></marker></defs>',
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12" fill="{GROUND}" stroke="#d1d5db"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("method.svg").write_text(draw(), encoding="utf-8")
