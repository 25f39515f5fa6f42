"""One strategy in training on one rank: model, optimizer, and a clock for what a step spends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from tamoe.exchange import Exchange
from tamoe.experiments.model import GPT, FeedForward, GPTOutput, ModelConfig, initialise
from tamoe.experiments.strategies import Strategy, make_gate, make_layer
from tamoe.experiments.text import Corpus, train_batch, validation_batch
from tamoe.functional import expert_counts
from tamoe.gates import Gate, steering
from tamoe.groups import group_size
from tamoe.moe import MoE
from tamoe.parallel import DenseGradients
from tamoe.record import record_exchanges
from tamoe.scope import scope_of
from tamoe.solver import Plan, Workload


@dataclass(frozen=True)
class TrainConfig:
    """What all strategies of a run have in common."""

    seed: int = 0  # of initial values and data order
    hidden_size: int = 64  # D
    intermediate_size: int = 128  # F of one expert
    num_heads: int = 2
    num_blocks: int = 2  # MoE layers
    sequence_length: int = 128
    sequences: int = 8  # a rank and step
    top_k: int = 2
    experts_per_rank: int = 4
    learning_rate: float = 6e-3
    warmup_steps: int = 8  # of the learning rate

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a rank in a step."""
        return self.sequences * self.sequence_length

    @property
    def workload(self) -> Workload:
        """What the solver has to know of it."""
        return Workload(
            tokens_per_rank=self.tokens_per_rank,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            element_bytes=4,
            experts_per_rank=self.experts_per_rank,
        )

    def make_expert(self) -> FeedForward:
        """One expert."""
        return FeedForward(self.hidden_size, self.intermediate_size)

    def model(self, vocabulary_size: int) -> ModelConfig:
        """Sizes of the language model."""
        return ModelConfig(
            vocabulary_size=vocabulary_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_blocks=self.num_blocks,
            sequence_length=self.sequence_length,
        )


class StepTimes(NamedTuple):
    """Seconds of one step on this rank."""

    step_s: float
    exchange_s: float  # moving rows: dispatch and combine, forward and backward
    counts_s: float  # agreeing on counts; the wait for late ranks falls here
    allreduce_s: float  # averaging dense gradients


class Trainee:
    """A strategy's model on this rank.

    All ranks make the same trainees in the same order and call their methods together.

    Parameters
    ----------
    strategy
        How it routes.
    config
        What it has in common with the other strategies.
    corpus
        What it reads.
    exchange
        What it trains with; also gives rank and nodes.
    plan
        Of the strategy's ``kl``; None where it has none.
    """

    def __init__(
        self,
        strategy: Strategy,
        config: TrainConfig,
        corpus: Corpus,
        exchange: Exchange,
        plan: Plan | None,
    ) -> None:
        self.strategy, self.config, self.corpus = strategy, config, corpus
        self.rank, self.num_ranks = exchange.rank, exchange.num_ranks
        self.nodes, self.group, self.exchange = exchange.nodes, exchange.group, exchange
        num_experts = config.experts_per_rank * self.num_ranks

        def make_moe(_: int) -> torch.nn.Module:
            gate = make_gate(
                strategy,
                hidden_size=config.hidden_size,
                num_experts=num_experts,
                top_k=config.top_k,
                plan=plan,
                rank=self.rank,
                group=exchange.group,
            )
            return make_layer(strategy, gate, config.make_expert, exchange)

        self.model = GPT(config.model(corpus.vocabulary_size), make_moe)
        first_expert = self.rank * config.experts_per_rank
        initialise(self.model, seed=config.seed, first_expert=first_expert)
        self.gates = [part for part in self.model.modules() if isinstance(part, Gate)]
        self.layers = [part for part in self.model.modules() if isinstance(part, MoE)]
        self.optimizer = self._make_optimizer()
        self.dense = DenseGradients(self.model, nodes=exchange.nodes, group=exchange.group)
        self.steps = 0
        self._own_s, self._own_steps = 0.0, 0  # of the steps with its own exchange
        self.counts_N = torch.zeros(num_experts)  # of the latest steps, mean of the layers
        # Of the latest steps, too, but by layer, and choices that were kept: no padding.
        self.chosen_LN = torch.zeros(len(self.layers), num_experts)
        self.dropped_share = 0.0  # of the latest steps, like the counts

    def _make_optimizer(self) -> torch.optim.Optimizer:
        in_gates = {id(p) for gate in self.gates for p in gate.parameters()}
        groups = [
            {
                "params": [p for p in self.model.parameters() if id(p) not in in_gates],
                "factor": 1.0,
            },
            {
                "params": [p for gate in self.gates for p in gate.parameters()],
                "factor": self.strategy.gate_lr_factor,
            },
        ]
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95))

    @property
    def seconds(self) -> float:
        """Of training so far, had all steps used its own exchange: others count as their mean."""
        return self._own_s * self.steps / max(self._own_steps, 1)

    def train_step(self, exchange: Exchange | None = None) -> StepTimes:
        """One step on this rank's next batch.

        Parameters
        ----------
        exchange
            What moves the rows of this step; None: the trainee's own. All exchanges that move rows
            give the same bits, so training does not depend on it.
        """
        with self._exchanging_by(exchange or self.exchange):
            times = self._train_step()
        self.steps += 1
        if exchange in (None, self.exchange):
            self._own_s += times.step_s
            self._own_steps += 1
        return times

    @contextmanager
    def _exchanging_by(self, exchange: Exchange) -> Iterator[None]:
        for layer in self.layers:
            layer.exchange = exchange
        try:
            yield
        finally:
            for layer in self.layers:
                layer.exchange = self.exchange

    def _train_step(self) -> StepTimes:
        config = self.config
        tokens = train_batch(
            self.corpus,
            seed=config.seed,
            step=self.steps,
            rank=self.rank,
            sequences=config.sequences,
            length=config.sequence_length,
        )
        warmed = min(1.0, (self.steps + 1) / config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * group["factor"] * warmed
        began_s = time.perf_counter()
        with record_exchanges() as record:
            out: GPTOutput = self.model(torch.from_numpy(tokens))
            (out.loss + out.aux_loss).backward()
        allreduce = self.dense.finish()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        step_s = time.perf_counter() - began_s
        first = self.steps == 0
        counts_N = torch.tensor(record.sent_counts_N, dtype=torch.float32).mean(0)
        self.counts_N = counts_N if first else self.counts_N.lerp(counts_N, 0.25)
        chosen = [expert_counts(r.expert_index_TK, len(counts_N)) for r in out.routings]
        chosen_LN = torch.stack(chosen).float()
        self.chosen_LN = chosen_LN if first else self.chosen_LN.lerp(chosen_LN, 0.25)
        dropped = _dropped_share(out)
        kept = self.dropped_share
        self.dropped_share = dropped if first else kept + 0.25 * (dropped - kept)
        counts_s = record.phase_s("counts")
        return StepTimes(step_s, record.exchange_s - counts_s, counts_s, allreduce.allreduce_s)

    @torch.no_grad()
    def validate(
        self, batches: Sequence[int], *, foreign: bool = False, steered: bool = True
    ) -> float:
        """Mean loss of all ranks on held-out text, in nats a byte.

        Parameters
        ----------
        batches
            Numbers of the batches of the fixed set.
        foreign
            Every rank gets the text of a rank of the next node.
        steered
            False: no bias, and the mean of all gates where each rank has its own.
        """
        config = self.config
        self.model.eval()
        losses = []
        with self._unsteered(steered):
            for index in batches:
                tokens = validation_batch(
                    self.corpus,
                    index=index,
                    rank=self._foreign_rank() if foreign else self.rank,
                    num_ranks=self.num_ranks,
                    sequences=config.sequences,
                    length=config.sequence_length,
                )
                losses.append(self.model(torch.from_numpy(tokens)).loss)
        self.model.train()
        return float(self.mean_of_ranks(torch.stack(losses).mean()))

    def mean_of_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks, on all of them."""
        if self.group is None:
            return values
        values = values.detach().clone()
        dist.all_reduce(values, group=self.group)
        return values / group_size(self.group)

    def _foreign_rank(self) -> int:
        """A rank of the next node, another one for each rank where nodes are alike."""
        number = next(n for n, ranks in enumerate(self.nodes) if self.rank in ranks)
        position = self.nodes[number].index(self.rank)
        following = self.nodes[(number + 1) % len(self.nodes)]
        return following[position % len(following)]

    @contextmanager
    def _unsteered(self, steered: bool) -> Iterator[None]:
        if steered:
            yield
            return
        own = [p for gate in self.gates for p in gate.parameters() if scope_of(p) == "rank"]
        kept = [p.detach().clone() for p in own]
        try:
            for parameter in own:
                parameter.copy_(self.mean_of_ranks(parameter))
            with steering(self.model, False):
                yield
        finally:
            for parameter, value in zip(own, kept, strict=True):
                parameter.data.copy_(value)


def _dropped_share(out: GPTOutput) -> float:
    dropped = torch.stack([(r.expert_index_TK < 0).float().mean() for r in out.routings])
    return float(dropped.mean())
