"""What a run looks like: its curve, for the browser."""

LEFT, RIGHT, TOP, BOTTOM = 60, 700, 40, 370  # of the plot, in an SVG of 760 x 420


SERIES = (("reward", -3, 3, "#1f5fbf"), ("em", 0, 1, "#2a8a3e"), ("stale", 0, 1, "#c2452d"))  # figure, axis, colour


def text(x, y, content, more=""):
    return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{content}</text>'


def svg(height, parts):
    """A picture, 760 wide, on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, f'<rect width="760" height="{height}" fill="white"/>', *parts, "</svg>"])


def polyline(steps, values, box, first, last, low, high, style):
    """A line through the points; `box` is the left, right, top and bottom of what its axes span."""
    left, right, top, bottom = box
    points = []
    for step, value in zip(steps, values, strict=True):
        x = left + (right - left) * (step - first) / max(1, last - first)
        points.append(f"{x:.1f},{bottom - (bottom - top) * (value - low) / (high - low):.1f}")
    return f'<polyline points="{" ".join(points)}" fill="none" {style}/>'


def smooth(values):
    """The mean of the nine values around each, of fewer at the ends."""
    near = [values[max(0, i - 4) : i + 5] for i in range(len(values))]
    return [sum(n) / len(n) for n in near]


def known(rows, name):
    """The steps in which a figure is there, and its values; a step that was not finite has none."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def frame(first, last):
    """Axes and grid: reward on the left, shares on the right, steps `first` to `last` below."""
    parts = []
    for tick in range(-3, 4):
        y = BOTTOM - (BOTTOM - TOP) * (tick + 3) / 6
        parts.append(f'<path d="M{LEFT} {y:.0f}H{RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y + 4, tick, 'text-anchor="end"'))
    for tick in range(0, 101, 25):
        parts.append(text(RIGHT + 8, BOTTOM - (BOTTOM - TOP) * tick / 100 + 4, f"{tick}%"))
    for fifth in range(6):
        x = LEFT + (RIGHT - LEFT) * fifth / 5
        parts.append(text(x, BOTTOM + 20, first + (last - first) * fifth // 5, 'text-anchor="middle"'))
    return [*parts, text((LEFT + RIGHT) / 2, BOTTOM + 40, "step", 'text-anchor="middle"')]


def curve(rows):
    """An SVG picture of metrics rows: thin lines are the steps, thick ones the mean of nine around each."""
    first, last = (rows[0]["step"], rows[-1]["step"]) if rows else (0, 0)
    parts, box = frame(first, last), (LEFT, RIGHT, TOP, BOTTOM)
    for place, (name, low, high, colour) in enumerate(SERIES):
        steps, values = known(rows, name)
        for line, style in ((values, 'opacity="0.3"'), (smooth(values), 'stroke-width="2.5"')):
            parts.append(polyline(steps, line, box, first, last, low, high, f'stroke="{colour}" {style}'))
        label = {"reward": "reward (left)", "em": "exact match", "stale": "stale"}[name]
        parts.append(text(LEFT + 20 + 150 * place, TOP - 15, label, f'fill="{colour}" font-weight="bold"'))
    return svg(420, parts)
