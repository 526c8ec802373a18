"""8 GB: micro-batch 4 with activation checkpointing. See gpu_24gb.py."""
micro_batch = 4
activation_checkpointing = True
