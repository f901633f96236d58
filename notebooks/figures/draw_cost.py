"""Draw the README's chart of time and memory against image side, from what the benchmark measured.

    python -m timm_ls.benchmark vil_ls_small_hires swin_tiny_patch4_window7_224 vit_small_patch16_224 \
        --img-size 224 448 896 1344 1792 --allocator tuned --json notebooks/figures/cost.json
    python notebooks/figures/draw_cost.py

Colors are read on light and on dark backgrounds.
"""
import json
from pathlib import Path

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
GREY = '#8a8f98'
MODELS = {
    'vil_ls_small_hires': ('ViL-LS small', '#3b82f6'),
    'swin_tiny_patch4_window7_224': ('Swin-T', '#f59e0b'),
    'vit_small_patch16_224': ('ViT-S/16, full attention', '#ef4444'),
}
PANELS = {  # of a cell of the report, in the unit of the title
    'seconds per image': lambda cell: 1 / cell['images_per_s'],
    'peak memory, GiB': lambda cell: cell['peak_bytes'] / 2 ** 30,
}


def draw() -> None:
    """Write the picture as SVG."""
    cells = json.loads((HERE / 'cost.json').read_text())['cells']
    plt.rcParams.update({
        'svg.hashsalt': 'cost', 'text.color': GREY, 'axes.edgecolor': GREY, 'axes.labelcolor': GREY,
        'xtick.color': GREY, 'ytick.color': GREY, 'font.size': 11})
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3), layout='constrained')
    for axis, (title, value) in zip(axes, PANELS.items()):
        for model, (label, color) in MODELS.items():
            line = sorted((cell['height'], value(cell)) for cell in cells if cell['model'] == model)
            axis.plot(*zip(*line), 'o-', color=color, label=label)
        axis.set(xlabel='image side, pixels', title=title, xticks=sorted({cell['height'] for cell in cells}), ylim=0)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(HERE / 'cost.svg', transparent=True, metadata={'Date': None})


if __name__ == '__main__':
    draw()
