"""Faults by the hundred: kills, flipped bits, commands that no one would type. All slow, all with a seed."""
