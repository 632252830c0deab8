"""Sweeps: trials on leased devices, each a process of its own, and the report over them."""
