"""The transformer and what belongs to it: presets, positions, condition branch, adapter, VAE.

In reading order:

transformer   the method: one joint sequence, modulated, attended and predicted
presets       which segments see each other, and the condition's timestep
embedding     Unified Condition Embedding
condition     Separated Condition AdaLN, and the condition cache
geometry      token grids and positions
checks        what a base and the inputs of its transformer must be
vae           images to latents and back
lora          LoRA layers: fresh, trained, merged
adapter_info  what an adapter says of itself, and whether it fits a base
adapter       adapters on disk
"""
