"""The plan of a targets store: what is kept of a teacher's caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from kava_core.eviction import (
    CacheBatch,
    Targets,
    evict,
    group_layers,
    make_budgets,
    parse_layers,
)
from kava_core.settings import Evict
from kava_core.store import Geometry, TargetsStore
from kava_core.targets.specs import stored_settings


@dataclass(frozen=True)
class Plan:
    """The eviction settings against the geometry of one teacher.

    layers: the teacher layers that keep targets; groups: indices into them, in runs that share;
    budgets: slots per layer, or per group where layers share. geometry: of the targets; its M is
    the widest layer's budget.
    """

    settings: Evict
    layers: list[int]
    groups: list[list[int]]
    budgets: list[int]
    geometry: Geometry

    @classmethod
    def of(cls, settings: Evict, source: Geometry) -> Self:
        """source: of any store of that teacher. KavaError names the setting that cannot be met."""
        layers = parse_layers(settings.model_dump()["layers"], source.model_layers)
        size = settings.share_size if settings.share != "none" else 1
        groups = group_layers(len(layers), size)
        budgets = make_budgets(settings.budget_shape, len(groups), settings.budget)
        geometry = Geometry(
            model_layers=source.model_layers,
            layers=tuple(layers),
            groups=tuple(tuple(layers[i] for i in group) for group in groups),
            share=settings.share,
            kv_heads=source.kv_heads,
            head_dim=source.head_dim,
            hidden_size=source.hidden_size,
            slots=max(budgets),
        )
        return cls(settings, layers, groups, budgets, geometry)

    @classmethod
    def of_store(cls, store: TargetsStore) -> Self:
        """The plan by which `store` was made, from its manifest.

        KavaError if it does not say so in words of this version.
        """
        return cls.of(stored_settings(store, Evict), store.geometry)

    def with_budget(self, budget: int) -> Self:
        """The same plan with another budget per layer."""
        settings = self.settings.model_copy(update={"budget": budget})
        return self.of(settings, self.geometry)

    def cut(self, caches: CacheBatch) -> Targets:
        """The targets of some traces, from caches of all layers."""
        share = self.settings.share
        return evict(
            caches.choose_layers(self.layers),
            self.settings.policy,
            self.budgets,
            select=self.settings.select,
            share=share,
            groups=None if share == "none" else self.groups,
            rotary_phase=self.settings.phase,
        )
