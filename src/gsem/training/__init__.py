"""Adversarial training: recipes, the step, the loop, and what a run directory holds."""
