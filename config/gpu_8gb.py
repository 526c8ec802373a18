"""8 GB: micro-batch 4, and blocks computed again in the backward pass. See gpu_24gb.py."""
micro_batch = 4
activation_checkpointing = True
