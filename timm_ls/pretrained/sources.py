"""Where `pretrained=True` finds its weights: the one place that turns a pretrained config into a local file.

A source that the caller names (`file`, `hf_hub_id` or `url` in `pretrained_cfg` or `pretrained_cfg_overlay`,
`hf-hub:` or `local-dir:` in the model name) is the only one that is used. Otherwise `catalogue.json` says where the
weights are published, and these are tried in turn:

1. the file shipped in this package (test models),
2. what an earlier run downloaded from the authors and converted to safetensors,
3. the Hub repository, if there is one: `model.safetensors` only, never a pickle,
4. the authors' file, downloaded once to the torch hub cache, read without running any code, checked, converted.

Nothing here touches the network unless pretrained weights are asked for.
"""
import hashlib
import json
import logging
import os
import warnings
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, TypeVar, Union
from urllib.parse import urlsplit

import filelock
import torch
import torch.nn as nn
from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, create_model, resolve_pretrained_cfg

from .._compat import http_get
from ..pyramid_transformer import grid_size
from .checkpoint import check_state_dict, read_checkpoint, unwrap_state_dict

__all__ = ['build_model', 'catalogue', 'convert_checkpoint', 'published_sources', 'structure_digest']

_logger = logging.getLogger(__name__)

ModelT = TypeVar('ModelT', bound=nn.Module)
FilterFn = Callable[[Dict[str, Any], nn.Module], Dict[str, torch.Tensor]]

PACKAGE_DIR = Path(__file__).parent
SHIPPED_DIR = PACKAGE_DIR / 'shipped_weights'


@cache
def catalogue() -> Dict[str, Dict[str, Any]]:
    """What is known of every published weight, by `architecture.tag`; `weights/README.md` explains the fields."""
    return json.loads((PACKAGE_DIR / 'catalogue.json').read_text(encoding='utf-8'))


def published_sources(name: str) -> Dict[str, Any]:
    """Fields of a timm config that say where the weights `name`, an `architecture.tag`, are published.

    The URL comes with a file name of its own: all of the authors' files have the same, by which timm would cache.
    """
    entry = catalogue().get(name, {})
    sources: Dict[str, Any] = {}
    if entry.get('file'):
        sources['file'] = str(SHIPPED_DIR / entry['file'])
    if entry.get('hf_hub_id'):
        revision = entry.get('hf_hub_revision')
        sources['hf_hub_id'] = entry['hf_hub_id'] + (f'@{revision}' if revision else '')
    if entry.get('url'):
        sources['url'] = (entry['url'], f'{name}.pth')
    return sources


def build_model(
        model_cls: Callable[..., ModelT],
        variant: str,
        pretrained: bool,
        pretrained_filter_fn: FilterFn,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Optional[Union[str, Path]] = None,
        **kwargs: Any,
) -> ModelT:
    """timm's `build_model_with_cfg`, with pretrained weights found and checked here.

    Args:
        model_cls: Model class.
        variant: Name of the entrypoint.
        pretrained: Load weights.
        pretrained_filter_fn: The family's `checkpoint_filter_fn`.
        pretrained_cfg: Tag or config, as timm passes it.
        pretrained_cfg_overlay: Fields that replace those of the config.
        cache_dir: Where to keep downloads, instead of the caches of torch hub and the Hugging Face hub.
        kwargs: For `build_model_with_cfg` and the model.

    Raises:
        FileNotFoundError: The file named by the config does not exist.
        RuntimeError: No source has the weights, they are damaged, or they belong to another architecture.
        ValueError: An argument is out of range; the message names it.
    """
    if 'img_size' in kwargs:  # timm knows Python's integers only, and keeps it
        kwargs['img_size'] = grid_size(kwargs['img_size'], 1)
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
        path = find_weights(variant, cfg, pretrained_filter_fn, cache_dir)
        if path is not None:
            pretrained_cfg_overlay = dict(pretrained_cfg_overlay or {}, file=str(path), source=None)
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=partial(filter_and_check, pretrained_filter_fn),
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        **kwargs,
    )


def find_weights(
        variant: str,
        cfg: Dict[str, Any],
        filter_fn: FilterFn,
        cache_dir: Optional[Union[str, Path]] = None,
) -> Optional[Path]:
    """Find the file with the weights of a resolved pretrained config, downloading and converting it if need be.

    Returns:
        A local file, or None where timm needs no help: a `state_dict`, `local-dir:`, or no source at all.

    Raises:
        FileNotFoundError: The file named by the config does not exist.
        RuntimeError: No source has them, or what it has is damaged; the message lists what was tried.
    """
    source = cfg.get('source')
    if source == 'hf-hub':
        return from_hub(cfg['hf_hub_id'], cfg.get('hf_hub_filename'), cache_dir=cache_dir)
    if source == 'local-dir' or cfg.get('state_dict'):
        return None
    name = '.'.join(filter(None, (variant, cfg.get('tag'))))
    published = published_sources(name)
    sources = {key: cfg[key] for key in ('file', 'hf_hub_id', 'url') if cfg.get(key)}
    entry = catalogue().get(name, {})
    named = [key for key in sources if as_tuple(sources[key]) != as_tuple(published.get(key))]
    if named:  # by the caller, in timm's order: no other weights will do
        sources, entry = {named[0]: sources[named[0]]}, {}
    if 'file' in named:
        if not cfg.get('custom_load'):
            unwrap_state_dict(read_checkpoint(sources['file']))  # raises a readable error, which timm does not
        return None

    attempts: List[Tuple[str, Callable[[], Path]]] = []
    if 'file' in sources:
        attempts.append((sources['file'], partial(from_package, Path(sources['file']), entry)))
    if 'url' in sources:
        original, converted = cached_files(name, sources['url'], cache_dir)
        if is_intact(converted, entry):
            return converted
    if 'hf_hub_id' in sources:
        hub_id = sources['hf_hub_id']
        attempts.append((
            f'the Hub repository {hub_id}', partial(from_hub, hub_id, cfg.get('hf_hub_filename'), entry, cache_dir)))
    if 'url' in sources:
        url = as_tuple(sources['url'])[0]
        # the model that a file of the caller's is for may have other options: it sees the file itself, as with `file`
        convert = copy_weights if named else partial(convert_checkpoint, variant=variant, cfg=cfg, filter_fn=filter_fn)
        attempts.append((url, partial(from_url, url, original, converted, convert, entry)))
    return first_that_works(name, attempts) if attempts else None


def first_that_works(name: str, attempts: Sequence[Tuple[str, Callable[[], Path]]]) -> Path:
    """What the first of labelled attempts to get weights returns that does not fail.

    Raises:
        RuntimeError: All of them failed; the message lists how.
    """
    failures = []
    for label, attempt in attempts:
        try:
            return attempt()
        except Exception as error:  # every source fails in its own ways, and the next one may work
            failures.append((label, error))
            _logger.warning(f'No pretrained weights for {name} from {label}: {error}')
    raise RuntimeError(
        f'Could not get the pretrained weights {name}. Tried:\n'
        + '\n'.join(f'- {label}: {type(error).__name__}: {error}' for label, error in failures)
        + '\nTry again with a network connection and room in the cache (TORCH_HOME, HF_HOME and cache_dir move it), or'
        + " pass a file that you have: pretrained_cfg_overlay=dict(file='...').") from failures[-1][1]


def as_tuple(source: Any) -> Tuple[Any, ...]:
    """A source as timm allows it, a string or a pair of URL and file name, as a tuple."""
    return tuple(source) if isinstance(source, (list, tuple)) else (source,)


def from_package(path: Path, entry: Mapping[str, Any]) -> Path:
    """The shipped file, checked."""
    if not is_intact(path, entry):
        raise RuntimeError('The file is part of this package, but missing or damaged: reinstall timm-ls.')
    return path


def from_hub(
        hub_id: str,
        filename: Optional[str] = None,
        entry: Optional[Mapping[str, Any]] = None,
        cache_dir: Optional[Union[str, Path]] = None,
) -> Path:
    """Get a safetensors file from a Hub repository, or from its local cache.

    Args:
        hub_id: `owner/name`, or `owner/name@revision`.
        filename: File in the repository, `model.safetensors` if None.
        entry: Its entry in the catalogue, for the checksum.
        cache_dir: Instead of the Hub client's cache.
    """
    filename = filename or 'model.safetensors'
    if not filename.endswith('.safetensors'):
        raise RuntimeError(f'{filename!r} is not safetensors, the only format that is read from a hub.')
    repo_id, _, revision = hub_id.partition('@')
    download = partial(
        hf_hub_download, repo_id, filename, revision=revision or None, cache_dir=cache_dir, library_name='timm-ls')
    try:
        path = Path(download())
        if not is_intact(path, entry):
            path = Path(download(force_download=True))  # damaged on the way or since
    except LocalEntryNotFoundError as error:  # has no network, or is told not to use it
        raise RuntimeError(f'{filename} is not in the local cache and the hub is out of reach: {error}') from error
    except EntryNotFoundError as error:
        raise RuntimeError(
            f'The repository {hub_id} has no {filename}. Pickles are not read from a hub: convert the weights'
            f' to safetensors, or download the file and pass pretrained_cfg_overlay=dict(file=...).') from error
    except Exception as error:
        raise RuntimeError(f'Could not download {filename} from {hub_id}: {error}') from error
    if not is_intact(path, entry):
        raise RuntimeError(f'{filename} of {hub_id} is damaged, or not the file that the catalogue describes.')
    return path


def cached_files(name: str, url: Any, cache_dir: Optional[Union[str, Path]] = None) -> Tuple[Path, Path]:
    """Where the file at `url` and its conversion are kept: under names that no other weights and no other URL have."""
    url, *_ = as_tuple(url)
    directory = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
    stem = f'{name}.{hashlib.sha256(url.encode()).hexdigest()[:12]}'
    suffix = '.safetensors' if urlsplit(url).path.endswith('.safetensors') else '.pth'
    return directory / f'{stem}.original{suffix}', directory / f'{stem}.safetensors'


def from_url(
        url: str,
        original: Path,
        converted: Path,
        convert: Callable[[Dict[str, Any]], Dict[str, torch.Tensor]],
        entry: Mapping[str, Any],
) -> Path:
    """Download a checkpoint and convert it, unless another process does so meanwhile.

    Both files appear under their names only when they are complete.
    """
    try:
        converted.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f'{converted}.lock')
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            _logger.warning(f'Another process holds {lock.lock_file}: waiting for it to provide {converted.name}.')
            lock.acquire()
    except OSError as error:
        raise RuntimeError(
            f'Could not write to {converted.parent}: {error}. Set TORCH_HOME or cache_dir to a folder with'
            ' room for the weights.') from error
    try:
        if is_intact(converted, entry):
            return converted
        if not original.is_file():
            download(url, original)
        expected = entry.get('url_sha256')
        try:
            if expected and file_sha256(original) != expected:
                raise RuntimeError(
                    f'The checksum of {url} is {file_sha256(original)}, expected {expected}: it was damaged on the way'
                    ' or replaced.')
            weights = convert(read_checkpoint(original))
        except Exception:
            original.unlink(missing_ok=True)  # else every later run would fail on it
            raise
        with whole_file(converted) as temporary:
            save_file(weights, temporary, {'format': 'pt'})
        if not is_intact(converted, entry):
            converted.unlink(missing_ok=True)
            raise RuntimeError(f'The conversion of {url} is not the file that the catalogue describes.')
        return converted
    finally:
        lock.release()


def download(url: str, path: Path) -> None:
    """Download a file as a whole, with a progress bar; a connection that breaks is taken up again."""
    if hub_constants.HF_HUB_OFFLINE:
        raise RuntimeError(f'{path.name} is not in {path.parent}, and HF_HUB_OFFLINE forbids downloading it.')
    _logger.info(f'Downloading {url} to {path}')
    with whole_file(path) as temporary:
        try:
            with open(temporary, 'wb') as file:
                http_get(url, file, displayed_filename=path.name)
        except Exception as error:
            raise RuntimeError(f'The download to {path.parent} failed: {type(error).__name__}: {error}') from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the path that this yields, and the file appears at `path` when it is complete, or not at all.

    The caller holds a lock, so that what a killed process left at the temporary path can be overwritten.
    """
    temporary = path.with_name(f'{path.name}.partial')
    try:
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_intact(path: Path, entry: Optional[Mapping[str, Any]] = None) -> bool:
    """Whether there is a complete safetensors file at `path`, the one that the catalogue describes if it does."""
    try:
        with safe_open(path, framework='pt') as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except Exception:  # missing, unreadable, cut short, not safetensors
        return False
    entry = entry or {}
    if entry.get('structure') and structure_digest(shapes) != entry['structure']:
        return False
    return not entry.get('sha256') or file_sha256(path) == entry['sha256']


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def structure_digest(weights: Mapping[str, Any]) -> str:
    """SHA-256 of the names and shapes of tensors, or of shapes by name, whatever their order."""
    shapes = sorted((name, list(getattr(value, 'shape', value))) for name, value in weights.items())
    return hashlib.sha256(json.dumps(shapes, separators=(',', ':')).encode()).hexdigest()


def convert_checkpoint(
        checkpoint: Dict[str, Any],
        variant: str,
        cfg: Mapping[str, Any],
        filter_fn: FilterFn,
) -> Dict[str, torch.Tensor]:
    """Convert what a checkpoint file holds to the names of `variant`, and check that it is all there and nothing else.

    Raises:
        RuntimeError: It belongs to another architecture; the message names the first differences.
    """
    reference = create_model(variant, device='meta', num_classes=cfg['num_classes'], in_chans=cfg['input_size'][0])
    try:
        weights = filter_fn(checkpoint, reference)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f'The checkpoint could not be converted to {variant}: {error}') from error
    check_state_dict(weights, reference)
    expected = reference.state_dict()
    for name, value in weights.items():
        if value.layout != torch.strided or value.is_floating_point() != expected[name].is_floating_point():
            raise RuntimeError(f'{name} is {value.dtype}, {value.layout}: expected dense {expected[name].dtype}.')
    return copy_weights(weights)


def copy_weights(checkpoint: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """The weights in a checkpoint, each in memory of its own, as safetensors wants them."""
    weights = unwrap_state_dict(checkpoint)
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}


def filter_and_check(filter_fn: FilterFn, state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Apply the family's filter, and let nothing but the classifier differ between weights and model.

    timm loads without `strict` where the number of classes differs, and would only log what else does.

    Raises:
        RuntimeError: The weights do not fit; the message names the first differences.
    """
    try:
        weights = filter_fn(state_dict, model)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # timm takes a TypeError for a filter of one argument, and would call it again
        raise RuntimeError(f'The checkpoint could not be converted to {type(model).__name__}: {error}') from error

    cfg: Dict[str, Any] = getattr(model, 'pretrained_cfg')  # noqa: B009 a type checker knows tensors and modules only
    own = model.state_dict()
    classifiers = tuple(f'{name}.' for name in as_tuple(cfg.get('classifier')) if name)
    comparable = {name: value for name, value in weights.items() if not name.startswith(classifiers)}
    comparable.update((name, value) for name, value in own.items() if name.startswith(classifiers))
    for name in as_tuple(cfg.get('first_conv')):
        weight = f'{name}.weight'
        if weight in own and weight in weights:
            shape, given = own[weight].shape, weights[weight].shape
            if shape[:1] + shape[2:] == given[:1] + given[2:]:  # timm adapts it to other channels
                comparable[weight] = own[weight]
    check_state_dict(comparable, model)

    broken = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        warnings.warn(
            f'{len(broken)} of {len(weights)} pretrained tensors hold values that are not finite, so will the outputs:'
            f' {", ".join(broken[:5])}{", ..." if len(broken) > 5 else ""}.', stacklevel=2)
    return weights
