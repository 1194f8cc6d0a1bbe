"""How nano was made: its data, its VAE, text encoder and video base, its adapter. See docs/nano.md."""
