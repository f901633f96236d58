"""Draw the README's diagram: what one token attends to. `python notebooks/figures/draw_attention.py` writes the SVG.

Colors are read on light and on dark backgrounds.
"""
from pathlib import Path
from typing import List

ROWS, COLS, WINDOW, PAD, CELL = 12, 20, 4, 2, 20  # tokens, and pixels a token
QUERY = 5, 6  # row and column
LANDMARKS = 6
GREY, BLUE, ORANGE, GREEN = '#8a8f98', '#3b82f6', '#f59e0b', '#10b981'


def square(x: float, y: float, fill: str, opacity: float) -> str:
    """Return one token."""
    return (f'<rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="3" fill="{fill}"'
            f' fill-opacity="{opacity}"/>')


def text(x: float, y: float, words: str, color: str, anchor: str = 'start') -> str:
    """Return a line of text."""
    return f'<text x="{x}" y="{y}" fill="{color}" text-anchor="{anchor}">{words}</text>'


def draw() -> str:
    """Return the picture as SVG."""
    parts: List[str] = []
    top, left = QUERY[0] // WINDOW * WINDOW, QUERY[1] // WINDOW * WINDOW
    for row in range(ROWS):
        for col in range(COLS):
            fill, opacity = GREY, .25
            if top - PAD <= row < top + WINDOW + PAD and left - PAD <= col < left + WINDOW + PAD:
                fill, opacity = BLUE, .35
            if top <= row < top + WINDOW and left <= col < left + WINDOW:
                fill, opacity = BLUE, .75
            if (row, col) == QUERY:
                fill, opacity = ORANGE, 1.
            parts.append(square(col * CELL, row * CELL, fill, opacity))
    right = COLS * CELL
    for i in range(LANDMARKS):
        y = (ROWS / 2 - LANDMARKS / 2 + i) * CELL
        parts.append(square(right + 110, y, GREEN, .9))
        parts.append(
            f'<path d="M {right + 8} {(i + .5) * ROWS * CELL / LANDMARKS} C {right + 60} '
            f'{(i + .5) * ROWS * CELL / LANDMARKS}, {right + 60} {y + CELL / 2}, {right + 106} {y + CELL / 2}"'
            f' fill="none" stroke="{GREEN}" stroke-width="1.5" stroke-opacity=".7"/>')
    below = ROWS * CELL + 24
    parts += [
        text(0, below, 'token', ORANGE), text(52, below, 'its window', BLUE),
        text(140, below, 'and the halo around it', BLUE),
        text(right + 190, below, 'landmarks, distilled from the whole image', GREEN, 'end'),
    ]
    width, height = right + 190, below + 8
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' font-family="sans-serif" font-size="14">\n' + '\n'.join(parts) + '\n</svg>\n')


if __name__ == '__main__':
    Path(__file__).with_name('attention.svg').write_text(draw())
