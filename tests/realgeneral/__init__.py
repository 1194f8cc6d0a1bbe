"""Tests of realgeneral, laid out as the package is."""
