"""Tests of realgeneral.training.progress."""
