"""What training costs: FLOPs of a token, the peak of a GPU, and what to do when its memory is full."""
import functools
from collections.abc import Callable

import torch

# Dense bf16 peaks in TFLOP/s, from NVIDIA's data sheets.
PEAK_TFLOPS = {"A5000": 111, "A6000": 155, "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 209,
               "L40S": 362, "A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989}


def flops_per_token(lm: torch.nn.Module, keys: float) -> float:
    """6 N + 12 L d T, forward and backward, where a token attends to T keys.

    With T the context it is the formula of PaLM (Chowdhery et al. 2022, appendix B), which counts hidden keys too.
    """
    return 6 * lm.n_params() + 12 * lm.config.num_hidden_layers * lm.config.hidden_size * keys


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a known GPU, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((t * 1e12 for known, t in PEAK_TFLOPS.items() if known in name), None)


def explain_out_of_memory(main: Callable) -> Callable:
    """Decorator of a stage's `main(cfg)`: if the GPU's memory is full, SystemExit says what is kept and what helps."""
    @functools.wraps(main)
    def explained(cfg) -> None:
        try:
            main(cfg)
        except torch.OutOfMemoryError as e:
            less = [f"a smaller micro_batch (now {cfg.micro_batch})"] * (cfg.micro_batch > 1)
            less += ["--activation_checkpointing=true"] * (not cfg.activation_checkpointing)
            less += ["a smaller context or model, in a new run"]
            raise SystemExit(f"{'. '.join(str(e).split('. ')[:2])}.\nStopped; checkpoints saved so far are kept, and "
                             f"--resume goes on. It takes less memory with {', '.join(less)}.") from None
    return explained
