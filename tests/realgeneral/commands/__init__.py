"""Tests of realgeneral.commands."""
