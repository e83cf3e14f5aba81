"""What happens to per-example gradients between the backward pass and the update: norms first, weighted sums later.

A parameter that enters one use as it is (or merely re-arranged) has its norm taken as soon as the backward pass
delivers it. Parameters that are used several times, tied, or computed from others are settled together afterwards:
one example's gradient is the sum over all uses, pulled back to the parameters.

Norms have a column per group of parameters (see `clipping.Groups`), and so have factors. A tensor that is computed
from parameters of several groups is pulled back to each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor

from .clipping import finite_examples
from .rules.affine import Affine
from .rules.cost import Choice, NormRule, choose
from .rules.gradients import Instantiated, PerExampleGradient, squared_rows, wide
from .rules.planner import Planner
from .rules.shared import Taken, TakenNorms
from .uses import Slot, Theta, Uses


def clusters(slots: Iterable[Slot]) -> list[list[Slot]]:
    """Slots grouped so that two groups have no parameter in common; order of first use."""
    group_of: dict[str, list[Slot]] = {}
    for slot in slots:
        met = {id(group): group for name in slot.theta.sources if (group := group_of.get(name)) is not None}
        merged = [*(member for group in met.values() for member in group), slot]
        for name in {name for member in merged for name in member.theta.sources}:
            group_of[name] = merged
    return list({id(group): group for group in group_of.values()}.values())


class Collector:
    """Receives the per-example gradients of one backward pass.

    Args:
        uses: what the forward pass recorded.
        norm_rule: ghost, instantiate, or a rule to choose per use.
        backward_passes: with 1 the gradients are held for `weighted_sums`; with 2 only norms leave this object.
        planner: chooses for each use and computes its norms.
        saved_bytes: what the forward pass saved, for the planner's bound.
        columns: the group of every trainable parameter, 0 to m-1.

    Attributes:
        backward_passes: as given, or 2 where one pass would hold too much.
    """

    def __init__(
        self,
        uses: Uses,
        norm_rule: NormRule,
        backward_passes: int,
        planner: Planner,
        saved_bytes: int,
        columns: Mapping[str, int],
    ) -> None:
        self._uses, self._norm_rule, self._columns = uses, norm_rule, columns
        self._joint: dict[Slot, list[Slot]] = {}  # those not alone, until their cluster is settled
        for members in clusters(uses.slots):
            if len(members) > 1 or not self._norm_carries_over(members[0].theta):
                self._joint |= dict.fromkeys(members, members)
        alone = [slot for slot in uses.slots if slot not in self._joint]
        plan = planner.plan(alone, uses.n, norm_rule, backward_passes, saved_bytes)
        self._norms, self.backward_passes = TakenNorms(planner, alone, plan.choices), plan.backward_passes
        first = next(iter(uses.parameters.values()))
        groups = max(columns.values()) + 1
        self._squared = torch.zeros(uses.n, groups, dtype=wide(first.dtype), device=first.device)
        self._held: dict[Slot, PerExampleGradient] = {}
        self._pulled_back: dict[str, Instantiated] = {}  # by parameter, where that is less to hold

    def _norm_carries_over(self, theta: Theta) -> bool:
        """Whether the norm of a tensor's gradient is that of its parameters', all of one group."""
        return theta.isometric and len(_groups_of(theta, self._columns)) == 1

    def receive(self, slot: Slot, gradient: PerExampleGradient) -> None:
        """Take one use's gradients during the backward pass."""
        if slot in self._joint:
            self._held[slot] = gradient
            members = self._joint[slot]
            if all(member in self._held for member in members):  # at once: a sharded parameter is soon gone again
                self._settle(members)
            return
        with torch._C.DisableTorchFunction():  # nothing is run again in here, so no mode needs to see it
            self._take(self._norms.receive(slot, gradient))

    def _take(self, known: Iterable[Taken]) -> None:
        for slot, squared, gradient in known:
            self._add(slot.theta, squared)
            if self.backward_passes == 1:
                self._held[slot] = gradient

    def squared_norms(self) -> Tensor:
        """Squared norms `[n, m]` over the parameters of each group; call once, after the backward pass."""
        self._take(self._norms.rest())
        while self._joint:  # uses that no gradient reached keep their clusters open until now
            self._settle(next(iter(self._joint.values())))
        return self._squared

    def unsettled(self) -> list[str]:
        """Parameters whose norms are not in yet, because only some of their uses were reached by a gradient."""
        open_uses = [slot for slot, members in self._joint.items() if any(m in self._held for m in members)]
        return sorted({name for slot in open_uses for name in slot.theta.sources})

    def _settle(self, members: list[Slot]) -> None:
        delivered = [slot for slot in members if slot in self._held]
        if delivered:
            self._take_together(delivered)
        for slot in members:
            del self._joint[slot]
            if self.backward_passes == 2:
                self._held.pop(slot, None)

    def _add(self, theta: Theta, squared: Tensor) -> None:
        """Count squared norms `[n]` in the one group that all parameters behind a tensor belong to."""
        (column,) = _groups_of(theta, self._columns)
        self._squared[:, column] += squared

    def _take_together(self, members: list[Slot]) -> None:
        gradients = [self._held[slot] for slot in members]
        theta = members[0].theta
        if self._norm_carries_over(theta) and all(slot.theta.tensor is theta.tensor for slot in members):
            affine = [gradient for gradient in gradients if isinstance(gradient, Affine)]
            if len(affine) == len(gradients):
                self._add(theta, self._affine_squared_norms(members, affine))
            else:
                total = reduce(torch.add, (gradient.instantiate() for gradient in gradients))
                self._add(theta, squared_rows(total))
            return
        per_parameter: dict[str, Tensor] = {}
        for slot, gradient in zip(members, gradients, strict=True):
            for name, pulled in self._pull_back(slot, gradient).items():
                per_parameter[name] = per_parameter[name] + pulled if name in per_parameter else pulled
        for name, pulled in per_parameter.items():
            self._squared[:, self._columns[name]] += squared_rows(pulled)
        if self.backward_passes == 1 and _smaller(per_parameter.values(), gradients):
            self._pulled_back |= {name: Instantiated(pulled) for name, pulled in per_parameter.items()}
            for slot in members:
                del self._held[slot]

    def _affine_squared_norms(self, members: list[Slot], gradients: list[Affine]) -> Tensor:
        joined = Affine.joined(gradients)
        shape = members[0].shape
        positions = sum(slot.shape.positions for slot in members)
        choice = choose(self._norm_rule, type(shape)(positions, shape.inputs, shape.outputs, shape.groups), 2)
        return joined.ghost_squared_norms() if choice is Choice.GHOST else joined.squared_norms()

    def _pull_back(self, slot: Slot, gradient: PerExampleGradient) -> dict[str, Tensor]:
        """Per-example gradients `[n, *shape]` of the parameters behind one slot's tensor."""
        names = sorted(slot.theta.sources)
        instantiated = gradient.instantiate().to(slot.theta.tensor.dtype)
        if slot.theta.tensor.is_leaf:
            return {names[0]: instantiated}
        found = torch.autograd.grad(
            slot.theta.tensor,
            [self._uses.parameters[name] for name in names],
            instantiated.view(self._uses.n, *slot.theta.tensor.shape),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}

    def weighted_sums(self, factors: Tensor) -> dict[str, Tensor]:
        """`sum_n factors[n, k] * gradient[n]` for every trainable parameter of group k; releases what is held.

        An example whose norm is not finite has factor 0, and its entries are removed beforehand (0 * NaN is NaN).
        """
        sums = Sums(self._uses)
        summer = Summer(self._uses, self._columns, factors, finite_examples(self._squared), sums.add)
        for slot in list(self._held):
            summer.receive(slot, self._held.pop(slot))
        for name, gradient in self._pulled_back.items():
            summer.receive_pulled_back(name, gradient)
        return sums.complete()


class Summer:
    """Forms weighted sums of per-example gradients and takes them back to the parameters, use by use.

    Args:
        uses: what the forward pass recorded.
        columns: the group of every trainable parameter.
        factors: `[n, m]`, one for each example and group.
        finite: `[n]`, false for examples that must contribute exactly nothing.
        add: receives one parameter's name and a share of its sum, float32 or better.
    """

    def __init__(
        self,
        uses: Uses,
        columns: Mapping[str, int],
        factors: Tensor,
        finite: Tensor,
        add: Callable[[str, Tensor], None],
    ) -> None:
        self._uses, self._columns, self._finite, self._add = uses, columns, finite, add
        self._factors = factors.unbind(1)
        self._all_finite = bool(finite.all())

    def receive(self, slot: Slot, gradient: PerExampleGradient) -> None:
        """Add one use's share."""
        if not self._all_finite:
            gradient = gradient.kept(self._finite)
        theta = slot.theta.tensor
        for column, names in _groups_of(slot.theta, self._columns).items():
            share = gradient.weighted_sum(self._factors[column]).view(theta.shape)
            if theta.is_leaf:
                self._add(names[0], share)
            else:
                self._add_pulled_back(theta, names, share)

    def receive_pulled_back(self, name: str, gradient: PerExampleGradient) -> None:
        """Add one parameter's own gradients."""
        if not self._all_finite:
            gradient = gradient.kept(self._finite)
        self._add(name, gradient.weighted_sum(self._factors[self._columns[name]]))

    def _add_pulled_back(self, theta: Tensor, names: list[str], share: Tensor) -> None:
        parameters = [self._uses.parameters[name] for name in names]
        found = torch.autograd.grad(theta, parameters, share.to(theta.dtype), retain_graph=True, allow_unused=True)
        for name, grad in zip(names, found, strict=True):
            if grad is not None:
                self._add(name, grad.to(wide(grad.dtype)))


def _groups_of(theta: Theta, columns: Mapping[str, int]) -> dict[int, list[str]]:
    """The groups that the parameters behind a tensor belong to, and their names in each."""
    found: dict[int, list[str]] = {}
    for name in sorted(theta.sources):
        found.setdefault(columns[name], []).append(name)
    return found


def _smaller(pulled_back: Iterable[Tensor], gradients: Iterable[PerExampleGradient]) -> bool:
    """Are the parameters' gradients fewer numbers than those of what is computed from them?

    So it is for a table of relative positions, read once per pair of positions.
    """
    instantiated = [gradient for gradient in gradients if isinstance(gradient, Instantiated)]
    held = sum(gradient.gradients.numel() for gradient in instantiated)
    return sum(pulled.numel() for pulled in pulled_back) < held


class Sums:
    """Sums by qualified parameter name."""

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, share: Tensor) -> None:
        """Add a share to one parameter's sum."""
        before = self._sums.get(name)
        self._sums[name] = share if before is None else before + share

    def complete(self) -> dict[str, Tensor]:
        """The sums, zeros for parameters without use."""
        return self._sums | zeros({n: p for n, p in self._uses.parameters.items() if n not in self._sums})


def zeros(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A sum over no example: zeros for every parameter, float32 or better."""
    return {name: torch.zeros_like(p, dtype=wide(p.dtype), requires_grad=False) for name, p in parameters.items()}
