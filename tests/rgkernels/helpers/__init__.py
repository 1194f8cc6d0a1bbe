"""What the tests of rgkernels share."""
