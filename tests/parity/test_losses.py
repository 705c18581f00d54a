"""Losses over a cut sequence: value and every gradient equal one device's, whatever share of the
valid tokens a rank has, down to none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from examples.llama_like import LlamaLike
from tspc.backend.simulated import Simulated, relative_errors, simulated_backend
from tspc.base.options import parse

pytestmark = pytest.mark.slow
WORDS, HIDDEN, LENGTH, IGNORED = 29, 16, 13, -100


@dataclass
class Seen:
    """What a loss reads: hidden [B, S, h], logits [B, S, V], labels and tokens [B, S], a number of
    the whole batch, float targets like the logits."""

    model: Model
    hidden: Tensor
    logits: Tensor
    labels: Tensor
    tokens: Tensor
    count: Tensor
    target: Tensor

    @property
    def valid(self) -> Tensor:
        return self.labels != IGNORED

    def masked(self, x: Tensor) -> Tensor:
        """The mean over valid tokens of what each token has."""
        return (x * self.valid).sum() / self.valid.sum().clamp(min=1)


Loss = Callable[[Seen], Tensor]


class Model(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.body = LlamaLike(WORDS, HIDDEN, 1, 2, 1, 20)
        self.body.head = nn.Identity()
        self.head, self.gate = nn.Linear(HIDDEN, WORDS, bias=False), nn.Linear(HIDDEN, 5)
        self.register_buffer("weights", torch.linspace(0.1, 1.5, WORDS))
        self.loss = loss

    def forward(self, tokens: Tensor, labels: Tensor, count: Tensor, target: Tensor) -> Tensor:
        hidden = self.body(tokens)
        logits = self.head(hidden)
        return self.loss(Seen(self, hidden, logits, labels, tokens, count, target))


def entropy(**given: object) -> Loss:
    """Cross-entropy of all tokens with these arguments; summed up where it is not reduced."""

    def loss(s: Seen) -> Tensor:
        kwargs = dict(given)
        if kwargs.pop("weighted", False):
            kwargs["weight"] = s.model.weights
        found = F.cross_entropy(s.logits.flatten(0, 1), s.labels.flatten(), **kwargs)  # type: ignore[arg-type]
        return (found * torch.arange(found.shape[0])).sum() if found.dim() else found

    return loss


def other_ignored(s: Seen) -> Tensor:
    labels = torch.where(s.valid, s.labels, 3)
    return F.cross_entropy(s.logits.flatten(0, 1), labels.flatten(), ignore_index=3)


def classes_second(s: Seen) -> Tensor:
    return F.cross_entropy(s.logits.transpose(1, 2), s.labels)


def probabilities(s: Seen) -> Tensor:
    return F.cross_entropy(s.logits.flatten(0, 1), s.target.softmax(-1).flatten(0, 1))


def negative_log_likelihood(s: Seen) -> Tensor:
    return F.nll_loss(F.log_softmax(s.logits, -1).flatten(0, 1), s.labels.flatten())


def by_hand(s: Seen) -> Tensor:
    """A log-softmax and a look-up."""
    chances = torch.log_softmax(s.logits, -1)
    labels = s.labels.clamp(min=0)
    return s.masked(-chances.gather(-1, labels[..., None])[..., 0])


def z_loss(s: Seen) -> Tensor:
    return entropy()(s) + 1e-2 * s.masked(s.logits.logsumexp(-1).square())


def items_in_batch(s: Seen) -> Tensor:
    return entropy(reduction="sum")(s) / s.count


def tokens_of_a_row(s: Seen) -> Tensor:
    """A mean over the tokens of each row, then over rows."""
    found = F.cross_entropy(s.logits.transpose(1, 2), s.labels, reduction="none")
    return (found.sum(1) / s.valid.sum(1).clamp(min=1)).mean()


def square(s: Seen) -> Tensor:
    return F.mse_loss(s.logits, s.target)


def square_of_valid(s: Seen) -> Tensor:
    return s.masked(F.mse_loss(s.logits, s.target, reduction="none").mean(-1))


def smooth_l1(s: Seen) -> Tensor:
    return F.smooth_l1_loss(s.logits, s.target, reduction="sum") + F.l1_loss(
        s.hidden, 0.1 * s.hidden
    )


def binary(s: Seen) -> Tensor:
    return F.binary_cross_entropy_with_logits(s.logits, s.target.sigmoid())


def divergence(s: Seen) -> Tensor:
    mine, other = F.log_softmax(s.logits / 2, -1), F.log_softmax(s.target / 2, -1)
    return 4 * F.kl_div(mine, other, log_target=True, reduction="batchmean")


def divergence_of_valid(s: Seen) -> Tensor:
    mine = F.log_softmax(s.logits, -1)
    return s.masked(F.kl_div(mine, s.target.softmax(-1), reduction="none").sum(-1))


def balance(s: Seen) -> Tensor:
    """The load of experts: shares of the first choice times mean chances."""
    chances = s.model.gate(s.hidden).softmax(-1)
    share = F.one_hot(chances.argmax(-1), 5).to(chances.dtype).mean((0, 1))
    return entropy()(s) + 0.1 * 5 * (share * chances.mean((0, 1))).sum()


def certainty(s: Seen) -> Tensor:
    """Entropy of the prediction, and the size of the hidden states."""
    chances = s.logits.softmax(-1)
    return s.masked(-(chances * F.log_softmax(s.logits, -1)).sum(-1)) + s.hidden.square().mean()


def two_heads(s: Seen) -> Tensor:
    few = torch.where(s.valid, s.labels % 5, IGNORED)
    return entropy()(s) + 0.3 * F.cross_entropy(s.model.gate(s.hidden).flatten(0, 1), few.flatten())


def shifted_logits(s: Seen) -> Tensor:
    return F.cross_entropy(s.logits[:, :-1].flatten(0, 1), s.labels[:, 1:].flatten())


def shifted_hidden(s: Seen) -> Tensor:
    """The last token never gets logits."""
    logits = s.model.head(s.hidden[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), s.labels[:, 1:].flatten())


def shifted_labels(s: Seen) -> Tensor:
    labels = F.pad(s.labels, (0, 1), value=IGNORED)[:, 1:]
    return F.cross_entropy(s.logits.flatten(0, 1), labels.flatten(), reduction="sum") / s.count


def rolled_labels(s: Seen) -> Tensor:
    labels = torch.roll(s.labels, -1, 1)
    labels[:, -1] = IGNORED
    return F.cross_entropy(s.logits.flatten(0, 1), labels.flatten())


def next_hidden(s: Seen) -> Tensor:
    """What is shifted is itself cut along the sequence."""
    return (s.hidden[:, :-1] - s.hidden[:, 1:].detach()).square().mean() + entropy()(s)


def two_tokens_ahead(s: Seen) -> Tensor:
    return shifted_logits(s) + 0.5 * F.cross_entropy(
        s.logits[:, :-2].flatten(0, 1), s.labels[:, 2:].flatten()
    )


PLAIN = {
    "mean": entropy(),
    "sum": entropy(reduction="sum"),
    "none": entropy(reduction="none"),
    "class weights": entropy(weighted=True),
    "class weights, sum": entropy(weighted=True, reduction="sum"),
    "class weights, none": entropy(weighted=True, reduction="none"),
    "smoothing": entropy(label_smoothing=0.1),
    "smoothing, sum": entropy(label_smoothing=0.1, reduction="sum"),
    "smoothing, none": entropy(label_smoothing=0.1, reduction="none"),
    "smoothing, class weights": entropy(label_smoothing=0.1, weighted=True),
}
OTHERS = (
    *(other_ignored, classes_second, probabilities, negative_log_likelihood, by_hand, z_loss),
    *(items_in_batch, tokens_of_a_row, square, square_of_valid, smooth_l1, binary, divergence),
    *(divergence_of_valid, balance, certainty, two_heads, shifted_logits, shifted_hidden),
    *(shifted_labels, rolled_labels, next_hidden, two_tokens_ahead),
)
LOSSES: dict[str, Loss] = PLAIN | {f.__name__: f for f in OTHERS}
# the head is a region of these; others read its logits as a whole, or by an op without a rule
FOLDED = {*PLAIN} - {"smoothing, class weights"} | {
    *("other_ignored", "classes_second", "z_loss", "items_in_batch", "tokens_of_a_row"),
    *("balance", "two_heads", "shifted_logits", "shifted_hidden", "shifted_labels"),
    *("rolled_labels", "next_hidden", "two_tokens_ahead"),
}


def together(s: Seen) -> Tensor:
    """What differs most, as one loss."""
    names = ("class weights", "smoothing, none", "items_in_batch", "balance", "shifted_hidden")
    return sum((LOSSES[n](s) * (i + 1) for i, n in enumerate(names)), square_of_valid(s))


def validity(length: int) -> dict[str, Tensor]:
    """Which tokens count: [2, S] each. Zigzag on three ranks: the first has the two ends."""
    at = torch.arange(length).expand(2, length)
    return {
        "all": at >= 0,
        "the ends": (at < 2) | (at >= length - 2),
        "the middle": (at > length // 3) & (at < 2 * length // 3),
        "one token": (at == length // 2) & torch.tensor([[True], [False]]),
        "a long row and none": torch.tensor([[True], [False]]).expand(2, length),
    }


def outcome(fn: Callable[..., Tensor], model: nn.Module, given: tuple[Tensor, ...]) -> dict:
    model.zero_grad()
    loss = fn(*given)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return grads | {"loss": loss.detach()}


def compare(loss: Loss, ranks: int, layout: str, shares: tuple[str, ...]) -> Simulated:
    """One compile, a call for each share of valid tokens."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, made = Model(loss).double(), list[Simulated]()
    fn = torch.compile(model, backend=simulated_backend(ranks, parse({"layout": layout}), made))
    tokens, target = torch.randint(0, WORDS, (2, LENGTH)), torch.randn(2, LENGTH, WORDS)
    for name in shares:
        valid = validity(LENGTH)[name]
        labels = torch.where(valid, torch.roll(tokens, -1, 1), IGNORED)
        given = (tokens, labels, valid.sum(), target.double())
        mine, one = outcome(fn, model, given), outcome(model, model, given)
        errors = relative_errors(mine, one)
        assert mine.keys() == one.keys()
        assert max(errors.values()) <= 1e-9, (name, errors)
    (graph,) = made
    return graph


def test_losses_in_one() -> None:
    graph = compare(together, 3, "zigzag", ("the middle", "one token"))
    assert {"body.blocks.0.attention", "body.blocks.0.mlp"} <= {
        n for n, _, _ in graph.rewritten.choice.regions
    }


@pytest.mark.wide
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_one_device(name: str, layout: str) -> None:
    graph = compare(LOSSES[name], 3, layout, tuple(validity(LENGTH)))
    folded = {n for n, _, _ in graph.rewritten.choice.regions}
    assert name not in FOLDED or "head" in folded, graph.rewritten.choice.refused
