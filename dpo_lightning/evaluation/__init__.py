"""Evaluation of a trained policy: its answers, its distance from the reference, its marks.

In: models and prompts, or a task of which all is known. Out: answers, metrics, and what is exactly
true.
"""
