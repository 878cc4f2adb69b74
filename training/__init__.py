"""The pretraining engine, on top of Accelerate."""
