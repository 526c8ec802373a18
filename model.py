"""The unit language model: a decoder-only transformer (Qwen2 / Llama), from scratch, in one file.

    lm = UnitLM.twist("Qwen/Qwen2.5-0.5B", vocab_size=502)   # a text LM turned into a unit LM (TWIST initialisation)
    logits, loss = lm(tokens, targets, positions)            # (B, T) int64 each; positions restart with an utterance
    lm.generate([[1, 17, 403]], max_new_tokens=100)          # with a KV cache, batched over prompts of any lengths
    lm.save_pretrained("out/slam/checkpoint")                # a folder that AutoModelForCausalLM reads as it is

Parameter names are transformers' own, so weights travel both ways without a table of names. OPT and Pythia, the other
bases of the paper's table 6, run in transformers' code behind the same interface (`HubLM`). SlamKit's checkpoints load
like any other, and ours become SlamKit's by

    python model.py export out/slam slam_for_slamkit
"""
import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slam.attention import attention_mask, cross_entropy, segment_attention, segments
from slam.checkpoint import SLAMKIT, fetch, find_checkpoint, read_folder, write_folder

VOCABULARY = ("model.embed_tokens.weight", "model.decoder.embed_tokens.weight", "gpt_neox.embed_in.weight",
              "lm_head.weight", "embed_out.weight")  # the tables with a row for every token


NOT_WEIGHTS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", "decoder.version")  # old files' own


@dataclass
class ModelConfig:
    """Shape of a decoder; field names are those of a Hugging Face config.json."""
    vocab_size: int = 502
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    attention_bias: bool = True  # on q, k and v (Qwen2: yes, Llama: no)
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 1024
    model_type: str = "qwen2"  # or llama: the class transformers builds from our folders

    @classmethod
    def from_hf(cls, config: dict, where: str = "config.json") -> "ModelConfig":
        """From a Hugging Face config.json (Qwen2, Llama or MobileLLM). ValueError for what this decoder does not do."""
        kind, tied = config.get("model_type"), config.get("tie_word_embeddings", False)
        if kind == "mobilellm":  # a Llama by another name, whose tying has another name too
            kind, tied = "llama", config.get("share_embedding", True)
        if kind not in ("qwen2", "llama"):
            raise ValueError(f"{where}: model_type {kind!r}; known are qwen2, llama, mobilellm, "
                             f"{', '.join(HubLM.TYPES)} and {SLAMKIT}")
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or rope
        scaling = scaling.get("rope_type") or scaling.get("type") or "default"  # `type`: the key's older name
        unsupported = {"rope type": scaling != "default", "MLP bias": config.get("mlp_bias"),
                       "o_proj bias": kind == "llama" and config.get("attention_bias"),
                       "sliding window": config.get("use_sliding_window"), "layer sharing": config.get("layer_sharing"),
                       "activation": config.get("hidden_act", "silu") != "silu"}
        if any(unsupported.values()):
            raise ValueError(f"{where}: not supported here: {', '.join(k for k, v in unsupported.items() if v)}")
        heads = config["num_attention_heads"]
        same = {k: config[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                       "rms_norm_eps", "max_position_embeddings")}
        return cls(**same, num_attention_heads=heads, num_key_value_heads=config.get("num_key_value_heads") or heads,
                   head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                   rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
                   attention_bias=kind == "qwen2", tie_word_embeddings=tied, model_type=kind)

    def to_hf(self) -> dict:
        """As the config.json of a Qwen2ForCausalLM / LlamaForCausalLM."""
        config = asdict(self) | {
            "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[self.model_type]],
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta}, "hidden_act": "silu",
            "use_sliding_window": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "dtype": "float32"}
        if self.model_type == "llama":
            config.pop("use_sliding_window")
        else:
            config.pop("attention_bias")  # implied by the type
        return config


class KVCache:
    """Keys and values, of every layer (B, kv_heads, capacity, head_dim); row b may be at its own position."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device, dtype):
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        # A tensor for each layer: compiled code writes into these in place, and copies the whole of a stacked one.
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
                          for _ in "kv")
        self.rows = torch.arange(batch, device=device)[:, None]
        self.length = capacity  # entries that the longest row fills; attention need not look further

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, kv_heads, T, D) at `positions` (B, T); return all entries so far."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[self.rows, :, positions] = new.transpose(1, 2)
        return self.k[layer][:, :, :self.length], self.v[layer][:, :, :self.length]

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these."""
        self.k, self.v, self.rows = [x[rows] for x in self.k], [x[rows] for x in self.v], self.rows[:len(rows)]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        if torch.is_autocast_enabled(x.device.type):  # cast once for all the linear layers that take it, not in each
            return y.to(torch.get_autocast_dtype(x.device.type))
        return y.to(x.dtype)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and ∓sin (B, 1, T, head_dim) of the rotary position embedding (Su et al. 2021), fp32, for `rotate`."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[:, None, :, None].float() * inverse
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of each head, (B, H, T, D)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | list[tuple[int, int, int]] | None,
                cache: KVCache | None, positions: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)
        groups = q.shape[1] // k.shape[1]  # query heads that share a key and value head
        if T == 1 and cache is not None:  # they see the same keys: as queries of one head, keys need no copies
            q, groups = q.view(B, k.shape[1], groups, self.head_dim), 1
        elif q.is_cuda and groups > 1 and (mask is not None or q.dtype == torch.float32):
            # CUDA's fused kernels do not share heads in these cases
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        if isinstance(mask, list):
            y = segment_attention(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1)
            y = y.reshape(B, -1, T, self.head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *attention_inputs) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: (B, T) tokens -> (B, T, hidden)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class UnitLM(nn.Module):
    """Decoder plus language-model head; see the module's docstring for its life in four lines."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute blocks in the backward pass: less memory, a third more work
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def hf_config(self) -> dict:
        """The config.json that describes this model to transformers."""
        return self.config.to_hf()

    def set_activation_checkpointing(self, on: bool) -> None:
        """Keep only each block's input for the backward pass, and compute the rest of it again (Chen et al. 2016)."""
        self.activation_checkpointing = on

    def n_params(self) -> int:
        """Number of parameters, tied ones counted once (paper table 6)."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens: Tensor, targets: Tensor | None = None, positions: Tensor | None = None,
                cache: KVCache | None = None, last: Tensor | None = None,
                reduction: str = "mean") -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, vocab) and, with targets, the cross-entropy in nats (fp32).

        tokens, targets: (B, T) int64; a target of -100 counts for nothing. reduction: mean, sum or none (-> (B, T)).
        positions: (B, T) int64, each token's place in its utterance; where it is 0 a new utterance begins, and no
            attention crosses that border. None: every row is one utterance. Where it falls back to some p > 0, another
            continuation of the utterance's first p tokens begins, which sees these and itself: 0 1 2 3 4 2 3.
        cache: with a KVCache, `positions` (B, T) says where the new tokens go, and each sees all before it.
        last: (B,) int64, the one position of each row whose logits are wanted -> (B, 1, vocab).
        """
        B, T = tokens.shape
        mask = None
        if cache is not None:
            assert positions is not None and targets is None
            mask = torch.arange(cache.length, device=tokens.device) <= positions[:, None, :, None]
        elif positions is not None:
            eager_cpu = positions.device.type == "cpu" and not torch.compiler.is_compiling()
            mask = segments(positions) if eager_cpu else attention_mask(positions)
        else:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, cache, positions, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, positions)
        if last is not None:
            x = x[torch.arange(B, device=x.device), last][:, None]
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = F.linear(self.model.norm(x), head.weight)
        return logits, None if targets is None else cross_entropy(logits, targets, reduction)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, repetition_penalty: float = 1.0, stop: tuple[int, ...] = (1,),
                 forbid: tuple[int, ...] = (0,), generator: torch.Generator | None = None, progress=None,
                 compile: bool = False) -> list[list[int]]:
        """Sample a continuation of each prompt; the new tokens only, without the stop token.

        Only a row that a stop token has ended, or `progress`, has fewer than `max_new_tokens`.
        temperature 0 is greedy. `forbid`: tokens never drawn. `progress(new)` is called every few steps with the tokens
        so far, (B, n) int64, -1 where a row has ended; if it returns True, that is all.
        compile: one compiled step over a cache of fixed size; pays where many batches of the same size follow.
        generate([[1, 17]], 3, temperature=0) -> [[44, 9, 300]]
        """
        assert all(prompts), "a prompt needs at least one token (BOS)"
        assert temperature >= 0
        if not prompts:
            return []
        device, lengths = self.device, [len(p) for p in prompts]
        tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long, device=device)
        for row, prompt in zip(tokens, prompts):
            row[:len(prompt)] = torch.tensor(prompt)
        # Rows are padded on the right; a row's padding is overwritten in the cache as the row grows, and never seen.
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        if self.model.norm.weight.dtype != torch.float32:
            dtype = self.model.norm.weight.dtype
        capacity = max(lengths) + max_new_tokens
        if compile:  # prompts of about the same length share a compiled step, and its cache
            capacity = -(-capacity // 128) * 128
            cache = self._static_cache(len(prompts), capacity, dtype)
        else:
            cache = KVCache(self.config, len(prompts), capacity, device, dtype)
        cache.length = max(lengths)
        positions = torch.arange(max(lengths), device=device).expand(tokens.shape)
        position = torch.tensor(lengths, device=device) - 1  # of each row's newest token
        logits = self(tokens, positions=positions, cache=cache, last=position)[0][:, 0]
        decode = self.decode
        if compile:
            cache.length = capacity
            if not hasattr(self, "compiled_decode"):
                mode = "reduce-overhead" if device.type == "cuda" else "default"  # the former: CUDA graphs
                self.compiled_decode = torch.compile(self.decode, dynamic=False, mode=mode)
            decode = self.compiled_decode

        new = torch.full((len(prompts), max_new_tokens), -1, device=device)  # -1: not drawn
        stops = torch.tensor(stop, device=device, dtype=torch.long)
        alive = torch.arange(len(prompts), device=device)  # which prompt each row belongs to
        seen = torch.zeros(len(prompts), self.config.vocab_size, dtype=torch.bool, device=device)
        if repetition_penalty != 1.0:
            for row, prompt in zip(seen, prompts):
                row[torch.tensor(prompt)] = True
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            token = sample(logits.float(), temperature, top_k, top_p, repetition_penalty, seen, forbid, generator)
            done = done | torch.isin(token, stops)
            new[alive, step] = torch.where(done, -1, token)
            if step % 8 == 7 or step == max_new_tokens - 1:  # finished rows are dropped, seldom enough not to stall
                if progress and progress(new[:, :step + 1]) or done.all():
                    break
                keep = (~done).nonzero()[:, 0]
                if len(keep) < 0.8 * len(done) and not compile:
                    cache.keep(keep)
                    alive, token, position, done, seen = (x[keep] for x in (alive, token, position, done, seen))
            if step == max_new_tokens - 1:
                break
            seen[torch.arange(len(alive), device=device), token] = True
            position = position + 1
            if not compile:
                cache.length += 1
            logits = decode(token, position, cache)
        return [[t for t in row if t >= 0] for row in new.tolist()]

    def _static_cache(self, batch: int, capacity: int, dtype: torch.dtype) -> KVCache:
        """A cache at an address that stays, as CUDA graphs need; the last one again, if it has the size."""
        key, cache = getattr(self, "last_cache", (None, None))
        if key != (batch, capacity, dtype, self.device):
            cache = KVCache(self.config, batch, capacity, self.device, dtype)
            for x in (*cache.k, *cache.v):
                torch._dynamo.mark_static_address(x)
            self.last_cache = (batch, capacity, dtype, self.device), cache
        return cache

    def decode(self, token: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        """One token of each row, (B,), at its position -> the logits of the next, (B, V)."""
        return self(token[:, None], positions=position[:, None], cache=cache)[0][:, 0]

    # ------------------------------------------------------------ folders

    @classmethod
    def from_pretrained(cls, name: str) -> "UnitLM":
        """Load a hub id, a local folder (ours, SlamKit's or transformers') or `embedded:NAME`, in fp32.

        SystemExit if it is missing, partial or foreign.
        """
        config, state = read_folder(name)
        try:
            lm = from_config(config, f"{name}: config.json")
        except (ValueError, KeyError) as e:
            raise SystemExit(f"{name}: not a model that runs here: {e}") from None
        lm.load_weights(state, name)
        return lm

    def load_weights(self, state: dict[str, Tensor], name: str) -> None:
        """Set every weight; `name` is for the message. SystemExit if one is missing, left over or of another shape."""
        expected = {k: tuple(v.shape) for k, v in self.state_dict().items()}
        state = {k: v.float() for k, v in state.items() if k in expected or not k.endswith(NOT_WEIGHTS)}
        if "lm_head.weight" not in expected:  # tied
            state.pop("lm_head.weight", None)
        found = {k: tuple(v.shape) for k, v in state.items()}
        if found != expected:
            missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
            other = [f"{k} {found[k]} instead of {v}" for k, v in expected.items() if found.get(k, v) != v]
            raise SystemExit(f"{name}: weights do not fit config.json: missing {missing[:3]}, "
                             f"unexpected {unexpected[:3]}, of another shape {other[:3]}")
        self.load_state_dict(state)

    @classmethod
    def twist(cls, base_name: str, vocab_size: int, init: str = "first_rows", n_layers: int | None = None,
              rope_theta: float | None = None, context: int | None = None) -> "UnitLM":
        """A text LM turned into a unit LM (TWIST, Hassid et al. 2023): its body stays, its vocabulary goes.

        init: `first_rows` keeps the text embedding's first rows (what SlamKit does), `random` draws N(0, 0.02),
              `none` keeps only the shape: training from scratch.
        n_layers: keep only the first so many blocks. rope_theta: the paper sets 10000, whatever the base used.
        """
        if init not in ("first_rows", "random", "none"):
            raise ValueError(f"TWIST init {init!r}; expected first_rows, random or none")
        base = cls.from_pretrained(base_name)
        config = base.hf_config()
        if (n_layers or 0) > config["num_hidden_layers"]:
            raise ValueError(f"{base_name} has {config['num_hidden_layers']} layers, not {n_layers}")
        if init == "first_rows" and vocab_size > config["vocab_size"]:
            raise ValueError(f"{base_name} has {config['vocab_size']} embedding rows, fewer than vocab_size "
                             f"{vocab_size}; use init random")
        lm = from_config(twisted(config, vocab_size, n_layers, rope_theta, context), base_name)
        if init != "none":
            state, theirs = lm.state_dict(), base.state_dict()
            kept = {k: theirs[k] for k in state if k not in VOCABULARY}
            rows = {k: theirs[k][:vocab_size] for k in state if k in VOCABULARY and init == "first_rows"}
            lm.load_state_dict(state | kept | rows)
        return lm

    def save_pretrained(self, folder: str | Path, slam: dict | None = None, trainer: dict | None = None) -> None:
        """Write config.json, model.safetensors (+ slam.json, trainer.pt) beside `folder`, then swap it in.

        A kill at any moment leaves a whole checkpoint: the old one or the new one.
        """
        write_folder(folder, self.hf_config(), self.state_dict(), slam, trainer)


class HubLM(UnitLM):
    """OPT or Pythia (GPT-NeoX): transformers' own code behind UnitLM's interface. Dropout is off, as in the paper."""
    TYPES = ("opt", "gpt_neox")

    def __init__(self, config: dict):
        from transformers import AutoConfig, AutoModelForCausalLM
        nn.Module.__init__(self)
        no_dropout = {k: 0.0 for k in config if "dropout" in k or k == "layerdrop"}
        self.config = AutoConfig.for_model(**config | no_dropout | {"dtype": "float32"})
        self.lm = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa")

    def hf_config(self) -> dict:
        """The config.json that describes this model to transformers."""
        return json.loads(self.config.to_json_string(use_diff=False)) | {"architectures": [type(self.lm).__name__]}

    def set_activation_checkpointing(self, on: bool) -> None:
        """As UnitLM's."""
        switch = "enable" if on else "disable"  # the method's older name is deprecated, its newer one not everywhere
        names = (f"{kind}_checkpointing_{switch}" for kind in ("activation", "gradient"))
        getattr(self.lm, next(name for name in names if hasattr(self.lm, name)))()

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Weights by the names in the hub's files; a tied one once."""
        state = self.lm.state_dict(*args, **kwargs)
        if "lm_head.weight" in state:  # newer versions of transformers call Pythia's embed_out so in memory
            head = state.pop("lm_head.weight")
            if not self.config.tie_word_embeddings:
                state["embed_out.weight"] = head
        return state

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None:
        """As nn.Module's, by the names in the hub's files."""
        own = self.lm.state_dict()
        if "lm_head.weight" in own:
            head = "model.decoder.embed_tokens.weight" if self.config.tie_word_embeddings else "embed_out.weight"
            state = {k: v for k, v in state.items() if k in own} | {"lm_head.weight": state[head]}
        self.lm.load_state_dict(state, strict=strict)

    def load_weights(self, state: dict[str, Tensor], name: str) -> None:
        """As UnitLM's."""
        super().load_weights({f"model.{k}" if k.startswith("decoder.") else k: v for k, v in state.items()}, name)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, positions: Tensor | None = None,
                last: Tensor | None = None, reduction: str = "mean") -> tuple[Tensor, Tensor | None]:
        """As UnitLM's, without a cache."""
        mask = None if positions is None else attention_mask(positions)
        logits = self.lm(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        if last is not None:
            logits = logits[torch.arange(len(logits), device=logits.device), last][:, None]
        return logits, None if targets is None else cross_entropy(logits, targets, reduction)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, repetition_penalty: float = 1.0, stop: tuple[int, ...] = (1,),
                 forbid: tuple[int, ...] = (0,), generator: torch.Generator | None = None, progress=None,
                 compile: bool = False) -> list[list[int]]:
        """As UnitLM's, by transformers' `generate`; the random numbers are others."""
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
            new = self.lm.generate(tokens, attention_mask=mask, max_new_tokens=max_new_tokens, **how,
                                   repetition_penalty=repetition_penalty, suppress_tokens=list(forbid) or None,
                                   eos_token_id=list(stop) or None, pad_token_id=0)[:, width:].tolist()
        ends = [next((i for i, t in enumerate(row) if t in stop), len(row)) for row in new]
        new = [row[:end] for row, end in zip(new, ends)]
        if progress:  # once, as transformers does not say what it has
            progress(torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in new], True, -1))
        return new


def from_config(config: dict, where: str = "config.json") -> UnitLM:
    """A new model of the shape of a Hugging Face config.json. ValueError or KeyError for one that does not run here."""
    if config.get("model_type") in HubLM.TYPES:
        return HubLM(config)
    return UnitLM(ModelConfig.from_hf(config, where))


def twisted(config: dict, vocab_size: int, n_layers: int | None = None, rope_theta: float | None = None,
            context: int | None = None) -> dict:
    """The config.json of a text LM -> that of the unit LM made from it; None keeps what the base has."""
    limit = config["max_position_embeddings"]
    if config["model_type"] == "opt" and context:
        if context > limit:
            raise ValueError(f"context {context}: OPT has learned positions, {limit} of them")
        context = None
    new = {"vocab_size": vocab_size, "num_hidden_layers": n_layers or config["num_hidden_layers"],
           "max_position_embeddings": context or limit, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if config["model_type"] not in HubLM.TYPES:
        new["tie_word_embeddings"] = True  # even if the base's are not; those of the paper's Qwen and Llama types are
    if rope_theta and config["model_type"] != "opt":
        new["rope_parameters"] = (config.get("rope_parameters") or {}) | {"rope_theta": rope_theta}
    return config | new


def export(name: str, folder: str | Path, base_name: str | None = None) -> None:
    """Write a checkpoint in SlamKit's layout: a nested config.json, weights named `lm.*`; slam.json goes along.

    base_name: the hub model whose config SlamKit starts from and then overrides; by default the smallest of the type.
    """
    lm = UnitLM.from_pretrained(name)
    base = lm.hf_config()
    base_names = {"qwen2": "Qwen/Qwen2.5-0.5B", "llama": "HuggingFaceTB/SmolLM2-135M", "opt": "facebook/opt-125m",
                  "gpt_neox": "EleutherAI/pythia-160m"}
    config = {"model_type": SLAMKIT, "architectures": ["UnitLM"], "base_config": base, "twist_init": True,
              "base_model_name": base_name or base_names[base["model_type"]], "vocab_size": base["vocab_size"],
              "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "torch_dtype": "float32",
              "tie_word_embeddings": base["tie_word_embeddings"]}
    slam = fetch(name) / "slam.json"
    write_folder(folder, config, {f"lm.{k}": v for k, v in lm.state_dict().items()},
                 json.loads(slam.read_text()) if slam.is_file() else None)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, repetition_penalty: float, seen: Tensor,
           forbid: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draw a token (B,) from logits (B, V) after repetition penalty (Keskar et al. 2019), temperature, top-k and top-p.

    `seen` (B, V) bool marks the tokens that the penalty applies to; temperature 0 takes the most likely token.
    """
    if repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    for token in forbid:  # one by one: a list as an index would be copied to the GPU, and waited for
        logits[:, token] = -torch.inf
    if temperature == 0:
        return logits.argmax(-1)
    # Sorted best first; only what top-k leaves is worth sorting, drawing noise for, and summing.
    k = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1]
    values, tokens = logits.topk(k) if k < logits.shape[-1] or top_p < 1 else (logits, None)
    p = (values / temperature).softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # keep the smallest set that reaches top_p
    # The exponential race: exact sampling without torch.multinomial's host sync.
    drawn = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)
    return drawn if tokens is None else tokens.gather(-1, drawn[:, None])[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["export"], help="export: write a checkpoint in SlamKit's layout")
    parser.add_argument("checkpoint", help="run folder, checkpoint folder or hub id")
    parser.add_argument("out", help="folder to write; must not exist")
    parser.add_argument("--base", help="hub model that SlamKit takes the config from, and then overrides")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise SystemExit(f"{args.out} exists; choose another folder")
    export(find_checkpoint(args.checkpoint), args.out, args.base)
    print(f"{args.out}: a checkpoint for SlamKit")


if __name__ == "__main__":
    main()
