"""Every base of the paper's table 6, SlamKit's layout, gradient checkpointing and compiled generation."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused, run
from safetensors.torch import load_file, save_file
from test_model import hf_model, our_model, random_tokens, randomise
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from model import HubLM, UnitLM, from_config, twisted
from slam.checkpoint import checkpoint_fingerprint
from slam.device import n_graphs
from slam.units import UnitWriter, write_pairs
from train import accumulate

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
    assert isinstance(lm, HubLM) == name.startswith(("OPT", "Pythia"))


def test_twist_of_the_embedded_base():
    lm = UnitLM.twist("embedded:smollm2-135m", 502)
    assert lm.n_params() == 106_492_608 and lm.config.model_type == "llama"


# ---------------------------------------------------------------- OPT and Pythia behind the same interface

def hub_model(kind: str):
    """A small random OPT (its embedding narrower than its body, as in OPT-350M) or GPT-NeoX of transformers."""
    shared = dict(vocab_size=60, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
                  max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    if kind == "opt":
        return randomise(OPTForCausalLM(OPTConfig(**shared, ffn_dim=80, word_embed_proj_dim=32, dropout=0.1,
                                                  do_layer_norm_before=False)))
    return randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**shared, intermediate_size=80, tie_word_embeddings=False)))


@pytest.fixture(scope="module", params=HubLM.TYPES)
def hub(request, tmp_path_factory):
    """Folder and model of transformers, and ours."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = hub_model(request.param)
    hf.save_pretrained(folder)
    return str(folder), hf, UnitLM.from_pretrained(str(folder)).eval()


@torch.no_grad()
def test_packed_rows_equal_utterances_alone(hub):
    _, hf, lm = hub
    a, b = random_tokens(1, 7, 1), random_tokens(1, 12, 2)
    row, positions = torch.cat([a, b], 1), torch.cat([torch.arange(7), torch.arange(12)])[None]
    logits, loss = lm(row, row.roll(-1, 1), positions)
    alone = torch.cat([hf(a).logits, hf(b).logits], 1)
    assert alone.std() > 0.1
    torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-4)
    assert loss.item() == pytest.approx(F.cross_entropy(alone[0], row.roll(-1, 1)[0]).item(), abs=1e-4)
    torch.testing.assert_close(lm(row, positions=positions, last=torch.tensor([4]))[0][:, 0], alone[:, 4],
                               atol=2e-5, rtol=1e-4)
    # Another continuation of b's first 5 tokens, and one of their first 3.
    for at in (5, 3):
        c = torch.cat([b[:, :at], random_tokens(1, 6, 3)], 1)
        branches = torch.cat([row, c[:, at:], a], 1)
        places = torch.cat([positions, torch.arange(at, at + 6)[None], torch.arange(7)[None]], 1)
        expected = torch.cat([alone, hf(c).logits[:, at:], hf(a).logits], 1)
        torch.testing.assert_close(lm(branches, positions=places)[0], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_its_greedy_generation_is_the_full_forward(hub):
    _, hf, lm = hub
    prompts = [[1, 5, 9], [1, 20, 21, 22, 23, 24, 7]]
    new = lm.generate(prompts, 12, temperature=0, stop=())
    for prompt, got in zip(prompts, new):
        x = list(prompt)
        for _ in range(12):
            logits = hf(torch.tensor([x])).logits[0, -1]
            logits[0] = -torch.inf
            x.append(int(logits.argmax()))
        assert got == x[len(prompt):]
    how = dict(temperature=1.0, top_k=20, generator=torch.Generator().manual_seed(3))
    once = lm.generate(prompts, 12, **how)
    how["generator"].manual_seed(3)
    assert lm.generate(prompts, 12, **how) == once != lm.generate(prompts, 12, **how)
    assert all(0 not in row and 1 not in row for row in once)


def test_its_folders_travel_both_ways(hub, tmp_path):
    folder, hf, lm = hub
    lm.save_pretrained(tmp_path / "x", slam={"step": 1})
    again, theirs = UnitLM.from_pretrained(str(tmp_path / "x")), AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    x = random_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(again.eval()(x)[0], lm(x)[0])
        torch.testing.assert_close(theirs.eval()(x).logits, hf(x).logits)
    assert again.lm.config.to_dict().get("dropout", 0) == 0


def test_old_files_load(hub, tmp_path):
    """What the hub has for OPT and Pythia: a pickle, OPT's names without `model.`, buffers among Pythia's weights."""
    folder, hf, lm = hub
    shutil.copy(f"{folder}/config.json", tmp_path)
    state = {k.removeprefix("model."): v for k, v in load_file(f"{folder}/model.safetensors").items()}
    if lm.config.model_type == "gpt_neox":
        state["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4)
        state["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, tmp_path / "pytorch_model.bin")
    again = UnitLM.from_pretrained(str(tmp_path))
    assert all(torch.equal(v, lm.state_dict()[k]) for k, v in again.state_dict().items())
    del state[next(k for k in state if k.endswith("fc1.bias") or k.endswith("dense.bias"))]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="missing"):
        UnitLM.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("init", ["first_rows", "random", "none"])
def test_its_twist(hub, init):
    folder, hf, _ = hub
    lm = UnitLM.twist(folder, 20, init=init, n_layers=2, context=64)
    old, new = load_file(f"{folder}/model.safetensors"), lm.state_dict()
    tables = [k for k in new if "embed_tokens" in k or "embed_in" in k or "embed_out" in k]
    assert all(new[k].shape[0] == 20 for k in tables) and len(tables) == 1 + (lm.config.model_type == "gpt_neox")
    for k, v in new.items():
        rows = old[k][:20] if k in tables else old[k]
        keeps = init == "first_rows" or init == "random" and k not in tables
        assert torch.equal(v, rows) == keeps, k
    assert lm.config.num_hidden_layers == 2
    if init == "first_rows":
        cut = hub_model(lm.config.model_type)
        cut.resize_token_embeddings(20, mean_resizing=False)
        assert torch.equal(cut.get_input_embeddings().weight, lm.lm.get_input_embeddings().weight)
    if lm.config.model_type == "opt":
        with pytest.raises(ValueError, match="learned positions"):
            UnitLM.twist(folder, 20, context=512)


def test_training_runs_on_it_and_resumes(hub, corpus, tmp_path):
    """train.py, with activation checkpointing: the loss falls; stopped half-way and resumed, it is the same run."""
    folder, *_ = hub
    flags = [f"--base={folder}", f"--train={corpus / 'train'}", f"--val={corpus / 'val'}", "--context=64",
             "--micro_batch=2", "--batch_tokens=256", "--lr=1e-2", "--dtype=float32", "--log_every=3",
             "--activation_checkpointing", "--init=random", "--schedule=constant", "--warmup=0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("train.py", *flags, f"--out={whole}", "--steps=8")
    run("train.py", *flags, f"--out={parts}", "--steps=4")
    run("train.py", *flags, f"--out={parts}", "--steps=8", "--resume")
    results = json.loads((whole / "results.json").read_text())
    assert results["val_loss"]["value"] < results["val_loss_before_training"]["value"]
    one, two = (load_file(x / "checkpoint" / "model.safetensors") for x in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---------------------------------------------------------------- MobileLLM

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


# ---------------------------------------------------------------- SlamKit's checkpoints

def slamkit_folder(folder, hf) -> None:
    """A checkpoint as SlamKit writes one: nested base_config, fp32 weights named lm.*, no tied head."""
    folder.mkdir(parents=True)
    base = hf.config.to_dict()
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["UnitLM"], "model_type": "speech_language_model", "base_model_name": "Qwen/Qwen2.5-0.5B",
        "base_config": base, "vocab_size": base["vocab_size"], "twist_init": True, "torch_dtype": "float32"}))
    state = {f"lm.{k}": v.contiguous() for k, v in hf.state_dict().items() if k != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_slamkit_checkpoints_load(tmp_path):
    hf = hf_model("qwen2")
    slamkit_folder(tmp_path / "slam", hf)
    lm, x = UnitLM.from_pretrained(str(tmp_path / "slam")), random_tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(lm(x)[0], hf(x).logits, atol=1e-4, rtol=1e-4)
    fingerprint = checkpoint_fingerprint(str(tmp_path / "slam"))
    assert (fingerprint.encoder, fingerprint.layer, fingerprint.n_units) == ("slprl/mhubert-base-25hz", 11, 58)


def test_slamkit_checkpoints_are_scored_continued_and_tuned(tmp_path):
    """Like ours: a validation loss on units of the published tokeniser, a continuation, a DPO run."""
    hf = hf_model("qwen2")
    slamkit_folder(tmp_path / "slam", hf)
    fingerprint = checkpoint_fingerprint(str(tmp_path / "slam"))
    with UnitWriter(tmp_path / "val", replace(fingerprint, codebook_sha256="a" * 64)) as writer:
        writer.add("x", np.arange(30), np.ones(30))
    done = run("eval.py", f"--checkpoint={tmp_path / 'slam'}", f"--val={tmp_path / 'val'}")
    assert "slam does not say which codebook" in done.stderr
    x = torch.arange(1, 33)[None] % 32
    x[0, -1] = 1  # BOS, units 0 to 29, EOS
    with torch.no_grad():
        expected = F.cross_entropy(hf(x[:, :-1]).logits[0], x[0, 1:]).item()
    results = json.loads((tmp_path / "slam" / "results.json").read_text())
    assert results["val_loss"]["value"] == pytest.approx(expected, rel=1e-4)
    other = replace(fingerprint, encoder="facebook/hubert-base-ls960")
    with UnitWriter(tmp_path / "other", other) as writer:
        writer.add("x", np.arange(30), np.ones(30))
    assert "hubert-base-ls960" in refused("eval.py", f"--checkpoint={tmp_path / 'slam'}", f"--val={tmp_path / 'other'}")

    lm = UnitLM.from_pretrained(str(tmp_path / "slam"))
    with torch.no_grad():
        theirs = hf.generate(x[:, :8], max_new_tokens=9, do_sample=False, suppress_tokens=[0], eos_token_id=None)
    assert lm.generate([x[0, :8].tolist()], 9, temperature=0, stop=()) == theirs[:, 8:].tolist()

    pairs = [{"id": str(i), "prompt": [i, i + 1], "chosen": [i + 2, 5], "rejected": [i + 3, 40]} for i in range(8)]
    for split in ("train", "val"):
        write_pairs(tmp_path / f"{split}.jsonl", fingerprint, pairs)
    run("dpo.py", f"--checkpoint={tmp_path / 'slam'}", f"--pairs={tmp_path / 'train.jsonl'}",
        f"--val_pairs={tmp_path / 'val.jsonl'}", f"--out={tmp_path / 'dpo'}", "--steps=2", "--batch_pairs=4",
        "--lr=1e-3", "--n_samples=0")
    assert json.loads((tmp_path / "dpo" / "results.json").read_text())["val_dpo_loss"]["step"] == 2
    assert checkpoint_fingerprint(str(tmp_path / "dpo" / "checkpoint")) == fingerprint


@pytest.mark.parametrize("kind", ["qwen2", "opt", "gpt_neox"])
def test_our_export_comes_back_bit_equal(tmp_path, kind):
    lm = our_model() if kind == "qwen2" else None
    if lm is None:
        hub_model(kind).save_pretrained(tmp_path / "hf")
        lm = UnitLM.from_pretrained(str(tmp_path / "hf"))
    slam = {"fingerprint": {"encoder": "e", "layer": 1, "unit_rate_hz": 25.0, "n_units": 58, "dedup": True,
                            "codebook_sha256": "f" * 64}}
    lm.save_pretrained(tmp_path / "run" / "checkpoint", slam=slam)
    run("model.py", "export", tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "speech_language_model" and config["base_config"]["model_type"] == kind
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert all(k.startswith("lm.") for k in names) and "lm.lm_head.weight" not in names
    back = UnitLM.from_pretrained(str(tmp_path / "out"))
    assert back.state_dict().keys() == lm.state_dict().keys()
    assert all(torch.equal(v, lm.state_dict()[k]) for k, v in back.state_dict().items())
    assert checkpoint_fingerprint(str(tmp_path / "out")).encoder == "e"
    assert "exists" in refused("model.py", "export", tmp_path / "run", tmp_path / "out")


# ---------------------------------------------------------------- gradient checkpointing, compilation

@pytest.mark.parametrize("kind", ["qwen2", "opt", "gpt_neox"])
def test_gradient_checkpointing_changes_no_gradient(kind, tmp_path):
    if kind == "qwen2":
        lm = our_model().train()
    else:
        hub_model(kind).save_pretrained(tmp_path)
        lm = UnitLM.from_pretrained(str(tmp_path)).train()
    x, positions = random_tokens(2, 20), torch.cat([torch.arange(8), torch.arange(12)]).expand(2, 20)
    gradients, saved = [], []
    for on in (False, True):
        lm.set_activation_checkpointing(on)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss = lm(x, x.roll(-1, 1), positions)[1]
        loss.backward()
        gradients.append([p.grad.clone() for p in lm.parameters()])
        saved.append(sum(sizes))
        lm.zero_grad()
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    assert saved[1] < saved[0] / 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "opt", "gpt_neox"])
def test_training_compiles_to_one_graph(kind, checkpointing, tmp_path):
    """As on a GPU, but for the code behind the graph: one graph, none after the first step, whatever the packing."""
    torch._dynamo.reset()
    if kind == "qwen2":
        lm = our_model()
    else:
        hub_model(kind).save_pretrained(tmp_path)
        lm = UnitLM.from_pretrained(str(tmp_path))
    lm.train().set_activation_checkpointing(checkpointing)
    forward, before = torch.compile(lm, backend="aot_eager"), n_graphs()
    x = random_tokens(2, 24)
    for seed, cuts in enumerate(([24], [5, 19], [3, 3, 18])):
        positions = torch.cat([torch.arange(n) for n in cuts]).expand(2, 24)
        loss = accumulate(forward, [(x, x.roll(-1, 1), positions)] * 2, 96, lm.device, "bfloat16")
        assert loss.item() == pytest.approx(accumulate(lm, [(x, x.roll(-1, 1), positions)] * 2, 96, lm.device,
                                                       "bfloat16").item(), rel=2e-2)
        with torch.inference_mode():
            lm(x, positions=positions)
    assert n_graphs() - before == 1


def test_opt_says_so_when_its_positions_run_out(tmp_path):
    hub_model("opt").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="learned positions"):
        UnitLM.from_pretrained(str(tmp_path)).generate([[1] * 200], 100)


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
