"""Tests of realgeneral.model."""
