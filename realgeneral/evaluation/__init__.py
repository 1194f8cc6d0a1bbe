"""Scores: nano's table, the paper's protocols, metrics and encoders.

In reading order:

evaluate    the door
nano_table  the adapter against copying the condition and against the base, on held-out concepts
protocols   the paper's protocols on a folder
cases       what a protocol generates
generator   generated pictures of the cases, kept between runs
scores      what a protocol measures
report      tables and grids
metrics     SSIM, PSNR, edge F1, Frechet distance, intervals
encoders    image and text encoders of the metrics
"""
