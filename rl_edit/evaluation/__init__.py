"""Evaluation: base against adapter on held-out tasks, paired, and comparison of runs."""
