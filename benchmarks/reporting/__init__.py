"""Benchmark rows that may be reported, and their plots.

In reading order:

    rows.py    reads and refuses rows, and groups what may stand in one table
    plots.py   bars against peers, and a roofline
"""
