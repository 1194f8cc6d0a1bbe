"""The small model and data that ship with the package, and the recipes that made them."""
