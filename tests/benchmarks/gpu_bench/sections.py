"""What each section measures: pairs of a label and a call that gives the case's result."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.kernels import add_norm, gather, route, scatter, select
from pmod_cli.modeling.router import spread_rank
from tests.benchmarks.gpu_bench.models import LLAVA, NEXT, Pair, Session, free_memory
from tests.benchmarks.gpu_bench.timing import (
    PMOD,
    Contender,
    contenders,
    recorded,
    seconds,
    take_turns,
)

Case = tuple[str, Callable[[], dict[str, Any]]]


@torch.inference_mode()
def prefill(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """The prompt's forward pass: its cache, and the first new token, [batch, 1]."""
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    return output[CACHE_ARGUMENT], output.logits[:, -1:].argmax(-1)


@torch.inference_mode()
def decode(model: Any, state: tuple[Any, Tensor], count: int) -> None:
    """So many decode steps, greedily."""
    cache, token = state
    for _ in range(count):
        step = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
        token = model(input_ids=token, **step).logits[:, -1:].argmax(-1)


def prompt_and_decode(
    session: Session, rival: Contender, inputs: dict[str, Tensor], count: int
) -> tuple[float, float]:
    """Milliseconds of a prefill, and per token of the decode steps after it."""
    state: list[Any] = []
    first = seconds(lambda: state.append(prefill(rival.model, inputs)), session.device)
    further = seconds(lambda: decode(rival.model, state[0], count), session.device)
    return 1e3 * first, 1e3 * further / count


def warm_up(session: Session, name: str = LLAVA) -> Pair:
    """The pair, after a short prompt that loads libraries."""
    pair = session.pair(name)
    for rival in contenders(pair):
        with rival.setting():
            decode(rival.model, prefill(rival.model, pair.inputs(1, 8)), 2)
    return pair


def cold(session: Session) -> Iterator[Case]:
    """Prompts of lengths not seen before, b = 1, the decode steps after them, and the same prompts again."""
    pair, count = warm_up(session), session.sizes.cold_tokens

    def measure(rival: Contender) -> dict[str, float]:
        inputs = pair.inputs(1, pair.new_text(1, count + 1))
        new_ms, new_decode_ms = prompt_and_decode(session, rival, inputs, count)
        again_ms, again_decode_ms = prompt_and_decode(session, rival, inputs, count)
        return {
            "prefill_ms": new_ms,
            "prefill_again_ms": again_ms,
            "decode_ms": new_decode_ms,
            "decode_again_ms": again_decode_ms,
        }

    yield f"b = 1, then {count} tokens", lambda: take_turns(contenders(pair), rounds(session, 3), measure)


def warm_prefill(session: Session) -> Iterator[Case]:
    """Prompts of one length, wall time and the device's."""
    one, some, many = session.sizes.batches
    for name, batch in ((LLAVA, one), (LLAVA, some), (LLAVA, many), (NEXT, one), (NEXT, some // 2)):

        def case(name: str = name, batch: int = batch) -> dict[str, Any]:
            pair = session.pair(name)
            inputs = pair.inputs(batch)

            def measure(rival: Contender) -> dict[str, float]:
                return {"ms": 1e3 * seconds(lambda: prefill(rival.model, inputs), session.device)}

            take_turns(contenders(pair), 1, measure)
            result = take_turns(contenders(pair), rounds(session, 3 if batch == many else 5), measure)
            for rival in contenders(pair):
                role = PMOD if rival.name == PMOD else "dense"
                if result[role] and rival.name in (PMOD, result["dense_setting"]):
                    with rival.setting():
                        seen = recorded(partial(prefill, rival.model, inputs), session.device)
                    result[role]["busy_ms"] = seen["busy_ms"]
            return result | {"flops_ratio": pair.flops_ratio(batch)}

        yield label(name, batch), case


def decoding(session: Session) -> Iterator[Case]:
    """Milliseconds per token after prompts of lengths not seen before, and again."""
    one, some, many = session.sizes.batches
    count = session.sizes.decode_tokens
    for name, batch in ((LLAVA, one), (LLAVA, some), (LLAVA, many), (NEXT, one)):

        def case(name: str = name, batch: int = batch) -> dict[str, Any]:
            pair = session.pair(name)

            def measure(rival: Contender) -> dict[str, float]:
                inputs = pair.inputs(batch, pair.new_text(batch, count + 1))
                new_ms = prompt_and_decode(session, rival, inputs, count)[1]
                again_ms = prompt_and_decode(session, rival, inputs, count)[1]
                return {"ms_per_token": new_ms, "ms_per_token_again": again_ms}

            return take_turns(contenders(pair), rounds(session, 2), measure)

        yield label(name, batch), case


def static(session: Session) -> Iterator[Case]:
    """``generate`` with a static cache, compiled by transformers on a GPU: one model after the other."""
    pair, count = session.pair(LLAVA), session.sizes.new_tokens
    for rival in contenders(pair)[:2]:

        def case(rival: Contender = rival) -> dict[str, Any]:
            inputs = pair.inputs(1)

            def new(tokens: int) -> float:
                length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
                options = {**length, "do_sample": False, "cache_implementation": "static"}
                return seconds(lambda: rival.model.generate(**inputs, **options), session.device)

            with rival.setting():
                first = new(count)
                rows = [1e3 * (new(count) - new(1)) / (count - 1) for _ in range(rounds(session, 3))]
            return {"ms_per_token": statistics.median(rows), "first_seconds": first, "runs": rows}

        yield f"{label(LLAVA, 1)}, {rival.name}", case


def throughput(session: Session) -> Iterator[Case]:
    """Tokens per second of ``generate`` at growing batches, until each model is out of memory."""
    session.release(NEXT)
    pair, count = session.pair(LLAVA), session.sizes.new_tokens
    alive = contenders(pair)
    for batch in session.sizes.growing:

        def case(batch: int = batch) -> dict[str, Any]:
            inputs = pair.inputs(batch)
            length = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}

            def measure(rival: Contender) -> dict[str, float]:
                if session.device.type == "cuda":
                    free_memory()
                    torch.cuda.reset_peak_memory_stats(session.device)
                wall = seconds(lambda: rival.model.generate(**inputs, **length), session.device)
                peak = torch.cuda.max_memory_allocated(session.device) if session.device.type == "cuda" else 0
                return {
                    "seconds_per_token": wall / batch / count,
                    "tokens_per_second": batch * count / wall,
                    "peak_gb": peak / 1e9,
                }

            # Once: lengths not seen before are paid for, as in use. Of the dense settings, the faster one goes on.
            result = take_turns(alive, 1, measure)
            out_of_memory = [rival.name for rival in alive if not result["runs"][rival.name]]
            kept = {PMOD, result["dense_setting"]} - set(out_of_memory)
            alive[:] = [rival for rival in alive if rival.name in kept]
            return result | {"batch": batch, "out_of_memory": out_of_memory}

        if alive:
            yield f"b = {batch}", case


def train(session: Session) -> Iterator[Case]:
    """Forward and backward, the vision tower frozen, with and without gradient checkpointing, and at new lengths."""
    session.release(NEXT)
    pair = session.pair(LLAVA)
    few, many = (1, 2) if session.tiny else (2, 8)
    for batch, checkpointing, new in (
        (many, False, False),
        (many, True, False),
        (few, False, False),
        (few, True, False),
        (many, True, True),
    ):

        def case(batch: int = batch, checkpointing: bool = checkpointing, new: bool = new) -> dict[str, Any]:
            fixed = pair.inputs(batch)

            def measure(rival: Contender) -> dict[str, float]:
                inputs = pair.inputs(batch, pair.new_text(batch)) if new else fixed
                labels = inputs["input_ids"].masked_fill(
                    inputs["input_ids"] == rival.model.config.image_token_id, -100
                )
                try:
                    wall = seconds(
                        lambda: rival.model(**inputs, labels=labels, use_cache=False).loss.backward(),
                        session.device,
                    )
                finally:
                    rival.model.zero_grad(set_to_none=True)
                return {"ms": 1e3 * wall}

            try:
                for model in (pair.pmod, pair.dense):
                    model.train()
                    if checkpointing:
                        checkpoint(model, True)
                if not new:
                    take_turns(contenders(pair), 1, measure)
                return take_turns(contenders(pair), rounds(session, 3), measure)
            finally:
                for model in (pair.pmod, pair.dense):
                    checkpoint(model, False)
                    model.eval()
                free_memory()

        text = f"b = {batch}, {'checkpointing' if checkpointing else 'no checkpointing'}"
        yield text + (", a new length each step" if new else ""), case


def checkpoint(model: Any, on: bool) -> None:
    """Gradient checkpointing, under the name that transformers has for it."""
    verb = "enable" if on else "disable"
    switch = getattr(model, f"activation_checkpointing_{verb}", None)
    (switch or getattr(model, f"gradient_checkpointing_{verb}"))()


def kernels(session: Session) -> Iterator[Case]:
    """Each fused kernel of a Mixture-of-Depths layer beside its PyTorch reference, half of the vision tokens kept."""
    for name, *calls in kernel_calls(session):

        def case(calls: list[Callable[[], Any]] = calls) -> dict[str, Any]:
            names = ("kernel_us", "reference_us")
            return {
                name: microseconds(call, session.device) for name, call in zip(names, calls, strict=False)
            }

        yield name, case


def kernel_calls(session: Session) -> Iterator[tuple[Any, ...]]:
    """Name, call and reference call of each kernel at the prompts' sizes (LLaVA-1.5, NeXT)."""
    width, dtype = (4096, torch.bfloat16) if session.device.type == "cuda" else (64, torch.float32)
    for batch, vision in ((1, 576), (8, 576), (1, 2928)):
        tokens = vision + 35
        with torch.device(session.device):
            hidden = torch.randn(batch, tokens, width, dtype=dtype)
            weight, norm = torch.randn(1, width, dtype=dtype), torch.ones(width, dtype=dtype)
            target = (torch.arange(tokens) < vision).expand(batch, -1).contiguous()
            cos, sin = torch.randn(2, 1, tokens, 128, dtype=dtype).unbind()
            rank, lengths = spread_rank(target)[0], torch.full((batch,), vision // 2 + 35, dtype=torch.int32)
        slots = vision // 2 + 35
        routed = (hidden, weight, None, target, None, rank)
        _, weights, keys, passed = route.route(*routed, norm="tanh", offset=1.0, scale=0.2)
        chosen = (keys, lengths, slots)
        gathered = (hidden, select.select(*chosen), norm, 1e-5, cos, sin)
        kept = gather.gather(*gathered)[0]
        back = (passed, kept, kept, weights, gathered[1], lengths)
        label = f"b = {batch}, {tokens} tokens"
        yield (
            f"route, {label}",
            partial(route.route, *routed, norm="tanh", offset=1.0, scale=0.2),
            partial(route.reference, *routed, norm=0, offset=1.0, scale=0.2),
        )
        others: Any = (
            (select, "select", chosen),
            (gather, "gather", gathered),
            (add_norm, "add_norm", (kept, kept, norm, 1e-5)),
            (scatter, "scatter", back),
        )
        for module, name, arguments in others:
            kernel, reference = getattr(module, name), module.reference
            yield f"{name}, {label}", partial(kernel, *arguments), partial(reference, *arguments)


def microseconds(call: Callable[[], Any], device: torch.device, repeats: int = 50) -> float:
    """Median time of one call: by CUDA events on a GPU, by the clock on a CPU."""
    with torch.inference_mode():
        for _ in range(5):
            call()
        if device.type != "cuda":
            return 1e6 * statistics.median(seconds(call, device) for _ in range(repeats))
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in marks:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return 1e3 * statistics.median(start.elapsed_time(end) for start, end in marks)


def trace(session: Session) -> Iterator[Case]:
    """What torch.profiler counts in one prefill and in one decode step, b = 1."""
    for name in (LLAVA, NEXT):

        def case(name: str = name) -> dict[str, Any]:
            pair = warm_up(session, name)
            inputs = pair.inputs(1)
            result: dict[str, Any] = {}
            for rival in contenders(pair)[:2]:
                state = prefill(rival.model, inputs)
                result[rival.name] = {
                    "prefill": recorded(partial(prefill, rival.model, inputs), session.device),
                    "decode_step": recorded(partial(decode, rival.model, state, 1), session.device),
                }
            return result

        yield label(name, 1), case


def compiled(session: Session) -> Iterator[Case]:
    """Both language models under ``torch.compile``: what it takes, a warm prefill and a decode step, b = 1."""
    pair = session.pair(LLAVA)

    def case() -> dict[str, Any]:
        inputs, count = pair.inputs(1), session.sizes.decode_tokens
        torch._dynamo.config.recompile_limit = 16
        first_seconds: dict[str, float] = {}
        rivals = contenders(pair)[:2]
        decoders = [rival.model.model.language_model for rival in rivals]
        # The tiny models are compiled to Python: there may be no compiler.
        backend = "eager" if session.tiny else "inductor"

        def measure(rival: Contender) -> dict[str, float]:
            prefill_ms, decode_ms = prompt_and_decode(session, rival, inputs, count)
            return {"prefill_ms": prefill_ms, "decode_ms": decode_ms}

        try:
            for rival, decoder in zip(rivals, decoders, strict=True):
                decoder.compile(dynamic=True, backend=backend)
                first_seconds[rival.name] = sum(measure(rival).values()) / 1e3
            take_turns(rivals, 1, measure)
            return take_turns(rivals, rounds(session, 3), measure) | {"first_seconds": first_seconds}
        finally:
            for decoder in decoders:
                decoder._compiled_call_impl = None

    yield label(LLAVA, 1), case


def rounds(session: Session, most: int) -> int:
    """How often to measure."""
    return min(most, session.sizes.repeats)


def label(name: str, batch: int) -> str:
    """Of a case: the geometry and the batch."""
    return f"{'LLaVA-1.5' if name == LLAVA else 'LLaVA-NeXT'}, b = {batch}"


CASES: dict[str, Callable[[Session], Iterator[Case]]] = {
    "cold": cold,
    "prefill": warm_prefill,
    "decode": decoding,
    "static": static,
    "throughput": throughput,
    "train": train,
    "kernels": kernels,
    "trace": trace,
    "compile": compiled,
}
