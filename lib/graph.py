"""A training step as one CUDA graph: the host launches a whole step at once, and the GPU never
waits for Python between its kernels.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch

from lib.command import is_out_of_memory, one_line, say


class StepGraph:
    """Runs steps of one shape as a CUDA graph.

    The first step of a shape runs without a graph: it chooses algorithms and makes constants. The
    second is captured, and from then on the graph is replayed. All give the same bits. The next
    replay overwrites what a replay returned.
    """

    def __init__(self, reason: str = ""):
        self.reason = reason  # why steps run without a graph; empty if they are captured
        self.shape = self.graph = self.inputs = self.result = None
        if reason:
            self._say_reason()

    def run(self, step: Callable, inputs: tuple[torch.Tensor, ...], shape: tuple, optimizer):
        """What `step(*inputs)` returns. Steps of the same `shape` must have inputs of the same
        sizes.
        """
        if self.reason:
            return step(*inputs)
        if shape != self.shape:
            # the memory of the last shape's graph is free again
            self.shape, self.graph, self.result = shape, None, None
            return step(*inputs)
        if self.graph is None:
            try:
                self._capture(step, inputs, optimizer)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.graph, self.reason = None, one_line(error)
                self._say_reason()
                return step(*inputs)
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value)
        self.graph.replay()
        return self.result

    def _capture(self, step: Callable, inputs: tuple[torch.Tensor, ...], optimizer) -> None:
        """Record the kernels of a step without running them."""
        self.inputs = [value.clone() for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that loads the next batch may use the GPU meanwhile
        recording = torch.cuda.graph(self.graph, capture_error_mode="thread_local")
        with capturable(optimizer), recording:
            self.result = step(*self.inputs)

    def _say_reason(self) -> None:
        say(f"note: training steps are not captured as a CUDA graph: {self.reason}")


@contextlib.contextmanager
def capturable(optimizer) -> Iterator[None]:
    """Let AdamW be captured within the block. Set outside of it, the flag makes AdamW warn."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
