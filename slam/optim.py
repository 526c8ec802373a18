"""From gradients to new weights: the schedule of the learning rate, and three optimisers.

    adamw     Loshchilov & Hutter 2019, arXiv 1711.05101: mean gradient over root mean square, both running
    ademamix  Pagliardini et al. 2024, arXiv 2409.03137: a second, much slower mean of the gradient beside the first
    muon      Jordan et al. 2024, kellerjordan.github.io/posts/muon: orthogonal steps for the blocks' matrices
"""
import math
from collections import defaultdict

import torch
from torch import Tensor, nn


def schedule(kind: str, p: float, warmup: float, floor: float) -> float:
    """Learning rate / peak at progress p in [0, 1]; `warmup` is a share of the run, `floor` = min_lr / lr.

    After a linear warm-up, with q the progress since:
    cosine: floor + (1 - floor) (1 + cos pi q) / 2. inverse_sqrt: sqrt(warmup / p). wsd: 1, and in the last fifth of the
    run linearly to the floor. constant: 1. All as in transformers. ValueError: inverse_sqrt without a warm-up.
    """
    if kind == "inverse_sqrt" and not warmup:
        raise ValueError("inverse_sqrt needs a warmup above 0")
    if p < warmup:
        return p / warmup
    if kind == "constant":
        return 1.0
    if kind == "inverse_sqrt":
        return math.sqrt(warmup / p)
    if kind == "wsd":
        return 1 - (1 - floor) * max(0.0, min(p, 1.0) - 0.8) / 0.2
    q = min(1.0, (p - warmup) / (1 - warmup))
    return {"cosine": floor + (1 - floor) * (1 + math.cos(math.pi * q)) / 2}[kind]


class AdEMAMix(torch.optim.Optimizer):
    """AdamW with a second, slow mean of the gradient (Pagliardini et al. 2024, algorithm 1). With alpha 0 it is AdamW.

    m1 = beta1 m1 + (1 - beta1) g    m2 = beta3 m2 + (1 - beta3) g    v = beta2 v + (1 - beta2) g^2
    w -= lr ((m1 / (1 - beta1^t) + alpha m2) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w)

    warmup_steps: the paper's T_alpha = T_beta3, there the length of the run. During these steps alpha rises linearly
        from 0, and beta3 from beta1 such that its half-life rises linearly. 0: both are constant.
    The state has the weights' type, as in torch's optimisers; bfloat16 is too coarse for a beta of 0.9999.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
                 alpha: float = 5.0, eps: float = 1e-8, weight_decay: float = 0.0, warmup_steps: int = 0):
        super().__init__(params, dict(lr=lr, betas=betas, alpha=alpha, eps=eps, weight_decay=weight_decay,
                                      warmup_steps=warmup_steps, step=0))

    @staticmethod
    def warmed(group: dict) -> tuple[float, float]:
        """alpha and beta3 at the group's present step."""
        (beta1, _, beta3), done = group["betas"], group["step"] / max(group["warmup_steps"], 1)
        if done >= 1:
            return group["alpha"], beta3
        half_life = (1 - done) / math.log(max(beta1, 1e-8)) + done / math.log(beta3)  # divided by ln 0.5
        return done * group["alpha"], math.exp(1 / half_life)

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            (beta1, beta2, _), (alpha, beta3), lr = group["betas"], self.warmed(group), group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p].update({name: torch.zeros_like(p) for name in ("fast", "slow", "square")})
                fast, slow, square = (self.state[p][name] for name in ("fast", "slow", "square"))
                fast.lerp_(p.grad, 1 - beta1)
                slow.lerp_(p.grad, 1 - beta3)
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = square.sqrt().div_(math.sqrt(1 - beta2 ** group["step"])).add_(group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(fast, root, value=-lr / (1 - beta1 ** group["step"])).addcdiv_(slow, root, value=-lr * alpha)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024): m = mu m + (1 - mu) g, u = mu m + (1 - mu) g, and then

    w -= lr (0.2 sqrt(max(w.shape)) orthogonal(u) + weight_decay w)

    The factor gives the steps the RMS of AdamW's (Liu et al. 2025, arXiv 2502.16982). It computes and stores what
    torch.optim.Muon does with adjust_lr_fn="match_rms_adamw", but updates 16 matrices of a shape at once: for
    Qwen2.5-0.5B a tenth of the 3,700 kernels a step.
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum, alike = group["lr"], group["momentum"], defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, matrices in alike.items():
                for at in range(0, len(matrices), 16):
                    params = matrices[at:at + 16]
                    for p in params:
                        if not self.state[p]:
                            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    grads, means = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
                    torch._foreach_lerp_(means, grads, 1 - momentum)
                    u = orthogonal(torch.stack(torch._foreach_lerp(grads, means, momentum))).to(params[0].dtype)
                    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                    torch._foreach_add_(params, u.unbind(), alpha=-lr * 0.2 * math.sqrt(max(shape)))


def orthogonal(x: Tensor) -> Tensor:
    """The orthogonal matrices next to x (n, rows, columns), roughly: singular values between 0.5 and 1.5; bfloat16.

    Five steps of the quintic Newton-Schulz iteration; constants of Jordan et al. 2024.
    """
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Together:
    """Several optimisers, each with its own weights, behind the interface of one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for x in self.optimizers for group in x.param_groups]

    def step(self) -> None:
        for x in self.optimizers:
            x.step()

    def state_dict(self) -> dict:
        return {"optimizers": [x.state_dict() for x in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        for x, theirs in zip(self.optimizers, state["optimizers"], strict=True):
            x.load_state_dict(theirs)


def make_optimizer(lm: nn.Module, cfg) -> torch.optim.Optimizer | Together:
    """The optimiser `cfg.optimizer` (AdamW if there is no such field) of all weights that are not frozen.

    `cfg` has lr, beta1, beta2, eps and weight_decay (of matrices only), and may have beta3, alpha, alpha_warmup
    (AdEMAMix's warmup_steps) and muon_momentum.

    muon: for the linear layers within a ModuleList, the blocks; AdamW for embeddings, head, projections beside them,
    norms and biases. One learning rate serves both.
    """
    kind = getattr(cfg, "optimizer", "adamw")
    params = [p for p in lm.parameters() if p.requires_grad]
    if kind == "muon":
        blocks = [x for x in lm.modules() if isinstance(x, nn.ModuleList)]
        inner = {id(x.weight) for block in blocks for x in block.modules() if isinstance(x, nn.Linear)}
        muon = Muon([p for p in params if id(p) in inner], cfg.lr, getattr(cfg, "muon_momentum", 0.95),
                    cfg.weight_decay)
        params = [p for p in params if id(p) not in inner]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    if kind == "ademamix":
        return AdEMAMix(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2, getattr(cfg, "beta3", 0.9999)), eps=cfg.eps,
                        alpha=getattr(cfg, "alpha", 5.0), warmup_steps=getattr(cfg, "alpha_warmup", 0))
    if kind not in ("adamw", "muon"):
        raise ValueError(f"optimizer {kind!r}; expected adamw, ademamix or muon")
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    return Together(muon, adamw) if kind == "muon" else adamw


def update(lm: nn.Module, optimizer: torch.optim.Optimizer | Together, lr: float, clip: float) -> Tensor:
    """Clip the gradients, take a step at this learning rate, clear the gradients; returns the unclipped norm, ()."""
    norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    lm.zero_grad()
    return norm
