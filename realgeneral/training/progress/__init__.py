"""What a run shows while it goes on.

In reading order:

tracking   metrics.jsonl, the progress bar, trackers
grids      sample grids
bad_batch  batches with a loss that is not finite, for replay
"""
