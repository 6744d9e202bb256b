"""The log of calls in order, and the rules for a step."""

import json
import os
import zlib

FLOAT32_STEP = ["zero_grad", "backward", "optimizer_step"]
AMP_STEP = ["zero_grad", "scale", "backward", "scaler.step", "scaler.update", "unlazy"]


class ContractViolation(AssertionError):
    """Raised where a program departs from the vendor's training loop; the message says how."""


class Log:
    """The calls in order, and the step being recorded, from one flush to the next.

    Attributes:
        calls: all calls so far, as ``(name, details)``.
        num_graphs: graphs compiled and run, including those forced by a read.
        num_graph_breaks: reads of values that were not requested as outputs of their step.
        is_strict: raise ``ContractViolation`` where a rule is broken; if False, only log it.
        step_number: number of the step being recorded.
    """

    def __init__(self):
        self.calls = []
        self.num_graphs = self.num_graph_breaks = self.step_number = 0
        self.is_strict = True
        self.is_training = False  # a forward pass with gradients has been recorded since the last flush
        self.step = []  # the calls of the current step so far
        self.graph = []  # the operations since the last flush, each with its constants
        self.scaled_loss = None
        self.tf32_at_import = None
        self._file = os.environ.get("VGGLAB_DOUBLE_LOG")

    def call(self, name, **details):
        self.calls.append((name, details))
        if self._file:
            with open(self._file, "a") as file:
                file.write(json.dumps({"rank": int(os.environ.get("RANK", 0)), "call": name, **details}) + "\n")

    def record_step_call(self, name, **details):
        self.call(name, **details)
        if name in self.step:
            self.violation(
                f"a second {name} before the flush: the previous step never ran, so the weights did not change"
            )
        self.step.append(name)

    def violation(self, text):
        self.call("violation", text=text)
        if self.is_strict:
            raise ContractViolation(text)

    def graph_break(self, text):
        self.num_graph_breaks += 1
        self.num_graphs += 1
        self.call("graph_break", text=text)
        if self.is_strict:
            raise ContractViolation(text)

    def flush(self, name):
        """Run one graph. Raises ContractViolation if the training step differs from the vendor's."""
        self.num_graphs += 1
        if os.environ.get("ENFLAME_ENABLE_TF32") != self.tf32_at_import:
            self.violation("ENFLAME_ENABLE_TF32 was changed after torch_gcu was imported")
        if self.is_training or self.step:
            self.step.append(name)
            if self.step not in (FLOAT32_STEP, AMP_STEP):
                self.violation(f"the step was {self.step}; the vendor's loop has {FLOAT32_STEP} or {AMP_STEP}")
        self.call(name, graph=zlib.crc32(repr(self.graph).encode()))  # the card compiles each new graph
        self.is_training, self.step, self.graph, self.scaled_loss = False, [], [], None
        self.step_number += 1

    def count(self, name):
        """Return the number of calls with this name."""
        return sum(called == name for called, _ in self.calls)


log = Log()
