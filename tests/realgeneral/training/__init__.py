"""Tests of realgeneral.training."""
