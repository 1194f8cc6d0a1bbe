"""Kernel launches as data, without a GPU: recorded, their bytes counted, compiled ahead of time.

In reading order:

    record.py               records a launch instead of running it
    direct.py               calls an op's launchers at a named workload, without autograd
    bytes_moved.py          bytes that a launch must move
    binaries.py             compiles a launch for any target and reads the binary
    variants.py             launches of the norm sites and of qk_norm_rope, and the budgets of their binaries
    variants_attention.py   the same for attention
"""
