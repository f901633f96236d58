"""Turn an original checkpoint into a folder that can be published on the Hub.

    python weights/convert.py vil_ls_medium.ls_in1k --checkpoint model_best.pth --output vil_ls_medium.ls_in1k

The folder gets `model.safetensors`, the same bytes that `pretrained=True` makes of that checkpoint, `config.json`,
which timm (`local-dir:`, `hf-hub:`) and transformers read, and the model card. Put the SHA-256 that this prints into
`catalogue.json` once the weights have been evaluated.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, Optional

import timm
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from timm.models import model_entrypoint, save_for_hf

from timm_ls.pretrained.checkpoint import read_checkpoint
from timm_ls.pretrained.sources import catalogue, convert_checkpoint, file_sha256, find_weights, structure_digest

TEMPLATE = Path(__file__).with_name('model_card.md')


def convert(name: str, output: Path, checkpoint: Optional[Path] = None) -> str:
    """Write the folder.

    Args:
        name: `architecture.tag`, as in the catalogue.
        output: Folder to write to.
        checkpoint: Original file, downloaded if None.

    Returns:
        SHA-256 of the safetensors file.

    Raises:
        RuntimeError: The checkpoint is not what the catalogue says.
    """
    entry = catalogue()[name]
    cfg = timm.get_pretrained_cfg(name).to_dict()
    filter_fn = sys.modules[model_entrypoint(entry['architecture']).__module__].checkpoint_filter_fn
    if checkpoint is None:
        checkpoint = find_weights(entry['architecture'], cfg, filter_fn)
    weights = convert_checkpoint(read_checkpoint(checkpoint), entry['architecture'], cfg, filter_fn)
    if structure_digest(weights) != entry['structure']:
        raise RuntimeError(f'The tensors of {checkpoint} are not those that the catalogue describes for {name}.')

    output.mkdir(parents=True, exist_ok=True)
    model = timm.create_model(name, pretrained=False)
    model.load_state_dict(weights)
    save_for_hf(model, str(output), safe_serialization=True)
    path = output / 'model.safetensors'
    save_file(weights, path, {'format': 'pt'})  # transformers asks for the format
    write_config(output / 'config.json')
    sha256 = file_sha256(path)
    write_card(output / 'README.md', name, entry, sha256)

    loaded = timm.create_model(f'local-dir:{output}', pretrained=True)
    for key, value in load_file(path).items():
        if not torch.equal(loaded.state_dict()[key], value):
            raise RuntimeError(f'{key} is not the same after loading {output}.')
    return sha256


def write_config(path: Path) -> None:
    """Drop what transformers would pass twice from timm's config: the number of classes is at the top level already."""
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def write_card(path: Path, name: str, entry: Dict[str, Any], sha256: str) -> None:
    """Render the model card."""
    data = ModelCardData(
        license=entry['license'],
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', 'image-classification', 'long-short-transformer'],
        datasets=[entry['dataset']] if entry['dataset'] == 'imagenet-1k' else None,
    )
    ModelCard.from_template(data, template_path=str(TEMPLATE), name=name, entry=entry, sha256=sha256).save(path)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=sorted(catalogue()))
    parser.add_argument('--checkpoint', type=Path, help="the authors' file (default: download it, or what ships)")
    parser.add_argument('--output', type=Path, required=True)
    args = parser.parse_args()
    print(json.dumps({'name': args.name, 'folder': str(args.output),
                      'sha256': convert(args.name, args.output, args.checkpoint)}))


if __name__ == '__main__':
    main()
