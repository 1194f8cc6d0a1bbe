"""Tests of realgeneral.training.processes."""
