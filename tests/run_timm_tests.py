"""Run timm's own tests on our models: python tests/run_timm_tests.py [PYTEST ARGUMENTS ...]

Downloads timm's source distribution, of the version that is installed, for the tests in it; none of them is in this
repository. Its per-model tests then run for our models in place of timm's: those that ask the registry for names, and
those with a fixed list of names that hold for any pyramid.
"""
import collections
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm
import timm.models

import timm_ls  # noqa: F401 registers the models

FILES = ('test_models.py', 'test_model_input.py')

# Tests with a list of names of their own, to which ours do not belong by name but by kind; other arguments as given
FIXED_LISTS = {
    'test_reset_classifier_keeps_pool': {},
    'test_features_only_grad_checkpointing_backward': {},
    'test_features_only_feature_cls_class': {},
    'test_pruned_features_torchscript': {},
    'test_feature_getter_stage_ends_torchscript': {},
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
# compares with files that timm keeps on its hub beside its own weights
NOT_OURS = ('test_model_inference',)


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
            wanted = self.is_ours(parameters.get('model_name')) and item.originalname not in NOT_OURS
            (ours if wanted else others).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = ours

    def pytest_runtest_logreport(self, report):
        """Keep what happened to each test."""
        if report.when == 'call' or report.outcome != 'passed':
            self.reports.append(report)

    def summary(self) -> str:
        """Counts by outcome, and by test."""
        lines = []
        by_test = collections.defaultdict(collections.Counter)
        for report in self.reports:
            by_test[report.location[2].partition('[')[0]][report.outcome] += 1
        for name, outcomes in sorted(by_test.items()):
            lines.append(f'{name}: ' + ', '.join(f'{count} {outcome}' for outcome, count in sorted(outcomes.items())))
        skipped = collections.Counter(report.longrepr[2] for report in self.reports if report.outcome == 'skipped')
        lines.extend(f'{count} skipped: {reason}' for reason, count in skipped.items())
        outcomes = collections.Counter(report.outcome for report in self.reports)
        lines.append(
            f'timm {timm.__version__}, {len(self.entrypoints)} models, {len(self.reports)} tests: '
            + ', '.join(f'{outcomes[outcome]} {outcome}' for outcome in ('passed', 'failed', 'skipped')))
        return '\n'.join(lines)


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


def main() -> int:
    """Download, run, print the counts; returns pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        tests = download_tests(Path(folder))
        plugin = OurModels()
        status = pytest.main(
            # of timm's limits, those on time depend on the machine
            ['-q', '-p', 'no:timeout', '-p', 'no:cacheprovider', '-W', 'ignore', f'--rootdir={tests.parent}',
             '-c', '/dev/null', *sys.argv[1:], *(str(tests / name) for name in FILES)],
            plugins=[plugin])
    print(plugin.summary())
    return int(status)


if __name__ == '__main__':
    sys.exit(main())
