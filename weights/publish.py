"""Publish a folder made by `convert.py` on the Hub. A dry run unless `--upload` is given.

    python weights/publish.py vil_ls_medium.ls_in1k --folder vil_ls_medium.ls_in1k --repo OWNER/vil_ls_medium.ls_in1k
    HF_TOKEN=... python weights/publish.py ... --upload

Put the repository and the revision that the upload prints into `catalogue.json`, as `hf_hub_id` and
`hf_hub_revision`: from then on `pretrained=True` uses that revision.
"""
import argparse
import json
import os
from pathlib import Path
from typing import Dict

from huggingface_hub import HfApi

from timm_ls.pretrained.sources import catalogue, file_sha256, is_intact

FILES = ('README.md', 'config.json', 'model.safetensors')


def check_folder(name: str, folder: Path) -> Dict[str, int]:
    """Sizes of the files to upload, by name.

    Raises:
        SystemExit: The folder is not a complete conversion of the weights `name`.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found != set(FILES):
        raise SystemExit(f'{folder} has {sorted(found)}: expected exactly {sorted(FILES)}, as convert.py writes them.')
    if not is_intact(folder / 'model.safetensors', catalogue()[name]):
        raise SystemExit(f'{folder / "model.safetensors"} is not what the catalogue describes for {name}.')
    return {file: (folder / file).stat().st_size for file in FILES}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=sorted(catalogue()))
    parser.add_argument('--folder', type=Path, required=True)
    parser.add_argument('--repo', required=True, help='owner/name on the Hub')
    parser.add_argument('--public', action='store_true', help='create the repository public instead of private')
    parser.add_argument('--upload', action='store_true', help='do it; without this, only say what would be done')
    args = parser.parse_args()

    plan = {
        'repository': args.repo,
        'visibility if created': 'public' if args.public else 'private',
        'files': check_folder(args.name, args.folder),
        'sha256': file_sha256(args.folder / 'model.safetensors'),
    }
    if not args.upload:
        print(json.dumps({'dry run': plan}, indent=2))
        return
    token = os.environ.get('HF_TOKEN')
    if not token:
        raise SystemExit('HF_TOKEN is not set: give a token that may write to the repository, in the environment only.')
    api = HfApi(token=token)
    api.create_repo(args.repo, private=not args.public, exist_ok=True)
    commit = api.upload_folder(
        repo_id=args.repo, folder_path=args.folder, allow_patterns=list(FILES), commit_message=f'Add {args.name}')
    print(json.dumps({**plan, 'hf_hub_id': args.repo, 'hf_hub_revision': commit.oid}, indent=2))


if __name__ == '__main__':
    main()
