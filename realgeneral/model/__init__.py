"""The transformer and what belongs to it: presets, positions, condition branch, adapter, VAE.

In reading order:

transformer   the method: one joint sequence, modulated, attended and predicted
presets       which segments see each other, and the condition's timestep
condition     Unified Condition Embedding, and the condition cache
checks        what the inputs of a transformer must be
cogvideox     what CogVideoX says of itself, and its model with the condition branch
geometry      CogVideoX's token grids and positions
vae           CogVideoX's VAE on single images
lora          LoRA layers: fresh, trained, merged
adapter_info  what an adapter says of itself, and whether it fits a base
adapter       adapters on disk
"""
