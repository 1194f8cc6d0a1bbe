"""A run: its plan, models, loss, processes, checkpoints, memory budget, and what it shows.

In reading order:

train       the loop
plan        what settings and base make of a run, and checks that need no weights
models      base and adapter, frozen and placed
features    latents and text features of a batch
objective   from samples to the loss
optimizers  AdamW and its 8-bit forms, the learning rate
memory      what a run will need
checkpoint  what is kept, and how a run continues from it
processes   one device or many
progress    curves, sample grids, bad batches
"""
