"""One device or many.

In reading order:

engine  what the loop asks of its processes
fsdp2   the model shared out over processes
zero2   DeepSpeed ZeRO-2
"""
