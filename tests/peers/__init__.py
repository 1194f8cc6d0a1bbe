"""diffusers' own test mixins, from a checkout of theirs, on what we make of their classes: `make test-peers DIFFUSERS=path`."""
