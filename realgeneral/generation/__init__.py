"""The pipeline: checks of a call, guidance, the loop over the steps, loading a base.

In reading order:

pipeline   prompt and condition images in, image out
arguments  what a call may be given
guidance   the passes of a step, and how their predictions are combined
denoising  the loop over the steps
bases      bases on disk, whole or in parts, and which ops they run on
"""
