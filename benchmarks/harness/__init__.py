"""What every benchmark needs: named workloads, timing, random models, and baselines written on stock PyTorch and diffusers.

In reading order:

    shapes.py        the named workloads
    least_work.py    the least bytes and operations of an op at a workload
    timing.py        turns, CUDA graphs, ceilings and rows
    attention.py     masked attention with what PyTorch has: a dense mask, FlexAttention
    stock_block.py   RealGeneral's block on stock diffusers
    models.py        models of the named workloads, and the providers that run them
"""
