"""A step's forward and backward as one CUDA graph: recorded once, then started whole.

A UNet's step is some five thousand small kernels. Started one by one by Python they take 120 ms of an H200 at batch 1, which computes for
30; replayed as a graph they take what the card needs (tests/benchmarks/throughput.py --device cuda).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from sdclr.config.schema import RunConfig
from sdclr.engine import processes
from sdclr.engine.loop import AddGradients
from sdclr.errors import first_line
from sdclr.report import console

WARM_UP = 3
"""Steps before the recording, in which kernels are chosen and workspaces allocated (as torch's make_graphed_callables)."""


def wanted(config: RunConfig, device: torch.device, precision: str) -> bool:
    """Whether a run's step is recorded: by one process on an NVIDIA GPU, where nothing in it is for Python to decide on (an update
    inside the backward, fp16's loss scale), and all pictures are of one shape."""
    decided = config.model.compile == "off" or config.optimizer.fused_backward or precision == "fp16"
    decided = decided or config.data.aspect != "square"
    return device.type == "cuda" and processes.count() == 1 and not decided


class Graph:
    """`add_gradients`, recorded at its first call and replayed at every other; it must run the same kernels on the same shapes each time,
    draw no random numbers and wait for nothing. A micro-batch is a tree of tensors.

    The gradients of a replay lie where they were recorded, and become the parameters' own: until the next replay.
    """

    def __init__(self, add_gradients: AddGradients, parameters: Sequence[torch.nn.Parameter]):
        self.add_gradients, self.parameters = add_gradients, parameters
        self.graph: torch.cuda.CUDAGraph | None = None
        self.count, self.refused, self.adds = 1, False, False
        self.loss = torch.zeros(())
        self.inputs: Any = ()
        self.grads: list[torch.Tensor | None] = []

    def __call__(self, inputs: Any, count: int) -> torch.Tensor:
        """As `add_gradients`."""
        if self.graph is None and not self.refused:
            self._try_to_record(inputs, count)
        if self.graph is None:
            return self.add_gradients(inputs, count)
        assert count == self.count, f"recorded as one of {self.count} micro-batches, replayed as one of {count}"
        tree_map(lambda own, given: own.copy_(given, non_blocking=True), self.inputs, inputs)
        fresh = all(parameter.grad is None for parameter in self.parameters)
        if self.adds and fresh:
            torch._foreach_zero_([grad for grad in self.grads if grad is not None])
        self.graph.replay()
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        return self.loss.clone()  # the next replay writes over it

    def seconds(self, inputs: Any, count: int, repeats: int = 5) -> float:
        """How long a call takes; gradients are left as they would be before a step."""
        self(inputs, count)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            self(inputs, count)
        end.record()
        end.synchronize()
        self._forget_gradients()
        return start.elapsed_time(end) / 1000 / repeats

    def _try_to_record(self, inputs: Any, count: int) -> None:
        """Record, or be told once why not; what is wrong with the step itself shows when its kernels are started one by one."""
        stream, problem = torch.cuda.current_stream(), ""
        try:
            self._record(inputs, count)
        except RuntimeError as error:  # memory is full, or something in the step waits for the GPU
            problem = first_line(error)
        if problem:
            torch.cuda.set_stream(stream)
            self.graph, self.refused, self.inputs, self.grads = None, True, (), []
            self._forget_gradients()
            gc.collect()
            torch.cuda.empty_cache()
            console.warn(
                f"the step cannot be recorded as a CUDA graph: {problem}\n"
                "  its kernels are started one by one, which is slower (model.compile: off does not try)"
            )

    def _record(self, inputs: Any, count: int) -> None:
        self.inputs = tree_map(torch.clone, inputs)
        self.count, self.adds = count, count > 1
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._forget_gradients()
                self.add_gradients(self.inputs, count)
        torch.cuda.current_stream().wait_stream(aside)
        if not self.adds:  # with None to add to, a backward writes; else it adds to what is there
            self._forget_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            self.loss = self.add_gradients(self.inputs, count)
        self.grads = [parameter.grad for parameter in self.parameters]
        self._forget_gradients()
        self.graph = graph

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
