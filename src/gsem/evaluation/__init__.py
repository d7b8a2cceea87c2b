"""Attacks on a model and the accuracies that they leave, with partial results that are resumed."""
