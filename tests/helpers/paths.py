"""Folders of this repository."""
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / 'tests'
HELPERS = TESTS / 'helpers'
RECIPES = ROOT / 'notebooks' / 'recipes'
