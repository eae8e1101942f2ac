"""Draws metrics by step as an SVG: `curve` for one run, tools/compare.py for several."""

from statistics import fmean

SHARES = (0, 0.25, 0.5, 0.75, 1)
SERIES = (  # metric, heading, ticks
    ("reward", "reward", range(-3, 4)),
    ("em", "exact match", SHARES),
    ("stale", "stale", SHARES),
)


def svg(panels, height, parts):
    """A picture of so many panels side by side, on white."""
    box = f'viewBox="0 0 {380 * panels} {height}"'
    style = 'style="background: white; font: 13px sans-serif"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {box} {style}>', *parts, "</svg>"])


def panel(place, heading, span, ticks, lines):
    """Panel number `place`: axes over the steps `span` and the values `ticks`, with `lines`."""
    left = 50 + 380 * place
    first, last = span
    wide = 300 / max(1, last - first)  # pixels per step
    tall = 250 / (ticks[-1] - ticks[0])
    parts = [f'<text x="{left}" y="22" font-weight="bold">{heading}</text>']
    for tick in ticks:
        y = 290 - tall * (tick - ticks[0])
        parts.append(f'<path d="M{left} {y:.0f}h300" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{tick:.3g}</text>')
    parts.append(f'<text x="{left}" y="310" text-anchor="middle">{first}</text>')
    parts.append(f'<text x="{left + 300}" y="310" text-anchor="middle">step {last}</text>')
    for points, style in lines:  # a point is (step, value)
        pixels = ""
        for step, value in points:
            pixels += f"{left + wide * (step - first):.1f},{290 - tall * (value - ticks[0]):.1f} "
        parts.append(f'<polyline points="{pixels}" fill="none" {style}/>')
    return parts


def known(rows, name):
    """The points (step, value) of a metric; a value that was not finite is missing."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def smooth(points):
    """The mean of the nine values around each, of fewer at both ends."""
    values = [value for _, value in points]
    return [(step, fmean(values[max(0, i - 4) : i + 5])) for i, (step, _) in enumerate(points)]


def curve(rows):
    """An SVG of reward, exact match and stale rate; of the loss where a run does not sample."""
    span = (rows[0]["step"], rows[-1]["step"]) if rows else (0, 0)
    series = SERIES
    losses = [value for _, value in known(rows, "loss")]
    if losses and "reward" not in rows[0]:  # sft.py
        series = [("loss", "loss", (min(losses), max(losses) + 1e-9))]
    parts = []
    for place, (name, heading, ticks) in enumerate(series):
        points = known(rows, name)
        thin = (points, 'stroke="#1f5fbf" opacity="0.3"')
        thick = (smooth(points), 'stroke="#1f5fbf" stroke-width="2.5"')
        parts += panel(place, heading, span, ticks, [thin, thick])
    return svg(len(series), 330, parts)
