"""What the tuner needs beside timing.

In reading order:

    builders.py        worker processes that compile ahead of the process that launches
    launch_writer.py   writes `rgkernels/_triton/launch_data.py`
"""
