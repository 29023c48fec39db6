"""Pairs, evaluation sets and the packages they come from."""
