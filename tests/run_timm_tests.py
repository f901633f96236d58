"""Run timm's own tests on our models: python tests/run_timm_tests.py [PYTEST ARGUMENTS ...]

Downloads timm's source distribution, of the version that is installed, for the tests in it; none of them is in this
repository. Its per-model tests then run for our models in place of timm's: those that ask the registry for names, and
those with a fixed list of names that hold for any pyramid.

Two of the tests load pretrained weights, which `create_model(pretrained=True)` downloads. Without a network,
`--stand-in-weights` puts random ones into a download cache of its own, from where they are loaded the same way.
"""
import argparse
import collections
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm
import timm.models
from safetensors.torch import save_file

import timm_ls  # noqa: F401 registers the models
from timm_ls.pretrained.sources import cached_files, catalogue

FILES = ('test_models.py', 'test_model_input.py')

# Tests with a list of names of their own, to which ours do not belong by name but by kind; other arguments as given
FIXED_LISTS = {
    'test_reset_classifier_keeps_pool': {},
    'test_features_only_grad_checkpointing_backward': {},
    'test_features_only_feature_cls_class': {},
    'test_pruned_features_torchscript': {},
    'test_feature_getter_stage_ends_torchscript': {},
    'test_forward_after_prune_intermediate_layers': {},
    'test_prune_intermediate_layers_params_used': {},
    'test_prune_intermediate_layers_last_feature': dict(stop_early_final=True),
    'test_forward_intermediates_stop_early_final_norm': dict(model_kwargs={}),
    'test_head_hidden_size': dict(model_kwargs={}),
    'test_model_init_weights_after_to_empty': dict(kwargs={}),
    'test_headless_checkpoint_reload': dict(kwargs={}),
    'test_relpos_non_square_checkpoint_reload': dict(kwargs={}),
    'test_relpos_non_square_set_input_size': dict(kwargs={}),
    'test_relpos_family_set_input_size': dict(kwargs={}, img_size=224, new_size=256),
    'test_export_tracks_reset_pool_in_head': dict(num_classes=3, pool='max'),
    'test_export_tracks_reset_classifier_structure': dict(kwargs={}, pool='max', reload_naflex=None),
}
# Tests that do not apply, and why
NOT_OURS = {
    'test_model_inference':
        "compares ImageNet classifiers called test_* with tensors in timm's own repositories on the hub, and wants an"
        ' owl to be class 24; ours of that name know ten digits',
    'test_forward_after_prune_intermediate_layers':
        'for models without a final norm, of a fixed list: wants the unnormed last level to equal the normed features'
        " (timm's nextvit, focalnet, coatnet, nest, swiftformer and resnetv2 fail there as well)",
}


def our_entrypoints() -> dict:
    """Name to entrypoint of the models that this package registers."""
    entrypoints = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
    return {name: function for name, function in entrypoints.items() if function.__module__.startswith('timm_ls.')}


class OurModels:
    """Pytest plugin: the per-model tests, on our models only."""

    def __init__(self):
        self.entrypoints = our_entrypoints()
        self.modules = sorted({function.__module__.rpartition('.')[2] for function in self.entrypoints.values()})
        self.reports = []
        self.left_out = collections.Counter()
        list_models = timm.list_models

        def list_ours(*args, module='', **kwargs):
            names = list_models(*args, module=self.modules if module else '', **kwargs)
            return [name for name in names if self.is_ours(name)]

        timm.list_models = timm.models.list_models = list_ours

    def is_ours(self, name) -> bool:
        """Whether a model name, with or without a tag, is one of ours."""
        return isinstance(name, str) and name.partition('.')[0] in self.entrypoints

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc):
        """Put our names in the place of a fixed list."""
        definition = metafunc.definition
        if definition.name not in FIXED_LISTS:
            return
        arguments = FIXED_LISTS[definition.name]
        definition.own_markers[:] = [
            mark for mark in definition.own_markers
            if mark.name != 'parametrize' or 'model_name' not in mark.args[0]]
        metafunc.parametrize(
            ','.join(['model_name', *arguments]),
            [(name, *arguments.values()) if arguments else name for name in self.entrypoints],
            ids=list(self.entrypoints))

    def pytest_collection_modifyitems(self, config, items):
        """Leave out what is not about a model, or not about one of ours."""
        ours, others = [], []
        for item in items:
            parameters = item.callspec.params if hasattr(item, 'callspec') else {}
            name = parameters.get('model_name')
            wanted = self.is_ours(name)
            if wanted and item.originalname in NOT_OURS:
                self.left_out[item.originalname] += 1
                wanted = False
            if wanted:
                item.user_properties.append(('model', name.partition('.')[0]))
            (ours if wanted else others).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = ours

    def pytest_runtest_logreport(self, report):
        """Keep what happened to each test."""
        if report.when == 'call' or report.outcome != 'passed':
            self.reports.append(report)

    def summary(self) -> str:
        """Counts by outcome: of each test, of each model, of all."""
        def count(key) -> str:
            counts = collections.defaultdict(collections.Counter)
            for report in self.reports:
                counts[key(report)][report.outcome] += 1
            return '\n'.join(
                f'{name}: ' + ', '.join(f'{number} {outcome}' for outcome, number in sorted(outcomes.items()))
                for name, outcomes in sorted(counts.items()))

        skipped = collections.Counter(report.longrepr[2] for report in self.reports if report.outcome == 'skipped')
        models = {dict(report.user_properties)['model'] for report in self.reports}
        outcomes = collections.Counter(report.outcome for report in self.reports)
        return '\n'.join([
            count(lambda report: report.location[2].partition('[')[0]),
            count(lambda report: dict(report.user_properties)['model']),
            *(f'{number} skipped: {reason}' for reason, number in skipped.items()),
            *(f'{number} left out: {name}: {NOT_OURS[name]}' for name, number in self.left_out.items()),
            f'timm {timm.__version__}, {len(models)} of {len(self.entrypoints)} models, {len(self.reports)} tests: '
            + ', '.join(f'{outcomes[outcome]} {outcome}' for outcome in ('passed', 'failed', 'skipped')),
        ])


def download_tests(folder: Path) -> Path:
    """Download timm's source distribution into a folder and unpack its tests there; returns their folder."""
    version = importlib.metadata.version('timm')
    subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
         f'timm=={version}', '--dest', str(folder)],
        check=True)
    archive, = folder.glob('timm-*.tar.gz')
    with tarfile.open(archive) as tar:
        tar.extractall(folder, members=[m for m in tar if m.name.split('/')[1:2] == ['tests']], filter='data')
    return folder / archive.name.removesuffix('.tar.gz') / 'tests'


def make_stand_in_weights(folder: Path) -> None:
    """Make a folder the cache of downloads, with random weights where those that need a network would be."""
    os.environ['TORCH_HOME'] = str(folder)
    for name, entry in catalogue().items():
        if entry['url'] and not entry['file']:
            _, converted = cached_files(name, entry['url'])
            converted.parent.mkdir(parents=True, exist_ok=True)
            save_file(timm.create_model(entry['architecture']).state_dict(), converted, {'format': 'pt'})


def main() -> int:
    """Download, run, print the counts; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0], allow_abbrev=False)
    parser.add_argument(
        '--stand-in-weights', action='store_true', help='random weights in place of those that need a network')
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        tests = download_tests(Path(folder))
        if options.stand_in_weights:
            make_stand_in_weights(Path(folder) / 'torch')
        plugin = OurModels()
        status = pytest.main(
            # of timm's limits, those on time depend on the machine; workers of xdist would test timm's models instead
            ['-q', '-p', 'no:timeout', '-p', 'no:xdist', '-p', 'no:cacheprovider', '-W', 'ignore',
             f'--rootdir={tests.parent}', '-c', '/dev/null', *arguments, *(str(tests / name) for name in FILES)],
            plugins=[plugin])
    print(plugin.summary())
    return int(status)


if __name__ == '__main__':
    sys.exit(main())
