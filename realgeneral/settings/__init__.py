"""Every option of every command: its default, its help, its checks. No module here imports more than `realgeneral.errors`.

In reading order:

options   what a setting is, shared checks, and the command line made of a settings class
data      what check-data, precompute and train share; check-data and precompute
train     train, and which settings may change on --resume
sampling  denoising steps and guidance that fit a base; generate and demo
evaluate  evaluate, and which settings a protocol has
"""
