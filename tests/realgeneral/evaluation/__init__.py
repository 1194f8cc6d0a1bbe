"""Tests of realgeneral.evaluation."""
