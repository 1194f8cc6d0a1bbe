"""Benchmarks and evidence: timings against peers, the static report of the compiled kernels, and the byte counter."""
