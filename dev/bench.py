"""Speed and memory of the stages, compared in one process with a peer: SlamKit, TRL or transformers.

    python dev/bench.py train config/slam.py                 # tokens/s of training: ours, and as SlamKit trains
    python dev/bench.py dpo --checkpoint out/demo/lm         # pairs/s of DPO: ours, SlamKit's way, TRL if installed
    python dev/bench.py generate --checkpoint out/demo/lm    # tokens/s of sampling: ours, and transformers' generate
    python dev/bench.py eval --checkpoint out/demo/lm        # pairs/s of scoring: ours, and SlamKit's loop
    python dev/bench.py memory config/slam.py                # GPU memory of a training run, counted without a GPU
    python dev/bench.py units --input out/study/data/audio   # hours per hour of speech to units, and each stage of it
    python dev/bench.py vocoder                              # seconds of speech per second: ours, and a unit HiFi-GAN

Each case is one JSON line: ours, peer, their ratio, the shape, the device and the versions. On a CPU the two sides take
turns, so that other work on the machine slows both; on a GPU they run one after the other, so that memory suffices.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import contextlib
import copy
import importlib.util
import io
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from torch import Tensor

from config import load_config
from dpo import Config as DpoConfig
from dpo import Data, backward, completion_logps, dpo_loss, load_pairs, step_rows
from dpo import complete as complete_dpo
from model import ModelConfig, UnitLM, from_config, twisted
from prepare_units import Config as UnitsConfig
from prepare_units import extract
from slam.audio import SAMPLE_RATE, load_audio
from slam.benchmarks import read_manifest, tokenize_pairs, units_cache
from slam.checkpoint import checkpoint_fingerprint, fetch
from slam.costs import flops_per_token, peak_flops
from slam.device import autocast, compiled, pick_device
from slam.embedded import resolve
from slam.hifigan import HifiGan
from slam.optim import make_optimizer, update
from slam.packing import Epochs, Loader, Rows, cut
from slam.scoring import PrefixPair, pair_nlls
from slam.tokenizer import SpeechTokenizer, WhisperFrames, assign, find_codebook, write_codebook
from slam.units import IGNORE, UnitReader, UnitWriter, to_tokens
from slam.vocoder import Vocoder
from train import Config as TrainConfig
from train import accumulate, build


def report(case: str, ours: float, peer: float, unit: str, **more) -> None:
    """Print one case."""
    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(json.dumps({"case": case, "ours": round(ours, 1), "peer": round(peer, 1), "unit": unit,
                      "ratio": round(ours / peer, 2), **more, "device": name, "torch": torch.__version__,
                      "transformers": transformers.__version__}), flush=True)


def rates(sides: dict[str, Callable[[], Callable[[], int]]], rounds: int, warm: int = 2) -> dict[str, tuple]:
    """Median rate and peak GPU memory (GB) of each side; a side makes a function that works and returns its count."""
    def seconds_per(work: Callable[[], int]) -> float:
        started = time.perf_counter()
        n = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / n

    found = {name: [] for name in sides}
    if torch.cuda.is_available():
        memory = {}
        for name, make in sides.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            work = make()
            found[name] = [seconds_per(work) for _ in range(warm + rounds)][warm:]
            memory[name] = torch.cuda.max_memory_allocated() / 1e9
            del work
    else:
        memory, made = dict.fromkeys(sides), {name: make() for name, make in sides.items()}
        for i in range(warm + rounds):
            for name, work in made.items():
                found[name] += [seconds_per(work)] * (i >= warm)
    return {name: (1 / statistics.median(x), memory[name]) for name, x in found.items()}


def packs(device: torch.device, dtype: str) -> bool:
    """Whether SlamKit can pack chunks into one row here, for which it demands FlashAttention 2, which has no fp32."""
    return device.type == "cuda" and dtype != "float32" and transformers.utils.is_flash_attn_2_available()


def peer_model(lm: UnitLM, attention: str = "sdpa") -> torch.nn.Module:
    """transformers' own model with the same shape and weights."""
    config = transformers.AutoConfig.for_model(**lm.hf_config())
    with pick_device():  # else half a minute goes into initial weights, which are replaced
        hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    hf.load_state_dict(lm.state_dict(), strict=False)  # not strict: a tied head is in it twice
    return hf.to(next(lm.parameters()).device)


# ---------------------------------------------------------------- training
@dataclass
class BenchTrain(TrainConfig):
    """Training steps, ours and the peer's; the settings are those of train.py."""
    peer_micro_batch: int = 8  # chunks in a forward pass of the peer (SlamKit's default)
    rounds: int = 5  # steps timed of each side, after two more

    def problems(self) -> list[str]:
        """A run's length is of no interest."""
        return [x for x in super().problems() if "exactly one of" not in x]


def peer_batch(reader: UnitReader, chunks: np.ndarray, packed: bool) -> dict[str, Tensor]:
    """Arguments of transformers' model for chunks (n, 3) of `cut`, as SlamKit's collators make them.

    Padded on the right, (n, longest), with an attention mask; packed: one row, (1, sum), with positions.
    """
    parts = [torch.from_numpy(reader.tokens(i)[at:at + n + 1].astype(np.int64)) for i, at, n in chunks.tolist()]
    if packed:
        tokens, positions = torch.cat(parts)[None], torch.cat([torch.arange(len(x)) for x in parts])[None]
        return {"input_ids": tokens, "position_ids": positions, "labels": tokens.masked_fill(positions == 0, IGNORE)}
    tokens, mask = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
                    for x in (parts, [torch.ones_like(x) for x in parts]))
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, IGNORE)}


def peer_training(cfg: BenchTrain, reader: UnitReader, lm: UnitLM, device: torch.device) -> Callable[[], int]:
    """What SlamKit runs: transformers' model and loss, torch's AdamW (fused: faster), bf16 autocast, not compiled.

    Utterances are cut one by one into chunks of at most `context` tokens, which are not filled up and drawn at random:
    `peer_micro_batch` in a forward pass, and as many a step as hold our number of tokens. SlamKit packs chunks into
    one row only with FlashAttention 2 and refuses to do so without; then it pads.
    """
    packed = packs(device, cfg.dtype)
    hf = peer_model(lm, "flash_attention_2" if packed else "sdpa").train()
    hf.to(device, torch.bfloat16 if cfg.dtype == "pure_bfloat16" else torch.float32)
    optimizer = torch.optim.AdamW(hf.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    chunks, rng = cut(reader.lengths, cfg.context), np.random.default_rng(cfg.seed)
    passes = max(1, round(cfg.batch_tokens / (chunks[:, 2].mean() * cfg.peer_micro_batch)))

    def step() -> int:
        chosen = chunks[rng.choice(len(chunks), (passes, cfg.peer_micro_batch))]
        n = int(chosen[..., 2].sum())
        for micro in chosen:
            batch = {k: x.to(device) for k, x in peer_batch(reader, micro, packed).items()}
            with autocast(device, cfg.dtype):
                hf(**batch, use_cache=False, num_items_in_batch=n).loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), cfg.grad_clip)
        optimizer.step()
        hf.zero_grad()
        return n

    return step


def our_training(cfg: BenchTrain, reader: UnitReader, lm: UnitLM, device: torch.device) -> Callable[[], int]:
    """train.py's step: filled rows, prefetched; compiled on a GPU."""
    lm.to(device, torch.bfloat16 if cfg.dtype == "pure_bfloat16" else torch.float32).train()
    lm.set_activation_checkpointing(cfg.activation_checkpointing)
    forward = compiled(lm, cfg.compile)
    optimizer, done = make_optimizer(lm, cfg), 0
    loader = Loader(reader, Rows(reader.lengths, cfg.context, cfg.batch_tokens // cfg.context, cfg.seed),
                    cfg.micro_batch, device)

    def step() -> int:
        nonlocal done
        micro, n = loader.step(done)
        accumulate(forward, micro, n, device, cfg.dtype)
        update(lm, optimizer, cfg.lr, cfg.grad_clip)
        done += 1
        return n

    return step


def bench_train(cfg: BenchTrain) -> None:
    """Useful tokens (targets) per second, MFU and peak memory of both sides."""
    device = pick_device()
    torch.set_float32_matmul_precision("high")
    reader = UnitReader(*cfg.train)
    lm = build(cfg, reader.fingerprint.vocab_size)
    flops, peak = flops_per_token(lm, cfg.context), peak_flops(device)
    shape = f"{lm.n_params() / 1e6:.1f}M, context {cfg.context}, micro-batch {cfg.micro_batch}, {cfg.dtype}"
    found = rates({"ours": lambda: our_training(cfg, reader, lm, device),
                   "peer": lambda: peer_training(cfg, reader, lm.cpu(), device)}, cfg.rounds)
    (ours, our_memory), (peer, peer_memory) = found["ours"], found["peer"]
    chunks = cut(reader.lengths, cfg.context)[:, 2]
    more = {"mfu": round(ours * flops / peak, 3), "peer_mfu": round(peer * flops / peak, 3)} if peak else {}
    if our_memory:
        more |= {"memory_gb": round(our_memory, 2), "peer_memory_gb": round(peer_memory, 2)}
    report("train", ours, peer, "useful tokens/s", **more, shape=shape, mean_chunk=round(float(chunks.mean()), 1),
           optimizer=cfg.optimizer, compile=cfg.compile, peer_rows="packed" if packs(device, cfg.dtype) else "padded",
           peer_micro_batch=cfg.peer_micro_batch)


# ---------------------------------------------------------------- preference tuning
@dataclass
class BenchDpo(DpoConfig):
    """Steps of DPO, ours and the peer's; the settings are those of dpo.py."""
    peer_micro_batch: int = 4  # pairs in a forward pass of the peer, which are twice as many sequences (the paper's)
    trl: bool = True  # time TRL's DPOTrainer too, if it is installed
    rounds: int = 3  # steps timed of each side, after one more


def our_dpo(cfg: BenchDpo, lm: UnitLM, pairs: list[PrefixPair], first_epoch: bool) -> Callable[[], int]:
    """dpo.py's step. first_epoch: with the reference's log-probabilities of its pairs, which are computed just once."""
    device, order, done = pick_device(), Epochs(len(pairs), cfg.seed), 0
    lm = copy.deepcopy(lm).to(device).train()
    forward, optimizer = compiled(lm, cfg.compile), make_optimizer(lm, cfg)
    width = cfg.context if forward is not lm else 0
    data = Data.of(pairs, torch.zeros(len(pairs), 2), device)

    def step() -> int:
        nonlocal done
        ids, done = [order[done * cfg.batch_pairs + i] for i in range(cfg.batch_pairs)], done + 1
        if first_epoch:
            data.reference[ids] = completion_logps(lm, [pairs[i] for i in ids], cfg, "").to(device)
        backward(forward, data, step_rows(ids, pairs, cfg, width), cfg, width)
        update(lm, optimizer, cfg.lr, cfg.grad_clip)
        return cfg.batch_pairs

    return step


def peer_dpo(cfg: BenchDpo, lm: UnitLM, pairs: list[PrefixPair]) -> Callable[[], int]:
    """What SlamKit runs, by TRL: chosen and rejected sequences, prompt and all, padded on the right in one batch,
    through the policy and a frozen copy of the starting model."""
    device, order, done = pick_device(), Epochs(len(pairs), cfg.seed), 0
    policy, reference = peer_model(lm).to(device).train(), peer_model(lm).to(device).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)

    def logps(hf: torch.nn.Module, batch: list[PrefixPair]) -> Tensor:
        both = [(p.prefix, p.first) for p in batch] + [(p.prefix, p.second) for p in batch]
        tokens, mask, completion = torch.zeros(3, len(both), max(len(a) + len(b) for a, b in both), dtype=torch.long)
        for row, (a, b) in enumerate(both):
            n = len(a) + len(b)
            tokens[row, :n], mask[row, :n], completion[row, len(a):n] = torch.tensor(a + b), 1, 1
        tokens, mask, completion = (x.to(device) for x in (tokens, mask, completion))
        with autocast(device, cfg.dtype):
            logits = hf(tokens, attention_mask=mask, use_cache=False).logits
        found = logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return (found * completion[:, 1:]).sum(1).view(2, -1)

    def step() -> int:
        nonlocal done
        ids, done = [order[done * cfg.batch_pairs + i] for i in range(cfg.batch_pairs)], done + 1
        for at in range(0, len(ids), cfg.peer_micro_batch):
            batch = [pairs[i] for i in ids[at:at + cfg.peer_micro_batch]]
            with torch.no_grad():
                frozen = logps(reference, batch)
            loss = dpo_loss(*logps(policy, batch), *frozen, cfg.beta)[0]
            (loss * len(batch) / cfg.batch_pairs).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        optimizer.step()
        policy.zero_grad()
        return cfg.batch_pairs

    return step


def trl_dpo(cfg: BenchDpo, lm: UnitLM, pairs: list[PrefixPair]) -> float | None:
    """Pairs per second of TRL's DPOTrainer, the median of `rounds` steps after one; None if it is not installed."""
    if importlib.util.find_spec("trl") is None:
        return None
    from datasets import Dataset
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer
    names = ["<pad>", "<s>", *(f"<Un{u}>" for u in range(lm.config.vocab_size - 2))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<[^>]+>"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<s>",
                                                     bos_token="<s>")
    rows = [{side: "".join(names[t] for t in tokens) for side, tokens in zip(("prompt", "chosen", "rejected"), pair)}
            for pair in pairs]
    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(-time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        bf16 = not isinstance(autocast(pick_device(), cfg.dtype), contextlib.nullcontext)
        arguments = DPOConfig(
            folder, per_device_train_batch_size=cfg.peer_micro_batch, beta=cfg.beta, learning_rate=cfg.lr,
            gradient_accumulation_steps=cfg.batch_pairs // cfg.peer_micro_batch, max_steps=1 + cfg.rounds, bf16=bf16,
            max_length=cfg.context, gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True,
            logging_strategy="no", use_cpu=pick_device().type == "cpu", max_grad_norm=cfg.grad_clip, seed=cfg.seed)
        DPOTrainer(peer_model(lm), peer_model(lm), arguments, train_dataset=Dataset.from_list(rows),
                   processing_class=tokenizer, callbacks=[Clock()]).train()
    return cfg.batch_pairs / statistics.median(times[1:])


def dpo_memory(cfg: BenchDpo, side: str) -> float:
    """GB that two steps of a side take at most on a CPU, the program itself not counted; for a process of its own."""
    def status(name: str) -> float:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6

    lm, pairs = dpo_case(cfg)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    step = our_dpo(cfg, lm, pairs, first_epoch=False) if side == "ours" else peer_dpo(cfg, lm, pairs)
    step()
    step()
    return status("VmHWM") - before


def dpo_case(cfg: BenchDpo) -> tuple[UnitLM, list[PrefixPair]]:
    return UnitLM.from_pretrained(cfg.checkpoint), load_pairs(cfg.pairs, cfg.context)[1]


def bench_dpo(cfg: BenchDpo) -> None:
    """Pairs per second, and peak memory."""
    with contextlib.redirect_stdout(sys.stderr):
        cfg = complete_dpo(cfg)
    lm, pairs = dpo_case(cfg)
    found = rates({"ours": lambda: our_dpo(cfg, lm, pairs, False), "first": lambda: our_dpo(cfg, lm, pairs, True),
                   "peer": lambda: peer_dpo(cfg, lm, pairs)}, cfg.rounds, warm=1)
    memory = {side: found[side][1] for side in ("ours", "peer")}
    if not torch.cuda.is_available() and sys.platform == "linux":
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = {side: pool.apply(dpo_memory, (cfg, side)) for side in ("ours", "peer")}
    (ours, _), (first, _), (peer, _) = found.values()
    trl = trl_dpo(cfg, lm, pairs) if cfg.trl else None
    more = {f"{side}_gb": round(gb, 2) for side, gb in memory.items() if gb}
    if trl:
        more |= {"trl": round(trl, 1), "ratio_trl": round(ours / trl, 2), "trl_version": version("trl")}
    mean = np.mean([[len(x) for x in pair] for pair in pairs], 0).round(1).tolist()
    report("dpo", ours, peer, "pairs/s", ratio_first_epoch=round(first / peer, 2), **more,
           shape=f"{lm.n_params() / 1e6:.1f}M, tokens of prompt, chosen, rejected: {mean}", dtype=cfg.dtype,
           rows=cfg.micro_batch, peer_pairs=cfg.peer_micro_batch, compile=cfg.compile)


# ---------------------------------------------------------------- generation
@dataclass
class BenchGenerate:
    """Sampling, ours and transformers' `generate`, with the same settings."""
    checkpoint: str = ""  # run folder, checkpoint folder or hub id; empty: random weights
    shape: dict = field(default_factory=dict)  # fields of ModelConfig, for random weights; empty: Slam's
    batches: tuple[int, ...] = (1, 16)  # prompts at once
    prompt_units: int = 60  # 3 s
    max_new_tokens: int = 150
    temperature: float = 0.8
    top_k: int = 25
    rounds: int = 5  # timed of each side, after two more


def bench_generate(cfg: BenchGenerate) -> None:
    """New tokens per second of both sides, one case a batch size; weights bf16 on a GPU, fp32 on a CPU."""
    device = pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm = UnitLM.from_pretrained(cfg.checkpoint) if cfg.checkpoint else \
        UnitLM(ModelConfig(**cfg.shape))
    lm = lm.to(device, dtype).eval()
    hf, n = peer_model(lm).to(device, dtype).eval(), cfg.max_new_tokens
    how = {"temperature": cfg.temperature, "top_k": cfg.top_k}
    rng = np.random.default_rng(0)
    for batch in cfg.batches:
        prompts = [to_tokens(rng.integers(0, lm.config.vocab_size - 2, cfg.prompt_units))[:-1] for _ in range(batch)]
        tokens = torch.tensor(prompts, device=device)

        def ours() -> int:
            new = lm.generate(prompts, n, **how, stop=(), forbid=(0, 1), compile=device.type == "cuda")
            return sum(map(len, new))

        def peer() -> int:
            new = hf.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, do_sample=True, **how,
                              top_p=1.0, suppress_tokens=[0, 1], eos_token_id=None, pad_token_id=0)
            return new[:, tokens.shape[1]:].numel()

        found = rates({"ours": lambda: ours, "peer": lambda: peer}, cfg.rounds)
        report("generate", found["ours"][0], found["peer"][0], "new tokens/s", batch=batch, dtype=str(dtype),
               shape=f"{lm.n_params() / 1e6:.1f}M, {cfg.prompt_units} + {n} tokens")


# ---------------------------------------------------------------- scoring of pairs
@dataclass
class BenchEval:
    """Scores of a benchmark's pairs, ours and the peer's: from units, and from audio the first time and later."""
    checkpoint: str = "out/demo/lm"  # run folder, checkpoint folder or hub id
    manifest: str = "out/demo/data/tstorycloze"  # pairs, by their manifest
    pairs: int = 100  # of them, at most
    tokenizer: str = ""  # codebook file; empty: that of the checkpoint's units
    context: int = 1024  # tokens in a row of ours
    dtype: Literal["bfloat16", "float32"] = "float32"  # of both models
    rounds: int = 3  # timed of each side, after one more


def peer_scores(lm: UnitLM, utterances: list[list[int]]) -> list[float]:
    """SlamKit's way: utterances in batches of 8 as they come, padded; mean NLL of each, in the model's type."""
    scores = []
    with torch.inference_mode():
        for at in range(0, len(utterances), 8):
            part = utterances[at:at + 8]
            tokens, mask = torch.zeros(2, len(part), max(map(len, part)), dtype=torch.long)
            for row, x in enumerate(part):
                tokens[row, :len(x)], mask[row, :len(x)] = torch.tensor(x), 1
            tokens, mask = tokens.to(lm.device), mask.to(lm.device)
            logits = lm(tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
            logp = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0] * mask[:, 1:]
            scores += (-logp.sum(1) / mask[:, 1:].sum(1)).tolist()
    return scores


def bench_eval(cfg: BenchEval) -> None:
    """Pairs per second. Audio: the peer tokenises every time, sorted and in batches of 16, which is its faster way."""
    device = pick_device()
    lm = UnitLM.from_pretrained(cfg.checkpoint).eval().to(device)
    hf = peer_model(lm).to(device, getattr(torch, cfg.dtype)).eval()
    codebook = cfg.tokenizer or find_codebook(checkpoint_fingerprint(cfg.checkpoint))
    tokenizer = SpeechTokenizer.load(codebook, device.type)
    benchmark = read_manifest(cfg.manifest)
    benchmark.pairs, benchmark.name = benchmark.pairs[:cfg.pairs], "bench"
    remembered = units_cache(tokenizer, benchmark.name)
    utterances = tokenize_pairs(tokenizer, benchmark)
    sides = [[pair[side] for pair in benchmark.pairs] for side in ("positive", "negative")]

    def ours(pairs: list[tuple]) -> int:
        pair_nlls(lm, pairs, cfg.context, dtype=cfg.dtype)
        return len(pairs)

    def peer(pairs: list[tuple]) -> int:
        for side in zip(*pairs):
            peer_scores(hf, side)
        return len(pairs)

    def first() -> int:
        remembered.unlink(missing_ok=True)
        return ours(tokenize_pairs(tokenizer, benchmark))

    with tempfile.TemporaryDirectory() as temporary:
        works = [peer_units(tokenizer, list(map(Path, paths)), Path(temporary) / "units.jsonl") for paths in sides]
        found = rates({"ours": lambda: lambda: ours(utterances), "peer": lambda: lambda: peer(utterances),
                       "first": lambda: first, "again": lambda: lambda: ours(tokenize_pairs(tokenizer, benchmark)),
                       "peer_audio": lambda: lambda: [work() for work in works] and peer(utterances)}, cfg.rounds, 1)
    remembered.unlink(missing_ok=True)
    lengths = [len(x) for pair in utterances for x in pair]
    for case, a, b in (("eval from units", "ours", "peer"), ("eval from audio", "first", "peer_audio"),
                       ("eval from audio, again", "again", "peer_audio")):
        report(case, found[a][0], found[b][0], "pairs/s", pairs=len(utterances), mean_tokens=round(np.mean(lengths)),
               dtype=cfg.dtype, shape=f"{lm.n_params() / 1e6:.1f}M")


# ---------------------------------------------------------------- memory
@dataclass
class BenchMemory(TrainConfig):
    """Memory of a training run, counted on a CPU; the settings are those of train.py."""

    def problems(self) -> list[str]:
        """No data is needed."""
        return []


def bench_memory(cfg: BenchMemory) -> None:
    """Weights, gradients, optimiser state, and what autograd keeps of one micro-batch, in GB.

    The last is counted tensor by tensor on one and two rows, without torch.compile, and extrapolated; compiled code
    keeps less. What the kernels need for themselves and the allocator wastes comes on top.
    """
    if cfg.shape or cfg.base == TrainConfig().base:  # the hub is not needed for the shape of Qwen2.5-0.5B
        lm = from_config(ModelConfig(**cfg.shape).to_hf())
    else:
        config = json.loads((fetch(cfg.base) / "config.json").read_text())
        lm = from_config(twisted(config, 502, cfg.n_layers, cfg.rope_theta, cfg.context))
    pure = cfg.dtype == "pure_bfloat16"
    lm = lm.to(torch.bfloat16 if pure else torch.float32).train()
    lm.set_activation_checkpointing(cfg.activation_checkpointing)

    def kept_for_backward(rows: int) -> int:
        """Bytes of the storages that autograd holds on to after a forward pass, parameters not counted."""
        tokens = torch.randint(2, lm.config.vocab_size, (rows, cfg.context))
        positions = (torch.arange(cfg.context) % (cfg.context // 2)).expand(rows, -1)  # two utterances a row
        kept, known = [], {p.data_ptr() for p in lm.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x), \
                autocast(torch.device("cpu"), "pure_bfloat16" if pure else "bfloat16"):
            _, loss = lm(tokens, tokens, positions)  # alive, or else what it keeps would be freed and counted anew
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept
                    if x.untyped_storage().data_ptr() not in known}.values())

    one, two = kept_for_backward(1), kept_for_backward(2)
    row, fixed = two - one, 2 * one - two  # fixed: bf16 copies of the weights, under autocast
    if cfg.activation_checkpointing:  # and what of one block is computed again
        lm.set_activation_checkpointing(False)
        row += (kept_for_backward(2) - kept_for_backward(1) - row) // lm.config.num_hidden_layers
    weights = sum(p.numel() * p.element_size() for p in lm.parameters())
    for p in lm.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = make_optimizer(lm, cfg)
    optimizer.step()
    states = getattr(optimizer, "optimizers", [optimizer])
    state = sum(x.numel() * x.element_size() for o in states for s in o.state.values() for x in s.values()
                if isinstance(x, Tensor))
    gb, total = 1e9, 2 * weights + state + fixed + cfg.micro_batch * row
    print(json.dumps({
        "case": "memory", "parameters": lm.n_params(), "weights_and_gradients_gb": round(2 * weights / gb, 2),
        "optimizer_gb": round(state / gb, 2), "activations_gb_per_row": round(row / gb, 3),
        "activations_gb_fixed": round(fixed / gb, 2), "micro_batch": cfg.micro_batch, "total_gb": round(total / gb, 1),
        "optimizer": cfg.optimizer, "dtype": cfg.dtype,
        "activation_checkpointing": cfg.activation_checkpointing, "context": cfg.context}))


# ---------------------------------------------------------------- speech to units
@dataclass
class BenchUnits:
    """Speech to units, ours and the peer's, on the same files and encoder."""
    input: str = "out/study/data/audio"  # folder of audio files
    tokenizer: str = "embedded"  # codebook file, or `hubert`: mHuBERT-25hz's shape, its numbers random, layer 11 of 12
    files: int = 64  # of the folder, at most
    dtype: str = "auto"  # of our encoder; the peer's is float32
    batch_seconds: float = 0.0  # audio that we encode together; 0 as in prepare_units.py
    rounds: int = 3  # timed, after one more
    hour: bool = True  # tokenise an hour in one file as well, and look at the memory that takes


def random_hubert(folder: Path, **shape) -> str:
    """A codebook over a HuBERT base with a frame rate of 25 Hz, both of random numbers: as fast as the real one.

    shape: fields of transformers' HubertConfig that are not the base's.
    """
    torch.manual_seed(0)
    config = transformers.HubertConfig(conv_stride=(5, 2, 2, 2, 2, 2, 4), conv_pos_batch_norm=True, **shape)
    transformers.HubertModel(config).save_pretrained(folder / "hubert")
    write_codebook(folder / "codebook.safetensors", {"centroids": torch.randn(500, config.hidden_size)},
                   {"encoder": folder / "hubert", "layer": config.num_hidden_layers - 1, "unit_rate_hz": 25.0})
    return str(folder / "codebook.safetensors")


def peer_units(tokenizer: SpeechTokenizer, paths: list[Path], out: Path) -> Callable[[], float]:
    """SlamKit's way: files sorted by length, batches of 16 zero-padded, all layers computed, features to the CPU,
    scikit-learn's `predict`, one JSON line a file. Whisper, which it does not know, as transformers feeds it: 30 s."""
    from sklearn.cluster import KMeans
    device, fingerprint = tokenizer.encoder.device, tokenizer.fingerprint
    kmeans = KMeans(fingerprint.n_units, n_init=1, max_iter=1).fit(tokenizer.centroids.cpu().numpy())
    kmeans.cluster_centers_ = tokenizer.centroids.cpu().numpy()
    whisper = isinstance(tokenizer.encoder, WhisperFrames)
    folder = resolve(fingerprint.encoder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder) if whisper else None

    @torch.inference_mode()
    def features(waves: list[np.ndarray]) -> list[Tensor]:
        if whisper:
            mel = extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features.to(device)
            x = model.encoder(mel, output_hidden_states=True).hidden_states[fingerprint.layer]
            x = (x[:, 0::2] + x[:, 1::2]) / 2
        else:
            x = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(w) for w in waves], batch_first=True)
            x = torch.nn.functional.pad(x, (40, 40)).to(device)
            x = model(x, output_hidden_states=True).hidden_states[fingerprint.layer]
        return [row[:len(w) // 640].cpu() for row, w in zip(x, waves)]

    def work() -> float:
        waves = sorted((load_audio(p) for p in paths), key=len)
        with open(out, "w") as lines:
            for at in range(0, len(waves), 16):
                for x in features(waves[at:at + 16]):
                    units, durations = torch.unique_consecutive(torch.from_numpy(kmeans.predict(x.numpy())),
                                                                return_counts=True)
                    lines.write(json.dumps({"units": units.tolist(), "duration": durations.tolist()}) + "\n")
        return sum(map(len, waves)) / SAMPLE_RATE

    return work


def stage_rates(tokenizer: SpeechTokenizer, paths: list[Path], cfg: BenchUnits, out: Path) -> dict[str, float]:
    """Seconds of audio per second of each of our stages alone, called from one thread."""
    import soundfile
    found, seconds = {}, 0.0

    def timed(name, work):
        started = time.perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found[name] = round(seconds / (time.perf_counter() - started), 1)
        return result

    seconds = sum(soundfile.info(p).duration for p in paths)
    waves = timed("decode", lambda: [load_audio(p) for p in paths])
    waves = sorted((w[:tokenizer.encoder.window * tokenizer.encoder.samples_per_frame] for w in waves), key=len)
    seconds = sum(map(len, waves)) / SAMPLE_RATE
    n = max(1, int((cfg.batch_seconds or tokenizer.batch_seconds) * len(waves) / seconds))
    features = timed("encode", lambda: torch.cat([x for at in range(0, len(waves), n)
                                                  for x in tokenizer.features(waves[at:at + n])]))
    frames = timed("assign", lambda: assign(features, tokenizer.centroids).cpu().numpy())

    def write():
        with UnitWriter(out, tokenizer.fingerprint) as writer:
            for i, part in enumerate(np.array_split(frames, len(waves))):
                writer.add(str(i), *tokenizer.finish(part))

    timed("write", write)
    return found


def bench_units(cfg: BenchUnits) -> None:
    import soundfile
    device = pick_device()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        name = random_hubert(folder) if cfg.tokenizer == "hubert" else cfg.tokenizer
        paths = [p for p in sorted(Path(cfg.input).rglob("*")) if p.suffix in (".wav", ".flac")][:cfg.files]
        if not paths:
            raise SystemExit(f"--input={cfg.input}: no wav or flac files; `bash runs/fast_study.sh` makes some")
        tokenizer = SpeechTokenizer.load(name, str(device), cfg.dtype)
        if isinstance(tokenizer.encoder, WhisperFrames):  # the peer hears no more than 30 s
            paths = [p for p in paths if soundfile.info(p).duration <= 30]
        listed = folder / "files.txt"
        listed.write_text("\n".join(str(p.resolve()) for p in paths))
        units = UnitsConfig(input=str(listed), out=str(folder / "ours"), batch_seconds=cfg.batch_seconds,
                            overwrite=True)

        def ours() -> float:
            with contextlib.redirect_stdout(io.StringIO()):
                extract(units, tokenizer)
            return UnitReader(folder / "ours").hours * 3600

        found = rates({"ours": lambda: ours, "peer": lambda: peer_units(tokenizer, paths, folder / "peer.jsonl")},
                      cfg.rounds, warm=1)
        hour = {}
        if cfg.hour:
            wave = np.concatenate([load_audio(p) for p in paths])
            wave = np.resize(wave, 3600 * SAMPLE_RATE)
            soundfile.write(folder / "hour.wav", wave, SAMPLE_RATE)
            # A process of its own; Linux tells its peak as VmHWM (ru_maxrss would begin with that of this process).
            code = ("import sys; from config import load_config; from prepare_units import Config, main; "
                    "main(load_config(Config, sys.argv[1:])); print(open('/proc/self/status').read())")
            started = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code, f"--input={folder}/hour.wav", f"--out={folder}/hour",
                                   f"--tokenizer={name}", f"--dtype={cfg.dtype}",
                                   f"--batch_seconds={cfg.batch_seconds}"],
                                  check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
            hour = {"one_hour_file_minutes": round((time.perf_counter() - started) / 60, 2), "one_hour_file_peak_gb":
                    round(int(re.search(r"VmHWM:\s+(\d+)", done.stdout)[1]) / 1e6, 2)}
        memory = {"our_gb": round(found["ours"][1], 2), "peer_gb": round(found["peer"][1], 2)} if any(
            m for _, m in found.values()) else {}
        report("units", found["ours"][0], found["peer"][0], "x real time", tokenizer=cfg.tokenizer,
               dtype=str(tokenizer.encoder.dtype)[6:], files=len(paths), hours=round(ours() / 3600, 3),
               stages=stage_rates(tokenizer, paths, cfg, folder / "stages"), **hour, **memory)


# ---------------------------------------------------------------- units to speech
@dataclass
class BenchVocoder:
    """Units to speech, ours and HiFi-GAN V1 (Kong et al. 2020) over units, at the same sample rate."""
    vocoder: str = "embedded"  # vocoder file
    seconds: tuple[float, ...] = (10.0, 1.0)  # of speech at once, one case each
    batch: int = 1  # utterances, one after the other
    rounds: int = 5  # timed of each side, after two more


def bench_vocoder(cfg: BenchVocoder) -> None:
    """Seconds of speech per second, durations given; the peer's weights are random, which its speed does not feel."""
    device = pick_device()
    ours = Vocoder.load(cfg.vocoder).to(device)
    n_units, rate = ours.fingerprint.n_units, ours.fingerprint.unit_rate_hz
    rates_of = {12.5: [8, 5, 4, 4, 2], 25.0: [5, 4, 4, 4, 2], 50.0: [5, 4, 4, 2, 2], 100.0: [5, 4, 4, 2]}[rate]
    peer = HifiGan({"num_embeddings": n_units, "embedding_dim": 128, "model_in_dim": 128, "upsample_rates": rates_of,
                    "upsample_kernel_sizes": [2 * r + r % 2 for r in rates_of], "upsample_initial_channel": 512,
                    "resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3,
                    "sampling_rate": ours.sample_rate, "dur_predictor_params": {
                        "encoder_embed_dim": 128, "var_pred_hidden_dim": 128, "var_pred_kernel_size": 3}},
                   ours.fingerprint)
    peer = peer.to(device).eval()
    rng = np.random.default_rng(0)
    for seconds in cfg.seconds:
        rows = [rng.integers(0, n_units, round(seconds * rate)) for _ in range(cfg.batch)]
        durations = [np.ones_like(row) for row in rows]

        def side(vocoder: Vocoder) -> Callable[[], float]:
            return lambda: sum(len(vocoder.synthesize(*x)[0]) for x in zip(rows, durations)) / vocoder.sample_rate

        found = rates({"ours": lambda: side(ours), "peer": lambda: side(peer)}, cfg.rounds)
        sizes = {name: sum(p.numel() for p in v.parameters()) for name, v in (("ours", ours), ("peer", peer))}
        report("vocoder", found["ours"][0], found["peer"][0], "x real time", seconds=seconds, batch=cfg.batch,
               parameters=sizes)


if __name__ == "__main__":
    cases = {"train": (BenchTrain, bench_train), "dpo": (BenchDpo, bench_dpo), "eval": (BenchEval, bench_eval),
             "generate": (BenchGenerate, bench_generate), "memory": (BenchMemory, bench_memory),
             "units": (BenchUnits, bench_units), "vocoder": (BenchVocoder, bench_vocoder)}
    if len(sys.argv) < 2 or sys.argv[1] not in cases:
        raise SystemExit(f"{__doc__.strip()}\n\nusage: python dev/bench.py {'|'.join(cases)} "
                         f"[CONFIG.py ...] [--key=value]")
    Config, run = cases[sys.argv[1]]
    run(load_config(Config, sys.argv[2:], __doc__))
