"""Tests of the recipes that made nano."""
