"""One function of the library for each command: (source, destination, options) to a result.

source    which checkpoint a path means
writing   the pipeline's end, once: surroundings done, carry out a plan, read back, manifest, next steps
opened    a checkpoint whose tensors are read when they are asked for
advice    what to do with what was written
extract, reshard, rebase, inspect, verify, latest   the operations, of which `ckpttools` gives the functions

Nothing here prints, asks or exits: errors are `CkptError`, results are values.
"""
