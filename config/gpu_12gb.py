"""12 GB: micro-batch 2. See gpu_24gb.py."""
micro_batch = 2
