"""The command ``interpolate``: the frontier of one trained policy."""
