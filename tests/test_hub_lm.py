"""OPT and Pythia behind UnitLM's interface; activation checkpointing and compilation of all three kinds of model."""
import json
import random
import shutil

import pytest
import test_attention  # noqa: F401, CPU kernels of FlashAttention's operators
import torch
import torch.nn.functional as F
from conftest import run
from safetensors.torch import load_file
from test_model import our_model, random_tokens, randomise
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from model import HUB_TYPES, UnitLM
from slam import attention
from slam.device import n_graphs
from slam.scoring import PrefixPair, row_logps
from train import accumulate


def hub_model(kind: str):
    """A small random OPT (its embedding narrower than its body, as in OPT-350M) or GPT-NeoX of transformers."""
    shared = dict(vocab_size=60, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
                  max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    if kind == "opt":
        return randomise(OPTForCausalLM(OPTConfig(**shared, ffn_dim=80, word_embed_proj_dim=32, dropout=0.1,
                                                  do_layer_norm_before=False)))
    return randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**shared, intermediate_size=80, tie_word_embeddings=False)))


@pytest.fixture(scope="module", params=HUB_TYPES)
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


def test_opt_says_so_when_its_positions_run_out(tmp_path):
    hub_model("opt").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="learned positions"):
        UnitLM.from_pretrained(str(tmp_path)).generate([[1] * 200], 100)
    with pytest.raises(SystemExit, match="a row of 300 tokens: OPT has learned positions"):
        UnitLM.from_pretrained(str(tmp_path))(torch.ones(1, 300, dtype=torch.long))


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


@pytest.mark.parametrize("kind, checkpointing", [("qwen2", False), ("qwen2", True), ("opt", True), ("gpt_neox", True)])
def test_training_compiles_to_one_graph(kind, checkpointing, tmp_path, monkeypatch):
    """As on a GPU, but for the code behind the graph: one graph, none after the first step, whatever the packing."""
    monkeypatch.setattr(attention, "WAY", "varlen" if kind == "qwen2" else "mask")
    torch._dynamo.reset()
    if kind == "qwen2":
        lm = our_model(num_hidden_layers=1)
    else:
        hub_model(kind).save_pretrained(tmp_path)
        lm = UnitLM.from_pretrained(str(tmp_path))
    lm.train().set_activation_checkpointing(checkpointing)
    forward, before = torch.compile(lm, backend="aot_eager", fullgraph=True), n_graphs()
    x = random_tokens(2, 100)
    for cuts in ([100], [5, 95], [1] * 80 + [20], [3, 3, 94]):  # at most 127 segments, and more
        positions = torch.cat([torch.arange(n) for n in cuts]).expand(2, 100)
        losses = [accumulate(f, [(x, x.roll(-1, 1), positions)] * 2, 400, lm.device, "bfloat16") for f in (forward, lm)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-2)
        with torch.inference_mode():
            lm(x, positions=positions)
    assert n_graphs() - before == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_preference_tuning_compiles_to_one_graph(checkpointing, monkeypatch):
    """The same with pairs, of which any number share prefixes of any length; loss and gradients are a CPU's."""
    torch._dynamo.reset()
    lm, rng = our_model(num_hidden_layers=1).train(), random.Random(0)
    lm.set_activation_checkpointing(checkpointing)
    forward, before = torch.compile(lm, backend="aot_eager", fullgraph=True), n_graphs()
    for sizes in ([(3, 4, 5)], [(20, 30, 40)] + [(2, 1, 1)] * 20, [(2, 1, 2)] * 40):
        rows = [[PrefixPair(*([rng.randrange(1, 40) for _ in range(n)] for n in size)) for size in sizes], []]
        found = []
        for way, f in (("varlen", forward), ("segments", lm)):
            monkeypatch.setattr(attention, "WAY", way)
            logps = row_logps(f, rows, 170, lm.device, "float32")
            logps.square().mean().backward()
            found.append([logps, *(p.grad for p in lm.parameters())])
            lm.zero_grad()
        for compiled, eager in zip(*found, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5 * eager.abs().max().item())
    assert n_graphs() - before == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_on_a_cpu_attention_still_goes_segment_by_segment(checkpointing, monkeypatch):
    """The mask is never built, no graph is compiled for another packing, and loss and gradients are the eager ones."""
    monkeypatch.setattr(attention, "attention_mask", None)
    torch._dynamo.reset()
    monkeypatch.setattr(attention.Segments, "attend", torch.compiler.disable(attention.Segments.attend))
    lm = our_model().train()
    lm.set_activation_checkpointing(checkpointing)
    forward, x, graphs = torch.compile(lm, backend="aot_eager"), random_tokens(2, 24), []
    for cuts in ([24], [5, 19], [3, 3, 18]):
        positions, found = torch.cat([torch.arange(n) for n in cuts]).expand(2, 24), []
        for f in (forward, lm):
            loss = accumulate(f, [(x, x.roll(-1, 1), positions)], 48, lm.device, "float32")
            found.append([loss, *(p.grad for p in lm.parameters())])
            lm.zero_grad()
        for compiled, eager in zip(*found, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
        graphs.append(n_graphs())
    assert graphs[0] == graphs[-1]
