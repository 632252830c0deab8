"""The command ``evaluate``: a trained policy on held-out rows, as its run measures it or others."""
