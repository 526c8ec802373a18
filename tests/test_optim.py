"""optim.py: the schedule, the optimisers against their papers' rules, resuming, and which weight gets which."""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import ModelConfig, UnitLM
from slam.optim import AdEMAMix, Muon, make_optimizer, schedule, update

KINDS = "adamw", "ademamix", "muon"
SHAPE = dict(vocab_size=22, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8)
BATCH = torch.randint(1, 22, (4, 17), generator=torch.Generator().manual_seed(0))


def tiny(tied=True) -> UnitLM:
    torch.manual_seed(0)
    return UnitLM(ModelConfig(**SHAPE, tie_word_embeddings=tied))


def settings(kind: str, **more) -> SimpleNamespace:
    return SimpleNamespace(**dict(optimizer=kind, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1) | more)


def steps(lm: UnitLM, optimizer, n: int, lr: float = 1e-2) -> list[float]:
    """n updates on the fixed batch; the loss before each."""
    losses = []
    for _ in range(n):
        loss = lm(BATCH[:, :-1], BATCH[:, 1:])[1]
        loss.backward()
        update(lm, optimizer, lr, 0.5)
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- the schedule

def theirs(make, warmup: int, steps: int, **more) -> list[float]:
    """transformers' learning rate / peak at every step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, out = make(optimizer, warmup, **more), []
    for _ in range(steps + 1):
        out.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return out


def test_schedule_equals_transformers():
    import transformers as t
    n, warm, floor = 200, 20, 0.05

    def ours(kind, floor):
        return [schedule(kind, step / n, warm / n, floor) for step in range(n + 1)]

    cosine = theirs(t.get_cosine_with_min_lr_schedule_with_warmup, warm, n, num_training_steps=n, min_lr_rate=floor)
    assert ours("cosine", floor) == pytest.approx(cosine, abs=1e-9)
    assert ours("inverse_sqrt", floor) == pytest.approx(theirs(t.get_inverse_sqrt_schedule, warm, n), abs=1e-9)
    for warm_steps, steps in ((1, 20_000), (1, 1), (100, 813)):
        found = [schedule("inverse_sqrt", step / steps, warm_steps / steps, 0.0) for step in range(steps + 1)]
        assert found == pytest.approx(theirs(t.get_inverse_sqrt_schedule, warm_steps, steps), abs=1e-9)
    # Without a warm-up theirs is sqrt(10,000 / (10,000 + step)), which no share of a run gives.
    for p in (0.0, 0.01, 1.0):
        with pytest.raises(ValueError, match="needs a warmup"):
            schedule("inverse_sqrt", p, 0.0, floor)
    with pytest.raises(KeyError, match="no_such_schedule"):  # one that is named but not written
        schedule("no_such_schedule", 0.5, 0.1, floor)
    wsd = dict(num_decay_steps=n // 5, num_training_steps=n, decay_type="linear")
    assert ours("wsd", 0.0) == pytest.approx(theirs(t.get_wsd_schedule, warm, n, **wsd), abs=1e-9)
    with_floor = theirs(t.get_wsd_schedule, warm, n, **wsd, min_lr_ratio=floor)
    assert ours("wsd", floor)[warm:] == pytest.approx(with_floor[warm:], abs=1e-9)  # their warm-up starts at the floor
    assert ours("constant", floor) == ours("cosine", floor)[:warm] + [1.0] * (n + 1 - warm)


# ---------------------------------------------------------------- the papers' rules, in plain numpy

def ademamix_by_the_paper(w, gradients, lr, beta1, beta2, beta3, alpha, eps, decay, T):
    """Algorithm 1 and its two schedulers (section 3), with beta_start = beta1; float64."""
    m1, m2, nu = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        a, b = alpha, beta3
        if T:
            a = min(t * alpha / T, alpha)
            log_start, log_end = math.log(beta1), math.log(beta3)
            b = min(math.exp(log_start * log_end / ((1 - t / T) * log_end + t / T * log_start)), beta3)
        m1 = beta1 * m1 + (1 - beta1) * g
        m2 = b * m2 + (1 - b) * g
        nu = beta2 * nu + (1 - beta2) * g * g
        m1_hat, nu_hat = m1 / (1 - beta1 ** t), nu / (1 - beta2 ** t)
        w = w - lr * ((m1_hat + a * m2) / (np.sqrt(nu_hat) + eps) + decay * w)
    return w


def trajectory(make, dtype, n=25) -> list[tuple]:
    """n steps of `make(params)` on a matrix, a vector and zeros, always the same: (start, gradients, end) each."""
    rng = np.random.default_rng(0)
    params = [torch.nn.Parameter(torch.tensor(w, dtype=dtype))
              for w in (rng.normal(0, 0.5, (7, 5)), rng.normal(0, 0.5, 6), np.zeros(4))]
    start, optimizer = [p.detach().double().numpy().copy() for p in params], make(params)
    gradients = [[] for _ in params]
    for _ in range(n):
        for p, seen in zip(params, gradients):
            p.grad = torch.tensor(rng.normal(0.3, rng.uniform(0.1, 2), p.shape), dtype=dtype)
            seen.append(p.grad.double().numpy().copy())
        optimizer.step()
    end = [p.detach().double().numpy() for p in params]
    assert all(np.abs(w - v).max() > 1e-4 for w, v in zip(start, end))
    return list(zip(start, gradients, end))


def follows(make, rule, dtype, tolerance) -> None:
    """`make(params)` takes the steps of `rule(w, gradients)`."""
    for start, gradients, end in trajectory(make, dtype):
        np.testing.assert_allclose(end, rule(start, gradients), rtol=0, atol=tolerance)


PRECISIONS = pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])


@PRECISIONS
@pytest.mark.parametrize("T", [0, 15, 100])
def test_ademamix_follows_the_paper(dtype, tolerance, T):
    follows(lambda params: AdEMAMix(params, lr=1e-2, betas=(0.9, 0.99, 0.9999), alpha=8.0, weight_decay=0.1,
                                    warmup_steps=T),
            lambda w, g: ademamix_by_the_paper(w, g, 1e-2, 0.9, 0.99, 0.9999, 8.0, 1e-8, 0.1, T), dtype, tolerance)


def test_ademamix_schedulers():
    """alpha rises linearly, beta3's half-life too, from beta1 to beta3; then both stay."""
    group = {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "warmup_steps": 1000}
    alpha, beta3 = zip(*(AdEMAMix.warmed(group | {"step": t}) for t in range(1201)))
    half_lives = np.log(0.5) / np.log(beta3)
    np.testing.assert_allclose(half_lives[:1001], np.linspace(half_lives[0], half_lives[1000], 1001), rtol=1e-9)
    np.testing.assert_allclose(alpha[:1001], np.linspace(0, 5, 1001))
    assert beta3[0] == pytest.approx(0.9) and set(beta3[1000:]) == {0.9999} and set(alpha[1000:]) == {5.0}


@PRECISIONS
def test_ademamix_without_alpha_is_adamw(dtype, tolerance):
    same = dict(lr=1e-2, weight_decay=0.1)
    ours = trajectory(lambda params: AdEMAMix(params, alpha=0.0, **same), dtype)
    adamw = trajectory(lambda params: torch.optim.AdamW(params, **same), dtype)
    for (_, _, a), (_, _, b) in zip(ours, adamw):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_muon_is_torchs_and_goes_on_from_its_state():
    """Matrices of several shapes, more of one than are stacked, one without a gradient; torch takes them one by one."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(32, 16)] * 18 + [(16, 32)] * 3 + [(8, 8)] + [(4, 64)] * 2
    start = [torch.randn(shape, generator=rng) for shape in shapes]
    ours, theirs, late = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(3))
    same = dict(lr=1e-2, momentum=0.9, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, **same, adjust_lr_fn="match_rms_adamw")
    optimizers = Muon(ours, **same), reference, Muon(late, **same)
    for step in range(6):
        gradients = [torch.randn(shape, generator=rng) for shape in shapes]
        for params, optimizer in zip((ours, theirs, late), optimizers):
            for p, g in zip(params[1:], gradients[1:]):
                p.grad = g
            if optimizer is not optimizers[2] or step >= 3:
                optimizer.step()
        if step == 2:
            for p, q in zip(late, theirs):
                p.data.copy_(q)
            optimizers[2].load_state_dict(copy.deepcopy(reference.state_dict()))  # or they would share it
    for params in (ours, late):
        for p, q in zip(params, theirs):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    assert torch.equal(ours[0], start[0]) and all((p - w).abs().mean() > 1e-3 for p, w in zip(ours[1:], start[1:]))


# ---------------------------------------------------------------- all three, on a unit LM

@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(kind):
    lm = tiny()
    losses = steps(lm, make_optimizer(lm, settings(kind)), 30)
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_changes_nothing(kind, tmp_path):
    """Through a file read with weights_only, into a new optimiser; AdEMAMix within its warm-up."""
    cfg, whole = settings(kind, alpha_warmup=8), tiny()
    first = make_optimizer(whole, cfg)
    steps(whole, first, 4)
    torch.save(first.state_dict(), tmp_path / "trainer.pt")
    resumed = tiny()
    resumed.load_state_dict(whole.state_dict())
    second = make_optimizer(resumed, settings(kind))
    second.load_state_dict(torch.load(tmp_path / "trainer.pt", weights_only=True))
    assert steps(whole, first, 6, lr=5e-3) == steps(resumed, second, 6, lr=5e-3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_has_one_optimiser(kind, tied):
    lm = tiny(tied)
    lm.model.norm.weight.requires_grad_(False)
    groups = make_optimizer(lm, settings(kind)).param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in lm.parameters() if p is not lm.model.norm.weight)
    assert all((group["weight_decay"] > 0) == (p.ndim >= 2) for group in groups for p in group["params"])


def hub(kind: str):
    """A small OPT (with projections beside its embeddings) or GPTNeoX of transformers."""
    import transformers as t
    if kind == "opt":
        return t.OPTForCausalLM(t.OPTConfig(vocab_size=22, hidden_size=16, ffn_dim=32, num_hidden_layers=2,
                                            num_attention_heads=2, word_embed_proj_dim=8, max_position_embeddings=32))
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(vocab_size=22, hidden_size=16, intermediate_size=32,
                                                num_hidden_layers=2, num_attention_heads=2))


@pytest.mark.parametrize("make,matrices,others", [
    (tiny, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", "model.embed_tokens.weight"),
    (lambda: tiny(False), "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
     "model.embed_tokens.weight lm_head.weight"),
    (lambda: hub("opt"), "q_proj k_proj v_proj out_proj fc1 fc2",
     "model.decoder.embed_tokens.weight model.decoder.embed_positions.weight model.decoder.project_in.weight "
     "model.decoder.project_out.weight"),
    (lambda: hub("gpt_neox"), "query_key_value dense dense_h_to_4h dense_4h_to_h",
     "gpt_neox.embed_in.weight lm_head.weight")], ids=["tied", "untied", "opt", "gpt_neox"])
def test_muon_has_the_matrices_of_the_blocks(make, matrices, others):
    lm = make()
    optimizer = make_optimizer(lm, settings("muon"))
    muon, adamw = ([id(p) for group in x.param_groups for p in group["params"]] for x in optimizer.optimizers)
    names = {id(p): name for name, p in lm.named_parameters()}  # transformers 5 renamed embed_out to lm_head
    assert sorted(muon + adamw) == sorted(names)
    assert {names[i].split(".")[-2] for i in muon} == set(matrices.split())
    assert len(muon) == 2 * len(matrices.split()) and all(".layers." in names[i] for i in muon)
    rest = {names[i].replace("embed_out", "lm_head") for i in adamw if lm.get_parameter(names[i]).ndim >= 2}
    assert rest == set(others.split())


def test_together_sets_the_learning_rate_of_all():
    lm = tiny()
    optimizer, before = make_optimizer(lm, settings("muon")), [p.detach().clone() for p in lm.parameters()]
    steps(lm, optimizer, 1, lr=0.0)
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), before))
    assert {group["lr"] for x in optimizer.optimizers for group in x.param_groups} == {0.0}
    assert all(p.grad is None for p in lm.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights(kind):
    lm = tiny().bfloat16()
    before = [p.detach().clone() for p in lm.parameters()]
    steps(lm, make_optimizer(lm, settings(kind)), 2, lr=0.1)
    assert all(p.isfinite().all() and (p != b).any() for p, b in zip(lm.parameters(), before))


def test_unknown_optimiser():
    with pytest.raises(ValueError, match="sgd"):
        make_optimizer(tiny(), settings("sgd"))
    del (cfg := settings("adamw")).optimizer
    assert isinstance(make_optimizer(tiny(), cfg), torch.optim.AdamW)
