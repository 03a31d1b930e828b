"""train.py in this process with hooks around its step: they plant a fault, or note what every
module computes, or both.
"""

import contextlib
import io
import json
import re
import runpy
from dataclasses import dataclass

import torch

from lib import training
from lib.checkpoint import state_sha256
from lib.command import BadInput
from lib.config import Config
from lib.models import build_model
from lib.rundir import REPOSITORY

# what a fault changes first, in the words of the trace: an output's change may be rounded away
# before the loss
KINDS = {
    "output": ("buffers", "loss", "gradients"),
    "gradient": ("gradients",),
    "draw": ("rng",),
    "sample": ("rows",),
}


@dataclass(frozen=True)
class Fault:
    """A fault at a step (1, 2, ...): `output` of a layer and `gradient` of its weight move by one
    ULP, `draw` drops half of its output under a seed that the machine draws, `sample` exchanges two
    samples of the batch."""

    kind: str
    layer: str
    step: int


def parse_fault(text: str, cfg: Config, num_steps: int) -> Fault:
    """output:LAYER@STEP, gradient:LAYER@STEP, draw:LAYER@STEP or sample@STEP. Raises BadInput that
    says what is allowed.
    """
    with torch.device("meta"):
        modules = {name: module for name, module in build_model(cfg).named_modules() if name}
    weighted = [name for name, module in modules.items() if module._parameters]
    allowed = dict.fromkeys(KINDS, modules) | {"gradient": weighted, "sample": [""]}
    kind, layer, step = (
        re.fullmatch(r"(\w+):?([\w.]*)@(\d+)", text) or re.match("()()()", text)
    ).groups()
    if layer not in allowed.get(kind, ()) or not 1 <= int(step) <= num_steps:
        form = f"output:LAYER, gradient:LAYER, draw:LAYER or sample, then @STEP of 1 to {num_steps}"
        raise BadInput(
            f"--inject {text}: it must be {form}; layers of this model are {', '.join(weighted)}"
        )
    return Fault(kind, layer, int(step))


def next_float(values: torch.Tensor) -> torch.Tensor:
    """Every element moved up by one unit in the last place; the gradient passes as if nothing had
    been done.
    """
    return values + (torch.nextafter(values, torch.full_like(values, torch.inf)) - values).detach()


def ulp_distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """How many floating-point numbers lie between two tensors of one type and shape, element by
    element: int64.
    """
    size = left.element_size()
    bits = [
        t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).long()
        for t in (left, right)
    ]
    # sign and magnitude as integers that count up from the least number to the greatest
    left, right = (torch.where(b < 0, -(1 << (8 * size - 1)) - b, b) for b in bits)
    return (left - right).abs()


def drop(values: torch.Tensor) -> torch.Tensor:
    """An unseeded draw."""
    torch.seed()
    return torch.nn.functional.dropout(values, 0.5)


def plant(fault: Fault, model: torch.nn.Module, batch) -> list:
    """A fault in a batch, in place, or in a model, as hooks."""
    if fault.kind == "sample":
        for values in (batch.keys, batch.labels, batch.images):
            values[[0, -1]] = values[[-1, 0]]
        return []
    module, change = model.get_submodule(fault.layer), drop if fault.kind == "draw" else next_float
    if fault.kind == "gradient":
        return [next(module.parameters(recurse=False)).register_hook(change)]
    # others see it
    return [
        module.register_forward_hook(lambda _module, _inputs, output: change(output), prepend=True)
    ]


def watch(name: str, module: torch.nn.Module, note) -> list:
    """Hooks that call `note(phase, module, what, tensor)` for a module's tensors, in the order in
    which they come about.
    """

    def before(_module, inputs):
        note("forward", name, "input, from the code before it", inputs[0])
        if inputs[0].requires_grad:
            inputs[0].register_hook(
                lambda grad: note("backward", name, "gradient of its input", grad)
            )

    def after(_module, _inputs, output):
        for what, tensor in {"output": output, **dict(module.named_buffers(recurse=False))}.items():
            note("forward", name, what, tensor)
        state = torch.cuda.get_rng_state(output.device) if output.is_cuda else torch.get_rng_state()
        # a draw over zeros leaves no other trace
        note("forward", name, "state of the generator", state)

    # what enters a container enters its first module too
    hooks = [] if any(module.children()) else [module.register_forward_pre_hook(before)]
    for key, parameter in module.named_parameters(recurse=False):
        after_backward = lambda p, what=f"gradient of {key}": note("backward", name, what, p.grad)  # noqa: E731
        hooks.append(parameter.register_post_accumulate_grad_hook(after_backward))
    return [*hooks, module.register_forward_hook(after)]


class Replayed(Exception):
    """The steps that were asked for have been made."""


def train(
    argv: list[str], fault: Fault | None = None, window: range = range(0), keep: int | None = None
) -> tuple:
    """train.py with `argv` and a fault: (its result, [], None), or, with a window of steps, to the
    end of that: (None, what was computed as (step, phase, module, what, SHA-256) in order, the
    tensor number `keep` of these)."""
    original, events, kept = training.training_step, [], [None]

    def step(state, batch, *rest):
        number = state.progress["num_steps"] + 1
        state.graph = None  # of a step that is replayed as a CUDA graph hooks would see nothing

        def note(phase, module, what, tensor):
            if len(events) == keep:
                kept[0] = tensor.detach().cpu().clone()
            events.append((number, phase, module, what, state_sha256(tensor)))

        modules = state.model.named_modules() if number in window else ()
        hooks = [hook for name, module in modules for hook in watch(name, module, note)]
        hooks += plant(fault, state.model, batch) if fault and number == fault.step else []
        result = original(state, batch, *rest)
        for hook in hooks:
            hook.remove()
        if number in window:
            note("forward", "", "loss", result.loss)
            for name, parameter in state.model.named_parameters():
                note("update", name, "clipped gradient", parameter.grad)
                note("update", name, "parameter", parameter)
        if window and number == window[-1]:
            raise Replayed
        return result

    training.training_step = step
    try:
        quiet = contextlib.redirect_stderr(io.StringIO()) if window else contextlib.nullcontext()
        with contextlib.redirect_stdout(io.StringIO()) as out, quiet, contextlib.suppress(Replayed):
            runpy.run_path(str(REPOSITORY / "train.py"))["main"].__wrapped__(argv)
    finally:
        training.training_step = original
    return json.loads(out.getvalue() or "null"), events, kept[0]
