"""torch.optim.lr_scheduler: its saved states as a tree of nodes, replayed and rescaled.

nodes     a state dict as a tree: which class it is of, by its keys
rates     each class's learning rate, in closed form and step by step
steps     `construct`, `step`, `jump` on a tree
lengths   which constants count steps, and what becomes of them
program   the tree as a `Program`
"""
