"""Tests of realgeneral.data.sources."""
