"""MMEngine's param_schedulers: several that act on the same param_groups, by epoch or by iteration.

config    the configuration that the checkpoint carries as text, read as data
steps     what each class does in one step
lengths   which constants count steps, and what becomes of them
program   the list as a `Program`
"""
