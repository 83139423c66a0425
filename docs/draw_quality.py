"""Draws docs/quality.svg, quality against speed on the front pages, from the records in results/simplify:

    python docs/draw_quality.py

`llm2slm benchmark --quality-plot` draws such pictures of any models. This one has its words beside the points, and a
light ground of its own, so that it is read at a glance on light and dark pages.
"""

import json
from pathlib import Path

from draw_method import FONTS, GROUND, INK, LLM, PROJECTOR, QUIET, SLM, text

RECORDS = Path(__file__).parents[1] / "results" / "simplify"
# Words, report of the quality, system of the benchmark, colours, and where the words stand beside the point.
POINTS = [
    ("LLM-to-SLM, 4 beams, fast", "more-beams", "fast_beams", PROJECTOR, (-8, -36, "start")),
    ("LLM-to-SLM, 4 beams", "more-beams", "beams", PROJECTOR, (12, 5, "start")),
    ("LLM-to-SLM, greedy, fast", "more", "fast", PROJECTOR, (-22, -38, "start")),
    ("LLM-to-SLM, greedy", "more", "llm2slm", PROJECTOR, (12, 5, "start")),
    ("small model alone (three layers; time of four)", "slm", "slm", SLM, (12, 14, "start")),
    ("LLM, fine-tuned with LoRA", "llm-lora", "llm", LLM, (-12, 5, "end")),
]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 64, 612, 52, 340
LEAST, MOST, SECONDS = 51, 57, 1.5  # chrF, and the end of the line of seconds


def place(seconds: float, score: float) -> tuple[float, float]:
    x = LEFT + (RIGHT - LEFT) * seconds / SECONDS
    return round(x, 1), round(BOTTOM - (BOTTOM - TOP) * (score - LEAST) / (MOST - LEAST), 1)


def read(name: str):
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def draw() -> str:
    seconds = {system["name"]: system["end_to_end_s"]["median"] for system in read("benchmark")["systems"]}
    title = "King James verses to Basic English: quality (chrF) against seconds for a response"
    parts = [text(LEFT, 28, "chrF, with its 95% interval", fill=QUIET, anchor="start")]
    for score in range(LEAST, MOST + 1):
        _, y = place(0, score)
        parts.append(f'<path d="M {LEFT} {y} H {RIGHT}" stroke="#e5e7eb"/>')
        parts.append(text(LEFT - 10, y + 5, score, fill=QUIET, anchor="end"))
    for tick in (0, 0.5, 1, 1.5):
        parts.append(text(place(tick, LEAST)[0], BOTTOM + 22, tick, fill=QUIET))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 46, "seconds for a verse, batch 1, two CPU cores", fill=QUIET))
    for words, report, system, (_, colour), (dx, dy, anchor) in POINTS:
        score = read(report)["scores"]["chrf"]
        x, y = place(seconds[system], score["score"])
        _, low = place(0, score["low"])
        _, high = place(0, score["high"])
        parts.append(f'<path d="M {x} {low} V {high}" stroke="{colour}" stroke-width="2" opacity="0.35"/>')
        parts.append(f'<circle cx="{x}" cy="{y}" r="6" fill="{colour}"/>')
        # A light line around the letters keeps them legible over the intervals.
        label = text(x + dx, y + dy, words, fill=INK, anchor=anchor)
        parts.append(label.replace("<text ", f'<text paint-order="stroke" stroke="{GROUND}" stroke-width="4" '))

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' role="img" style="font-family:{FONTS}">',
        f"<title>{title}</title>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12" fill="{GROUND}" stroke="#d1d5db"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("quality.svg").write_text(draw(), encoding="utf-8")
