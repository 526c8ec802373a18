"""The unit language model: a decoder-only transformer (Qwen2 or Llama) with TWIST initialisation and generation.

    lm = UnitLM.twist("Qwen/Qwen2.5-0.5B", vocab_size=502)   # a text LM becomes a unit LM
    logits, loss = lm(tokens, targets, positions)            # (B, T) int64 each; positions restart with an utterance
    lm.generate([[1, 17, 403]], max_new_tokens=100)          # with a KV cache, batched over prompts of any lengths
    lm.save_pretrained("out/slam/checkpoint")                # a folder that AutoModelForCausalLM reads as it is
    python model.py export out/slam slam_for_slamkit         # the same in SlamKit's layout; their folders load here too

Parameters have transformers' names. OPT and Pythia run in transformers' code, with the same methods (slam/hub_lm.py).
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slam.attention import KVCache, Mask, attend, compiled_decode, packed_mask
from slam.checkpoint import load_weights, read_folder, write_folder
from slam.device import matmul_dtype, with_linear_layers_in
from slam.loss import head_loss

INITS = ("first_rows", "random", "none", "keep_text", "keep_text_random")
HUB_TYPES = ("opt", "gpt_neox")  # model types that run in transformers' code
VOCABULARY = ("embed_tokens.weight", "embed_in.weight", "lm_head.weight", "embed_out.weight")  # a row for each token


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
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 1024
    first_text_token: int = 0  # of a model of speech and text, after units and markers; 0: the model has no text
    model_type: str = "qwen2"  # (biases on q, k and v) or llama (none): the class that transformers loads

    def __post_init__(self):
        if self.model_type not in ("qwen2", "llama") or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("model_type is qwen2 or llama, num_attention_heads a multiple of num_key_value_heads")

    @classmethod
    def from_hf(cls, config: dict) -> "ModelConfig":
        """From the config.json of a Qwen2, Llama or MobileLLM. Raises ValueError for what this decoder cannot do."""
        kind, tied = config.get("model_type"), config.get("tie_word_embeddings", False)
        if kind == "mobilellm":  # a Llama by another name, with another name for tying
            kind, tied = "llama", config.get("share_embedding", True)
        rope = (config.get("rope_parameters") or {}) | (config.get("rope_scaling") or {})  # the newer name, the older
        unsupported = {f"model_type {kind!r}": kind not in ("qwen2", "llama"),
                       "rope type": (rope.get("type") or rope.get("rope_type")) not in (None, "default"),
                       "o_proj bias": kind == "llama" and config.get("attention_bias"),
                       "sliding window": config.get("use_sliding_window"), "layer sharing": config.get("layer_sharing"),
                       "MLP bias": config.get("mlp_bias"), "activation": config.get("hidden_act", "silu") != "silu"}
        if any(unsupported.values()):
            raise ValueError(f"not supported: {', '.join(k for k, v in unsupported.items() if v)}; what runs here: "
                             f"qwen2, llama, mobilellm, {', '.join(HUB_TYPES)}, and SlamKit's speech_language_model")
        same = {k: config[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                       "num_attention_heads", "rms_norm_eps", "max_position_embeddings")}
        same |= {k: v for k, v in config.items() if k in cls.__dataclass_fields__}  # also fields that a fork adds
        return cls(**same | dict(
            num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            tie_word_embeddings=tied, model_type=kind))

    def to_hf(self) -> dict:
        """The config.json of a Qwen2ForCausalLM or LlamaForCausalLM."""
        shape = {k: v for k, v in asdict(self).items() if v or k != "first_text_token"}
        return shape | {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"], "hidden_act": "silu",
                        "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
                        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "dtype": "float32"}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return y.to(matmul_dtype(x))  # one cast here serves all linear layers that read it


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
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        bias = config.model_type == "qwen2"
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None,
                positions: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)
        y = attend(q, k, v, mask)  # (B, heads, T, head_dim)
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


class UnitLM(nn.Module):
    """Decoder with a language-model head; the module's docstring shows its use."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps)))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # not the norms', which are ones
                nn.init.normal_(p, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def n_params(self) -> int:
        """Number of parameters, tied ones counted once (paper, table 7)."""
        return sum(p.numel() for p in self.parameters())

    def hf_config(self) -> dict:
        """The config.json that describes this model to transformers."""
        return self.config.to_hf()

    def set_activation_checkpointing(self, on: bool) -> None:
        """Keep only blocks' inputs for the backward pass, recompute the rest: a third more work (Chen et al. 2016)."""
        self.activation_checkpointing = on

    def forward(self, tokens: Tensor, targets: Tensor | None = None, positions: Tensor | None = None,
                mask: Mask = None, cache: KVCache | None = None, last: Tensor | None = None,
                reduction: str = "mean") -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, vocab) and, with targets, the cross-entropy in nats (fp32).

        With targets from a large vocabulary the logits are None (slam/loss.py).
        tokens, targets: (B, T) int64; targets of -100 are ignored. reduction: mean, sum or none (-> (B, T)).
        positions: (B, T) int64, counted from 0 in each utterance of a packed row, which attends to itself alone
            (slam/attention.py; also several continuations of a shared prefix). None: each row is one utterance.
        mask: `packed_mask` of the positions, made beforehand; compiled code on a GPU is fast only with it.
        cache: keys and values of earlier tokens; `positions` are then those of the new tokens.
        last: (B,) int64, the only position of each row whose logits are wanted -> logits (B, 1, vocab).
        """
        B, T = tokens.shape
        x = self.model.embed_tokens(tokens)
        if positions is None:  # plain causal attention
            assert cache is None or cache.length == T
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        elif cache is not None:
            mask = torch.arange(cache.length, device=tokens.device) <= positions[:, None, :, None]
        elif mask is None:
            mask = packed_mask(positions, tokens.device, matmul_dtype(x))
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        for block in self.model.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, cache, positions, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, positions)
        if last is not None:
            x = x[torch.arange(B, device=x.device), last][:, None]
        x = self.model.norm(x)
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return (F.linear(x, head.weight), None) if targets is None else head_loss(x, head.weight, targets, reduction)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, repetition_penalty: float = 1.0, stop: tuple[int, ...] = (1,),
                 forbid: tuple[int, ...] = (0,), generator: torch.Generator | None = None, progress=None,
                 compile: bool = False) -> list[list[int]]:
        """Sample a continuation of each prompt: its new tokens, without the stop token that ends it.

        temperature: 0 takes the most likely token; the other settings are those of `sample`.
        stop: tokens that end a row; without one it has max_new_tokens. forbid: tokens that are never drawn.
        progress: called every 8 steps with the tokens so far, (B, n) int64, -1 after a row's end; True ends all rows.
        compile: compile the step, over a cache of fixed size; pays where many batches of the same size follow.
        generate([[1, 17]], 3, temperature=0) -> [[44, 9, 300]]
        """
        assert all(prompts) and temperature >= 0, "a prompt needs at least one token (BOS), a temperature 0 or more"
        if not prompts or not max_new_tokens:
            return [[] for _ in prompts]
        device, B, width = self.device, len(prompts), max(map(len, prompts))

        # All prompts at once, padded on the right by their own last token. A row's new tokens overwrite its padding in
        # the cache, and no token attends to positions after its own.
        tokens = torch.tensor([p + p[-1:] * (width - len(p)) for p in prompts], device=device)
        position = torch.tensor([len(p) - 1 for p in prompts], device=device)  # of each row's newest token
        seen = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=device).scatter_(1, tokens, True)
        capacity, dtype = width + max_new_tokens, matmul_dtype(self.model.norm.weight)
        lm = with_linear_layers_in(dtype, self)
        if compile:
            capacity = -(-capacity // 128) * 128  # prompts of similar lengths share a compiled step and its cache
            decode, cache = compiled_decode(self.__dict__.setdefault("static", {}), lm, B, capacity, dtype)
        else:
            decode, cache = lm._decode, KVCache(self.config, B, capacity, device, dtype)
        cache.length = width
        logits = lm(tokens, cache=cache, last=position)[0][:, 0]
        cache.length = capacity if compile else width

        # Token by token. Rows that have ended run on, unread, until they are dropped.
        stops = torch.tensor(stop, device=device, dtype=torch.long)
        new = torch.full((B, max_new_tokens), -1, device=device)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        prompt = torch.arange(B, device=device)  # number of each row's prompt
        for step in range(max_new_tokens):
            token = sample(logits.float(), temperature, top_k, top_p, repetition_penalty, seen, forbid, generator)
            done = done | torch.isin(token, stops)
            new[prompt, step] = torch.where(done, -1, token)
            if step % 8 == 7 or step == max_new_tokens - 1:  # not at every step: the CPU waits for the GPU here
                if progress and progress(new[:, :step + 1]) or done.all() or step == max_new_tokens - 1:
                    break
                keep = (~done).nonzero()[:, 0]
                if len(keep) < 0.8 * len(done) and not compile:
                    cache.keep(keep)
                    prompt, token, position, done, seen = (x[keep] for x in (prompt, token, position, done, seen))
            seen.scatter_(1, token[:, None], True)
            position = position + 1
            cache.length = min(cache.length + 1, capacity)
            logits = decode(token, position, cache)
        return [[t for t in row if t >= 0] for row in new.tolist()]

    def _decode(self, token: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        """A token of each row (B,) at its position (B,) -> logits of the next (B, vocab)."""
        return self(token[:, None], positions=position[:, None], cache=cache)[0][:, 0]

    @classmethod
    def from_pretrained(cls, name: str) -> "UnitLM":
        """Load a hub id, folder (ours, SlamKit's, transformers') or embedded:NAME, in fp32. SystemExit if it fails."""
        config, state = read_folder(name)
        try:
            lm = from_config(config)
        except (ValueError, KeyError) as e:
            raise SystemExit(f"{name}: config.json: not a model that runs here ({type(e).__name__}: {e})") from None
        load_weights(lm, state, name)
        return lm

    @classmethod
    def twist(cls, base_name: str, vocab_size: int, init: str = "first_rows", n_layers: int | None = None,
              rope_theta: float | None = None, context: int | None = None) -> "UnitLM":
        """Make a unit LM from a text LM (TWIST, Hassid et al. 2023): keep its body, replace its vocabulary.

        init: unit embeddings. `first_rows`: the text embedding's first rows, as in SlamKit. `random`: N(0, 0.02).
            `none`: keep only the base's shape, to train from scratch. `keep_text`, for speech and text in one model:
            units and markers get new rows before the text's, with its mean and spread (keep_text_random: N(0, 0.02)).
        n_layers: keep the first n blocks. rope_theta: the paper's is 10000 for every base. context: longest row, in
            tokens. None keeps the base's. Raises ValueError for what the base cannot give.
        """
        base = cls.from_pretrained(base_name)
        config = base.hf_config()
        rows, keep_text = config["vocab_size"], init.startswith("keep_text")
        if init not in INITS:
            raise ValueError(f"TWIST init {init!r}; expected one of {', '.join(INITS)}")
        if n_layers is not None and not 1 <= n_layers <= config["num_hidden_layers"]:
            raise ValueError(f"{base_name} has {config['num_hidden_layers']} layers, not {n_layers}")
        if init == "first_rows" and vocab_size > rows:
            raise ValueError(f"{base_name} has {rows} embedding rows, fewer than vocab_size {vocab_size}; use init "
                             f"random")
        if keep_text and (vocab_size <= rows or config["model_type"] in HUB_TYPES):
            raise ValueError(f"{base_name} ({rows} tokens): init {init} needs a Qwen2 or Llama, and a vocabulary with "
                             f"its text, not {vocab_size} tokens")
        n_new = vocab_size - rows if keep_text else 0
        lm = from_config(twisted(config, vocab_size, n_layers, rope_theta, context, n_new))
        theirs = base.state_dict()
        for name, weight in lm.state_dict().items():  # these share their memory with the parameters
            if n_new and name.endswith(VOCABULARY):
                weight[n_new:] = theirs[name]
                if init == "keep_text":
                    weight[:n_new].normal_().mul_(theirs[name].std(0)).add_(theirs[name].mean(0))
            elif init != "none" and (init != "random" or not name.endswith(VOCABULARY)):
                weight.copy_(theirs[name][:len(weight)])
        return lm

    def save_pretrained(self, folder: str | Path, slam: dict | None = None, trainer: dict | None = None) -> None:
        """Write a checkpoint folder; a kill at any moment leaves the whole old one or the whole new one."""
        write_folder(folder, self.hf_config(), self.state_dict(), slam, trainer)


def from_config(config: dict) -> nn.Module:
    """A new UnitLM or HubLM of the shape of a config.json. Raises ValueError or KeyError if it does not run here."""
    if config.get("model_type") in HUB_TYPES:
        from slam.hub_lm import HubLM
        return HubLM(config)
    return UnitLM(ModelConfig.from_hf(config))


def twisted(config: dict, vocab_size: int, n_layers: int | None = None, rope_theta: float | None = None,
            context: int | None = None, n_new: int = 0) -> dict:
    """The config.json of a text LM -> that of the unit LM made from it; None keeps the base's value.

    n_new: if the text's tokens are kept, the number of new tokens before them.
    """
    kind, limit = config["model_type"], config["max_position_embeddings"]
    if kind == "opt":  # learned positions: their number stays, and there is no rotary embedding
        if (context or 0) > limit:
            raise ValueError(f"context {context}: OPT has learned positions, {limit} of them")
        context = rope_theta = None
    new = {"vocab_size": vocab_size, "num_hidden_layers": n_layers or config["num_hidden_layers"],
           "max_position_embeddings": context or limit, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if n_new:
        new["first_text_token"] = n_new
    elif kind not in HUB_TYPES:
        new["tie_word_embeddings"] = True  # also where the base's are not; the paper's Qwen and Llama bases are tied
    if rope_theta:
        new["rope_parameters"] = (config.get("rope_parameters") or {}) | {"rope_theta": rope_theta}
    return config | new


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, repetition_penalty: float, seen: Tensor,
           forbid: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draw a token (B,) from logits (B, V) after repetition penalty (Keskar et al. 2019), temperature, top-k and top-p.

    `seen` (B, V) bool marks the tokens that the penalty applies to; temperature 0 takes the most likely token; top_k 0
    and top_p 1 cut nothing. Overwrites `logits` in place at the tokens of `forbid` (numbers or slices of numbers).
    """
    if repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    for token in forbid:  # one by one: a list as an index would be copied to the GPU, and waited for
        logits[:, token] = -torch.inf
    if temperature == 0:
        return logits.argmax(-1)
    # Sorted best first, but only if needed: sorting and drawing noise for fewer tokens is faster.
    k = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1]
    values, tokens = logits.topk(k) if k < logits.shape[-1] or top_p < 1 else (logits, None)
    p = (values / temperature).softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # keep the smallest set that reaches top_p
    # The exponential race: exact sampling without torch.multinomial's host sync.
    drawn = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)
    return drawn if tokens is None else tokens.gather(-1, drawn[:, None])[:, 0]


if __name__ == "__main__":
    from slam.slamkit import export
    export(UnitLM.from_pretrained)
