"""Tests of realgeneral.generation."""
