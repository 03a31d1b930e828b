"""A training step as one CUDA graph: the host launches a whole step at once, and the GPU never
waits for Python between its kernels.
"""

from collections.abc import Callable

import torch

from lib.command import one_line, say


class StepGraph:
    """Runs steps of one shape as a CUDA graph.

    The first step of a shape runs without a graph: it chooses algorithms and makes constants. The
    second is captured, and from then on the graph is replayed. All give the same bits. The next
    replay overwrites what a replay returned.
    """

    def __init__(self, reason: str = ""):
        self.shape = self.graph = self.inputs = self.result = None
        self.reason = ""
        if reason:
            self._give_up(reason)

    def run(self, step: Callable, inputs: tuple[torch.Tensor, ...], shape: tuple, optimizer):
        """What `step(*inputs)` returns. Steps of the same `shape` must have inputs of the same
        sizes.
        """
        if shape != self.shape:
            # the memory of the last shape's graph is free again
            self.shape, self.graph, self.result = shape, None, None
            return step(*inputs)
        if not self.graph and not self.reason:
            try:
                self._capture(step, inputs, optimizer)
            except RuntimeError as error:
                self._give_up(one_line(error))
        if self.reason:
            return step(*inputs)
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value)
        self.graph.replay()
        return self.result

    def _give_up(self, reason: str) -> None:
        """Make steps without a graph from now on, and say why."""
        self.graph, self.reason = None, reason
        say(f"note: training steps are not captured as a CUDA graph: {reason}")

    def _capture(self, step: Callable, inputs: tuple[torch.Tensor, ...], optimizer) -> None:
        """Record the kernels of a step without running them."""
        self.inputs = [value.clone() for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # AdamW warns where it has this flag outside of a capture
        groups = [group for group in optimizer.param_groups if "capturable" in group]
        # thread_local: the thread that loads the next batch may use the GPU meanwhile
        recording = torch.cuda.graph(self.graph, capture_error_mode="thread_local")
        try:
            for group in groups:
                group["capturable"] = True
            with recording:
                self.result = step(*self.inputs)
        finally:
            for group in groups:
                group["capturable"] = False
