"""DeepSpeed's own schedulers: a counter in the checkpoint, all constants in ds_config.

formulas  the learning rate as a function of the counter
program   both as a `Program`
"""
