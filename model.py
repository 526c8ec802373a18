"""The unit language model: a decoder-only transformer (Qwen2 / Llama), from scratch, in one file.

    lm = UnitLM.twist("Qwen/Qwen2.5-0.5B", vocab_size=502)   # a text LM turned into a unit LM (TWIST initialisation)
    logits, loss = lm(tokens, targets, positions)            # (B, T) int64 each; positions restart with an utterance
    lm.generate([[1, 17, 403]], max_new_tokens=100)          # with a KV cache, batched over prompts of any lengths
    lm.save_pretrained("out/slam/checkpoint")                # a folder that AutoModelForCausalLM reads as it is

Parameter names are transformers' own, so weights travel both ways without a table of names.
"""
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedded import resolve

IGNORE = -100  # target that counts for nothing


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
        """From a Hugging Face config.json (Qwen2 or Llama type). ValueError for what this decoder does not do."""
        kind = config.get("model_type")
        if kind not in ("qwen2", "llama"):
            raise ValueError(f"{where}: model_type {kind!r}; this decoder is 'qwen2' or 'llama'")
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or rope
        scaling = scaling.get("rope_type") or scaling.get("type") or "default"  # `type`: the key's older name
        unsupported = {"rope type": scaling != "default", "MLP bias": config.get("mlp_bias"),
                       "o_proj bias": kind == "llama" and config.get("attention_bias"),
                       "sliding window": config.get("use_sliding_window"),
                       "activation": config.get("hidden_act", "silu") != "silu"}
        if any(unsupported.values()):
            raise ValueError(f"{where}: not supported here: {', '.join(k for k, v in unsupported.items() if v)}")
        heads = config["num_attention_heads"]
        same = {k: config[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                       "rms_norm_eps", "max_position_embeddings")}
        return cls(**same, num_attention_heads=heads, num_key_value_heads=config.get("num_key_value_heads") or heads,
                   head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                   rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
                   attention_bias=kind == "qwen2", tie_word_embeddings=config.get("tie_word_embeddings", False),
                   model_type=kind)

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
    """Keys and values of every layer, (B, kv_heads, capacity, head_dim); row b may be at its own position."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device, dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.k, self.v = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.length = capacity  # entries that the longest row fills; attention need not look further

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, kv_heads, T, D) at `positions` (B, T); return all entries so far."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[self.rows, :, positions] = new.transpose(1, 2)
        return self.k[layer, :, :, :self.length], self.v[layer, :, :, :self.length]

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these."""
        self.k, self.v, self.rows = self.k[:, rows], self.v[:, rows], self.rows[:len(rows)]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, head_dim) of the rotary position embedding (Su et al. 2021), fp32."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = (positions[:, None, :, None].float() * inverse).repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head, (B, H, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None,
                positions: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=q.shape[1] != k.shape[1])
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
        return self.model.norm.weight.device

    def n_params(self) -> int:
        """Number of parameters, tied ones counted once (paper table 6)."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens: Tensor, targets: Tensor | None = None, positions: Tensor | None = None,
                cache: KVCache | None = None, last: Tensor | None = None,
                reduction: str = "mean") -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, vocab) and, with targets, the cross-entropy in nats (fp32).

        tokens, targets: (B, T) int64; a target of -100 counts for nothing. reduction: mean, sum or none (-> (B, T)).
        positions: (B, T) int64, each token's place in its utterance; where it is 0 a new utterance begins, and no
            attention crosses that border. None: every row is one utterance.
        cache: with a KVCache, `positions` (B, T) says where the new tokens go, and each sees all before it.
        last: (B,) int64, the one position of each row whose logits are wanted -> (B, 1, vocab).
        """
        B, T = tokens.shape
        mask = None
        if cache is not None:
            assert positions is not None and targets is None
            mask = torch.arange(cache.length, device=tokens.device) <= positions[:, None, :, None]
        elif positions is not None:
            utterance = (positions == 0).cumsum(1)
            mask = (utterance[:, None, :, None] == utterance[:, None, None, :]).tril()
        else:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, cos, sin, mask, cache, positions)
        if last is not None:
            x = x[torch.arange(B, device=x.device), last][:, None]
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = F.linear(self.model.norm(x), head.weight)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                               reduction=reduction)
        return logits, loss.view(B, T) if reduction == "none" else loss

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, repetition_penalty: float = 1.0, stop: tuple[int, ...] = (1,),
                 forbid: tuple[int, ...] = (0,), generator: torch.Generator | None = None,
                 progress=None) -> list[list[int]]:
        """Sample a continuation of each prompt; the new tokens only, without the stop token.

        temperature 0 is greedy. `forbid`: tokens never drawn. `progress(n_done, n_rows)` is called every few steps.
        generate([[1, 17]], 3, temperature=0) -> [[44, 9, 300]]
        """
        assert all(prompts), "a prompt needs at least one token (BOS)"
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
        cache = KVCache(self.config, len(prompts), max(lengths) + max_new_tokens, device, dtype)
        cache.length = max(lengths)
        positions = torch.arange(max(lengths), device=device).expand(tokens.shape)
        position = torch.tensor(lengths, device=device) - 1  # of each row's newest token
        logits = self(tokens, positions=positions, cache=cache, last=position)[0][:, 0]

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
                if progress:
                    progress(step + 1, len(alive))
                if done.all():
                    break
                keep = (~done).nonzero()[:, 0]
                if len(keep) < 0.8 * len(done):
                    cache.keep(keep)
                    alive, token, position, done, seen = (x[keep] for x in (alive, token, position, done, seen))
            if step == max_new_tokens - 1:
                break
            seen[torch.arange(len(alive), device=device), token] = True
            position, cache.length = position + 1, cache.length + 1
            logits = self(token[:, None], positions=position[:, None], cache=cache)[0][:, 0]
        return [[t for t in row if t >= 0] for row in new.tolist()]

    # ------------------------------------------------------------ folders

    @classmethod
    def from_pretrained(cls, name: str) -> "UnitLM":
        """Load a hub id, a local folder or `embedded:NAME` (fp32). SystemExit if it is missing, partial or foreign."""
        folder = fetch(name)
        try:
            config = json.loads((folder / "config.json").read_text())
            lm = cls(ModelConfig.from_hf(config, str(folder / "config.json")))
            state = {k: v for path in weight_files(folder) for k, v in load_file(path).items()}
        except (OSError, ValueError, KeyError) as e:
            raise SystemExit(f"{name}: not a whole checkpoint folder of a Qwen2 or Llama type: {e}") from None
        except Exception as e:  # safetensors' own error type for a truncated file
            if type(e).__name__ != "SafetensorError":
                raise
            raise SystemExit(f"{name}: damaged weights ({e}); copy or train it again") from None
        state = {k: v.float() for k, v in state.items() if not k.endswith("rotary_emb.inv_freq")}
        if lm.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        expected = {k: tuple(v.shape) for k, v in lm.state_dict().items()}
        found = {k: tuple(v.shape) for k, v in state.items()}
        if found != expected:
            missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
            other = [f"{k} {found[k]} instead of {v}" for k, v in expected.items() if found.get(k, v) != v]
            raise SystemExit(f"{name}: weights do not fit config.json: missing {missing[:3]}, "
                             f"unexpected {unexpected[:3]}, of another shape {other[:3]}")
        lm.load_state_dict(state)
        return lm

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
        config = ModelConfig(**asdict(base.config) | {
            "vocab_size": vocab_size, "num_hidden_layers": n_layers or base.config.num_hidden_layers,
            "rope_theta": rope_theta or base.config.rope_theta, "tie_word_embeddings": True,
            "max_position_embeddings": context or base.config.max_position_embeddings})
        if config.num_hidden_layers > base.config.num_hidden_layers:
            raise ValueError(f"{base_name} has {base.config.num_hidden_layers} layers, not {n_layers}")
        if init == "first_rows" and vocab_size > base.config.vocab_size:
            raise ValueError(f"{base_name} has {base.config.vocab_size} embedding rows, fewer than vocab_size "
                             f"{vocab_size}; use init random")
        lm = cls(config)
        if init != "none":
            state = lm.state_dict()
            kept = {k: v for k, v in base.state_dict().items() if k in state}
            rows = kept.pop("model.embed_tokens.weight")
            if init == "first_rows":
                state["model.embed_tokens.weight"] = rows[:vocab_size]
            lm.load_state_dict(state | kept)
        return lm

    def save_pretrained(self, folder: str | Path, slam: dict | None = None, trainer: dict | None = None) -> None:
        """Write config.json, model.safetensors (+ slam.json, trainer.pt) beside `folder`, then swap it in.

        A kill at any moment leaves a whole checkpoint: the old one or the new one.
        """
        folder = Path(folder).resolve()
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        state = {k: v.detach().contiguous() for k, v in self.state_dict().items()}
        save_file(state, new / "model.safetensors", metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(self.config.to_hf(), indent=2) + "\n")
        if slam is not None:
            (new / "slam.json").write_text(json.dumps(slam, indent=2) + "\n")
        if trainer is not None:
            torch.save(trainer, new / "trainer.pt")
        swap_in(new, folder)


def swap_in(new: Path, folder: Path) -> None:
    """Put the finished folder `new` in the place of `folder`; `recover` mends a kill between the two renames."""
    recover(folder)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """After a kill between `swap_in`'s two renames: bring the old checkpoint back."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def fetch(name: str) -> Path:
    """Local folder of a model name; a hub id is downloaded into Hugging Face's own cache first."""
    folder = Path(name).resolve()
    old = folder.with_name(folder.name + ".old")
    if old.is_dir() and not folder.exists():  # killed, or just now, between swap_in's renames; reading mends nothing
        return old
    source = resolve(name)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as e:  # huggingface_hub raises a dozen types here; to the user they are one
        raise SystemExit(f"{name}: no such folder here, and not to be had from the Hugging Face hub "
                         f"({type(e).__name__}); check the name and the network") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder, sharded or not. FileNotFoundError if there are none, or one is missing."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else \
        ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{name} is missing")
    return [folder / name for name in names]


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, repetition_penalty: float, seen: Tensor,
           forbid: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draw a token (B,) from logits (B, V) after repetition penalty (Keskar et al. 2019), temperature, top-k and top-p.

    `seen` (B, V) bool marks the tokens that the penalty applies to; temperature 0 takes the most likely token.
    """
    if repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if forbid:
        logits[:, list(forbid)] = -torch.inf
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
