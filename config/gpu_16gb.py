"""16 GB: micro-batch 4. See gpu_24gb.py."""
micro_batch = 4
