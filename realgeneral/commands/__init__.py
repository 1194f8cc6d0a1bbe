"""What a person types: one file a command, and the command line. `train` and `evaluate` are in their own wings.

In reading order:

cli         the command line: options, one-line errors, exit status
demo        held-out pictures of every task, then a short training
check_data  what is in a data set, and its bad rows
precompute  pictures and prompts of a data set encoded once
generate    images from a prompt and a condition
"""
