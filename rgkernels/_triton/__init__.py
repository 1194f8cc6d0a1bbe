"""The Triton implementations. Nothing here is imported before `impl="triton"` asks for it."""
