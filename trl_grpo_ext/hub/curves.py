"""Reward curves as a picture: an SVG, which needs no plotting library and is a few kilobytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

FILE = "reward_curves.svg"
WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 200, 16, 40  # margins; the legend is on the right
# Okabe and Ito's colours, which people who see few colours can tell apart
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MOST_POINTS = 500

Curve = list[tuple[int, float]]


def reward_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """`(step, value)` of `reward`, of each `rewards/<name>/mean`, and of the same in evaluations."""
    curves: dict[str, Curve] = {}
    for entry in log_history:
        for name, value in entry.items():
            if _is_reward(name) and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((int(entry["step"]), float(value)))
    order = sorted(curves, key=lambda name: (name != "reward", name.startswith("eval_"), name))
    return {name: curves[name] for name in order}


def _is_reward(name: str) -> bool:
    if name == "reward" or (name.startswith("eval_") and name.endswith("_reward")):
        return True
    return "rewards/" in name and name.endswith("/mean")


def save_reward_curves(log_history: Sequence[Mapping[str, Any]], folder: Path) -> Path | None:
    """Write `reward_curves.svg`; None, and no file, if no reward was logged."""
    curves = reward_curves(log_history)
    if not curves:
        return None
    path = folder / FILE
    path.write_text(draw(curves), encoding="utf-8")
    return path


def draw(curves: Mapping[str, Curve]) -> str:
    """The SVG. Training is a line, evaluations are dashed with dots; a curve of one point is a dot."""
    steps = [step for curve in curves.values() for step, _ in curve]
    values = [value for curve in curves.values() for _, value in curve]
    x_ticks, y_ticks = ticks(min(steps), max(steps)), ticks(min(values), max(values))

    def x(step: float) -> float:
        return LEFT + (step - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in y_ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">optimizer step</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour, held_out = COLOURS[i % len(COLOURS)], name.startswith("eval_")
        points = [(x(step), y(value)) for step, value in thinned(curve)]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        dash = ' stroke-dasharray="5 3"' if held_out else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        if held_out or len(points) == 1:
            parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points]
        top = TOP + 10 + 18 * i
        parts.append(f'<path d="M{WIDTH - RIGHT + 12} {top}h20" stroke="{colour}" stroke-width="1.5"{dash}/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 38}" y="{top + 4}">{escape(_label(name))}</text>')
    return "\n".join([*parts, "</svg>", ""])


def thinned(curve: Curve) -> Curve:
    """At most `MOST_POINTS` points, each the mean of as many neighbours, so that a long run stays readable."""
    size = math.ceil(len(curve) / MOST_POINTS)
    groups = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(round(sum(s for s, _ in g) / len(g)), sum(v for _, v in g) / len(g)) for g in groups]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, at most `most` of them, at least two."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10, 20, 25):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first + 1 <= most:
            break
    return [round(i * step, 12) for i in range(first, last + 1)]


def _label(name: str) -> str:
    held_out = "held-out " if name.startswith("eval_") else ""
    text = name.removeprefix("eval_").removesuffix("/mean")
    text = text.removeprefix("rewards/")
    return held_out + (text if len(text) <= 22 else f"{text[:21]}…")
