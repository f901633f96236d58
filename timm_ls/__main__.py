"""Command line: look at the pyramid of a photo, list the models, export, measure, run any timm script.

    python -m timm_ls [IMAGE ...] [--model NAME] [--img-size H W] [--device D] [--checkpoint FILE] [--out PICTURE]
    python -m timm_ls COMMAND [ARGS ...]
"""
import argparse
import importlib
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence

import timm
import torch

from .cli import available_device, import_matplotlib, load_model, open_image, picture_file, synchronize
from .complexity import count_macs, count_parameters

__all__ = ['main']

COMMANDS = {
    'models': 'list the models',
    'run': 'run a script with the models registered: run SCRIPT.py [ARGS ...]',
    'export': 'write a model to a file for ONNX Runtime, OpenVINO or torch.export, checked in its engine',
    'benchmark': 'measure speed and memory of models, side by side',
    'gpu_check': 'check and measure the kernels on a GPU',
    'precision': 'compare reduced precision with float64',
}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line; `argv` defaults to that of the process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ['run']:
        run_script(argv[1:])
        return
    try:
        if argv[:1] == ['models']:
            list_models(argv[1:])
        elif argv and argv[0] in COMMANDS:
            importlib.import_module(f'timm_ls.{argv[0]}').main(argv[1:])
        else:
            show_pyramid(argv)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells report it


def run_script(argv: List[str]) -> None:
    """Run a Python script as `python SCRIPT.py ARGS...` would, our models registered with timm."""
    if not argv or not Path(argv[0]).is_file():
        raise SystemExit(
            'Usage: python -m timm_ls run SCRIPT.py [ARGS ...], with the path of an existing script, for example'
            f' timm\'s validate.py; got {argv[0] if argv else "nothing"}.')
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    runpy.run_path(argv[0], run_name='__main__')


def list_models(argv: Sequence[str]) -> None:
    """Print a table of all models: parameters, multiply-adds at native size, window."""
    argparse.ArgumentParser(
        prog='python -m timm_ls models', description='List the models, as a table in Markdown.').parse_args(argv)
    print('| model | parameters | GMACs | at | window | attention |')
    print('|---|---|---|---|---|---|')
    for name in timm_ls_models():
        model: Any = timm.create_model(name, device='meta')
        size = model.pretrained_cfg['input_size'][-1]
        windows = {m.window_size for m in model.modules() if hasattr(m, 'window_size')}
        print(
            f'| `{name}` | {count_parameters(model):,} | {count_macs(model, size) / 1e9:.2f} | {size}'
            f' | {"/".join(map(str, sorted(windows)))} | {" ".join(model.attn_types)} |')


def timm_ls_models() -> List[str]:
    """Names of the models that this package registers, without those that only tests need."""
    return [name for family in ('vil_ls', 'cvt_ls') for name in timm.list_models(f'{family}*', module=family)]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the arguments of `show_pyramid`, before any work."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_ls',
        description='Run a model on photos: top-5 classes, the feature pyramid as a table and as a picture.',
        epilog='\n'.join(['commands, each with a --help of its own (python -m timm_ls COMMAND --help):', *(
            f'  {name:10} {what}' for name, what in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='*', metavar='IMAGE', help='photos (default: a sample photo)')
    parser.add_argument('--model', default='vil_ls_medium', help='model name (default: %(default)s)')
    parser.add_argument('--img-size', nargs='+', type=int, metavar='PIXELS',
                        help='side, or height and width, after the images (default: the native size of the model)')
    parser.add_argument('--device', default='cpu', type=available_device, help='torch device (default: %(default)s)')
    parser.add_argument('--checkpoint', metavar='FILE', help="weights: the authors' .pth, our own, or safetensors")
    parser.add_argument('--pretrained', action='store_true', help='load the published weights of the model')
    parser.add_argument(
        '--out', default='pyramid.png', type=picture_file, metavar='PICTURE',
        help='picture to write (default: %(default)s)')
    args = parser.parse_args(argv)
    for path in args.images:
        if not Path(path).is_file():
            parser.error(f'{path!r} is neither a photo, there is no such file, nor a command: {", ".join(COMMANDS)}')
    if not timm.is_model(args.model.split('.')[0]):
        parser.error(f'unknown model {args.model!r}; ours: {", ".join(timm_ls_models())}')
    if args.img_size is not None and (len(args.img_size) > 2 or min(args.img_size) < 1):
        parser.error(f'--img-size takes a side or a height and a width in pixels, got {args.img_size}')
    import_matplotlib()
    return args


def show_pyramid(argv: Sequence[str]) -> None:
    """Classify images, print each level of the pyramid, and draw it."""
    args = parse_arguments(argv)
    images = [(path, open_image(path)) for path in args.images or [sample_photo()]]
    device = torch.device(args.device)
    model = load_model(args.model, args.pretrained, args.checkpoint).to(device)
    has_weights = bool(args.checkpoint or args.pretrained)

    config = timm.data.resolve_data_config(model=model)
    if args.img_size is not None:
        height, width = args.img_size[0], args.img_size[-1]
        config.update(input_size=(config['input_size'][0], height, width), crop_pct=1.)
    transform = timm.data.create_transform(**config)

    rows = []
    for path, picture in images:
        x = transform(picture).unsqueeze(0).to(device)
        with torch.inference_mode():
            try:
                model(x)  # first runs allocate and choose kernels
            except (ValueError, AssertionError, RuntimeError) as error:  # each of timm's families raises its own
                raise SystemExit(f'{args.model} at {x.shape[2]} x {x.shape[3]} pixels: {error}') from error
            synchronize(device)
            start = time.perf_counter()
            features, levels = model.forward_intermediates(x)
            logits = model.forward_head(features)
            synchronize(device)
        seconds = time.perf_counter() - start
        print(f'{path}: {picture.width} x {picture.height} pixels, seen by {args.model}'
              f' at {x.shape[3]} x {x.shape[2]}, {seconds * 1000:.0f} ms on {device}')
        print_classes(logits[0], has_weights)
        for info, level in zip(model.feature_info, levels):
            print(f'  {info["module"]}: stride {info["reduction"]:2d}, {list(level.shape)}')
        mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
        rows.append((path, (x[0].cpu() * std + mean).clamp(0, 1), [level[0].float().cpu() for level in levels]))
    draw(rows, args.model, [info['reduction'] for info in model.feature_info], has_weights, args.out)
    print(f'Pyramid drawn to {args.out}')


def sample_photo() -> str:
    """A photo to start with: the portrait of Grace Hopper that matplotlib ships."""
    return str(Path(import_matplotlib().get_data_path()) / 'sample_data' / 'grace_hopper.jpg')


def print_classes(logits: torch.Tensor, has_weights: bool) -> None:
    """Print the five most probable classes, or that there are no weights to tell them."""
    if not has_weights:
        print('  No weights loaded (--pretrained or --checkpoint FILE): random features, no classes to tell.')
        return
    describe: Callable[[int], str] = str
    if logits.numel() == 1000:
        describe = timm.data.ImageNetInfo().index_to_description
    for probability, index in zip(*logits.softmax(-1).topk(min(5, logits.numel()))):
        print(f'  {probability.item():6.1%}  {describe(index.item())}')


def principal_colors(level: torch.Tensor) -> torch.Tensor:
    """The three main directions of a map [C, H, W] as colors [H, W, 3] in 0..1."""
    pixels = level.flatten(1).T
    pixels = pixels - pixels.mean(0)
    components = min(3, *pixels.shape)
    u, s, _ = torch.linalg.svd(pixels, full_matrices=False)
    colors = torch.zeros(pixels.shape[0], 3)
    colors[:, :components] = u[:, :components] * s[:components]
    low, high = colors.quantile(torch.tensor([.02, .98]), dim=0)
    colors = (colors - low) / (high - low).clamp(min=1e-6)
    return colors.clamp(0, 1).reshape(*level.shape[1:], 3)


def draw(rows: list, name: str, reductions: List[int], has_weights: bool, out: str) -> None:
    """Draw each image beside its levels, at the same size, colored by their three principal components."""
    matplotlib = import_matplotlib()
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = 1 + len(reductions)
    height, width = rows[0][1].shape[1:]
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.9 * columns, .4 + (.6 + 2.9 * height / width) * len(rows)),
        squeeze=False, layout=ConstrainedLayoutEngine(h_pad=.1))  # inches between the titles
    for axis_row, (path, picture, levels) in zip(axes, rows):
        axis_row[0].imshow(picture.permute(1, 2, 0))
        file = Path(path).name
        file = file if len(file) <= 30 else f'{file[:14]}…{file[-14:]}'  # as wide as the panel
        axis_row[0].set_title(f'{file}\n{picture.shape[2]} × {picture.shape[1]} pixels', fontsize=11)
        for axis, level, reduction in zip(axis_row[1:], levels, reductions):
            axis.imshow(principal_colors(level), interpolation='nearest', extent=(0, width, height, 0))
            C, H, W = level.shape
            axis.set_title(f'stride {reduction}\n{W} × {H} tokens, {C} channels', fontsize=11)
    for axis in axes.flat:
        axis.set_axis_off()
    weights = '' if has_weights else ' (random weights)'
    figure.suptitle(f'Feature pyramid of {name}{weights}: similar colors, similar features', fontsize=13)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == '__main__':
    main()
