"""train.py in this process with hooks around its step: they plant a fault, or note what every
module computes, or both.
"""

import contextlib
import io
import json
import re
import runpy
import sys
from dataclasses import dataclass

import torch

from lib import training
from lib.checkpoint import weights_sha256
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
        modules = dict(build_model(cfg).named_modules())
    weighted = [name for name, module in modules.items() if module._parameters]
    allowed = {"output": modules, "gradient": weighted, "draw": modules, "sample": [""]}
    match = re.fullmatch(r"(\w+):?([\w.]*)@(\d+)", text)
    if match:
        kind, layer, step = match.groups()
        if layer in allowed.get(kind, ()) and 1 <= int(step) <= num_steps:
            return Fault(kind, layer, int(step))
    form = f"output:LAYER, gradient:LAYER, draw:LAYER or sample, then @STEP of 1 to {num_steps}"
    raise BadInput(
        f"--inject {text}: it must be {form}; layers of this model are {', '.join(weighted)}"
    )


def next_float(values: torch.Tensor) -> torch.Tensor:
    """Every element moved up by one unit in the last place; the gradient passes as if nothing had
    been done.
    """
    above = torch.nextafter(values, torch.full_like(values, torch.inf))
    return values + (above - values).detach()


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
    module = model.get_submodule(fault.layer)
    if fault.kind == "gradient":
        return [next(module.parameters(recurse=False)).register_hook(next_float)]
    change = drop if fault.kind == "draw" else next_float
    # the first of its hooks: others see the change
    hook = lambda _module, _inputs, output: change(output)  # noqa: E731
    return [module.register_forward_hook(hook, prepend=True)]


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
        note("forward", name, "output", output)
        for key, buffer in module.named_buffers(recurse=False):
            note("forward", name, key, buffer)
        state = torch.cuda.get_rng_state(output.device) if output.is_cuda else torch.get_rng_state()
        # a draw over zeros leaves no other trace
        note("forward", name, "state of the generator", state)

    hooks = [module.register_forward_hook(after)]
    if not any(module.children()):  # what enters a container enters its first module too
        hooks.append(module.register_forward_pre_hook(before))
    for key, parameter in module.named_parameters(recurse=False):
        after_backward = lambda p, what=f"gradient of {key}": note("backward", name, what, p.grad)  # noqa: E731
        hooks.append(parameter.register_post_accumulate_grad_hook(after_backward))
    return hooks


class Replayed(Exception):
    """The steps that were asked for have been made."""


def train(argv: list[str], fault: Fault | None = None, window: range = range(0)) -> tuple:
    """train.py with `argv` and a fault: (its result, []), or, with a window of steps, to the end of
    that: (None, what was computed as (step, phase, module, what, SHA-256) in order)."""
    original = training.training_step
    events = []

    def step(state, batch, *rest):
        number = state.progress["num_steps"] + 1
        state.graph = None  # of a step that is replayed as a CUDA graph hooks would see nothing

        def note(phase, module, what, tensor):
            events.append((number, phase, module, what, weights_sha256({what: tensor})))

        hooks = []
        if number in window:
            for name, module in state.model.named_modules():
                hooks += watch(name, module, note)
        if fault and number == fault.step:
            hooks += plant(fault, state.model, batch)
        result = original(state, batch, *rest)
        for hook in hooks:
            hook.remove()
        if number in window:
            note("forward", "", "loss", result.loss)
            for name, parameter in state.model.named_parameters():
                note("update", name, "clipped gradient", parameter.grad)
                note("update", name, "parameter", parameter)
            if number == window[-1]:
                raise Replayed
        return result

    main = runpy.run_path(str(REPOSITORY / "train.py"))["main"].__wrapped__
    out = io.StringIO()
    log = io.StringIO() if window else sys.stderr
    training.training_step = step
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
            main(argv)
    except Replayed:
        return None, events
    finally:
        training.training_step = original
    return json.loads(out.getvalue()), events
