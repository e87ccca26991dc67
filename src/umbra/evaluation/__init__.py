"""Evaluating one adapter: scores by task, replies, and lm-eval."""
