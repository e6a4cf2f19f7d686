"""A timeline for people: a table of text, or an SVG picture."""

from __future__ import annotations

from html import escape

from vmm.timeline import ALONE, Phase, Timeline

BAR = 32
"""Characters of the longest possible bar."""
LEFT, RIGHT, ROW, TOP, PLOT = 120, 90, 24, 44, 720
"""Pixels: room for names and for durations, height of a row, room for the title, width of the plot."""
COLOURS = {"host": "#4878a8", "guest": "#e08a3c"}
STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def as_text(timeline: Timeline, title: str) -> str:
    """One line a phase: when it began, how long it took, its processor time (ms), a bar; then the single moments."""
    total = _total(timeline)
    lines = [f"{title}: {total * 1e3:.1f} ms", f"  {'':<16}{'begins':>9}{'takes':>9}{'processor':>11}"]
    for phase in timeline.phases():
        begin, took = phase.begin, phase.end - phase.begin
        at = int(BAR * begin / total)
        bar = " " * at + "#" * max(1, round(BAR * took / total))
        figures = f"{begin * 1e3:>9.1f}{took * 1e3:>9.1f}{phase.processor * 1e3:>11.1f}"
        lines.append(f"  {phase.name:<10}{phase.where:<6}{figures}  |{bar[:BAR]:<{BAR}}|")
    lines += [f"  {name:<24} at {seconds * 1e3:>8.1f}" for name, seconds in timeline.moments if name in ALONE]
    return "\n".join(lines) + "\n"


def as_svg(timeline: Timeline, title: str) -> str:
    """A bar for each phase on a common axis; single moments as vertical lines. Stands alone, needs no script."""
    total = _total(timeline)
    phases = timeline.phases()
    moments = [moment for moment in timeline.moments if moment.name in ALONE]
    bottom = TOP + ROW * len(phases)
    height = bottom + 30 + 16 * len(moments)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + PLOT + RIGHT}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-size="14">{escape(title)}: {total * 1e3:.0f} ms</text>',
        f'<text x="{LEFT}" y="36" fill="{COLOURS["host"]}">■ host</text>',
        f'<text x="{LEFT + 70}" y="36" fill="{COLOURS["guest"]}">■ guest</text>',
    ]
    step = next((step for step in STEPS if total / step <= 10), STEPS[-1])
    for number in range(int(total / step) + 1):
        x = _x(number * step, total)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{number * step * 1e3:g}</text>')
    parts += [_bar(phase, TOP + ROW * row, total) for row, phase in enumerate(phases)]
    for row, (name, seconds) in enumerate(moments):
        x, y = _x(seconds, total), bottom + 30 + 16 * row
        anchor = "start" if x < LEFT + PLOT / 2 else "end"
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{y}" stroke="#a33" stroke-dasharray="3 3"/>')
        shown = f"{escape(name)}, {seconds * 1e3:.0f} ms"
        parts.append(f'<text x="{x:.1f}" y="{y}" fill="#a33" text-anchor="{anchor}">{shown}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(phase: Phase, y: int, total: float) -> str:
    x, end = _x(phase.begin, total), _x(phase.end, total)
    took = f"{(phase.end - phase.begin) * 1e3:.1f} ms"
    processor = f"{phase.processor * 1e3:.1f} ms of processor time"
    return (
        f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{phase.name}</text>'
        f'<rect x="{x:.2f}" y="{y + 4}" width="{max(end - x, 0.5):.2f}" height="{ROW - 8}" '
        f'fill="{COLOURS[phase.where]}"><title>{phase.name}, {phase.where}: {took}, {processor}</title></rect>'
        f'<text x="{end + 6:.1f}" y="{y + 16}">{took}</text>'
    )


def _x(seconds: float, total: float) -> float:
    return LEFT + PLOT * seconds / total


def _total(timeline: Timeline) -> float:
    moments = timeline.moments
    return max(moments[-1].seconds if moments else 0.0, 1e-9)
