"""The unit LM against transformers (logits, folders, generation), TWIST, table 6, packing, generation and sampling."""
import itertools
import json
import shutil
from dataclasses import asdict, dataclass, replace

import pytest
import scipy.stats
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

import model
from model import KVCache, ModelConfig, UnitLM, from_config, sample, twisted
from slam import embedded
from slam.attention import compiled_decode
from slam.device import with_linear_layers_in

V = 60
HF = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
TINY = ModelConfig(vocab_size=V, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=12, max_position_embeddings=256)


def randomise(model, seed=0):
    """Weights far from their initial values, biases and norms included, so that a dropped or swapped one is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model.eval()


def hf_model(kind="qwen2", tied=True, kv_heads=2, head_dim=12, theta=10000.0, seed=0, **more):
    """A small random transformers model."""
    config_class, model_class = HF[kind]
    return randomise(model_class(config_class(
        vocab_size=V, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": theta}, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        **more)), seed)


def our_model(seed=0, **changes):
    """A small random UnitLM."""
    return randomise(UnitLM(replace(TINY, **changes)), seed)


def random_tokens(batch, length, seed=0):
    return torch.randint(2, V, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def lm():
    return our_model()


# ---------------------------------------------------------------- logits, loss, folders: transformers is the oracle

@pytest.mark.parametrize("kind", HF)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads, head_dim, theta", [(4, 12, 10000.0), (2, 12, 1e6), (1, 16, 500.0)])
@torch.no_grad()
def test_logits_and_loss_equal_transformers(tmp_path, kind, tied, kv_heads, head_dim, theta):
    hf = hf_model(kind, tied, kv_heads, head_dim, theta)
    hf.save_pretrained(tmp_path)
    ours = UnitLM.from_pretrained(str(tmp_path))
    assert ours.n_params() == hf.num_parameters()
    tokens, targets = random_tokens(3, 40), random_tokens(3, 40, seed=1)
    targets[0, :7] = targets[2, 30:] = -100
    logits, loss = ours(tokens, targets)
    assert (logits - hf(tokens).logits).abs().max() < 1e-4
    nll = [-logits[b, t].double().log_softmax(-1)[targets[b, t]].item()
           for b, t in itertools.product(range(3), range(40)) if targets[b, t] != -100]
    assert len(nll) == 103
    assert loss.item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert ours(tokens, targets, reduction="sum")[1].item() == pytest.approx(sum(nll), rel=1e-5)
    per_token = ours(tokens, targets, reduction="none")[1]
    assert per_token.shape == (3, 40) and (per_token[targets == -100] == 0).all()
    assert per_token[targets != -100].tolist() == pytest.approx(nll, rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_sharded_and_bf16_folders_load(tmp_path):
    hf = hf_model("llama", tied=False)
    hf.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    tokens = random_tokens(2, 20)
    logits, _ = UnitLM.from_pretrained(str(tmp_path / "shards"))(tokens)
    assert (logits - hf(tokens).logits).abs().max() < 1e-4
    hf.bfloat16().save_pretrained(tmp_path / "bf16")
    ours = UnitLM.from_pretrained(str(tmp_path / "bf16"))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.lm_head.weight, hf.lm_head.weight.float())


@pytest.mark.parametrize("kind", HF)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_our_folder_loads_in_transformers_and_comes_back_bit_equal(tmp_path, kind, tied):
    ours = our_model(model_type=kind, tie_word_embeddings=tied, rope_theta=5e4,
                     head_dim=16, num_key_value_heads=1)
    ours.save_pretrained(tmp_path / "lm", slam={"step": 3}, trainer={"x": torch.ones(2)})
    hf, info = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert type(hf) is HF[kind][1] and not info["missing_keys"] and not info["unexpected_keys"]
    assert hf.dtype == torch.float32
    tokens = random_tokens(2, 50)
    assert (ours(tokens)[0] - hf(tokens).logits).abs().max() < 1e-4
    again = UnitLM.from_pretrained(str(tmp_path / "lm"))
    assert again.config == ours.config
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in again.state_dict().items())
    assert json.loads((tmp_path / "lm" / "slam.json").read_text()) == {"step": 3}
    trainer = torch.load(tmp_path / "lm" / "trainer.pt", weights_only=True)
    assert torch.equal(trainer["x"], torch.ones(2))


@torch.no_grad()
def test_smollm2_logits_equal_transformers():
    """A whole pretrained text LM: 30 layers, 9 query heads on 3 key-value heads, theta 100000."""
    folder = embedded.resolve("embedded:smollm2-135m")
    ours = UnitLM.from_pretrained("embedded:smollm2-135m").eval()
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(2, 49152, (1, 48), generator=torch.Generator().manual_seed(0))
    expected = hf(tokens).logits
    logits, _ = ours(tokens)
    assert expected.std() > 1
    assert (logits - expected).abs().max() < 1e-4 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("change, word", [
    ({"model_type": "gpt2"}, "gpt2"), ({"hidden_act": "gelu"}, "activation"), ({"mlp_bias": True}, "MLP bias"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type"),  # the key's older name
    ({"use_sliding_window": True}, "sliding window")])
def test_foreign_configs_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        ModelConfig.from_hf(TINY.to_hf() | change)
    assert ModelConfig.from_hf(TINY.to_hf()) == TINY


def test_a_field_that_a_fork_adds_is_saved_and_read():
    @dataclass
    class Forked(ModelConfig):
        qk_norm: bool = False

    forked = Forked(**asdict(TINY), qk_norm=True)
    assert Forked.from_hf(forked.to_hf()) == forked and Forked.from_hf(TINY.to_hf()) == Forked(**asdict(TINY))


# ---------------------------------------------------------------- TWIST

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A text LM's folder and its model."""
    folder = tmp_path_factory.mktemp("base")
    hf = hf_model("qwen2", theta=1e6)
    hf.save_pretrained(folder)
    return str(folder), hf


@pytest.mark.parametrize("init", ["first_rows", "random", "none"])
def test_twist_keeps_what_it_says(base, init):
    folder, hf = base
    lm = UnitLM.twist(folder, 20, init=init)
    rows, state = hf.get_input_embeddings().weight, hf.state_dict()
    body = [k for k in lm.state_dict() if k != "model.embed_tokens.weight"]
    assert lm.model.embed_tokens.weight.shape == (20, 48) and lm(random_tokens(1, 5) % 20)[0].shape == (1, 5, 20)
    assert len(body) == 1 + 3 * 12
    assert all(torch.equal(lm.state_dict()[k], state[k]) == (init != "none") for k in body)
    same_rows = (lm.model.embed_tokens.weight == rows[:20]).all(-1)
    assert same_rows.all() if init == "first_rows" else not same_rows.any()
    if init == "random":
        assert lm.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert lm.config.rope_theta == 1e6 and lm.config.tie_word_embeddings and lm.config.vocab_size == 20


@torch.no_grad()
def test_twist_first_rows_is_resize_token_embeddings(base):
    hf = hf_model("qwen2", theta=1e6)
    hf.resize_token_embeddings(20)
    tokens = random_tokens(2, 30) % 20
    assert (UnitLM.twist(base[0], 20)(tokens)[0] - hf(tokens).logits).abs().max() < 1e-4


@torch.no_grad()
def test_twist_layers_theta_and_context(base):
    folder, hf = base
    lm = UnitLM.twist(folder, 20, n_layers=2, rope_theta=10000.0, context=64)
    assert len(lm.model.layers) == lm.config.num_hidden_layers == 2
    assert (lm.config.rope_theta, lm.config.max_position_embeddings) == (10000.0, 64)
    assert torch.equal(lm.model.layers[1].mlp.up_proj.weight, hf.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(lm.model.norm.weight, hf.model.norm.weight)
    cut = hf_model("qwen2", theta=10000.0)
    cut.resize_token_embeddings(20)
    del cut.model.layers[2:]
    cut.config.num_hidden_layers = 2
    tokens = random_tokens(1, 20) % 20
    expected = cut(tokens, use_cache=False).logits
    assert (lm(tokens)[0] - expected).abs().max() < 1e-4
    assert (UnitLM.twist(folder, 20, n_layers=2)(tokens)[0] - expected).abs().max() > 1e-2  # theta does something


def test_twist_refuses_what_it_cannot_do(base):
    with pytest.raises(ValueError, match="first_rows, random, none"):
        UnitLM.twist(base[0], 20, init="zeros")
    with pytest.raises(ValueError, match="has 3 layers, not 4"):
        UnitLM.twist(base[0], 20, n_layers=4)
    with pytest.raises(ValueError, match="has 3 layers, not -1"):
        UnitLM.twist(base[0], 20, n_layers=-1)
    for wrong in ({"model_type": "gpt2"}, {"num_attention_heads": 3}):
        with pytest.raises(ValueError, match="model_type is qwen2 or llama, num_attention_heads a multiple"):
            ModelConfig(**wrong)
    with pytest.raises((ValueError, SystemExit), match=str(V)):  # more rows than the text embedding has
        UnitLM.twist(base[0], V + 1)
    assert UnitLM.twist(base[0], V + 1, init="random").config.vocab_size == V + 1


def test_twist_of_an_untied_base_is_tied(tmp_path):
    hf = hf_model("llama", tied=False)
    hf.save_pretrained(tmp_path)
    lm = UnitLM.twist(str(tmp_path), 20)
    assert not hasattr(lm, "lm_head") and lm.config.tie_word_embeddings
    assert torch.equal(lm.model.embed_tokens.weight, hf.model.embed_tokens.weight[:20])


@pytest.mark.parametrize("tied", [True, False])
def test_twist_that_keeps_the_text(tied, tmp_path):
    """A text row is the old one; so a text has the base's logits, once the tokens before the text's are left out."""
    hf = hf_model("llama", tied=tied)
    hf.save_pretrained(tmp_path)
    rows = hf.get_input_embeddings().weight.detach()
    for init in ("keep_text", "keep_text_random"):
        lm = UnitLM.twist(str(tmp_path), V + 24, init=init, rope_theta=None)
        assert lm.config.first_text_token == 24 and hasattr(lm, "lm_head") != tied
        new, tokens = lm.model.embed_tokens.weight[:24].detach(), random_tokens(2, 30)
        assert (lm(tokens + 24)[0][..., 24:] - hf(tokens).logits).abs().max() < 1e-4
        assert new.std().item() == pytest.approx(rows.std().item() if init == "keep_text" else 0.02, rel=0.2)
    lm.save_pretrained(tmp_path / "mixed")
    assert UnitLM.from_pretrained(str(tmp_path / "mixed")).config == lm.config
    assert "first_text_token" not in UnitLM.twist(str(tmp_path), 20).hf_config()
    with pytest.raises(ValueError, match="a vocabulary with its text, not 20 tokens"):
        UnitLM.twist(str(tmp_path), 20, init="keep_text")


# ---------------------------------------------------------------- bases of the paper's table 6

# The shapes in the hub's config.json files, less what has no part in the shape.
LLAMA = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 1e4, "hidden_act": "silu"}
OPT = {"model_type": "opt", "activation_function": "relu", "max_position_embeddings": 2048, "vocab_size": 50272,
       "num_attention_heads": 12, "tie_word_embeddings": True, "dropout": 0.1}
PYTHIA = {"model_type": "gpt_neox", "max_position_embeddings": 2048, "vocab_size": 50304, "rotary_pct": 0.25,
          "tie_word_embeddings": False, "use_parallel_residual": True, "hidden_act": "gelu"}
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3}
LARGE = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
         "num_key_value_heads": 5}
TABLE_6 = {
    "MobileLLM-125M": (LLAMA | SMALL | {"model_type": "mobilellm", "vocab_size": 32000, "share_embedding": True,
                                        "tie_word_embeddings": False, "layer_sharing": False}, 106_492_608),
    "MobileLLM-350M": (LLAMA | LARGE | {"model_type": "mobilellm", "vocab_size": 32000, "share_embedding": True,
                                        "tie_word_embeddings": False, "layer_sharing": False}, 315_117_120),
    "OPT-125M": (OPT | {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "word_embed_proj_dim": 768,
                        "do_layer_norm_before": True}, 87_015_936),
    "OPT-350M": (OPT | {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                        "word_embed_proj_dim": 512, "do_layer_norm_before": False}, 305_714_176),
    "Qwen2.5-0.5B": ({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                      "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6,
                      "max_position_embeddings": 32768, "rope_theta": 1e6, "hidden_act": "silu",
                      "tie_word_embeddings": True, "use_sliding_window": False}, 358_347_904),
    "SmolLM2-135M": (LLAMA | SMALL | {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True},
                     106_492_608),
    "SmolLM2-360M": (LLAMA | LARGE | {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True},
                     315_117_120),
    "Pythia-160M": (PYTHIA | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                              "num_attention_heads": 12}, 85_827_072),
    "Pythia-410M": (PYTHIA | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                              "num_attention_heads": 16}, 303_339_520)}


@pytest.mark.parametrize("name", TABLE_6)
def test_parameter_counts_of_table_6(name):
    config, expected = TABLE_6[name]
    with torch.device("meta"):
        lm = from_config(twisted(config, 502, context=1024, rope_theta=1e4))
    assert lm.n_params() == expected
    assert (type(lm) is not UnitLM) == name.startswith(("OPT", "Pythia"))


def test_twist_of_the_embedded_base():
    lm = UnitLM.twist("embedded:smollm2-135m", 502)
    assert lm.n_params() == 106_492_608 and lm.config.model_type == "llama"


def test_mobilellm_is_a_llama_by_another_name(tmp_path):
    hf = hf_model("llama")
    hf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mobilellm", "share_embedding": True, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = random_tokens(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(UnitLM.from_pretrained(str(tmp_path))(x)[0], hf(x).logits, atol=1e-4, rtol=1e-4)
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_sharing": True}))
    with pytest.raises(SystemExit, match="layer sharing"):
        UnitLM.from_pretrained(str(tmp_path))


# ---------------------------------------------------------------- packing

@torch.no_grad()
def test_packed_utterances_do_not_see_each_other(lm):
    lengths = [9, 1, 14, 6]
    utterances = [random_tokens(1, n + 1, seed=n)[0] for n in lengths]

    def packed_losses(utterances):
        tokens = torch.cat([u[:-1] for u in utterances])[None]
        targets = torch.cat([u[1:] for u in utterances])[None]
        positions = torch.cat([torch.arange(len(u) - 1) for u in utterances])[None]
        return lm(tokens, targets, positions, reduction="none")[1][0].split(lengths)

    losses = packed_losses(utterances)
    for u, packed in zip(utterances, losses):
        alone = lm(u[None, :-1], u[None, 1:], reduction="none")[1][0]
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for i in range(4):
        changed = [random_tokens(1, len(u), seed=99)[0] if i == j else u for j, u in enumerate(utterances)]
        for j, (before, after) in enumerate(zip(losses, packed_losses(changed))):
            assert torch.equal(before, after) == (i != j)


def test_no_gradient_crosses_an_utterance_border(lm):
    tokens, positions = random_tokens(2, 20), torch.cat([torch.arange(12), torch.arange(8)]).expand(2, 20)
    embedded_tokens = []
    hook = lm.model.embed_tokens.register_forward_hook(lambda m, i, out: embedded_tokens.append(out) or out)
    logits, _ = lm(tokens, positions=positions)
    hook.remove()
    gradient, = torch.autograd.grad(logits[:, 15].square().sum(), embedded_tokens[0])
    reached = gradient.abs().sum(-1) > 0
    assert reached[:, 12:16].all() and not reached[:, :12].any() and not reached[:, 16:].any()


@torch.no_grad()
def test_rows_of_a_batch_and_padding_change_nothing(lm):
    tokens = random_tokens(4, 25)
    whole, _ = lm(tokens)
    padded = torch.cat([tokens[2:3, :10], torch.zeros(1, 15, dtype=torch.long)], 1)
    assert torch.allclose(lm(padded)[0][0, :10], whole[2, :10], atol=1e-5)
    assert torch.allclose(lm(tokens[1:2])[0][0], whole[1], atol=1e-5)


# ---------------------------------------------------------------- generation

PROMPTS = [[1], [1, 5, 9], [1, 40, 3, 3, 21, 8, 50],
           *([1, *random_tokens(1, n, seed=n)[0].tolist()] for n in range(2, 9))]


@torch.no_grad()
def greedy(lm, prompt, max_new_tokens, stop=(1,), forbid=(0,)):
    """The oracle: the whole sequence forward at every step, no cache, no batch."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        logits = lm(torch.tensor([tokens]))[0][0, -1]
        logits[list(forbid)] = -torch.inf
        if (token := logits.argmax().item()) in stop:
            break
        tokens.append(token)
    return tokens[len(prompt):]


def test_greedy_equals_the_full_forward_in_any_batch(lm):
    expected = [greedy(lm, p, 40, stop=()) for p in PROMPTS]
    assert sum(len(set(row)) > 8 for row in expected) > 5  # no dull loops
    assert lm.generate(PROMPTS, 40, temperature=0, stop=()) == expected
    assert [lm.generate([p], 40, temperature=0, stop=())[0] for p in PROMPTS] == expected


@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_full_forward(lm):
    """In chunks of any size, every row at its own place."""
    tokens, cache = random_tokens(3, 30), KVCache(lm.config, 3, 30, "cpu", torch.float32)
    expected, _ = lm(tokens)
    done = torch.tensor([[0], [4], [9]])
    for row, n in enumerate(done[:, 0].tolist()):  # rows start at different places
        alone = KVCache(lm.config, 1, 30, "cpu", torch.float32)
        if n:
            lm(tokens[row:row + 1, :n], positions=torch.arange(n)[None], cache=alone)
        for into, out in zip((*cache.k, *cache.v), (*alone.k, *alone.v)):
            into[row] = out[0]
    for chunk in (1, 7, 1, 12):
        positions = done + torch.arange(chunk)
        logits, _ = lm(tokens.gather(1, positions), positions=positions, cache=cache)
        wanted = expected.gather(1, positions[:, :, None].expand(-1, -1, V))
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        done = done + chunk
    last = torch.tensor([29, 0, 13])
    assert torch.allclose(lm(tokens, last=last)[0], expected[torch.arange(3), last][:, None], atol=1e-5)


def test_stop_tokens_end_rows_at_different_times(lm):
    free = [greedy(lm, p, 40, stop=()) for p in PROMPTS]
    stop = (free[0][3], free[1][12], free[2][25])
    expected = [greedy(lm, p, 40, stop) for p in PROMPTS]
    assert len({len(row) for row in expected}) > 3 and max(map(len, expected)) > 16  # rows are dropped on the way
    assert lm.generate(PROMPTS, 40, temperature=0, stop=stop) == expected
    assert not any(t in stop for row in expected for t in row)
    penalised = lm.generate(PROMPTS, 40, temperature=0, stop=stop, repetition_penalty=1.5)
    assert len({len(row) for row in penalised}) > 3
    assert [lm.generate([p], 40, temperature=0, stop=stop, repetition_penalty=1.5)[0] for p in PROMPTS] == penalised
    calls = []
    lm.generate(PROMPTS, 40, temperature=0, stop=stop, progress=lambda new: calls.append(new.tolist()))
    assert [len(new[0]) for new in calls] == [8, 16, 24, 32, 40][:len(calls)]
    assert [[t for t in row if t >= 0] for row in calls[-1]] == expected
    assert calls[0] == [(row[:8] + 8 * [-1])[:8] for row in expected]
    cut = lm.generate(PROMPTS, 40, temperature=0, stop=stop, progress=lambda new: new.shape[1] == 16)
    assert cut == [row[:16] for row in expected]
    assert all(row == [] for row in lm.generate(PROMPTS, 40, temperature=0, stop=tuple(range(V))))


def test_forbidden_tokens_are_never_drawn(lm):
    free = lm.generate(PROMPTS, 30, temperature=0, stop=())
    forbid = (0, *sorted(set(free[0] + free[1]))[:6])
    rows = lm.generate(PROMPTS, 30, temperature=0, stop=(), forbid=forbid)
    assert rows == [greedy(lm, p, 30, (), forbid) for p in PROMPTS] and rows != free
    drawn = lm.generate(PROMPTS, 30, temperature=5.0, stop=(), forbid=forbid)
    assert not set(forbid) & {t for row in rows + drawn for t in row}


@pytest.mark.parametrize("max_new_tokens", [0, 1, 8, 9])
def test_number_of_new_tokens(lm, max_new_tokens):
    rows = lm.generate(PROMPTS[:3], max_new_tokens, temperature=0, stop=())
    assert rows == [greedy(lm, p, max_new_tokens, ()) for p in PROMPTS[:3]]
    assert [len(row) for row in rows] == [max_new_tokens] * 3


@pytest.mark.parametrize("kind", HF)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers_generate(tmp_path, kind, penalty):
    hf = hf_model(kind, kv_heads=1, head_dim=16)
    hf.save_pretrained(tmp_path)
    ours = UnitLM.from_pretrained(str(tmp_path)).generate(PROMPTS, 24, temperature=0, repetition_penalty=penalty)
    for prompt, row in zip(PROMPTS, ours):
        theirs = hf.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                             do_sample=False, max_new_tokens=24, repetition_penalty=penalty, suppress_tokens=[0],
                             eos_token_id=1, pad_token_id=0)[0, len(prompt):].tolist()
        assert row == (theirs[:theirs.index(1)] if 1 in theirs else theirs)
    if penalty == 1.0:
        penalised = UnitLM.from_pretrained(str(tmp_path)).generate(PROMPTS, 24, temperature=0, repetition_penalty=1.3)
        assert penalised != ours


def test_top_k_1_and_tiny_top_p_are_greedy(lm):
    expected = lm.generate(PROMPTS, 20, temperature=0)
    assert lm.generate(PROMPTS, 20, temperature=1.5, top_k=1) == expected
    assert lm.generate(PROMPTS, 20, temperature=1.5, top_p=1e-6) == expected


def test_a_seeded_generator_is_reproducible(lm):
    def draw(seed):
        return lm.generate(PROMPTS, 20, temperature=1.2, top_k=25, top_p=0.95,
                           generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(before, torch.get_rng_state())  # the global generator is left alone


@torch.no_grad()
def test_generation_in_bf16(lm):
    """Under autocast, and with bf16 weights: a cache of that type, and tokens that fp32 finds (nearly) the best too."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = lm.generate(PROMPTS, 12, temperature=0, stop=())
    of_bf16 = our_model().bfloat16().generate(PROMPTS, 12, temperature=0, stop=())
    for rows in (under_autocast, of_bf16):
        for prompt, row in zip(PROMPTS, rows):
            logits = lm(torch.tensor([prompt + row]))[0][0, len(prompt) - 1:-1]
            logits[:, 0] = -torch.inf
            gap = logits.max(-1).values - logits.gather(1, torch.tensor(row)[:, None])[:, 0]
            assert len(row) == 12 and gap.max() < 0.1 * logits[:, 1:].std()


def test_under_autocast_weights_are_cast_once_for_all_tokens(lm, monkeypatch):
    """Not at every token; the tokens are the same. The head's, which is the embedding, is small and stays fp32."""
    def draw(n: int) -> tuple[list[list[int]], int]:
        casts = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                out = op(*args, **kwargs or {})
                if op in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default):
                    casts.extend(p for p in lm.parameters() if p is args[0] and out.dtype == torch.bfloat16)
                return out

        with torch.autocast("cpu", dtype=torch.bfloat16), Count():
            return lm.generate(PROMPTS[:3], n, temperature=0, stop=()), len(casts)

    (tokens, few), (_, many) = draw(12), draw(2)
    assert few - many == 10
    monkeypatch.setattr(model, "with_linear_layers_in", lambda dtype, lm: lm)
    (expected, all_of_them), (_, fewer) = draw(12), draw(2)
    assert tokens == expected and all_of_them - fewer > 100


def test_compiled_generation_keeps_its_place_and_takes_new_weights():
    """CUDA graphs read weights and cache where they were when they were captured."""
    lm, static = our_model(), {}
    found = []
    with torch.inference_mode():
        for _ in range(2):
            lm.model.layers[0].mlp.up_proj.weight.mul_(2)
            decode, cache = compiled_decode(static, with_linear_layers_in(torch.bfloat16, lm), 2, 128, torch.bfloat16)
            weight = static["lm"].model.layers[0].mlp.up_proj.weight
            assert torch.equal(weight, lm.model.layers[0].mlp.up_proj.weight.bfloat16())
            found.append((decode, cache, weight.data_ptr()))
        assert found[0] == found[1]
        assert compiled_decode(static, lm, 2, 128, torch.float32)[1] is not cache
    assert not any("static" in name for name in lm.state_dict())


# ---------------------------------------------------------------- sampling

def expected_distribution(logits, temperature, top_k, top_p, forbid=()):
    """Probabilities by the book: sort, cut, renormalise."""
    p = {t: 2.718281828459045 ** (x / temperature) for t, x in enumerate(logits) if t not in forbid}
    best = sorted(p, key=p.get, reverse=True)[:top_k or None]
    total, mass, kept = sum(p[t] for t in best), 0.0, []
    for t in best:
        if mass >= top_p:
            break
        kept.append(t)
        mass += p[t] / total
    return {t: p[t] / sum(p[k] for k in kept) for t in kept}


@pytest.mark.parametrize("temperature, top_k, top_p, forbid", [
    (1.0, 0, 1.0, ()), (0.7, 0, 1.0, ()), (2.0, 0, 1.0, (0, 6)), (1.0, 3, 1.0, ()), (1.0, 99, 1.0, ()),
    (1.0, 0, 0.8, ()), (0.8, 5, 0.9, (1,)), (1.5, 4, 0.6, ())])
def test_samples_follow_the_softmax(temperature, top_k, top_p, forbid):
    logits, n = [0.3, 2.0, -1.0, 1.1, 0.0, 1.6, 0.7, -3.0], 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = sample(torch.tensor(logits).repeat(n, 1), temperature, top_k, top_p, 1.0, None, forbid, generator)
    counts = drawn.bincount(minlength=8).tolist()
    expected = expected_distribution(logits, temperature, top_k, top_p, forbid)
    assert {t for t, c in enumerate(counts) if c} <= set(expected)
    result = scipy.stats.chisquare([counts[t] for t in expected], [n * p for p in expected.values()])
    assert result.pvalue > 1e-4, (counts, expected)


def test_rows_are_drawn_independently():
    drawn = sample(torch.zeros(4000, 2), 1.0, 0, 1.0, 1.0, None, (), torch.Generator().manual_seed(0)).float()
    assert abs(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]) < 0.06


@pytest.mark.parametrize("penalty", [0.8, 1.1, 1.5, 3.0])
def test_repetition_penalty_equals_transformers(penalty):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1000, 12, generator=generator) - 3  # the best one is now above zero, now below
    history = torch.randint(0, 12, (1000, 5), generator=generator)
    seen = torch.zeros(1000, 12, dtype=torch.bool).scatter_(1, history, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone()).argmax(-1)
    assert (expected != logits.argmax(-1)).any()
    assert torch.equal(sample(logits, 0, 0, 1.0, penalty, seen, (), None), expected)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on a CPU")
def test_compiled_generation_is_the_same(capfd):
    lm = our_model(num_hidden_layers=1)
    prompts = [[1, 5, 9], [1, 20, 21, 22, 23, 24, 7]]
    how = dict(temperature=0, stop=(), repetition_penalty=1.3)
    assert lm.generate(prompts, 20, **how, compile=True) == lm.generate(prompts, 20, **how)
    from torch._dynamo.utils import counters
    before = counters["stats"]["unique_graphs"]
    lm.generate([[1, 2, 3, 4], [1, 7]], 25, **how, compile=True)  # the same size of cache: nothing is compiled again
    assert counters["stats"]["unique_graphs"] == before
