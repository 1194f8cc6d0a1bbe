"""Tests of realgeneral.nano."""
