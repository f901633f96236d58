"""The recipes for sequences: ListOps is what its grammar says, models learn, baselines are what they are called."""
import importlib
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from paths import RECIPES


@pytest.fixture
def recipe(request, monkeypatch):
    """The module of a recipe, on one thread."""
    monkeypatch.syspath_prepend(RECIPES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module(request.param)
    torch.set_num_threads(threads)


def work_out(words):
    """The value of an expression, its deepest nesting, and how many arguments each operation has."""
    stack, deepest, numbers = [], 0, []
    for word in words:
        if word != ']':
            stack.append(int(word) if word.isdigit() else word)
            deepest = max(deepest, sum(isinstance(entry, str) for entry in stack))
            continue
        operation = max(i for i, entry in enumerate(stack) if isinstance(entry, str))
        arguments = stack[operation + 1:]
        numbers.append(len(arguments))
        stack[operation:] = [{
            '[MIN': min(arguments), '[MAX': max(arguments), '[MED': int(np.median(arguments)),
            '[SM': sum(arguments) % 10}[stack[operation]]]
    value, = stack
    return value, deepest, numbers


@pytest.mark.parametrize('recipe', ['listops'], indirect=True)
def test_listops_sequences(recipe):
    """Of the lengths asked for, distinct, with the right results, nested and branching as the task says."""
    data = recipe.examples(40)
    assert len({tokens for tokens, _ in data}) == 40
    for tokens, result in data:
        value, deepest, numbers = work_out([recipe.VOCABULARY[token] for token in tokens])
        assert value == result and deepest <= 9 and 500 < len(tokens) < 2000
        assert 2 <= min(numbers) and max(numbers) <= 10
    assert all(10 < len(tokens) < 30 for tokens, _ in recipe.examples(40, 10, 30))
    assert recipe.examples(5, seed=1) != data[:5] == recipe.examples(5)


@pytest.mark.parametrize('recipe', ['listops'], indirect=True)
def test_listops_grammar(recipe):
    """A quarter of the nodes are operations, each as often, with two to ten arguments, each number as often."""
    rng, firsts, numbers = random.Random(0), Counter(), Counter()
    for _ in range(8000):
        tokens = []
        recipe.draw(rng, tokens, 10 ** 9)
        words = [recipe.VOCABULARY[token] for token in tokens]
        firsts[words[0] if words[0].startswith('[') else 'digit'] += 1
        numbers.update(work_out(words)[2][-1:])  # of the outermost operation
    assert abs(firsts['digit'] / 8000 - .75) < .02
    assert all(abs(firsts[operation] / 8000 - .25 / 4) < .012 for operation in ('[MIN', '[MAX', '[MED', '[SM'))
    assert set(numbers) == set(range(2, 11))
    assert all(abs(count / sum(numbers.values()) - 1 / 9) < .03 for count in numbers.values())


@pytest.mark.parametrize('attention', ['long-short', 'full'])
@pytest.mark.parametrize('recipe', ['listops'], indirect=True)
def test_listops_learns(recipe, attention, capsys):
    """Better than the likeliest digit on sequences that it did not see; padding changes nothing."""
    options = '--min-length 5 --max-length 20 --train-examples 4800 --held-out 400 --steps 150 --lr 3e-3'
    model, report = recipe.run(['--attention', attention, *options.split()])
    results = [result for _, result in recipe.examples(400, 5, 20)]  # the test set comes first
    assert report['test'] > max(Counter(results).values()) / 400 + .05
    assert report['history'][-1][1] < report['history'][0][1] and 'step 150: loss' in capsys.readouterr().out
    tokens, mask, _ = next(recipe.batches(recipe.examples(8, 5, 20), 8, random.Random(0)))
    assert not mask.all()
    logits = model.eval()(tokens, mask)
    for row, counts, expected in zip(tokens, mask, logits):
        torch.testing.assert_close(model(row[counts][None], counts[counts][None])[0], expected)


@pytest.mark.parametrize('attention', ['long-short', 'window', 'full'])
@pytest.mark.parametrize('recipe', ['charlm'], indirect=True)
def test_language_model_learns(recipe, attention):
    """Far fewer bits than bytes have; an evaluation over all of the text, by its definition."""
    options = '--dim 32 --depth 1 --window-size 8 --segment-size 4 --length 64 --batch-size 8 --steps 60 --lr 1e-2'
    model, report = recipe.run(['--attention', attention, '--held-out', '1000', *options.split()])
    assert report['test'] < 5 and report['characters'] == 60 * 8 * 64
    tokens = recipe.read_text()[-1000:].long()
    expected = [
        -model.eval()(tokens[None, start:start + 64])[0][0].log_softmax(-1)[range(64), tokens[start + 1:start + 65]]
        for start in range(0, 999 // 64 * 64, 64)]
    assert abs(torch.cat(expected).mean().item() / math.log(2) - report['test']) < 1e-3


@pytest.mark.parametrize('recipe', ['charlm'], indirect=True)
def test_language_models_differ_in_attention_only(recipe):
    """The window alone sees no landmark, full attention sees everything before, none sees what comes."""
    options = '--dim 32 --depth 1 --window-size 8 --segment-size 4 --length 64 --cost-at 64'.split()
    text = recipe.read_text()[None, :64].long()
    changed = text.clone()
    changed[:, 20] = 0
    for attention, far in (('long-short', True), ('window', False), ('full', True)):
        model, report = recipe.run(['--attention', attention, *options])
        assert report['length'] == 64 and report['peak_mib'] > 0
        difference = (model.eval()(text)[0] - model(changed)[0]).abs().amax(dim=2)[0]
        assert not difference[:20].any() and difference[20:28].all() and difference[28:].all() == far


@pytest.mark.parametrize('recipe', ['sequence_cost'], indirect=True)
def test_full_attention(recipe):
    """By its formula, with a mask and a global token; positions are relative: those of a shifted sequence are equal."""
    torch.manual_seed(0)
    layer = recipe.FullAttention(8, 2)
    x, g, mask = torch.randn(2, 9, 8), torch.randn(2, 1, 8), torch.rand(2, 9) < .6
    y, out = layer(x, mask, g)
    for b in range(2):
        rows = torch.cat([g[b], x[b][mask[b]]])
        q, k, v = layer.qkv(rows).unflatten(1, (3, 2, 4)).permute(1, 2, 0, 3)
        expected = layer.proj(((q @ k.mT / 2).softmax(-1) @ v).transpose(0, 1).flatten(1))
        torch.testing.assert_close(torch.cat([out[b], y[b][mask[b]]]), expected)

    layer = recipe.CausalFullAttention(8, 2)
    q, k, v = layer.project(x)
    turn = torch.polar(torch.ones(9, 2), torch.arange(9.)[:, None] * torch.tensor([1., .01]))
    q, k = (torch.complex(*part.split(2, dim=3)) * turn for part in (q, k))
    logits = (q @ k.mT.conj()).real / 2 + torch.full((9, 9), float('-inf')).triu(1)
    torch.testing.assert_close(layer(x), layer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize('recipe, arguments, message', [
    ('charlm', ['--length', '0'], "--length: expected a whole number from 1 on, got '0'"),
    ('charlm', ['--held-out', '100000000'], '--held-out 100000000: expected more than --length 1024, and as much'),
    ('charlm', ['--held-out', '1024'], '--held-out 1024: expected more than --length 1024'),
    ('charlm', ['--cost-at', '100000000'], '--cost-at 100000000: expected fewer than the'),
    ('listops', ['--min-length', '3000'], '--max-length 2000: expected 2 more than --min-length 3000'),
    ('listops', ['--train-examples', '0'], '--train-examples: expected a whole number from 1 on'),
], indirect=['recipe'])
def test_arguments_that_do_not_fit_are_refused(recipe, arguments, message, capsys):
    """Before anything is drawn or trained; without end, two of them would be."""
    with pytest.raises(SystemExit) as stop:
        recipe.run(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['sequence_cost'], indirect=True)
def test_cost(recipe, capsys, monkeypatch):
    """Each measurement is of a process of its own; the exponent is the power of the length."""
    cells = [{'length': length, 'figure': 3. * length ** 1.5} for length in (10, 100, 500)]
    assert abs(recipe.exponent(cells, 'figure') - 1.5) < 1e-9
    recipe.main(['causal', '--lengths', '4096', '8192', '--train'])
    report, = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [cell['length'] for cell in report['cells']] == [4096, 8192]
    assert set(report['exponents']) == {'time', 'memory'}
    assert all(cell['cpu_seconds'] > 0 for cell in report['cells'])
    with pytest.raises(SystemExit):
        recipe.main(['causal', '--lengths', '128', '256'])
    assert 'expected lengths above 256, that of the first pass' in capsys.readouterr().err
