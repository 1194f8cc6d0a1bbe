"""From files to batches: rows, sources, sizes, order, samples, the precomputed store.

In reading order:

rows     a row before anything is decoded, and what a source of rows is
columns  which column of a table holds what
sources  folders, tables, tar files, lists of those, and what ships with the package
shapes   the buckets of a run, and the sizes of a source's pictures
order    which row sample n is
samples  rows to samples and batches
store    latents and text features that were computed before
workers  data-loading processes
"""
