"""Weights: where they come from, how files are read and converted, and what a related model may lend."""
