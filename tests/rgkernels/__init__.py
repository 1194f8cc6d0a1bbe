"""Tests of rgkernels."""
