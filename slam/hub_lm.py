"""OPT and Pythia (GPT-NeoX), bases of the paper's table 7: transformers' code behind the methods of `model.UnitLM`."""
import json
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slam.attention import Mask, attention_mask
from slam.checkpoint import write_folder
from slam.loss import head_loss


class HubLM(nn.Module):
    """A unit LM of the shape of an OPT or Pythia config.json, in fp32. Dropout is off, as in the paper."""

    def __init__(self, config: dict):
        from transformers import AutoConfig, AutoModelForCausalLM
        super().__init__()
        no_dropout = {k: 0.0 for k in config if "dropout" in k or k == "layerdrop"}
        self.config = AutoConfig.for_model(**config | no_dropout | {"dtype": "float32"})
        self.lm = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa")

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def n_params(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def hf_config(self) -> dict:
        """The config.json that describes this model to transformers."""
        return json.loads(self.config.to_json_string(use_diff=False)) | {"architectures": [type(self.lm).__name__]}

    def set_activation_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass (Chen et al. 2016)."""
        lm, switch = self.lm, "enable" if on else "disable"
        newer = getattr(lm, f"activation_checkpointing_{switch}", None)  # older versions of transformers lack it
        (newer or getattr(lm, f"gradient_checkpointing_{switch}"))()

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by the names in the hub's files, a tied one once."""
        state = self.lm.state_dict()
        head = state.pop("lm_head.weight", None)  # what newer versions of transformers call Pythia's embed_out
        return state if head is None or self.config.tie_word_embeddings else state | {"embed_out.weight": head}

    def save_pretrained(self, folder: str | Path, slam: dict | None = None, trainer: dict | None = None) -> None:
        """Write a checkpoint folder and swap it in, as `UnitLM.save_pretrained`."""
        write_folder(folder, self.hf_config(), self.state_dict(), slam, trainer)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, positions: Tensor | None = None,
                mask: Mask = None, last: Tensor | None = None, reduction: str = "mean") -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, vocab) and, with targets, the cross-entropy, as `UnitLM.forward`; there is no cache.

        A `mask` is ignored: transformers' models take a tensor, which is always computed from `positions`.
        SystemExit for a row longer than OPT's learned positions.
        """
        if self.config.model_type == "opt" and tokens.shape[1] > (limit := self.config.max_position_embeddings):
            raise SystemExit(f"a row of {tokens.shape[1]} tokens: OPT has learned positions, {limit} of them")
        mask = None if positions is None else attention_mask(positions)
        x = self.lm.base_model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last][:, None]
        weight = self.lm.get_output_embeddings().weight
        return (F.linear(x, weight), None) if targets is None else head_loss(x, weight, targets, reduction)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, repetition_penalty: float = 1.0, stop: tuple[int, ...] = (1,),
                 forbid: tuple[int, ...] = (0,), generator: torch.Generator | None = None, progress=None,
                 compile: bool = False) -> list[list[int]]:
        """`UnitLM.generate` by transformers' `generate`, which draws other random numbers.

        `progress` is called once, with all new tokens; `compile` changes nothing. Raises ValueError if OPT's learned
        positions do not suffice.
        """
        assert all(prompts), "a prompt needs at least one token (BOS)"
        if not prompts or not max_new_tokens:
            return [[] for _ in prompts]
        width, limit = max(map(len, prompts)), self.config.max_position_embeddings
        if self.config.model_type == "opt" and width + max_new_tokens > limit:
            raise ValueError(f"{width} tokens and {max_new_tokens} new: OPT has learned positions, {limit} of them")
        tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)  # padded on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        how = {"do_sample": False} if temperature == 0 else \
            {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # transformers draws from the global generator
            torch.manual_seed(torch.randint(2**62, (), generator=generator, device=generator and generator.device))
            found = self.lm.generate(tokens, attention_mask=mask, max_new_tokens=max_new_tokens, **how,
                                     repetition_penalty=repetition_penalty, suppress_tokens=list(forbid) or None,
                                     eos_token_id=list(stop) or None, pad_token_id=0)
        new = [list(takewhile(lambda token: token not in stop, row)) for row in found[:, width:].tolist()]
        if progress:
            progress(torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in new], True, -1))
        return new
