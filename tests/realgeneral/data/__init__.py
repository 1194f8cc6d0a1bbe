"""Tests of realgeneral.data."""
