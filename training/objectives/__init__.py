"""What is learned: one module an objective, with what a command line, a plan, a doctor and a card say of it.

The losses are in `modeling/`. Imports nothing heavy: the command line reads it before torch is there.
"""
