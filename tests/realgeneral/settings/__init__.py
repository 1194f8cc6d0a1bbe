"""Tests of realgeneral.settings."""
