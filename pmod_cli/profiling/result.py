"""What a profile says: two models side by side, their ratios, and the gates that a user can set on them.

The JSON form is documented in ``docs/json.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pmod_cli.output.errors import GateError, PmodError
from pmod_cli.profiling.closed_form import PhaseCount
from pmod_cli.profiling.prompt import Workload
from pmod_cli.published import Published

if TYPE_CHECKING:
    from pmod_cli.profiling.latency import Latency

FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class VariantProfile:
    """The figures of one model.

    Attributes:
        name: What was profiled.
        model_type: transformers' name.
        retention_ratios: One per layer, None for dense layers; None for the dense model.
        work: The prompt, in this model's tokens.
        parameters: By part.
        prefill: MACs of the prompt's forward pass.
        decode_step: MACs of the first token decoded after it.
        generation_macs: MACs of prefill and all decode steps.
        kv_prefill: Bytes of KV cache by layer after the prompt.
        kv_final: Bytes of KV cache by layer once the new tokens are generated.
        vision_retention: Mean share of vision tokens that a layer processes; None if it depends on the weights
            or there are none.
        token_retention: The same of all tokens.
        traffic: Least bytes moved in ``prefill`` and in the first ``decode_step``.
    """

    name: str
    model_type: str
    retention_ratios: list[float | None] | None
    work: Workload
    parameters: dict[str, int]
    prefill: PhaseCount
    decode_step: PhaseCount
    generation_macs: int
    kv_prefill: list[int]
    kv_final: list[int]
    vision_retention: float | None
    token_retention: float
    traffic: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "model_type": self.model_type,
            "retention_ratios": self.retention_ratios,
            "vision_tokens": self.work.vision_tokens,
            "crops": self.work.image.crops if self.work.image else 0,
            "parameters": {"total": sum(self.parameters.values()), **self.parameters},
            "prefill": _phase(self.prefill),
            "decode_step": _phase(self.decode_step),
            "generation": _work(self.generation_macs),
            "kv_cache": kv_cache_dict(self.kv_prefill, self.kv_final),
            "retention": {"vision": self.vision_retention, "all": self.token_retention},
            "least_traffic_bytes": self.traffic,
        }


@dataclass(frozen=True)
class ProfileResult:
    """A whole profile.

    Attributes:
        model: As the user named it.
        variants: Profiles by ``pmod`` and ``dense``; one of them may be missing.
        work: The prompt.
        convention: ``full`` or ``paper``.
        counted_by: ``fvcore`` or ``formula``.
        checks: Whether each other count that was made (``formula``) agrees, part by part and layer by layer.
        published: The paper's own figures, under its convention.
        latency: What was measured, or None.
        versions: Of the packages that took part.
    """

    model: str
    variants: dict[str, VariantProfile]
    work: Workload
    convention: str
    counted_by: str
    checks: dict[str, bool]
    published: Published | None
    latency: Latency | None
    versions: dict[str, str]

    @property
    def ratios(self) -> dict[str, float]:
        """p-MoD divided by dense, of everything worth comparing; empty if there is only one model."""
        pmod, dense = self.variants.get("pmod"), self.variants.get("dense")
        if pmod is None or dense is None:
            return {}
        ratios = {
            "prefill_flops": pmod.prefill.macs / dense.prefill.macs,
            "decode_step_flops": pmod.decode_step.macs / dense.decode_step.macs,
            "generation_flops": pmod.generation_macs / dense.generation_macs,
            "kv_prefill": sum(pmod.kv_prefill) / sum(dense.kv_prefill),
            "kv_final": sum(pmod.kv_final) / sum(dense.kv_final),
            "prefill_traffic": pmod.traffic["prefill"] / dense.traffic["prefill"],
            "decode_step_traffic": pmod.traffic["decode_step"] / dense.traffic["decode_step"],
            "parameters": sum(pmod.parameters.values()) / sum(dense.parameters.values()),
        }
        return ratios | (self.latency.ratios if self.latency else {})

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        work = self.work
        return {
            "model": self.model,
            "workload": {
                "image_size": list(reversed(work.image_size)) if work.image_size else None,
                "vision_tokens": work.vision_tokens,
                "text_tokens": work.text_tokens,
                "new_tokens": work.new_tokens,
                "batch": work.batch,
                "dtype": work.dtype,
                "logits": "all" if work.all_logits else "last",
            },
            "convention": self.convention,
            "counted_by": self.counted_by,
            "checks": self.checks,
            "pmod": self.variants["pmod"].to_dict() if "pmod" in self.variants else None,
            "dense": self.variants["dense"].to_dict() if "dense" in self.variants else None,
            "ratios": self.ratios,
            "published": self.published.to_dict() if self.published else None,
            "latency": self.latency.to_dict() if self.latency else None,
            "versions": self.versions,
        }


GATES = {
    "max_flops_ratio": ("prefill_flops", "prefill FLOPs"),
    "max_kv_ratio": ("kv_prefill", "KV cache after prefill"),
    "max_prefill_ratio": ("prefill_seconds", "prefill time"),
}


def check_gates(result: ProfileResult, limits: Mapping[str, float]) -> None:
    """Hold the ratios of p-MoD to dense against limits.

    Args:
        result: A profile with both models.
        limits: By name as in `GATES`.

    Raises:
        GateError: Names every ratio above its limit.
        PmodError: A limit on something that was not compared or not measured.
    """
    failed = []
    for gate, limit in limits.items():
        key, what = GATES[gate]
        if key not in result.ratios:
            need = "--latency" if key == "prefill_seconds" else "a p-MoD model and its dense baseline"
            raise PmodError(f"--{gate.replace('_', '-')} needs {need}")
        if result.ratios[key] > limit:
            failed.append(f"{what}: {result.ratios[key]:.4f} of dense, above {limit:g}")
    if failed:
        raise GateError("; ".join(failed))


def kv_cache_dict(prefill: list[int], final: list[int]) -> dict[str, Any]:
    """For JSON: bytes of KV cache by layer, and their sums."""
    return {
        "prefill_bytes": sum(prefill),
        "final_bytes": sum(final),
        "prefill_layers": prefill,
        "final_layers": final,
    }


def _work(macs: int) -> dict[str, int]:
    return {"macs": macs, "flops": FLOPS_PER_MAC * macs}


def _phase(count: PhaseCount) -> dict[str, Any]:
    return {
        **_work(count.macs),
        "parts": {part: _work(macs) for part, macs in count.parts.items()},
        "layers": [
            {
                "tokens": layer.tokens,
                **_work(layer.macs),
                "attention_projections_macs": layer.attention_projections,
                "attention_scores_macs": layer.attention_scores,
                "mlp_macs": layer.mlp,
                "router_macs": layer.router,
            }
            for layer in count.layers
        ],
    }
