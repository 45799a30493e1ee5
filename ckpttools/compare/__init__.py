"""What a checkpoint holds whatever its layout, and how two of them differ.

content   tensors and numbers by kind and name, unread; settings and counters as plain data
stream    their bytes in the order of the elements, by threads, the source's checksums on the way
digests   one digest for each of them, and one for the whole
pairs     what of two checkpoints is the same thing
apart     how far apart two tensors are
facts     counters, schedule, hyper-parameters: which differ
"""
